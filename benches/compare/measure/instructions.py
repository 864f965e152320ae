"""User-mode instructions per request, counted by callgrind."""

import functools
import re

from client import Batches
from kinds import COUNTED_CONNECTIONS, RAW
from servers import serving
from tools import LOAD_CORE, Failed

TRIES = 3  # runs of a peer under callgrind
WARM_UP = 0.1  # the length of the shorter run, relative to the longer


@functools.cache
def instructions(bench, kind=RAW, name="key-service", requests=None):
    """User-mode instructions per request: two runs of different length, the difference of totals divided by that of requests."""
    many = (requests or kind.counted) // COUNTED_CONNECTIONS
    few = max(1, int(many * WARM_UP))
    counts = [count(bench, kind, name, batches) for batches in (few, many)]
    return (counts[1] - counts[0]) / (many - few) / COUNTED_CONNECTIONS


def count(bench, kind, name, batches):
    """The instructions of a server from its start to its exit, with requests of a kind. The first thread of the daemon is left out: it
    serves no keys, and at shutdown it reads /proc/net/tcp, whose length depends on the sockets of other programs."""
    counts = bench.scratch / "callgrind.out"
    callgrind = ["valgrind", "--quiet", "--tool=callgrind", "--separate-threads=yes", f"--callgrind-out-file={counts}"]
    # callgrind writes its counts when the server exits, so a peer that had to be killed is measured again.
    for _ in range(TRIES):
        for each in bench.scratch.glob(f"{counts.name}*"):
            each.unlink()
        with (
            # On the client's core and in this policy (sched(7)), the server runs when the client waits, and so finds all requests at once.
            serving(bench, kind, name, under=["chrt", "--batch", "0", *callgrind], cores=str(LOAD_CORE)) as (server, prepared),
            Batches(server, prepared, COUNTED_CONNECTIONS) as client,
        ):
            for _ in range(batches):
                client.ask()
        threads = [each for each in bench.scratch.glob(f"{counts.name}*") if (name, each.suffix) != ("key-service", ".out-01")]
        if found := [int(total) for each in threads for total in re.findall(r"^totals: (\d+)", each.read_text(), re.MULTILINE)]:
            return sum(found)
    raise Failed(f"{name}: callgrind wrote no counts in {TRIES} runs\n{server.log.read_text()[-2000:]}")

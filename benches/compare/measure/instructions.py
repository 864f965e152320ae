"""User-mode instructions per request, counted by callgrind."""

import contextlib
import functools
import re

from servers import Running
from tools import Failed

TRIES = 3  # runs of a peer under callgrind


@functools.cache
def instructions(bench, name, rates=False):
    """User-mode instructions per request: two runs of different length, the difference of totals divided by that of requests."""
    settings = {"KEYSERVICE_RATE_REQUESTS": "1000000", "KEYSERVICE_RATE_BYTES": "100000000"} if rates else {}
    few, many = (50, 250) if name == "python" else (bench.requests // 10, bench.requests)

    def total(requests):
        def ask(server):
            with server.connect() as connection:
                for _ in range(requests):
                    connection.ask()

        return count(bench, name, {"KEYSERVICE_WORKERS": "1", **settings}, ask)

    return (total(many) - total(few)) / (many - few)


def of_kind(bench, kind):
    """The daemon's instructions per request of a kind."""
    kind, settings = bench.prepared(kind)
    few, many = kind.counted // 10, kind.counted

    def total(requests):
        def ask(server):
            with contextlib.ExitStack() as stack:
                connection = None if kind.closes else stack.enter_context(server.connect(kind=kind))
                for _ in range(requests):
                    if kind.closes:
                        with server.connect(kind=kind) as connection:
                            connection.ask()
                    else:
                        connection.ask()

        return count(bench, "key-service", settings, ask)

    return (total(many) - total(few)) / (many - few)


def count(bench, name, settings, ask):
    """The instructions of a server from its start to its exit, with the requests that `ask` sends. The first thread of the daemon is
    left out: it serves no keys, and at shutdown it reads /proc/net/tcp, whose length depends on the sockets of other programs."""
    counts = bench.scratch / "callgrind.out"
    valgrind = ["valgrind", "--quiet", "--tool=callgrind", "--separate-threads=yes", f"--callgrind-out-file={counts}"]
    # callgrind writes its counts when the server exits, so a peer that had to be killed is measured again.
    for _ in range(TRIES):
        for each in bench.scratch.glob(f"{counts.name}*"):
            each.unlink()
        with Running(bench, name, under=valgrind, environment=settings, tls="KEYSERVICE_TLS_CERT" in settings) as server:
            ask(server)
        threads = [each for each in bench.scratch.glob(f"{counts.name}*") if (name, each.suffix) != ("key-service", ".out-01")]
        if found := [int(total) for each in threads for total in re.findall(r"^totals: (\d+)", each.read_text(), re.MULTILINE)]:
            return sum(found)
    raise Failed(f"{name}: callgrind wrote no counts in {TRIES} runs\n{server.log.read_text()[-2000:]}")

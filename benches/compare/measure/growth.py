"""Growth: the cost of a request and the memory of the daemon, by the number of connections, tokens, clients and trusted networks."""

import contextlib
import hashlib
import ipaddress
import random
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from client import source
from kinds import PROXY, RATES, RAW
from servers import Running
from tools import MICROSECOND, Failed, run

from measure.memory import LONG_TIMEOUTS, allow_descriptors

BATCH = 64  # connections that send at a time, so that all points have the same load
COUNTED = 640  # requests under callgrind
SETTINGS = {**LONG_TIMEOUTS, "KEYSERVICE_WORKERS": "1", "KEYSERVICE_MAX_CONNECTIONS_PER_CLIENT": "10000"}


class Load(NamedTuple):
    """Requests that are sent one after the other, and the daemon's settings for them."""

    connections: int
    requests: list
    settings: dict


class Growth(NamedTuple):
    """A number that grows."""

    of: str
    points: list
    load: Callable  # (bench, number) -> Load
    server: str = "key-service"


def with_header(header):
    return replace(RAW, headers=(*RAW.headers, header)).request


def connections(bench, number):
    return Load(number, [RAW.request], {})


def tokens(bench, number):
    """All of the tokens are used in turn."""
    texts = [f"ks_{i:064x}" for i in range(number)]
    path = bench.scratch / f"tokens-{number}"
    path.touch(0o600)
    path.write_text("".join(f"a sha256:{hashlib.sha256(text.encode()).hexdigest()}\n" for text in texts))
    return Load(BATCH, [with_header(f"Authorization: Bearer {text}") for text in texts], {"KEYSERVICE_TOKENS_FILE": str(path)})


def clients(bench, number):
    """A trusted proxy reports a client for each request, all of them in turn."""
    addresses = [ipaddress.IPv4Address("10.0.0.0") + i for i in range(number)]
    return Load(BATCH, [with_header(f"X-Forwarded-For: {address}") for address in addresses], {**PROXY, **RATES})


def networks(bench, number):
    """The trusted networks include neither each other nor the client."""
    others = [ipaddress.IPv4Address("10.0.0.0") + 512 * i for i in range(number - 1)]
    trusted = ",".join([*(f"{address}/24" for address in others), "127.0.0.0/8"])
    return Load(BATCH, [with_header("X-Forwarded-For: 203.0.113.7")], {"KEYSERVICE_TRUSTED_PROXIES": trusted, **RATES})


GROWTHS = [
    Growth("connections", [1, 10, 100, 1000, 10_000], connections),
    # What the kernel and the processor's caches take of that: this server keeps one byte for each connection.
    Growth("connections, raw loop", [1, 10, 100, 1000, 10_000], connections, "raw loop, getrandom"),
    Growth("tokens", [1, 10, 100, 1000, 10_000, 100_000], tokens),
    Growth("clients", [1, 10, 100, 1000, 10_000, 65_536], clients),
    Growth("trusted networks", [1, 10, 100, 1000], networks),
]


class Sample(NamedTuple):
    """The figures at one point."""

    instructions: float | None  # counted for the daemon only
    cpu: float  # µs
    resident: int


def growth(bench, of):
    """Pairs of a number and its Sample. Each round measures all points, because the machine may be slower in some rounds."""
    allow_descriptors()
    loads = {number: of.load(bench, number) for number in of.points}
    instructions = {number: instructions_of(bench, load) for number, load in loads.items() if of.server == "key-service"}
    rounds = [{number: cpu_and_memory(bench, load, of.server) for number, load in loads.items()} for _ in range(bench.rounds)]
    medians = {number: map(statistics.median, zip(*(found[number] for found in rounds), strict=True)) for number in of.points}
    return [(number, Sample(instructions.get(number), *medians[number])) for number in of.points]


def instructions_of(bench, load):
    """The instructions between two dumps of one run: neither the start nor the first turn of each client is included."""
    counts = bench.scratch / "growth.out"
    for each in bench.scratch.glob(f"{counts.name}*"):
        each.unlink()
    valgrind = ["valgrind", "--quiet", "--tool=callgrind", "--separate-threads=yes", f"--callgrind-out-file={counts}"]
    with (
        Running(bench, "key-service", under=valgrind, environment={**SETTINGS, **load.settings}) as server,
        connected(server, load) as take,
    ):
        dump = ["callgrind_control", "--dump", str(server.pid)]
        run(dump)
        take(COUNTED)
        run(dump)
    # The first thread serves no requests.
    threads = [each for each in bench.scratch.glob(f"{counts.name}.2-*") if each.suffix != ".2-01"]
    totals = [int(total) for each in threads for total in re.findall(r"^totals: (\d+)", each.read_text(), re.MULTILINE)]
    if not any(totals):
        raise Failed("callgrind wrote no counts")
    return sum(totals) / COUNTED


def cpu_and_memory(bench, load, name):
    with Running(bench, name, environment={**SETTINGS, **load.settings}) as server, connected(server, load) as take:
        begun = server.cpu_seconds()
        take(bench.requests)
        return (server.cpu_seconds() - begun) / bench.requests / MICROSECOND, server.resident()


@contextlib.contextmanager
def connected(server, load):
    """A function that sends a number of requests. Each connection and each request of the load has had its turn before."""
    with contextlib.ExitStack() as stack:
        # In random order: neither memory nor the kernel's tables can be read ahead.
        order = random.Random(0)
        opened = [stack.enter_context(server.connect(source(index))) for index in range(load.connections)]
        requests = list(load.requests)
        order.shuffle(opened)
        order.shuffle(requests)

        def take(number):
            for begin in range(0, number, BATCH):
                turns = range(begin, min(begin + BATCH, number))
                batch = [opened[turn % len(opened)] for turn in turns]
                for first in range(0, len(batch), len(opened)):
                    at_once = batch[first : first + len(opened)]
                    for turn, connection in enumerate(at_once, begin + first):
                        connection.request = requests[turn % len(requests)]
                        connection.send()
                    for connection in at_once:
                        connection.receive()

        take(max(len(opened), len(requests), BATCH))
        yield take

"""The rows of the benchmark, with the bar of each."""

import statistics
from dataclasses import dataclass
from typing import NamedTuple

from kinds import BARRED
from measure import tls
from measure.bulk import bulk, generation
from measure.instructions import instructions
from measure.latency import QUANTILES, SHARES, latency, latency_busy
from measure.load import load, new_connections, two_workers
from measure.memory import IDLE_CONNECTIONS, memory
from measure.start import activation, start
from measure.system_calls import system_calls
from tools import KIB, MB, MICROSECOND, MILLISECOND


class Figure(NamedTuple):
    """The result of a row."""

    value: float  # the figure that is compared with the bar
    ours: float
    peer: float | None  # the figure of the peer, if the row has one


@dataclass(frozen=True)
class Row:
    """A figure and its bar. The bar applies to the ratio to `peer` or, without a peer, to the figure itself."""

    name: str
    what: str
    unit: tuple[str, float]
    peer: str | None
    sense: str  # the side of the bar that passes: "≤" or "≥"
    bar: float
    measure: callable  # Bench -> Figure

    def is_met(self, figure):
        return figure.value <= self.bar if self.sense == "≤" else figure.value >= self.bar

    def cells(self, figure):
        name, size = self.unit
        by = "×" if self.peer else name
        return [
            self.name,
            amount(figure.ours / size, name),
            f"{self.peer} {amount(figure.peer / size, name)}" if self.peer else "–",
            f"{figure.value:.2f} ×" if self.peer else "–",
            f"{self.sense} {self.bar:g} {by}".rstrip(),
            "ok" if self.is_met(figure) else "SHORT",
        ]


INSTRUCTIONS, CALLS = ("", 1), ("", 1)
CPU, RATE, BYTES_RATE = ("µs", MICROSECOND), ("/s", 1), ("MB/s", MB)
LATENCY = ("µs", MICROSECOND)

ROWS = [
    *[
        Row(
            f"instructions-{kind.name}",
            f"user-mode instructions: {kind.what}",
            INSTRUCTIONS,
            "nginx",
            "≤",
            kind.bar,
            lambda b, kind=kind: compare_with({"key-service": [instructions(b, kind)], "nginx": [instructions(b, name="nginx")]}, "nginx"),
        )
        for kind in BARRED
    ],
    Row("cpu-nginx", "CPU time a request", CPU, "nginx", "≤", 0.95, lambda b: compare_with(load(b, "cpu"), "nginx")),
    Row(
        "cpu-raw",
        "CPU time a request",
        CPU,
        "raw loop, getrandom",
        "≤",
        1.08,
        lambda b: compare_with(load(b, "cpu"), "raw loop, getrandom"),
    ),
    Row(
        "system-calls",
        "system calls a request beyond epoll_wait",
        CALLS,
        None,
        "≤",
        3.05,
        lambda b: single(sum(n for call, n in system_calls(b, "key-service").items() if call != "epoll_wait")),
    ),
    Row(
        "waits", "epoll_wait calls a request", CALLS, None, "≤", 0.5, lambda b: single(system_calls(b, "key-service").get("epoll_wait", 0))
    ),
    Row(
        "new-connection",
        "CPU time of a request on a connection of its own",
        CPU,
        "nginx",
        "≤",
        1.0,
        lambda b: compare_with(new_connections(b), "nginx"),
    ),
    Row(
        "pipelined",
        "requests a second of CPU time, pipelined ×16",
        RATE,
        "nginx",
        "≥",
        1.0,
        lambda b: compare_with(load(b, "pipelined"), "nginx"),
    ),
    Row(
        "bulk-urandom",
        "1 GiB key, bytes a second of CPU time",
        BYTES_RATE,
        "/dev/urandom",
        "≥",
        5.0,
        lambda b: compare_with(bulk(b), "/dev/urandom"),
    ),
    Row(
        "generation",
        "streamed key that is not sent, bytes a second of CPU time",
        BYTES_RATE,
        "OpenSSL",
        "≥",
        0.65,
        lambda b: compare_with(generation(b), "OpenSSL"),
    ),
    Row("memory-idle", "resident memory before any load", ("MB", MB), None, "≤", 5.0, lambda b: single(memory(b, "key-service")[0], MB)),
    Row(
        "memory-connection",
        f"resident memory of an idle connection, at {IDLE_CONNECTIONS:,}",
        ("KiB", KIB),
        None,
        "≤",
        6.0,
        lambda b: single(memory(b, "key-service")[1], KIB),
    ),
    Row("start", "exec to READY=1", ("ms", MILLISECOND), None, "≤", 10.0, lambda b: single(start(b), MILLISECOND)),
    Row(
        "activation",
        "exec to the first byte for the client that triggered it",
        ("ms", MILLISECOND),
        None,
        "≤",
        20.0,
        lambda b: single(activation(b), MILLISECOND),
    ),
    Row(
        "two-workers",
        "CPU time a request of two workers on two cores",
        CPU,
        "two processes",
        "≤",
        1.1,
        lambda b: compare_with(two_workers(b), "two processes"),
    ),
    Row("tls-request", "CPU time a request over TLS", CPU, "nginx", "≤", 0.8, lambda b: compare_with(tls.requests(b), "nginx")),
    Row("tls-request-haproxy", "the same", CPU, "haproxy", "≤", 0.8, lambda b: compare_with(tls.requests(b), "haproxy")),
    Row(
        "tls-handshake",
        "CPU time of a TLS connection with one request",
        CPU,
        "nginx",
        "≤",
        0.8,
        lambda b: compare_with(tls.handshakes(b), "nginx"),
    ),
    Row("tls-handshake-haproxy", "the same", CPU, "haproxy", "≤", 0.8, lambda b: compare_with(tls.handshakes(b), "haproxy")),
    Row(
        "tls-hybrid",
        f"the same with {tls.HYBRID_GROUP}",
        CPU,
        "key-service, X25519",
        "≤",
        1.4,
        lambda b: compare_with(tls.handshakes(b), "key-service", ours=tls.HYBRID),
    ),
    Row(
        "tls-memory",
        f"resident memory of an idle TLS connection, at {tls.IDLE_CONNECTIONS:,}",
        ("KiB", KIB),
        "nginx",
        "≤",
        1.0,
        lambda b: compare_with(tls.memory(b), "nginx"),
    ),
    Row(
        "tls-bulk",
        "1 GiB over TLS, bytes a second of CPU time",
        BYTES_RATE,
        "nginx",
        "≥",
        0.9,
        lambda b: compare_with(tls.bulk(b), "nginx"),
    ),
    Row("binary", "size of the binary in the package", ("MB", MB), None, "≤", 6.5, lambda b: single(b.packaged.stat().st_size, MB)),
    Row("deb", "size of the package", ("MB", MB), None, "≤", 2.5, lambda b: single(b.package.stat().st_size, MB)),
    # Last, because they need a quiet machine.
    *[
        Row(
            f"latency-{share * 100:.0f}-{quantile}",
            f"{quantile} at {share:.0%} of nginx's capacity",
            LATENCY,
            "nginx",
            "≤",
            1.0,
            lambda b, figure=(share, quantile): compare_with(latency(b)[figure], "nginx"),
        )
        for share in SHARES
        for quantile in QUANTILES
    ],
    Row(
        "latency-busy",
        "p99 at 50% with 1,000 slow clients, a stream and a scraper",
        LATENCY,
        "itself, quiet",
        "≤",
        2.0,
        lambda b: compare_with(latency_busy(b)["p99"], "itself, quiet"),
    ),
]


def compare_with(samples, peer, ours="key-service"):
    """The medians of all rounds, and the median of the ratios of each round: a disturbance of a whole round affects both sides."""
    ours, theirs = samples[ours], samples[peer]
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return Figure(ratio, statistics.median(ours), statistics.median(theirs))


def single(figure, unit=1):
    return Figure(figure / unit, figure, None)


def amount(number, unit):
    """A number with three significant digits."""
    digits = 0 if number >= 100 else 1 if number >= 10 else 2
    return f"{number:,.{digits}f} {unit}".rstrip()

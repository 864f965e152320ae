"""Looks at keys that a daemon served over HTTP with three independent tools, and shows that each of them can fail.

rngtest, ent and dieharder are gates: each lets a source pass or not, by a criterion whose false-failure rate is stated
beside it. The same gates then see sources that are broken on purpose and are the same in every run; each gate must stop
exactly those that it is known to stop, and no source may get past all of them. docs/randomness.md has the table.

The calls of getrandom(2) are counted meanwhile, with the C libraries of Debian 12 and 13. With --full, there are more bytes, and
every test of dieharder: an hour or more.
"""

import array
import contextlib
import itertools
import math
import random
import re
import subprocess
import tempfile
import threading

import pytest
from support import peers, system_calls
from support.conditions import TIMEOUT, expect
from support.daemon import Daemon, binary, built

pytestmark = [pytest.mark.tools("rngtest", "ent", "dieharder")]

MIB = 1 << 20
MAX_SIZE = 1 << 30

# rngtest calls a block of 20,000 bits bad if it fails one of five FIPS 140-2 tests. Those ask for a set count of bits,
# nibbles and runs, so that a good source fails 8 blocks in 10,000; never failing is as wrong as failing often.
BAD_BLOCKS = 0.0008
# Two-sided, by the Poisson distribution of their number.
RNGTEST_P = 1e-10
# Standard deviations, for each of four figures: 2.6e-12 two-sided, if they were exactly normal.
ENT_LIMIT = 7.0
# Of two samples, both with a p-value below 1e-6 or above 1 - 1e-6: 4e-12 for each test.
DIEHARDER_P = 1e-6
# Quick ones of different kinds: spacings, ranks of binary matrices, bits, runs of bits. Of fewer samples than the 100 that
# dieharder takes by itself; fewer than 8 ranks can't give a p-value below the limit.
DIEHARDER = [["-d", "0", "-p", "40"], ["-d", "2", "-p", "8"], ["-d", "100", "-p", "40"], ["-d", "101", "-p", "40"]]
# As many bytes as the hungriest of them reads; a shorter file would be read again, which is a repetition.
SAMPLE = 40 << 20


def good(size):
    """is no worse than the Mersenne twister"""
    return random.Random(3).randbytes(size)


def biased(size):
    """sets every 64th bit"""
    mask = int.from_bytes((b"\x80" + bytes(7)) * (size // 8), "big")
    return (int.from_bytes(random.Random(1).randbytes(size), "big") | mask).to_bytes(size, "big")


def repeating(size):
    """repeats itself after 64 KiB"""
    return random.Random(2).randbytes(1 << 16) * (size >> 16)


def counter(size):
    """counts up in 64 bits"""
    words = array.array("Q", range(1 << 40, (1 << 40) + size // 8))
    words.byteswap()
    return words.tobytes()


def congruential(size):
    """is a linear congruential generator of 32 bits"""

    def step(state, _):
        return (1664525 * state + 1013904223) & 0xFFFFFFFF

    return array.array("I", itertools.accumulate(range(size // 4 - 1), step, initial=12345)).tobytes()


def linear(size):
    """is a shift register of 32 bits (xorshift32)"""

    def step(state, _):
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        return state ^ state << 5 & 0xFFFFFFFF

    return array.array("I", itertools.accumulate(range(size // 4 - 1), step, initial=2463534242)).tobytes()


def stuttering(size):
    """gives the last word of every 64 KiB twice"""
    data = bytearray(random.Random(4).randbytes(size))
    for at in range(1 << 16, size, 1 << 16):
        data[at : at + 4] = data[at - 4 : at]
    return bytes(data)


# Who stops what, exactly: a gate that stopped more would be another gate than the one that was described.
BROKEN = {
    good: set(),
    biased: {"rngtest", "ent", "dieharder"},
    repeating: {"ent", "dieharder"},
    counter: {"rngtest", "ent", "dieharder"},
    congruential: {"ent"},
    linear: {"dieharder"},
    stuttering: {"rngtest"},
}


def rngtest(sample):
    """Whether as many blocks fail the tests of FIPS 140-2 as a good source lets fail. Its exit status is 1 if one does."""
    with open(sample, "rb") as stream:
        said = subprocess.run(["rngtest"], stdin=stream, capture_output=True, text=True, check=False).stderr
    successes, failures = (int(re.search(rf"FIPS 140-2 {what}: (\d+)", said).group(1)) for what in ("successes", "failures"))
    blocks = successes + failures
    if not blocks:
        raise RuntimeError(f"rngtest read no block: {said}")
    p = min(1.0, 2 * min(poisson_at_most(failures, blocks * BAD_BLOCKS), poisson_at_least(failures, blocks * BAD_BLOCKS)))
    return p > RNGTEST_P, f"{failures} of {blocks} blocks, p = {p:.2g}"


def ent(sample):
    """Whether chi-square, mean, pi and serial correlation are within the limit of what is expected."""
    said = subprocess.run(["ent", "-t", sample], capture_output=True, text=True, check=True).stdout
    _, count, _, chi, mean, pi, correlation = map(float, said.splitlines()[1].split(","))
    spread = 2 / (9 * 255)
    quarter = math.pi / 4
    deviations = {
        # Made normal by Wilson and Hilferty's cube root.
        "chi-square": ((chi / 255) ** (1 / 3) - (1 - spread)) / math.sqrt(spread),
        "mean": (mean - 127.5) / math.sqrt((256**2 - 1) / 12 / count),
        # One point of the plane takes 6 bytes.
        "pi": (pi - math.pi) / (4 * math.sqrt(quarter * (1 - quarter) / (count // 6))),
        "correlation": correlation * math.sqrt(count),
    }
    passes = all(abs(deviation) < ENT_LIMIT for deviation in deviations.values())
    return passes, ", ".join(f"{name} {deviation:+.1f} sd" for name, deviation in deviations.items())


def dieharder(samples):
    """Whether no test fails on every one of the samples."""
    failed, figures = None, []
    for sample in samples:
        p_values = {}
        for options in DIEHARDER:
            command = ["dieharder", "-g", "201", "-f", sample, *options, "-D", "test_name", "-D", "pvalues"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found = re.findall(r"^ *(\w+)\| *([0-9.]+)$", said, re.MULTILINE)
            if not found:
                raise RuntimeError(f"dieharder {' '.join(options)} gave no p-value: {said}")
            p_values |= {name: float(p) for name, p in found}
        fails = {name for name, p in p_values.items() if min(p, 1 - p) < DIEHARDER_P}
        failed = fails if failed is None else failed & fails
        figures = figures or [f"{name} {p:.3g}" for name, p in p_values.items()]
        if not failed:
            break  # another sample could not make it worse
    return not failed, "p-values: " + ", ".join(figures)


def fed(daemon, command):
    """What a tool says, line by line and at the end, of as many bytes as it wants."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    threading.Thread(target=feed, args=(daemon, process.stdin), daemon=True).start()
    said = ""
    with peers.killed_after(process, command[0]):
        for line in process.stdout:
            said += line.decode()
        process.wait(TIMEOUT)
    return said


def feed(daemon, pipe):
    with contextlib.suppress(BrokenPipeError, ConnectionError), pipe:  # a tool that waits for more has to see an end
        while True:
            for piece in daemon.pieces(MAX_SIZE):
                pipe.write(piece)


def poisson_at_least(count, mean):
    return max(0.0, 1 - poisson_at_most(count - 1, mean)) if count <= mean else tail(count, mean, 1)


def poisson_at_most(count, mean):
    return tail(count, mean, -1) if count < mean else max(0.0, 1 - tail(count + 1, mean, 1))


def tail(count, mean, step):
    """The sum of Poisson probabilities from `count` on, away from the mean."""
    total = 0.0
    while count >= 0:
        term = math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))
        total += term
        if term <= total * 1e-17:
            break
        count += step
    return total


class Served(Daemon):
    """A daemon whose keys may be as long as they get."""

    def __init__(self, folder):
        super().__init__(folder, f"max-size = {MAX_SIZE}\n")

    def keys(self, length, count):
        """`count` keys, over one connection, 64 requests at a time."""
        request = f"GET /key/{length} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        with self.connect() as connection, connection.makefile("rb") as answers:
            for begin in range(0, count, 64):
                several = min(64, count - begin)
                connection.sendall(request * several)
                for _ in range(several):
                    head(answers, length)
                    yield exactly(answers, length)

    def pieces(self, length):
        """One key, piece by piece."""
        with self.connect() as connection, connection.makefile("rb") as answers:
            connection.sendall(f"GET /key/{length} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            head(answers, length)
            for _ in range(0, length, MIB):
                yield exactly(answers, MIB)


def head(answers, length):
    lines = list(iter(answers.readline, b"\r\n"))
    if lines[0] != b"HTTP/1.1 200 OK\r\n" or f"content-length: {length}\r\n".encode() not in lines:
        raise RuntimeError(f"expected a key of {length} bytes, found {lines}")


def exactly(answers, length):
    data = answers.read(length)
    if len(data) != length:
        raise RuntimeError(f"expected {length} bytes, found {len(data)}")
    return data


GATES = {"rngtest": rngtest, "ent": ent, "dieharder": lambda sample: dieharder([sample])}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    with Served(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((length, total // length), marks=pytest.mark.xdist_group("served"), id=f"{total // length}-keys-of-{length}")
        for length, total in [(100, 2 * MIB), (4096, 16 * MIB), (SAMPLE, SAMPLE)]
    ],
)
def keys(request, daemon):
    """Keys of each way of making them: from the kernel as they are, expanded, and in pieces."""
    with sampled(b"".join(daemon.keys(*request.param))) as sample:
        yield sample


@contextlib.contextmanager
def sampled(data):
    """A file of these bytes, which goes away."""
    with tempfile.NamedTemporaryFile(prefix="key-service-") as sample:
        sample.write(data)
        sample.flush()
        yield sample.name


@pytest.mark.parametrize("gate", ["rngtest", "ent"])
def test_served_keys_pass(gate, keys, figures):
    """the tool finds no fault with keys that were served"""
    passes, found = GATES[gate](keys)
    assert passes, found
    figures(found)


@pytest.mark.xdist_group("served")
def test_served_keys_pass_dieharder(daemon, figures):
    """dieharder finds no fault with both of two keys of 40 MiB"""
    first, second = daemon.keys(SAMPLE, 2)
    with sampled(first) as first, sampled(second) as second:
        passes, found = dieharder([first, second])
    assert passes, found
    figures(found)


@pytest.fixture(
    scope="module",
    params=[pytest.param(source, marks=pytest.mark.xdist_group(source.__name__), id=source.__name__) for source in BROKEN],
)
def source(request):
    """A source that must be stopped or not, and for each gate a file of its bytes."""
    data = request.param(SAMPLE)
    with sampled(data) as sample, sampled(data[: 8 * MIB]) as start:
        yield request.param, {"rngtest": start, "ent": sample, "dieharder": sample}  # plenty for rngtest


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_stops(gate, source, figures):
    """a gate stops the broken sources that it is known to stop, and no others"""
    source, samples = source
    # One sample will do for dieharder: a second one would be the same.
    passes, found = GATES[gate](samples[gate])
    expect(not passes, gate in BROKEN[source], f"whether {gate} stops a source that {source.__doc__}: {found}")
    figures(f"{'does not see' if passes else 'stops'} a source that {source.__doc__}: {found}")


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_can_fail(gate):
    """each gate stops one of the broken sources"""
    assert any(gate in stoppers for stoppers in BROKEN.values())


def test_no_broken_source_gets_past_all_gates():
    """no broken source gets past all gates"""
    assert all(stoppers for source, stoppers in BROKEN.items() if source is not good)


@pytest.mark.tools("strace", "mmdebstrap", "cargo")
@pytest.mark.parametrize("suite", [pytest.param(suite, marks=pytest.mark.xdist_group("traced")) for suite in ("bookworm", "trixie")])
def test_every_key_is_a_system_call(suite, tmp_path, figures):
    """every key is a system call with the C library of a Debian release"""
    loader, version = system_calls.extracted(suite)
    # $KEY_SERVICE_BIN may be static, and would not use that library.
    total, wrong = system_calls.counted(tmp_path, [*loader, built("debug")])
    assert not wrong, "; ".join(wrong)
    figures(f"{total} calls with glibc {version}")


@pytest.mark.tools("strace")
def test_every_key_is_a_system_call_as_it_was_built(tmp_path, figures):
    """every key is a system call with the C library it was built with"""
    total, wrong = system_calls.counted(tmp_path, [binary()])
    assert not wrong, "; ".join(wrong)
    figures(f"{total} calls")


@pytest.mark.hours
def test_rngtest_passes_a_million_blocks(daemon, figures):
    """rngtest passes a million blocks"""
    said = fed(daemon, ["rngtest", "-c", "1000000"])
    failures = int(re.search(r"FIPS 140-2 failures: (\d+)", said).group(1))
    # Five standard deviations around the 800 that are expected: one run in 1.7 million is outside.
    assert 659 <= failures <= 941, f"{failures} failed"
    figures(f"{failures} failed")


@pytest.mark.hours
def test_dieharder_finds_nothing_failed(daemon, figures):
    """dieharder -a finds nothing FAILED"""
    said = fed(daemon, ["dieharder", "-a", "-g", "200"])
    counts = {word: len(re.findall(rf"\b{word}\b", said)) for word in ("PASSED", "WEAK", "FAILED")}
    assert counts["PASSED"] > 100 and not counts["FAILED"], f"{counts}\n{said}"
    figures(str(counts))

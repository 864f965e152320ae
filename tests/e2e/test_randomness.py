"""Checks keys that a daemon served over HTTP with three independent tools, and verifies that each tool can fail.

The tools rngtest, ent and dieharder are gates: each accepts or rejects a source by a criterion whose false-failure rate is stated next
to it. The same gates then check deterministic sources, all but one of them broken on purpose. Each gate must reject exactly the sources
that it is known to reject, and no broken source may pass all gates. docs/randomness.md has the table.

Other tests count the calls of getrandom(2) with the C libraries of Debian 12 and 13. With --full, the tools check more bytes, and
dieharder runs all of its tests, which takes an hour or more.
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

# rngtest rejects a block of 20,000 bits that fails one of five FIPS 140-2 tests. The tests limit the counts of bits, nibbles and runs, so
# that a good source fails 8 blocks in 10,000. Too few failures are as wrong as too many.
BAD_BLOCKS = 0.0008
# Two-sided p-value of the number of bad blocks, by the Poisson distribution.
RNGTEST_P = 1e-10
# In standard deviations, for each of four statistics: 2.6e-12 two-sided if they were exactly normal.
ENT_LIMIT = 7.0
# A test fails if both of two samples have a p-value below 1e-6: at most 1e-12 for each test. Values near 1 say nothing: dieharder's
# Kolmogorov-Smirnov test computes its distance in another way than the distribution it looks it up in, so that with 8 p-values of a good
# source, 2 in 100 results are above 1 - 1e-6.
DIEHARDER_P = 1e-6
# Fast tests of different kinds: spacings, ranks of binary matrices, bits, runs of bits. They use fewer samples than dieharder's default of
# 100. With fewer than 8 samples, the rank test can't give a p-value below the limit.
DIEHARDER = [["-d", "0", "-p", "40"], ["-d", "2", "-p", "8"], ["-d", "100", "-p", "40"], ["-d", "101", "-p", "40"]]
# As many bytes as the test with the largest input reads. dieharder would read a shorter file again, which is a repetition.
SAMPLE = 40 << 20


def good(size):
    """is as good as the Mersenne twister"""
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
    """repeats the last word of every 64 KiB"""
    data = bytearray(random.Random(4).randbytes(size))
    for at in range(1 << 16, size, 1 << 16):
        data[at : at + 4] = data[at - 4 : at]
    return bytes(data)


# The gates that reject each source, exactly. A gate that rejected more would not be the gate that is described here.
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
    """Whether the number of blocks that fail the FIPS 140-2 tests fits a good source. rngtest exits with 1 if one block fails."""
    with open(sample, "rb") as stream:
        output = subprocess.run(["rngtest"], stdin=stream, capture_output=True, text=True, check=False).stderr
    successes, failures = (int(re.search(rf"FIPS 140-2 {what}: (\d+)", output).group(1)) for what in ("successes", "failures"))
    blocks = successes + failures
    if not blocks:
        raise RuntimeError(f"rngtest read no block: {output}")
    p = min(1.0, 2 * min(poisson_at_most(failures, blocks * BAD_BLOCKS), poisson_at_least(failures, blocks * BAD_BLOCKS)))
    return p > RNGTEST_P, f"{failures} of {blocks} blocks, p = {p:.2g}"


def ent(sample):
    """Whether chi-square, mean, pi and serial correlation are within ENT_LIMIT of their expected values."""
    output = subprocess.run(["ent", "-t", sample], capture_output=True, text=True, check=True).stdout
    _, count, _, chi, mean, pi, correlation = map(float, output.splitlines()[1].split(","))
    spread = 2 / (9 * 255)
    quarter = math.pi / 4
    deviations = {
        # Nearly normal after Wilson and Hilferty's cube root transformation.
        "chi-square": ((chi / 255) ** (1 / 3) - (1 - spread)) / math.sqrt(spread),
        "mean": (mean - 127.5) / math.sqrt((256**2 - 1) / 12 / count),
        # ent takes 6 bytes for each point of the plane.
        "pi": (pi - math.pi) / (4 * math.sqrt(quarter * (1 - quarter) / (count // 6))),
        "correlation": correlation * math.sqrt(count),
    }
    passes = all(abs(deviation) < ENT_LIMIT for deviation in deviations.values())
    return passes, ", ".join(f"{name} {deviation:+.1f} sd" for name, deviation in deviations.items())


def dieharder(samples):
    """Whether no test fails on all of the samples."""
    runs = [p_values(samples[0])]
    failed = failing(itertools.chain(runs, map(p_values, samples[1:])))
    return not failed, "p-values: " + ", ".join(f"{name} {p:.3g}" for name, p in runs[0].items())


def p_values(sample):
    """The p-values of some tests on a file, by the tests' names."""
    found = {}
    for options in DIEHARDER:
        command = ["dieharder", "-g", "201", "-f", sample, *options, "-D", "test_name", "-D", "pvalues"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows = re.findall(r"^ *(\w+)\| *([0-9.]+)$", output, re.MULTILINE)
        if not rows:
            raise RuntimeError(f"dieharder {' '.join(options)} gave no p-value: {output}")
        found |= {name: float(p) for name, p in rows}
    return found


def failing(runs):
    """The tests that fail in each run of dieharder, by their p-values. Ends with the run that leaves none."""
    failed = None
    for run in runs:
        fails = {name for name, p in run.items() if p < DIEHARDER_P}
        failed = fails if failed is None else failed & fails
        if not failed:
            break
    return failed


def run_tool(daemon, command):
    """The output of a tool that reads as many served bytes as it needs."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    feeder = threading.Thread(target=feed, args=(daemon, process.stdin), daemon=True)
    feeder.start()
    with peers.killed_after(process, command[0]), process.stdout:
        output = process.stdout.read().decode()
        process.wait(TIMEOUT)
    feeder.join(TIMEOUT)
    return output


def feed(daemon, pipe):
    with contextlib.suppress(BrokenPipeError, ConnectionError), pipe:  # closes the pipe, so that a tool that waits for more bytes ends
        while True:
            with contextlib.closing(daemon.chunks(MAX_SIZE)) as chunks:
                for chunk in chunks:
                    pipe.write(chunk)


def poisson_at_least(count, mean):
    return max(0.0, 1 - poisson_at_most(count - 1, mean)) if count <= mean else tail(count, mean, 1)


def poisson_at_most(count, mean):
    return tail(count, mean, -1) if count < mean else max(0.0, 1 - tail(count + 1, mean, 1))


def tail(count, mean, step):
    """The sum of the Poisson probabilities from `count` in the direction away from the mean."""
    total = 0.0
    while count >= 0:
        term = math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))
        total += term
        if term <= total * 1e-17:
            break
        count += step
    return total


class Served(Daemon):
    """A daemon with the largest max-size."""

    def __init__(self, directory):
        super().__init__(directory, f"max-size = {MAX_SIZE}\n")

    def keys(self, length, count):
        """`count` keys over one connection, 64 pipelined requests at a time."""
        request = f"GET /key/{length} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        with self.connect() as connection, connection.makefile("rb") as responses:
            for begin in range(0, count, 64):
                batch = min(64, count - begin)
                connection.sendall(request * batch)
                for _ in range(batch):
                    read_headers(responses, length)
                    yield read_exactly(responses, length)

    def chunks(self, length):
        """One key, in chunks of 1 MiB."""
        with self.connect() as connection, connection.makefile("rb") as responses:
            connection.sendall(f"GET /key/{length} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            read_headers(responses, length)
            for _ in range(0, length, MIB):
                yield read_exactly(responses, MIB)


def read_headers(responses, length):
    lines = list(iter(responses.readline, b"\r\n"))
    if lines[0] != b"HTTP/1.1 200 OK\r\n" or f"content-length: {length}\r\n".encode() not in lines:
        raise RuntimeError(f"expected a key of {length} bytes, found {lines}")


def read_exactly(responses, length):
    data = responses.read(length)
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
    """Keys from each way of generating them: directly from the kernel, expanded, and streamed."""
    with sample_file(b"".join(daemon.keys(*request.param))) as sample:
        yield sample


@contextlib.contextmanager
def sample_file(data):
    """A temporary file with these bytes."""
    with tempfile.NamedTemporaryFile(prefix="key-service-") as sample:
        sample.write(data)
        sample.flush()
        yield sample.name


@pytest.mark.parametrize("gate", ["rngtest", "ent"])
def test_served_keys_pass(gate, keys, figures):
    """rngtest and ent accept served keys"""
    passes, found = GATES[gate](keys)
    assert passes, found
    figures(found)


@pytest.mark.xdist_group("served")
def test_served_keys_pass_dieharder(daemon, figures):
    """no test of dieharder fails on both of two keys of 40 MiB"""
    first, second = daemon.keys(SAMPLE, 2)
    with sample_file(first) as first, sample_file(second) as second:
        passes, found = dieharder([first, second])
    assert passes, found
    figures(found)


@pytest.fixture(
    scope="module",
    params=[pytest.param(source, marks=pytest.mark.xdist_group(source.__name__), id=source.__name__) for source in BROKEN],
)
def source(request):
    """A source, and for each gate a file of its bytes."""
    data = request.param(SAMPLE)
    with sample_file(data) as sample, sample_file(data[: 8 * MIB]) as start:
        yield request.param, {"rngtest": start, "ent": sample, "dieharder": sample}  # enough for rngtest


@pytest.mark.parametrize("gate", GATES)
def test_gate_rejects_the_sources_it_should(gate, source, figures):
    """a gate rejects the broken sources that it is known to reject, and no others"""
    source, samples = source
    # One sample is enough for dieharder, because a second one would be identical.
    passes, found = GATES[gate](samples[gate])
    expect(not passes, gate in BROKEN[source], f"whether {gate} rejects a source that {source.__doc__}: {found}")
    figures(f"{'accepts' if passes else 'rejects'} a source that {source.__doc__}: {found}")


@pytest.mark.parametrize("gate", GATES)
def test_each_gate_rejects_a_source(gate):
    """each gate rejects at least one broken source"""
    assert any(gate in rejecting for rejecting in BROKEN.values())


def test_each_broken_source_is_rejected():
    """at least one gate rejects each broken source"""
    assert all(rejecting for source, rejecting in BROKEN.items() if source is not good)


@pytest.mark.tools("strace", "mmdebstrap", "cargo")
@pytest.mark.parametrize("suite", [pytest.param(suite, marks=pytest.mark.xdist_group("traced")) for suite in ("bookworm", "trixie")])
def test_every_key_is_a_system_call(suite, tmp_path, figures):
    """every key takes a system call, with the C library of a Debian release"""
    loader, version = system_calls.extracted(suite)
    # Not $KEY_SERVICE_BIN, which may be static and would not use this library.
    total, wrong = system_calls.counted(tmp_path, [*loader, built("debug")])
    assert not wrong, "; ".join(wrong)
    figures(f"{total} calls with glibc {version}")


@pytest.mark.tools("strace")
def test_every_key_is_a_system_call_with_its_own_libc(tmp_path, figures):
    """every key takes a system call, with the C library of the binary under test"""
    total, wrong = system_calls.counted(tmp_path, [binary()])
    assert not wrong, "; ".join(wrong)
    figures(f"{total} calls")


@pytest.mark.hours
@pytest.mark.timeout(0)
def test_rngtest_accepts_a_million_blocks(daemon, figures):
    """rngtest accepts a million blocks"""
    output = run_tool(daemon, ["rngtest", "-c", "1000000"])
    failures = int(re.search(r"FIPS 140-2 failures: (\d+)", output).group(1))
    # The expected 800, plus or minus seven standard deviations: 5e-12 by the Poisson distribution.
    assert 600 <= failures <= 1000, f"{failures} failed"
    figures(f"{failures} failed")


@pytest.mark.hours
@pytest.mark.timeout(0)
def test_dieharder_accepts_all_tests(daemon, figures):
    """no row of dieharder -a has a p-value below 1e-6, or it does not in a second run"""
    outputs = []

    def run():
        outputs.append(run_tool(daemon, ["dieharder", "-a", "-g", "200"]))
        rows = re.findall(r"\| *([0-9.]+)\| *(?:PASSED|WEAK|FAILED)", outputs[-1])
        assert len(rows) > 100, outputs
        return {row: float(p) for row, p in enumerate(rows)}

    assert not failing(run() for _ in range(2)), outputs  # 1e-12 for each of about 107 rows
    figures(f"{outputs[0].count('PASSED')} p-values passed")

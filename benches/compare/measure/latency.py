"""Latency under open-loop load: requests are sent at scheduled times, whatever the responses do (floor/src/bin/open-loop)."""

import collections
import functools
import json
import subprocess
import sys
from pathlib import Path

from kinds import CONNECTIONS, RAW
from servers import Running
from tools import LOAD_CORE, MICROSECOND, Failed, run

from measure.bulk import BULK
from measure.load import under_wrk

SHARES = [0.5, 0.8]  # of nginx's capacity
QUANTILES = ["p50", "p99", "p99.9"]
SERVERS = ["key-service", "nginx", "haproxy", "bare hyper"]
SETTINGS = {"KEYSERVICE_WORKERS": "1", "KEYSERVICE_MAX_SIZE": str(BULK)}
SLOW_CLIENTS = 1000
TRIES = 3  # of a measurement that other programs disturb
# How long the server may wait for its core: for each of its turns there (1 to 2 µs if no other program shares the core, hundreds if one
# does), and as a part of the time, because a server that never sleeps has few turns.
WAIT_MAX, WAIT_SHARE_MAX = 3 * MICROSECOND, 0.001
# With a stream the worker never sleeps, and the thread that serves the scraper waits for the same core: 2 % of the time.
WAIT_SHARE_BUSY_MAX = 0.03
# How late the load may be, as a part of the latency: beyond that, the latency would be that of the load and not of the server.
LATE_MAX = 0.75


class Disturbed(Exception):
    """Other programs took a core from the server or the load."""


@functools.cache
def latency(bench):
    """For each share of nginx's capacity with a quantile, and each server, the latencies of the rounds in seconds."""
    return undisturbed_rounds(bench, servers_in_turn)


@functools.cache
def latency_busy(bench):
    """For each quantile, the daemon's latencies at half of nginx's capacity: "key-service" while other clients are active, too, and
    "itself, quiet" without them."""
    return undisturbed_rounds(bench, quiet_and_busy)


def undisturbed_rounds(bench, measure):
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    reasons = []
    for _ in range(bench.rounds):
        try:
            for figure, name, seconds in list(measure(bench)):
                found[figure][name].append(seconds)
        except Disturbed as reason:
            reasons.append(reason)
    if reasons:
        print(f"latency: {len(reasons)} of {bench.rounds} rounds are left out: {reasons[-1]}", file=sys.stderr, flush=True)
    if not found:
        raise Failed(f"other programs disturbed every round: {reasons[-1]}")
    return found


def servers_in_turn(bench):
    capacity = nginx_capacity(bench)
    for share in SHARES:
        for name in SERVERS:
            with Running(bench, name, environment=SETTINGS) as server:
                for quantile, seconds in under_open_loop(bench, server, share * capacity).items():
                    yield (share, quantile), name, seconds


def quiet_and_busy(bench):
    rate = nginx_capacity(bench) / 2
    for name in ("itself, quiet", "key-service"):
        with Running(bench, "key-service", environment=SETTINGS) as server:
            host, port = server.metrics
            others = [] if name != "key-service" else [f"slow={SLOW_CLIENTS}", f"stream=/key/{BULK}", f"scrape={host}:{port}"]
            for quantile, seconds in under_open_loop(bench, server, rate, others).items():
                yield quantile, name, seconds


def nginx_capacity(bench):
    """Requests per second that nginx can answer, from its CPU time: the rate would also depend on what else runs on its core."""
    with Running(bench, "nginx") as server:
        return 1 / under_wrk(bench, server, "keep-alive")["cpu"]


def under_open_loop(bench, server, rate, others=()):
    """The latency of each quantile in seconds, at this rate and while the others are active."""
    host, port = server.address
    with server.connect() as connection:  # waits for the server, warms it up and checks its responses
        for _ in range(1000):
            connection.ask()
    load = [bench.open_loop, f"{host}:{port}", RAW.path, RAW.length, CONNECTIONS, rate, bench.seconds, *others]
    for _ in range(TRIES):
        before = core_waits(server)
        try:
            output = run(["taskset", "-c", str(LOAD_CORE), *map(str, load)])
        except subprocess.CalledProcessError as error:
            output, failure = None, error.stderr
        seconds, turns = (after - then for after, then in zip(core_waits(server), before, strict=True))
        share = WAIT_SHARE_BUSY_MAX if others else WAIT_SHARE_MAX
        if seconds > turns * WAIT_MAX + bench.seconds * share:
            reason = f"{server.name} waited for its core for {seconds:.3f} s in {turns} turns"
        elif output is None:
            raise Failed(f"{server.name}: {failure}")
        else:
            sample = json.loads(output)
            latency, late = sample["latency"], sample["late"]
            if late["p99"] <= LATE_MAX * latency["p99"]:
                return {quantile: latency[quantile] for quantile in QUANTILES}
            reason = f"the load was late by {late['p99'] / MICROSECOND:.0f} µs (p99)"
    raise Disturbed(reason)


def core_waits(server):
    """How long all threads of the server waited for their core when they could run, and how often one got it (proc_pid_schedstat)."""
    seconds = turns = 0
    for path in Path(f"/proc/{server.pid}/task").glob("*/schedstat"):
        _, waited, count = map(int, path.read_text().split())
        seconds, turns = seconds + waited / 1e9, turns + count
    return seconds, turns

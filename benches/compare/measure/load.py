"""CPU time, rate and memory under load: by wrk, or for a kind of request by the client of this benchmark."""

import contextlib
import functools
import os
import re
import statistics
from dataclasses import replace

from client import Batches
from kinds import CONNECTIONS, COUNTED_CONNECTIONS, RAW
from servers import MAIN_SERVERS, SERVERS, Running, listening, serving
from tools import LOAD_CORE, MICROSECOND, SERVER_CORE, Failed, run

from measure.bulk import BULK

REQUESTS_MIN = 100  # with fewer, the measurement fails
TURN, TURNS = 320, 100  # requests to one server before those to the next, and how often


def load(bench, figure):
    """For each server, one figure per round under wrk. "cpu" is CPU seconds per request, "rate" requests per second, "resident"
    resident bytes, "new connection" CPU seconds per request on new connections, "pipelined" requests per second of CPU time."""
    if figure == "new connection":
        return loads(bench, "cpu", figure)
    if figure == "pipelined":  # per CPU time, because wrk can be the slower side
        return {name: [1 / cpu for cpu in cpus] for name, cpus in loads(bench, "cpu", figure).items()}
    return loads(bench, figure, "keep-alive")


def loads(bench, figure, connections):
    return {name: [sample[figure] for sample in each] for name, each in samples(bench, connections).items()}


@functools.cache
def samples(bench, connections):
    names = list(SERVERS) if connections == "keep-alive" else MAIN_SERVERS
    found = {name: [] for name in names}
    for _ in range(bench.rounds):
        for name in names:
            with Running(bench, name, environment={"KEYSERVICE_WORKERS": "1"}) as server:
                found[name].append(under_wrk(bench, server, connections))
    return found


@functools.cache
def new_connections(bench):
    """CPU seconds per request on new connections, for the daemon and nginx."""
    with contextlib.ExitStack() as stack:
        names = ["key-service", "nginx"]
        servers = {name: [stack.enter_context(Running(bench, name, environment={"KEYSERVICE_WORKERS": "1"}))] for name in names}
        return in_turn(bench, servers, replace(RAW, closes=True), COUNTED_CONNECTIONS)


@functools.cache
def two_workers(bench):
    """CPU seconds per request of two workers on two cores, and of two processes with one worker each that share only the listening
    socket. The client runs on the same cores."""
    both = (SERVER_CORE, LOAD_CORE)
    layouts = {"key-service": [both], "two processes": [(core,) for core in both]}
    os.sched_setaffinity(0, both)
    try:
        with contextlib.ExitStack() as stack:
            servers = {}
            for name, processes in layouts.items():
                listener = stack.enter_context(listening())
                # Duplicate all before the first start: Python's dup() makes the socket blocking, also for a running server that has
                # made it non-blocking, and that would then block in accept(2).
                listeners = [listener.dup() for _ in processes]
                servers[name] = [
                    stack.enter_context(
                        Running(
                            bench,
                            "key-service",
                            cores=",".join(map(str, cores)),
                            listener=inherited,
                            environment={"KEYSERVICE_WORKERS": str(len(cores))},
                        )
                    )
                    for inherited, cores in zip(listeners, processes, strict=True)
                ]
            return in_turn(bench, servers, RAW, CONNECTIONS)
    finally:
        os.sched_setaffinity(0, {LOAD_CORE})


def in_turn(bench, servers, kind, connections):
    """CPU seconds per request, in each turn, for servers that each have one or more processes. All run all the time and are measured
    in turn, for some 10 ms each: between two runs of seconds, the machine's speed changes by more than the servers differ."""
    found = {name: [] for name in servers}
    batches = TURN // connections

    def spent(processes):
        return sum(each.cpu_seconds() for each in processes)

    for _ in range(TURNS):
        for name, processes in servers.items():
            # New connections each time, because chance decides which worker accepts how many.
            with Batches(processes[0], kind, connections) as client:
                client.ask()
                cpu = spent(processes)
                for _ in range(batches):
                    client.ask()
                found[name].append((spent(processes) - cpu) / batches / connections)
    return found


def curves(bench, names, points, options):
    """For each server, pairs of a point and the CPU µs per request at this point, as the median of the rounds. `options` returns the
    options of under_wrk for a point."""
    settings = {
        "KEYSERVICE_WORKERS": "1",
        "KEYSERVICE_MAX_SIZE": str(BULK),
        "KEYSERVICE_MAX_CONNECTIONS_PER_CLIENT": "100000",  # wrk has one address
    }
    found = {name: [] for name in names}
    for point in points:
        costs = {name: [] for name in names}
        for _ in range(bench.rounds):
            for name in names:
                with Running(bench, name, environment=settings) as server:
                    costs[name].append(under_wrk(bench, server, "keep-alive", **options(point))["cpu"] / MICROSECOND)
        for name in names:
            found[name].append((point, statistics.median(costs[name])))
    return found


def under_wrk(bench, server, kind, path="/key/32", connections=CONNECTIONS):
    """The cost of a request for the server, under one wrk on the other core."""
    with server.connect() as connection:  # warms up the server and checks its responses
        for _ in range(1000):
            connection.ask()
    options = ["-H", "Connection: close"] if kind == "new connection" else []
    if kind == "pipelined":
        script = bench.scratch / "pipelined.lua"
        script.write_text("init = function() batch = string.rep(wrk.format(), 16) end\nrequest = function() return batch end\n")
        options = ["-s", script]
    cpu = server.cpu_seconds()
    # A slow response on a busy machine is not an error, hence the timeout.
    output = run(["wrk", "-t1", f"-c{connections}", f"-d{bench.seconds}s", "--timeout", "60s", *options, f"{server.origin}{path}"])
    cpu = server.cpu_seconds() - cpu
    if "Non-2xx" in output or "Socket errors" in output:
        raise Failed(f"{server.name} did not answer every request:\n{output}")
    count, seconds = re.search(r"(\d+) requests in ([\d.]+)s", output).groups()
    if int(count) < REQUESTS_MIN:
        raise Failed(f"{count} requests are too few for a measurement: is the machine busy?")
    return {"cpu": cpu / int(count), "rate": int(count) / float(seconds), "resident": server.resident()}


def of_kind(bench, kind):
    """For each round, CPU seconds per request of this kind and of the first kind, measured one right after the other."""
    found = {"key-service": [], "the first": []}
    for _ in range(bench.rounds):
        for name, each in [("the first", RAW), ("key-service", kind)]:
            with serving(bench, each) as (server, prepared):
                found[name].append(in_batches(server, prepared))
    return found


def in_batches(server, kind):
    """CPU seconds per request, with many connections ready at a time, as under load. The number of requests is fixed and not the
    time, so that a busy machine only makes the measurement longer."""
    batches = kind.requests // kind.connections
    with Batches(server, kind, kind.connections) as client:
        client.ask()  # the warm-up
        begun = server.cpu_seconds()
        for _ in range(batches):
            client.ask()
        return (server.cpu_seconds() - begun) / batches / kind.connections

"""Memory before any load, and of idle connections."""

import functools
import re
import resource
from dataclasses import replace
from pathlib import Path

from client import source
from kinds import RAW
from servers import Running
from tools import KIB, Failed

IDLE_CONNECTIONS = 10_000
# On a busy machine, the first connections would be closed before the last is open.
LONG_TIMEOUTS = {"KEYSERVICE_HEAD_TIMEOUT": "3600", "KEYSERVICE_IDLE_TIMEOUT": "3600"}


@functools.cache
def memory(bench, name):
    """The resident bytes before any load, and those that each of many idle keep-alive connections adds."""
    allow_descriptors()
    with Running(bench, name, environment=LONG_TIMEOUTS) as server:
        own, before, connections = connect_idle(server)
        for connection in connections:
            connection.close()
    return before, own


def of_idle(bench, tls):
    """The resident bytes that each of many idle connections adds, and the kernel memory for one end of it."""
    kind, settings = bench.prepared(replace(RAW, tls=tls))

    def slab():
        return int(re.search(r"^SUnreclaim:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)[1]) * KIB

    allow_descriptors()
    before = slab()
    with Running(bench, "key-service", environment={**LONG_TIMEOUTS, **settings}, tls=bool(tls)) as server:
        own, _, connections = connect_idle(server, kind)
        kernel = (slab() - before) / IDLE_CONNECTIONS / 2  # both ends of each connection are on this machine
        for connection in connections:
            connection.close()
    return own, kernel


def connect_idle(server, kind=None, number=IDLE_CONNECTIONS):
    """The resident bytes that each of many idle keep-alive connections adds, those before any load, and the connections."""
    with server.connect(kind=kind) as connection:
        connection.ask()
    before = server.resident()
    connections = []
    for index in range(number):
        connections.append(server.connect(source(index), kind))
        connections[-1].ask()
    return (server.resident() - before) / number, before, connections


def allow_descriptors():
    """Raises the limit of open files, for the idle connections."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit < IDLE_CONNECTIONS + 100:
        raise Failed(
            f"expected a hard limit of at least {IDLE_CONNECTIONS + 100} open files for {IDLE_CONNECTIONS} connections, found {limit}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

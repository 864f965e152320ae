"""The rate of one large key."""

import functools
import os
import time

from servers import Running
from tools import LOAD_CORE, SERVER_CORE, Failed, run

BULK = 1 << 30


@functools.cache
def bulk(bench):
    """Bytes per second of CPU time of the daemon, of the daemon's server code and bare hyper sending zeros, and of a plain read of
    /dev/urandom."""
    servers = {"key-service": "key-service", "own server, zeros": "zeros", "bare hyper, zeros": "bare hyper"}
    rates = {key: [] for key in [*servers, "/dev/urandom"]}
    settings = {"KEYSERVICE_WORKERS": "1", "KEYSERVICE_MAX_SIZE": str(BULK)}
    for _ in range(bench.rounds):
        for key, name in servers.items():
            with Running(bench, name, environment=settings) as server:
                cpu = server.cpu_seconds()
                download(f"{server.origin}/key/{BULK}")
                rates[key].append(BULK / (server.cpu_seconds() - cpu))
        rates["/dev/urandom"].append(read_urandom(BULK // 4))
    return rates


def download(url):
    """Downloads a key of BULK bytes with curl, and checks its size."""
    size = run(["curl", "-sS", "--fail", "-o", os.devnull, "-w", "%{size_download}", url])
    if int(size) != BULK:
        raise Failed(f"expected {BULK} bytes, found {size}")


def read_urandom(size):
    """The bytes per second of CPU time that a read of /dev/urandom gives on the server's core."""
    os.sched_setaffinity(0, {SERVER_CORE})
    try:
        buffer = bytearray(1 << 20)
        begun = time.thread_time()
        with open("/dev/urandom", "rb", buffering=0) as source:
            left = size
            while left > 0:
                left -= source.readinto(buffer)
        return size / (time.thread_time() - begun)
    finally:
        os.sched_setaffinity(0, {LOAD_CORE})

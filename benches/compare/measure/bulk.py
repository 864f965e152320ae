"""The rate of one large key."""

import functools
import os
import re
import resource
import subprocess
import time

from servers import Running
from tools import LOAD_CORE, SERVER_CORE, Failed, run

BULK = 1 << 30


@functools.cache
def bulk(bench):
    """Bytes per second of CPU time of the daemon, of bare hyper sending zeros, and of a plain read of /dev/urandom."""
    servers = {"key-service": "key-service", "bare hyper, zeros": "bare hyper"}
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


@functools.cache
def generation(bench):
    """Bytes per second of CPU time of generating a streamed key without sending it, and of OpenSSL's AES-256-CTR. Neither depends on a
    client or on the kernel's copies."""
    rates = {"key-service": [], "OpenSSL": []}
    for _ in range(bench.rounds):
        cpu, _ = cpu_of([bench.stream, str(4 * BULK)])
        rates["key-service"].append(4 * BULK / cpu)
        cpu, output = cpu_of(["openssl", "speed", "-seconds", "1", "-bytes", "65536", "-evp", "aes-256-ctr"])
        rates["OpenSSL"].append(65536 * int(re.search(r"(\d+) AES-256-CTR's in", output)[1]) / cpu)
    return rates


def cpu_of(command):
    """The CPU seconds of a command on the server's core, and what it wrote to standard error."""

    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    done = subprocess.run(["taskset", "-c", str(SERVER_CORE), *command], check=True, capture_output=True, text=True)
    return spent() - before, done.stderr


def download(url, *options):
    """Downloads a key of BULK bytes with curl, and checks its size."""
    size = run(["curl", "-sS", "--fail", "-o", os.devnull, "-w", "%{size_download}", *options, url])
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

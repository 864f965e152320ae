"""The time from the start of the daemon to readiness, or to the first byte for a waiting client."""

import functools
import socket
import statistics
import time

from client import Connection
from servers import Running, listening


@functools.cache
def start(bench):
    """Seconds from before the fork to READY=1, as the median of several starts."""
    return statistics.median(once(bench, until_ready=True) for _ in range(bench.starts))


@functools.cache
def activation(bench):
    """Seconds from before the fork to the first byte for a client that was waiting, as the median of several starts."""
    return statistics.median(once(bench, until_ready=False) for _ in range(bench.starts))


def once(bench, until_ready):
    address = bench.scratch / "notify"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
        listening() as listener,
        Connection(listener.getsockname()) as waiting,
    ):
        address.unlink(missing_ok=True)
        notify.bind(str(address))
        notify.settimeout(10)
        waiting.send()
        begun = time.monotonic()
        with Running(bench, "key-service", cores="0,1", listener=listener, environment={"NOTIFY_SOCKET": str(address)}):
            if until_ready:
                while b"READY=1" not in notify.recv(4096):
                    pass
                return time.monotonic() - begun
            waiting.receive()
            return time.monotonic() - begun

"""Processes and ports of the tests and of benches/compare/run.

A peer is a process that a test needs in addition to the daemon: nginx, Prometheus, a browser, a load generator. The exit of a peer is
not under test, so a hung peer is killed and logged. The exit of the daemon is under test, so a hung daemon is a failure. Neither
replaces an error that ended the block earlier.
"""

import contextlib
import errno
import signal
import socket
import subprocess
import sys
import time

PEER_TIMEOUT = 30  # seconds
DAEMON_TIMEOUT = 60  # seconds, longer than its drain timeout
SIGNAL_INTERVAL = 1  # seconds
KILL_TIMEOUT = 30  # seconds; only a process that is blocked in the kernel takes long


class Hung(AssertionError):
    """The daemon did not exit."""


class HeldPort:
    """A port of 127.0.0.1 and of ::1 that is reserved, during the block, for a server that binds it itself.

    If the port were found by bind(2) with port 0 and then closed, another process could take it. Worse, connect(2) to it could choose
    the same number as its source port, which connects a client to itself. So these sockets stay bound, and never listen. The server can
    still bind the port if it sets SO_REUSEADDR, as nginx and all servers in Go or Rust do. The kernel does not give the port to a process
    that asks for any free port (socket(7), ip(7)). Each address family has its own ports, so a port that is reserved in one can be in
    use in the other."""

    def __init__(self):
        self.sockets = []
        with contextlib.ExitStack() as refused:  # held during the search, or the kernel would give the same ports again
            while not self.sockets:
                ipv4 = self.bound(socket.AF_INET, ("127.0.0.1", 0))
                self.address = ipv4.getsockname()
                self.number = self.address[1]
                try:
                    self.sockets = [ipv4, self.bound(socket.AF_INET6, ("::1", self.number))]
                except OSError as error:
                    if error.errno == errno.EADDRINUSE:
                        refused.enter_context(ipv4)
                    elif error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                        self.sockets = [ipv4]  # this host has no IPv6
                    else:
                        raise

    @staticmethod
    def bound(family, address):
        held = socket.socket(family)
        try:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(address)
        except OSError:
            held.close()
            raise
        return held

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        for held in self.sockets:
            held.close()


def connect(address, timeout, source=None):
    """Connects to a server that may have exited. A connection of a client to itself counts as refused."""
    connection = socket.create_connection(address, timeout, source and (source, 0))
    if connection.getsockname() == connection.getpeername():
        connection.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, f"no server listens on {address[0]}:{address[1]}")
    return connection


def stop_peer(process, name, request=signal.SIGTERM, timeout=None):
    """Stops a peer by the signal `request`, or by SIGKILL after `timeout` (default PEER_TIMEOUT). Returns True if it exited by itself.

    The signal is repeated, because nginx with one process checks the flag of its SIGTERM handler and then calls epoll_wait(2) without a
    timeout. It would not notice a signal between the two before the next event; a second signal is such an event."""
    timeout = PEER_TIMEOUT if timeout is None else timeout
    deadline = time.monotonic() + timeout
    try:
        while process.poll() is None and (left := deadline - time.monotonic()) > 0:
            process.send_signal(request)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(SIGNAL_INTERVAL, left))
        exits = process.poll() is not None
        if not exits:
            log(f"{name} (process {process.pid}) did not exit within {timeout:g} s of {request.name} and is killed")
    finally:  # leaves no peer behind if the test is interrupted
        kill(process, name)
    return exits


def stop_daemon(process, name, error=None, timeout=None):
    """Stops the daemon by one SIGTERM. If it does not exit within `timeout` (default DAEMON_TIMEOUT), raises Hung; if `error` has ended
    the block, only logs it."""
    timeout = DAEMON_TIMEOUT if timeout is None else timeout
    try:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        sentence = f"{name} (process {process.pid}) did not exit within {timeout:g} s of SIGTERM and is killed"
        if error is None:
            raise Hung(sentence) from None
        log(sentence)
    finally:
        kill(process, name)


@contextlib.contextmanager
def killed_after(process, name):
    """Kills a process that is still running at the end of the block, with or without an error."""
    try:
        yield process
    finally:
        if process.poll() is None:
            log(f"{name} (process {process.pid}) still runs and is killed")
        kill(process, name)


def kill(process, name):
    """Kills a process by its id, unless it has exited, and waits for it. Logs a process that does not end, and never raises for it."""
    if process.poll() is not None:
        return
    process.kill()
    try:
        process.wait(KILL_TIMEOUT)
    except subprocess.TimeoutExpired:
        log(f"{name} (process {process.pid}) did not end within {KILL_TIMEOUT} s of SIGKILL")


def log(sentence):
    print(sentence, file=sys.stderr, flush=True)

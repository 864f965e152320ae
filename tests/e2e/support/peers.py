"""Processes and ports of the runners that are written in Python.

A peer is a process that a runner needs beside the daemon: nginx, Prometheus, a browser, a load generator. The exit of a peer
proves nothing, so a peer that hangs is killed and logged. The exit of the daemon is tested, so a daemon that hangs is a
failure. Neither replaces the error that ended the block before.
"""

import contextlib
import errno
import signal
import socket
import subprocess
import sys
import time

PEER_TIMEOUT = 30  # seconds
DAEMON_TIMEOUT = 60  # seconds, longer than its drain
SIGNAL_INTERVAL = 1  # seconds
KILL_TIMEOUT = 30  # seconds; only a process that the kernel itself holds needs them


class Hung(AssertionError):
    """The daemon did not exit."""


class HeldPort:
    """A port of 127.0.0.1 for a server that binds it by itself; no other process gets it while the block runs.

    A port that was found by bind(2) with port 0 and then closed is free only for a moment: another process may take it, and
    connect(2) to it may choose the same number as its source port, which connects a client to itself. This socket stays
    bound, and never listens. The server binds the port all the same if it sets SO_REUSEADDR, as nginx and every server in Go
    or Rust do; to others, which ask for any port, the kernel does not give it (socket(7), ip(7))."""

    def __init__(self):
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", 0))
        self.address = self.socket.getsockname()
        self.number = self.address[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.socket.close()


def connect(address, timeout, source=None):
    """A connection to a server that may have ended: one that a client got to itself counts as refused."""
    connection = socket.create_connection(address, timeout, source and (source, 0))
    if connection.getsockname() == connection.getpeername():
        connection.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, f"no server listens on {address[0]}:{address[1]}")
    return connection


def stop_peer(process, name, request=signal.SIGTERM, timeout=None):
    """Ends a peer by `request`, else by SIGKILL after `timeout` (PEER_TIMEOUT). True if it exited by itself.

    The request is repeated: nginx with one process looks at what its handler of SIGTERM has set, then calls epoll_wait(2)
    without a timeout. A signal between the two is not seen before the next event, and a second signal is one."""
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
    finally:  # an interrupt of the runner leaves no peer behind
        kill(process, name)
    return exits


def stop_daemon(process, name, error=None, timeout=None):
    """Ends the daemon by one SIGTERM. Raises Hung if it does not exit within `timeout` (DAEMON_TIMEOUT), or only logs that
    where `error` ended the block."""
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
    """Kills a process that still runs when the block ends, however it ends."""
    try:
        yield process
    finally:
        if process.poll() is None:
            log(f"{name} (process {process.pid}) still runs and is killed")
        kill(process, name)


def kill(process, name):
    """Kills a process by its id, unless it has ended, and waits for it. Never raises for a process that stays."""
    if process.poll() is not None:
        return
    process.kill()
    try:
        process.wait(KILL_TIMEOUT)
    except subprocess.TimeoutExpired:
        log(f"{name} (process {process.pid}) did not end within {KILL_TIMEOUT} s of SIGKILL")


def log(sentence):
    print(sentence, file=sys.stderr, flush=True)

"""The client of all measurements except wrk's and curl's. It checks every response."""

import contextlib
import re
import socket
import ssl
from dataclasses import replace

from kinds import RAW
from tools import Failed, fail, peers

# The daemon's certificate is self-signed, and its verification is not part of the measurement.
UNVERIFIED = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
UNVERIFIED.check_hostname, UNVERIFIED.verify_mode = False, ssl.CERT_NONE


def source(index):
    """The client address of the connection of this index. 200 share one: the daemon limits the connections of each address, and one has
    only 28,000 ports, each taken for a minute after its connection is closed."""
    return f"127.0.1.{1 + index // 200}"


class Connection:
    """A connection that sends requests of one kind."""

    def __init__(self, address, source="127.0.0.1", kind=RAW):
        self.request, self.status, self.length = kind.request, kind.status, kind.length
        self.socket = peers.connect(address, 60, source)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if kind.tls:
            self.socket = UNVERIFIED.wrap_socket(self.socket)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.socket.close()

    def ask(self):
        self.send()
        return self.receive()

    def send(self):
        self.socket.sendall(self.request)

    def receive(self):
        """Reads one response, checks its status and length, and returns its body."""
        response = b""
        while b"\r\n\r\n" not in response:
            response += self._receive_some()
        head, _, body = response.partition(b"\r\n\r\n")
        declared = re.search(rb"\r\ncontent-length: (\d+)", head.lower())
        length = int(declared[1]) if declared else None
        if not head.startswith(b"HTTP/1.1 %d " % self.status) or length is None or self.length not in (None, length):
            raise Failed(f"expected status {self.status} and {self.length or 'some'} bytes, found {head!r}")
        parts, left = [body], length - len(body)
        while left > 0:
            parts.append(self._receive_some())
            left -= len(parts[-1])
        if left < 0:
            raise Failed(f"expected {length} bytes as declared, found {length - left}")
        return b"".join(parts)

    def _receive_some(self):
        return self.socket.recv(65536) or fail("the connection was closed in the middle of a response")


class Batches:
    """Requests of one kind on several connections at once, as under load: all are sent before the first response is read."""

    def __init__(self, server, kind, connections):
        self.server, self.kind, self.connections = server, kind, connections

    def __enter__(self):
        if self.kind.before:
            with self.server.connect(kind=replace(self.kind, path=self.kind.before, status=200, length=None)) as first:
                first.ask()
        self.kept = [] if self.kind.closes else self._connect()
        return self

    def __exit__(self, *_):
        for connection in self.kept:
            connection.close()

    def _connect(self):
        return [self.server.connect(kind=self.kind) for _ in range(self.connections)]

    def ask(self):
        """One request on each connection; if connections are not kept, on new ones."""
        with contextlib.ExitStack() as closed:
            connections = self.kept or [closed.enter_context(connection) for connection in self._connect()]
            for connection in connections:
                connection.send()
            for connection in connections:
                connection.receive()

"""The client of all measurements except wrk's and curl's. It checks every response."""

import re
import socket
import ssl

from kinds import RAW
from tools import Failed, fail, peers

# The daemon's certificate is self-signed, and its verification is not part of the measurement.
UNVERIFIED = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
UNVERIFIED.check_hostname, UNVERIFIED.verify_mode = False, ssl.CERT_NONE


class Connection:
    """A connection that sends requests of one kind."""

    def __init__(self, address, source="127.0.0.1", kind=RAW):
        self.request, self.length = kind.request, kind.length
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
        self.receive()

    def send(self):
        self.socket.sendall(self.request)

    def receive(self):
        """Reads one response, and checks its status and length."""
        response = b""
        while b"\r\n\r\n" not in response:
            response += self._receive_some()
        head, _, body = response.partition(b"\r\n\r\n")
        declared = re.search(rb"\r\ncontent-length: (\d+)", head.lower())
        if not head.startswith(b"HTTP/1.1 200 ") or not declared or (self.length or int(declared[1])) != int(declared[1]):
            raise Failed(f"expected 200 and {self.length or 'some'} bytes, found {head!r}")
        found, length = len(body), int(declared[1])
        while found < length:
            found += len(self._receive_some())
        if found > length:
            raise Failed(f"expected {length} bytes as declared, found {found}")

    def _receive_some(self):
        return self.socket.recv(65536) or fail("the connection was closed in the middle of a response")

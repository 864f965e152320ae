"""Clients that are slow, broken or malicious. Each counts what it can know of the daemon's counters, and no more."""

import contextlib
import socket
import ssl
import struct
import time

from support import peers
from support.soak import catalogue
from support.soak.clients import PROXY, Client, Connection, proxy_header, tls, unavailable

WAIT = 40  # seconds, longer than any timeout of the daemons
HALVES = [b"G", b"GET /key/32 HT", b"GET /key/32 HTTP/1.1\r\nHost: local", b"GET /key/32 HTTP/1.1\r\nHost: localhost\r\nX: y\r\n"]
GARBAGE = [b"\0\1\2\3\r\n\r\n", b"hello\r\n\r\n", b"GET /key/32 HTTP/3.0\r\nHost: a\r\n\r\n", b"GET  /key/1 HTTP/1.1\r\nHost: a\r\n\r\n"]
HANDSHAKE = b"\x16\x03\x01\x02"  # the first bytes of a TLS handshake


class Hostile(Client):
    """A client that misbehaves in a different way in each session."""

    pause = 0.7
    ways = ()

    def session(self):
        getattr(self, self.random.choice(self.ways))()

    def connect(self, buffer=None):
        client = socket.socket()
        client.settimeout(WAIT)
        if buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        client.bind((self.address, 0))
        client.connect(self.service.http)
        return client

    def http(self, buffer=None):
        """A connection that can send a request."""
        return Connection(self.connect(buffer))

    def answered(self, connection):
        """Notes that the daemon has answered on the connection."""

    def ends(self, client):
        """Waits until the daemon closes the connection, and returns what it sent. Gives up for a quiet moment."""
        received, deadline = b"", time.monotonic() + WAIT
        client.settimeout(0.2)
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError, ssl.SSLWantReadError):
                try:
                    chunk = client.recv(65_536)
                except (ConnectionError, ssl.SSLError):
                    return received, True
                if not chunk:
                    return received, True
                received += chunk
                continue
            if self.must_hurry:
                return received, False
        self.all.problems.add(f"{self.name}: the daemon did not close the connection within {WAIT} s")
        return received, False

    def reset(self, connection):
        """Closes the connection by a reset."""
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    def half_a_request(self):
        """Sends a part of a request, and closes the connection or waits until the daemon does."""
        with contextlib.closing(self.http()) as connection:
            connection.socket.sendall(self.random.choice(HALVES))
            if self.random.random() < 0.5:
                received, _ = self.ends(connection.socket)
                if received:
                    self.all.problems.add(f"{self.name}: half a request got a response: {received[:200]}")
        self.completed_handshake(connection)

    def completed_handshake(self, connection):
        """The daemon has not received the end of the handshake if the connection is closed before."""
        if connection.is_tls:
            self.service.ledger.add("tls_handshakes_total", is_sure=False)
            self.service.ledger.add('tls_handshake_failures_total{reason="closed"}', is_sure=False)

    def garbage(self):
        """Sends what is no HTTP/1.1, or too many headers, and gets a 400 or 431 without content."""
        too_large = self.random.random() < 0.3
        data = b"GET /key/32 HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 120 + b"\r\n" if too_large else self.random.choice(GARBAGE)
        with contextlib.closing(self.http()) as connection:
            epoch = self.service.epoch
            connection.socket.sendall(data)
            response = connection.answers.next()
            if response is None and self.service.overlaps(epoch):
                self.service.ledger.rejection("malformed", is_sure=False)
                return
            if response is None or response[0] != (431 if too_large else 400) or connection.answers.next() is not None:
                self.all.problems.add(f"{self.name}: {data[:40]} got {response}")
                return
            self.answered(connection)
        self.service.ledger.rejection("malformed")
        self.service.ledger.add(f'http_responses_total{{status_code="{response[0]}"}}')

    def stream(self, connection):
        """Requests a large raw key. Returns it with the headers and the first bytes of the body, or None if it was refused."""
        keys = catalogue.Keys(self.random.randint(200_000, catalogue.MAX_SIZE), "raw")
        wanted = catalogue.key_request(self.random, keys, rates=False)
        connection.socket.sendall(wanted.bytes(self.service.tokens["hostile"], connection.headers))
        status, headers, body = connection.answers.next(has_body=False) or (None, None, None)
        if status is None:
            return None  # the daemon shut down before it read the request
        self.answered(connection)
        if status == 503:
            while len(connection.answers.buffer) < int(headers["content-length"]) and connection.answers.more():
                pass
            body = connection.answers.buffer
            self.service.ledger.response(status, wanted.endpoint)
            self.service.ledger.rejection(unavailable(body), is_key=True)
            return None
        if status != 200:
            self.all.problems.add(f"{self.name}: {wanted.path}: expected the status 200 or 503, found {status}")
            return None
        return keys, headers, len(connection.answers.buffer)

    def leave(self, connection, epoch, keys, headers, received):
        """Counts a response of which only `received` bytes arrived."""
        is_sure = not self.service.overlaps(epoch)
        is_complete = received == keys.key_bytes
        self.service.ledger.response(200, "/key/{length}", is_sure)
        self.service.ledger.keys(keys, is_sure, None if is_complete else received)
        self.service.audit.expect(
            headers["x-request-id"],
            True,
            ("complete",) if is_complete else ("complete", "aborted"),
            (received, keys.key_bytes),
            token="hostile",
            address=self.address,
            length=keys.length,
            format=keys.format,
        )

    def leave_at_once(self):
        """Requests a key and leaves without reading the response. Whether the daemon had read the request, its audit log says."""
        with contextlib.closing(self.http()) as connection:
            if connection.is_tls:  # a request before this one makes sure that the handshake is complete
                connection.socket.sendall(catalogue.Wanted("/livez", "/livez", frozenset({200})).bytes(None))
                if connection.answers.next():
                    self.answered(connection)
                    self.service.ledger.response(200, "/livez")
            connection.socket.sendall(
                catalogue.Wanted(f"/key/{catalogue.LEFT.length}?format={catalogue.LEFT.format}", "", frozenset()).bytes(
                    self.service.tokens["hostile"]
                )
            )
            if self.random.random() < 0.5:
                self.reset(connection)

    def slow_reader(self):
        """Reads a stream slowly, and half of the time leaves in the middle."""
        self.read_slowly(self.random.choice([1.0, self.random.random()]))

    def vanish(self):
        """Leaves right after the first bytes of a stream."""
        self.read_slowly(0.0)

    def read_slowly(self, share):
        epoch, connection = self.service.epoch, self.http(4096)
        try:
            if (begun := self.stream(connection)) is None:
                return
            keys, headers, received = begun
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while received < share * keys.key_bytes and not self.must_hurry:
                    if not (chunk := connection.socket.recv(16_384)):
                        break
                    received += len(chunk)
                    self.all.over.wait(0.02)
            self.leave(connection, epoch, keys, headers, received)
        finally:
            if connection.is_tls and share == 1.0:
                connection.close()
            else:
                self.reset(connection)

    def deaf(self):
        """Requests a stream and reads nothing but the headers, until the daemon resets the connection."""
        epoch, connection = self.service.epoch, self.http(4096)
        try:
            if (begun := self.stream(connection)) is None:
                return
            deadline = time.monotonic() + WAIT
            while self.is_open(connection.socket) and not self.must_hurry:
                if time.monotonic() > deadline:
                    self.all.problems.add(f"{self.name}: a client that reads nothing was not closed within {WAIT} s")
                    break
                self.all.over.wait(0.2)
            self.leave(connection, epoch, *begun)
        finally:
            self.reset(connection)

    @staticmethod
    def is_open(client):
        """Whether the connection is neither closed nor reset: its state in TCP_INFO (tcp(7)) is ESTABLISHED."""
        return client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 1


class Plain(Hostile):
    """Attacks the daemon without TLS, which expects PROXY headers from trusted proxies."""

    ways = ("half_a_request", "garbage", "leave_at_once", "slow_reader", "vanish", "deaf", "proxy_error", "proxy_error", "proxy_silence")

    def proxy_error(self):
        """Sends a PROXY header that is wrong, or where none is allowed, or none where one is required."""
        reason, source, data = self.random.choice(
            [
                ("untrusted", self.address, proxy_header(self.random, "192.0.2.1") + b"GET /key/32 HTTP/1.1\r\nHost: a\r\n\r\n"),
                ("missing", PROXY, b"GET /key/32 HTTP/1.1\r\nHost: a\r\n\r\n"),
                ("malformed", PROXY, b"PROXY TCP4 192.0.2.1 192.0.2.999 1 2\r\n"),
            ]
        )
        epoch = self.service.epoch
        with peers.connect(self.service.http, WAIT, source) as client:
            client.sendall(data)
            received, is_closed = self.ends(client)
        if received:
            self.all.problems.add(f"{self.name}: a PROXY header that is {reason} got a response: {received[:200]}")
        is_sure = is_closed and not self.service.overlaps(epoch)
        for each in [reason] if is_sure else [reason, "timeout"]:
            self.service.ledger.add(f'proxy_protocol_errors_total{{reason="{each}"}}', is_sure=is_sure)

    def proxy_silence(self):
        """Connects as a trusted proxy and sends half of a header. A quiet moment ends it early, which is `malformed`."""
        epoch = self.service.epoch
        with peers.connect(self.service.http, WAIT, PROXY) as client:
            client.sendall(b"PROXY TCP4 192.0")
            _, is_closed = self.ends(client)
        is_sure = not self.service.overlaps(epoch)
        reason = "timeout" if is_closed else "malformed"
        self.service.ledger.add(f'proxy_protocol_errors_total{{reason="{reason}"}}', is_sure=is_sure)


class Encrypted(Hostile):
    """Attacks the daemon with TLS, which never restarts."""

    ways = (
        "half_a_request",
        "garbage",
        "leave_at_once",
        "slow_reader",
        "vanish",
        "deaf",
        "handshake",
        "handshake",
        "stalled_handshake",
        "greedy",
    )

    def http(self, buffer=None):
        return Connection(tls(self.all, self.connect(buffer)), is_tls=True)

    def answered(self, connection):
        if not connection.has_response:
            self.service.ledger.add("tls_handshakes_total")
            connection.has_response = True

    def completed_handshake(self, connection):
        if not connection.has_response:
            super().completed_handshake(connection)

    def failure(self, reason):
        self.service.ledger.add(f'tls_handshake_failures_total{{reason="{reason}"}}')

    def handshake(self):
        """Breaks the handshake in a way that the daemon recognises."""
        reason = self.random.choice(["closed", "malformed", "plain_http", "incompatible", "client_alert"])
        with self.connect() as client:
            if reason == "closed":
                client.sendall(HANDSHAKE)
            elif reason == "malformed":
                client.sendall(b"\x99garbage garbage garbage")
                self.ends(client)
            elif reason == "plain_http":
                client.sendall(b"GET /key/32 HTTP/1.1\r\nHost: a\r\n\r\n")
                received, _ = self.ends(client)
                if b" 400 " not in received[:20] or b"https://" not in received:
                    self.all.problems.add(f"{self.name}: plain HTTP got {received[:200]}")
            else:
                context = ssl.create_default_context()  # which trusts no certificate of a test
                if reason == "incompatible":
                    context.maximum_version = ssl.TLSVersion.TLSv1_2
                with contextlib.suppress(ssl.SSLError), context.wrap_socket(client, server_hostname="localhost"):
                    self.all.problems.add(f"{self.name}: a handshake that is {reason} succeeded")
        self.failure(reason)

    def stalled_handshake(self):
        """Begins a handshake and waits until the daemon gives up."""
        with self.connect() as client:
            client.sendall(HANDSHAKE)
            _, is_closed = self.ends(client)
        self.failure("timeout" if is_closed else "closed")

    def greedy(self):
        """Opens more connections than one client may have."""
        connections = []
        wanted = catalogue.Wanted("/key/32", "/key/{length}", frozenset({200, 503}), keys=catalogue.Keys(32, "raw"))
        try:
            for _ in range(self.service.connections_max + 10):
                try:
                    connection = self.http()
                except (ConnectionError, ssl.SSLError):  # closed as soon as it was accepted
                    self.service.ledger.rejection("client_connections", is_sure=False)
                    self.failure_possible()
                    continue
                connections.append(connection)
                with contextlib.suppress(ConnectionError, ssl.SSLError):
                    connection.socket.sendall(wanted.bytes(self.service.tokens["hostile"]))
                    if (response := connection.answers.next()) is None:
                        self.failure_possible()
                        continue
                    self.answered(connection)
                    status, headers, body = response
                    self.service.ledger.response(status, wanted.endpoint)
                    if status == 503:
                        self.service.ledger.rejection(unavailable(body), is_key=True)
                    else:
                        self.service.ledger.keys(wanted.keys)
                        self.all.unique(catalogue.fingerprints([body], None))
                        self.service.audit.expect(
                            headers["x-request-id"], False, token="hostile", address=self.address, length=32, format="raw", sent=(32, 32)
                        )
        finally:
            for connection in connections:
                connection.close()

    def failure_possible(self):
        for reason in ("closed", "timeout"):
            self.service.ledger.add(f'tls_handshake_failures_total{{reason="{reason}"}}', is_sure=False)
        self.service.ledger.add("tls_handshakes_total", is_sure=False)

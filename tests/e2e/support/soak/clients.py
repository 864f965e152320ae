"""Well-behaved clients: each request gets a complete and correct response, or is lost, which is a problem.

A client may be closed between two requests, and then it repeats the request on a new connection (RFC 9110 section 9.2.2). That is no
loss if the daemon may have closed the connection before the request arrived. It reads for 250 ms after the beginning of a drain, and each
response from then on has `Connection: close`. So a connection that is kept after a response stays open for at least 250 ms from when
the request was sent, however slow the client is. A new connection has a second for its first request.
"""

import contextlib
import dataclasses
import random
import socket
import ssl
import struct
import threading
import time

from support import peers
from support.answers import Answers
from support.soak import catalogue

TIMEOUT = 60  # seconds; clients wait this long in the backlog of a daemon that restarts
PROXY = "127.0.0.3"  # the address of trusted proxies
PIPELINED_MAX = 5
KEPT_MIN, NEW_MIN = 0.2, 0.9  # seconds that the daemon keeps a connection open at least, with a margin: after a request, and a new one


class Gate:
    """Lets clients run, or holds them between two sessions."""

    def __init__(self):
        self.condition, self.is_open, self.busy, self.is_over = threading.Condition(), True, 0, False

    @contextlib.contextmanager
    def session(self):
        """A session of a client. Gives False once the run is over."""
        with self.condition:
            self.condition.wait_for(lambda: self.is_open or self.is_over)
            self.busy += not self.is_over
            is_running = not self.is_over
        try:
            yield is_running
        finally:
            with self.condition:
                self.busy -= is_running
                self.condition.notify_all()

    @contextlib.contextmanager
    def closed(self, problems):
        """A quiet moment: no client is in a session."""
        with self.condition:
            self.is_open = False
            if not self.condition.wait_for(lambda: self.busy == 0, 2 * TIMEOUT):
                problems.add(f"{self.busy} clients did not end their sessions")
        try:
            yield
        finally:
            with self.condition:
                self.is_open = True
                self.condition.notify_all()

    def end(self):
        with self.condition:
            self.is_over = True
            self.condition.notify_all()


class Client(threading.Thread):
    """A client in a thread. A subclass has `session`."""

    pause = 0.1  # seconds between two sessions, on average

    def __init__(self, run, service, name, address):
        super().__init__(name=name, daemon=True)
        self.all, self.service, self.address = run, service, address
        self.random = random.Random(f"{run.seed} {name}")

    def run(self):
        while True:
            with self.all.gate.session() as is_running:
                if not is_running:
                    return
                with self.all.problems.noted(self.name):
                    self.session()
            self.all.over.wait(self.random.expovariate(1 / self.pause))

    @property
    def must_hurry(self):
        """Whether a quiet moment waits for the end of this session."""
        return not self.all.gate.is_open


@dataclasses.dataclass
class Connection:
    socket: socket.socket
    headers: tuple = ()  # which the proxy would add
    proxy: str | None = None  # as the audit record has it
    is_tls: bool = False
    has_response: bool = False
    since: float | None = None  # when the exchange before began, or the connection; None if it is of no further use

    def __post_init__(self):
        self.answers = Answers(self.socket)

    def close(self):
        self.socket.close()


def tls(run, client):
    """Completes a handshake. The name in the certificate is not under test; its bytes are compared after each renewal."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or the request waits for the acknowledgement of the handshake
    with contextlib.ExitStack() as stack:
        stack.callback(client.close)
        encrypted = run.tls.wrap_socket(client)
        stack.pop_all()
    return encrypted


class Route:
    """A way from a client to a daemon."""

    pipelines = True
    may_delay = False  # whether a request that was sent may reach the daemon at any later time

    def __init__(self, run, service):
        self.run, self.service = run, service

    def connect(self, client):
        return Connection(peers.connect(self.service.http, TIMEOUT, client.address))


class ProxyHeader(Route):
    """A proxy that forwards TCP and sends a PROXY header, version 1 or 2."""

    def connect(self, client):
        connection = Connection(peers.connect(self.service.http, TIMEOUT, PROXY))
        connection.socket.sendall(proxy_header(client.random, client.address))
        return connection


class Haproxy(Route):
    """haproxy, which forwards TCP with a PROXY header."""

    may_delay = True

    def connect(self, client):
        return Connection(peers.connect(self.run.haproxy.tcp, TIMEOUT, client.address))


class Tls(Route):
    def connect(self, client):
        return Connection(tls(self.run, peers.connect(self.service.http, TIMEOUT, client.address)), is_tls=True)


class Forwarded(Route):
    """A proxy that names the client in X-Forwarded-For."""

    def connect(self, client):
        forged = client.random.choice(["", "203.0.113.7, ", "unknown, "])  # what stands to the left of the client has no effect
        headers = (f"X-Forwarded-For: {forged}{client.address}",)
        return Connection(tls(self.run, peers.connect(self.service.http, TIMEOUT, PROXY)), headers, PROXY, is_tls=True)


class HaproxyHttp(Route):
    """haproxy, which sends X-Forwarded-For and makes a connection over TLS for each request."""

    pipelines = False

    def connect(self, client):
        return Connection(peers.connect(self.run.haproxy.http, TIMEOUT, client.address), proxy=PROXY)


def proxy_header(choice, address):
    if choice.random() < 0.5:
        return f"PROXY TCP4 {address} 127.0.0.1 40000 1123\r\n".encode()
    addresses = socket.inet_aton(address) + socket.inet_aton("127.0.0.1") + struct.pack("!HH", 40_000, 1123)
    return b"\r\n\r\n\0\r\nQUIT\n" + b"\x21\x11" + struct.pack("!H", len(addresses)) + addresses


class Regular(Client):
    """A client that sends valid and invalid requests, on new and on kept connections, one at a time or several at once."""

    def __init__(self, run, route, token, name, address):
        super().__init__(run, route.service, name, address)
        self.route, self.token = route, token
        self.size_max = catalogue.LIMITED_SIZE if token == "limited" else catalogue.MAX_SIZE

    def session(self):
        connection = None
        try:
            for _ in range(self.random.choice([1, 1, 2, 5, 20])):
                several = self.route.pipelines and self.random.random() < 0.1
                wanted = [self.choose() for _ in range(self.random.randint(2, PIPELINED_MAX) if several else 1)]
                while wanted:
                    if not connection:
                        begin = time.monotonic()
                        connection = self.route.connect(self)
                        connection.since = begin
                    wanted = self.exchange(connection, wanted)
                    if connection.since is None:
                        connection.close()
                        connection = None
                if self.must_hurry:
                    return
                self.all.over.wait(self.random.expovariate(1 / 0.04))
        finally:
            if connection:
                connection.close()

    def choose(self):
        return catalogue.choose(self.random, self.size_max, rates=self.token == "slow")

    def exchange(self, connection, wanted):
        """Sends the requests and reads their responses. Returns those that have to be repeated."""
        epoch, begin = self.service.epoch, time.monotonic()
        since, connection.since, is_kept = connection.since, None, connection.has_response
        token = self.service.tokens[self.token]
        done, sent, error = 0, None, None
        try:
            connection.socket.sendall(b"".join(each.bytes(token, connection.headers) for each in wanted))
            sent = time.monotonic()
            for number, each in enumerate(wanted):
                response = self.all.read_response(connection.answers, each)
                if response is None:
                    break
                done = number + 1
                if number == 0 and each.keys and not each.keys.is_streamed:
                    self.all.latency(self.service, time.monotonic() - begin)
                self.verify(connection, each, response, self.service.overlaps(epoch))
                if response[1].get("connection") == "close":
                    return wanted[done:]
        except (OSError, AssertionError) as raised:
            error = raised
        if done == len(wanted):
            connection.since = begin
            return []
        now = time.monotonic()
        arrived = now if sent is None or is_kept and self.route.may_delay else sent  # at the latest
        least = since + (KEPT_MIN if is_kept else NEW_MIN)
        is_closed = not done and (error is None or isinstance(error, ConnectionError | ssl.SSLError))
        if is_closed and (arrived > least or now > least and self.service.excuse_unread(epoch)):
            self.service.count("repeated")
            if not is_kept:  # it may have been closed before the end of its PROXY header
                self.service.ledger.add('proxy_protocol_errors_total{reason="timeout"}', is_sure=False)
            return wanted
        how = f"{type(error).__name__}: {error}" if error else f"closed after {done} of {len(wanted)} responses"
        age = f"{arrived - since:.3f} s after the {'request before' if is_kept else 'connection'}"
        self.all.problems.add(f"lost: {self.name}: {wanted[done].method} {wanted[done].path}: {how} ({age}; {self.service.state()})")
        return []

    def verify(self, connection, wanted, response, overlaps):
        status, headers, body = response
        service, ledger = self.service, self.service.ledger
        if connection.is_tls and not connection.has_response or isinstance(self.route, HaproxyHttp):
            ledger.add("tls_handshakes_total")
        connection.has_response = True
        service.count("responses")
        keys = wanted.keys if status == 200 else None
        is_sure = not (overlaps and keys and keys.is_streamed)
        ledger.response(status, wanted.endpoint, is_sure)
        if wrong := find_error(wanted, status, headers, body):
            self.all.problems.add(f"{self.name}: {wanted.method} {wanted.path}: {wrong} ({status} {headers} {body[:200]})")
            return
        if status == 503 and wanted.keys:  # /readyz reports the drain and rejects nothing
            ledger.rejection(unavailable(body), is_key=True)
        elif status == 429 or wanted.reason:
            ledger.rejection(wanted.reason or "rate")
        if not keys or wanted.is_head:
            return
        found = keys.decode(body)
        if len(found) != keys.number or any(len(each) != keys.length for each in found):
            self.all.problems.add(
                f"{self.name}: {wanted.path}: expected {keys.number} keys of {keys.length}, found {[*map(len, found)][:9]}"
            )
        ledger.keys(keys, is_sure)
        self.all.unique(catalogue.fingerprints(found, keys.alphabet))
        service.count("keys", keys.number)
        service.audit.expect(
            headers["x-request-id"],
            keys.is_streamed,
            token=self.token,
            address=self.address,
            proxy=connection.proxy,
            length=keys.length,
            count=keys.count,
            format=keys.format,
            alphabet=keys.alphabet,
            sent=(len(body), len(body)),
        )


def find_error(wanted, status, headers, body):
    """What is wrong with a response; empty if nothing is."""
    if status not in wanted.statuses:
        return f"expected the status {' or '.join(map(str, sorted(wanted.statuses)))}"
    missing = [
        name
        for name in {401: ["www-authenticate"], 405: ["allow"], 429: ["retry-after"], 503: ["retry-after"]}.get(status, [])
        if name not in headers
    ]
    if missing:
        return f"expected the header {missing[0]}"
    if headers.get("cache-control") != "no-store" and status == 200 and wanted.keys:
        return "expected Cache-Control: no-store"
    if status != 200:
        return "" if f'"status":{status}'.encode() in body or wanted.is_head else "expected problem details"
    if not wanted.keys:
        return ""
    if int(headers["content-length"]) != wanted.keys.body_length:
        return f"expected a Content-Length of {wanted.keys.body_length}"
    if ("x-accel-buffering" in headers) != wanted.keys.is_streamed:
        return "the body is streamed, or not, against the expectation"
    expected = catalogue.MEDIA_TYPES[wanted.keys.format]
    if wanted.keys.count is not None and wanted.keys.format == "jwk":
        expected = "application/jwk-set+json"
    return "" if headers["content-type"].startswith(expected) else f"expected the type {expected}"


def unavailable(body):
    """The reason of a 503, as the metrics call it."""
    for text, reason in [
        (b"Too many large responses", "bulk"),
        (b"Too many connections", "client_connections"),
        (b"The service is stopping", "draining"),
    ]:
        if text in body:
            return reason
    raise ValueError(f"expected a reason, found {body[:200]}")


class Units(Client):
    """systemd, which fetches a credential for a unit."""

    pause = 0.5

    def session(self):
        name = f"key-{self.random.getrandbits(64):x}"
        is_malformed = self.random.random() < 0.2
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(TIMEOUT)
            client.bind(f"\0{self.random.getrandbits(64):x}/{'home' if is_malformed else 'unit/soak.service'}/{name}")
            client.connect(str(self.service.credential))
            with client.makefile("rb") as stream:
                key = stream.read()
        self.service.ledger.add(f'credentials_total{{outcome="{"malformed" if is_malformed else "served"}"}}')
        if len(key) != (0 if is_malformed else 32):
            self.all.problems.add(f"{self.name}: a credential of {len(key)} bytes")
        if not is_malformed:
            keys = catalogue.Keys(32, "raw")
            self.service.ledger.keys(keys)
            self.all.unique(catalogue.fingerprints([key], None))
            self.service.audit.expect(name, False, unit="soak.service", credential=name, length=32, format="raw", sent=(32, 32))

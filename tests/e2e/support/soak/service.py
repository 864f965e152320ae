"""The daemons under load, with what is known of them: tokens, counts, audit records, and the figures of their processes."""

import collections
import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path

from support.answers import Answers
from support.certificates import self_signed
from support.conditions import until
from support.daemon import Daemon, binary
from support.soak import catalogue, ledger
from support.soak.audit import Audit
from support.soak.clients import NEW_MIN, PROXY

TIMEOUT = 60  # seconds
CLOSE_TIMEOUT = 30  # seconds; longer than the timeouts of the daemons, which end every connection that a client has left
SETTLE_TIMEOUT = 15  # seconds
# Token: its limits. Most clients have one without, which falls under the rates of the configuration.
TOKENS = {
    "web": [],
    "limited": ["--max-size", str(catalogue.LIMITED_SIZE)],
    "slow": ["--rate-requests", "2"],
    "hostile": [],
}
CONNECTIONS_MAX = 1000  # never reached
RESIDENT_DIFFERENCE = 4 << 20  # bytes; the two are measured a moment apart
SCRAPE_INTERVAL = 0.075  # seconds, during the drain
METRICS_CLIENTS = 12  # connections that are held for the last scrape; one client may have 16
DRAIN_SCRAPE = 0.3  # seconds from SIGTERM to the first scrape, when no more connections are accepted
# After the end of a process, clients count what they have received of it. Steps, since the harness may be stalled in one of them.
CATCH_UP_STEPS, CATCH_UP_STEP = 20, 0.02


class Service:
    """A daemon, in one process or in several one after the other. The harness holds its sockets."""

    def __init__(self, run, name):
        self.run, self.name, self.daemon = run, name, None
        self.problems = run.problems
        self.directory = Path(run.directory) / name
        self.directory.mkdir()
        self.ledger, self.audit = ledger.Ledger(), Audit(name, run.problems)
        self.counted = collections.Counter()
        self.epoch = 0  # odd from SIGTERM until the next process is ready
        self.generation = 0
        self.stopped = set()  # the processes that excuse_unread has excused
        shown = subprocess.run([binary(), "--version"], check=True, capture_output=True, text=True).stdout
        self.version, self.commit = re.fullmatch(r"key-service (\S+)(?: \(([^,)]+).*\))?\n", shown).groups(default="")
        self.earlier = collections.Counter()  # the last scrapes of the processes before this one
        self.rate = 100_000
        self.tokens, self.lines = {}, {}
        for token, limits in TOKENS.items():
            self.add_token(token, *limits)
        self.write_tokens()
        self.sockets = contextlib.ExitStack()
        self.listener = self.sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
        self.http = self.listener.getsockname()

    # Configuration

    def config(self):
        settings = {
            "audit": True,
            "max-size": catalogue.MAX_SIZE,
            "tokens-file": str(self.directory / "tokens"),
            "rate-requests": self.rate,
            "trusted-proxies": [PROXY],
            "max-connections": CONNECTIONS_MAX,
            "max-bulk-streams": 16,
            "workers": 2,
            # A client, the daemon or haproxy may be stalled for 5 seconds in the middle of anything. A drain may have to wait for a
            # client that reads nothing, so its timeout is longer by that.
            "head-timeout": 10,
            "idle-timeout": 30,
            "write-timeout": 7,
            "drain-timeout": 13,
            **self.settings(),
        }
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())

    def settings(self):
        return {}

    def add_token(self, name, *limits):
        """Creates a token by the command that operators use."""
        command = [binary(), "token", "new", "--name", name, *limits]
        self.tokens[name], self.lines[name] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()

    def write_tokens(self, more=""):
        self.replace("tokens", "".join(f"{line}\n" for line in self.lines.values()) + more)

    def write_config(self, more=""):
        self.replace("config.toml", self.config() + more)

    def replace(self, name, text):
        """Replaces a file at once, as operators should."""
        new = self.directory / f"{name}.new"
        new.write_text(text)
        new.chmod(0o600)
        new.rename(self.directory / name)

    # Process

    def start(self):
        self.generation += 1
        log = self.directory / f"log-{self.generation}"
        log.touch()
        self.audit.follow(log)
        self.daemon = Daemon(self.directory, self.config(), log=log, inherit=self.inherited(), names=self.names).__enter__()
        host, port = self.daemon.metrics.split(":")
        self.metrics = (host, int(port))
        self.process_started = None

    def state(self):
        """Where the daemon is in its life, for messages."""
        return f"process {self.generation}{', restarting' if self.epoch % 2 else ''}"

    def overlaps(self, epoch):
        """Whether the time since the epoch was `epoch` overlaps a restart."""
        return epoch != self.epoch or epoch % 2 == 1

    def excuse_unread(self, epoch):
        """Whether the daemon may have closed a connection without reading a request that had arrived: if it was stopped during its
        drain, it may notice only that the time is over. This excuses no three processes in a row."""
        if not self.overlaps(epoch):
            return False
        self.stopped.add(self.generation)
        return not {self.generation - 1, self.generation - 2} <= self.stopped

    def count(self, what, number=1):
        with self.ledger.lock:
            self.counted[what] += number

    def signal(self, number):
        os.kill(self.daemon.pid, number)

    def stop(self):
        self.signal(signal.SIGTERM)
        self.ended()

    def close(self):
        """Closes the sockets, and kills the process if an error has ended the run."""
        if self.daemon and self.daemon.process.poll() is None:
            self.daemon.process.kill()
            self.ended()
        self.sockets.close()

    def ended(self):
        status = self.daemon.process.wait(TIMEOUT)
        if status != 0:
            self.problems.add(f"{self.name}: expected exit status 0, found {status}")
        self.daemon.__exit__(None, None, None)

    # Metrics

    def scrape(self, client=None):
        """The metrics, as they are after this scrape has ended. The count of requests in flight is without it. `self.scraped` is what
        clients had counted before the last scrape that succeeded, and `self.asked` when the last request was sent, if it was."""
        counted, self.asked = self.ledger.counted(), None
        with client or socket.create_connection(self.metrics, TIMEOUT) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            self.asked = time.monotonic()
            response = Answers(client).next()
        assert response and response[0] == 200, f"expected metrics, found {response}"
        values = collections.Counter(ledger.parse(response[2].decode()))
        own = {'http_responses_total{status_code="200"}': 1, 'request_latency_seconds_count{endpoint="/metrics"}': 1}
        for series, count in own.items():
            self.ledger.add(series)
            values[series] += count
            counted[series] += count
        self.scraped = counted
        values["http_requests_in_flight"] -= 1
        return values

    def totals(self, values):
        """The sums of `values` and of the last scrapes of all earlier processes. Gauges are those of `values`."""
        return {series: value + (self.earlier[series] if ledger.name_of(series) in SUMMED else 0) for series, value in values.items()}

    def settled(self):
        """Waits until no connection is open, and returns a scrape of that moment."""

        def is_quiet():
            values = self.scrape()
            return values["http_connections"] == 0 and values["http_requests_in_flight"] == 0 and values

        return until(f"the connections to the {self.name} daemon to end", is_quiet, CLOSE_TIMEOUT)

    def verify(self):
        """Compares everything in a quiet moment: metrics, audit records, and the figures of the process. Returns these.

        The daemon counts some things, and writes records, a moment after its client has noticed the end. What still differs after
        SETTLE_TIMEOUT is a problem."""
        values = self.settled()
        with contextlib.suppress(AssertionError):
            until("the audit records", self.has_records, SETTLE_TIMEOUT)
        self.audit.settle(self.excuse)
        with contextlib.suppress(AssertionError):
            until("the metrics", self.is_equal, SETTLE_TIMEOUT)
        for difference in self.different:
            self.problems.add(f"{self.name} ({self.state()}): {difference}")
        self.process_started = values["process_start_time_seconds"]
        return self.last_figures

    def excuse(self, fields):
        """Whether the client of an audit record may have left before it read the headers, as hostile.py does with this request. The record
        is the proof that the daemon had read the request."""
        if (fields.get("token"), fields["length"], fields["format"]) != ("hostile", str(catalogue.LEFT.length), catalogue.LEFT.format):
            return False
        self.ledger.response(200, "/key/{length}")
        self.ledger.keys(catalogue.LEFT)
        return True

    def is_equal(self):
        self.different = self.differences()
        return not self.different

    def has_records(self):
        self.audit.read()
        return not self.audit.expected

    def differences(self):
        """A sentence for each metric that differs from the clients' counts or the kernel's figures."""
        self.audit.settle(self.excuse)
        values = self.scrape()
        figures = self.last_figures = self.figures()
        limit = re.search(r"Max open files\s+(\d+)", Path(f"/proc/{self.daemon.pid}/limits").read_text())[1]
        exact = {
            **ledger.QUIET,
            "process_threads": figures["threads"],
            "process_open_fds": figures["descriptors"] + 1,  # the connection of the scrape, which is closed now
            "process_max_fds": int(limit),
            "http_connections_limit": CONNECTIONS_MAX,
            f'build_info{{commit="{self.commit}",version="{self.version}"}}': 1,
            "process_start_time_seconds": self.process_started or values["process_start_time_seconds"],
            **self.more_expected(),
        }
        found = list(self.ledger.problems(self.totals(values)))
        found += [
            f"{name}: expected {value:g}, found {values[name]:g}"
            for name, value in exact.items()
            if values.get(name) != value and not (name.startswith("tls_") and name not in values)  # which exist only with TLS
        ]
        resident = values["process_resident_memory_bytes"]
        if abs(resident - figures["resident"]) > RESIDENT_DIFFERENCE:
            found.append(f"process_resident_memory_bytes: expected about {figures['resident']}, found {resident:.0f}")
        return found

    def figures(self):
        """Resident bytes, open descriptors, threads, and bytes in the kernel's sockets."""
        return {
            "resident": self.daemon.resident("VmRSS"),
            "descriptors": len(os.listdir(f"/proc/{self.daemon.pid}/fd")),
            "threads": len(os.listdir(f"/proc/{self.daemon.pid}/task")),
            "kernel": self.daemon.socket_memory(),
        }

    def more_expected(self):
        return {}

    # Requests of the operator

    def get(self, token, path="/key/32", connection=None):
        """The status and headers of a request of the operator. `connection` is one that was open before."""
        epoch = self.epoch
        client = connection or self.connect()
        try:
            lines = [f"GET {path} HTTP/1.1", "Host: localhost"] + ([f"Authorization: Bearer {token}"] if token else [])
            client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
            status, headers, body = Answers(client).next()
        finally:
            if not connection:
                client.close()
        assert not self.overlaps(epoch), "the operator does one thing at a time"
        self.ledger.response(status, "/key/{length}")
        if status == 401:
            self.ledger.rejection("unauthorized")
        if status == 200:
            keys = catalogue.Keys(len(body), "raw")
            self.ledger.keys(keys)
            self.run.unique(catalogue.fingerprints([body], None))
            name = next(name for name, text in self.tokens.items() if text == token)
            self.audit.expect(
                headers["x-request-id"], False, token=name, address="127.0.0.1", length=len(body), format="raw", sent=(len(body),) * 2
            )
        return status, headers

    def connect(self):
        """A connection of the operator, who always sends a request on it."""
        return socket.create_connection(self.http, TIMEOUT)


SUMMED = ledger.COUNTED.keys() | ledger.AT_LEAST.keys()


class Steady(Service):
    """The daemon that never restarts: TLS, X-Forwarded-For, credentials."""

    names, connections_max = "http:credential", 8

    def __init__(self, run):
        self.certificates = 0
        super().__init__(run, "steady")
        self.credential = self.directory / "credential.sock"
        self.credential_listener = self.sockets.enter_context(socket.socket(socket.AF_UNIX))
        self.credential_listener.bind(str(self.credential))
        self.credential_listener.listen(128)
        self.renew()

    def inherited(self):
        return self.listener, self.credential_listener

    def settings(self):
        return {
            "tls-cert": str(self.directory / "cert.pem"),
            "tls-key": str(self.directory / "key.pem"),
            "max-connections-per-client": self.connections_max,
        }

    def renew(self):
        """Writes a new certificate with a new key, each renamed into place."""
        self.certificates += 1
        key, certificate = self.directory / "key.pem.new", self.directory / "cert.pem.new"
        self_signed(key, certificate, f"/CN=certificate {self.certificates}")
        self.certificate = certificate.read_text()
        for file in (certificate, key):
            file.rename(file.with_suffix(""))

    def more_expected(self):
        text = subprocess.run(
            ["openssl", "x509", "-noout", "-enddate"], input=self.certificate, check=True, capture_output=True, text=True
        ).stdout
        return {"tls_certificate_not_after_timestamp_seconds": ssl.cert_time_to_seconds(text.strip().partition("=")[2])}

    def connect(self):
        self.ledger.add("tls_handshakes_total")
        return self.run.tls.wrap_socket(super().connect())

    def served_certificate(self):
        """The certificate that a new handshake gets."""
        with self.connect() as client:
            certificate = ssl.DER_cert_to_PEM_cert(client.getpeercert(binary_form=True))
            client.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")  # the daemon has completed the handshake before it answers
            status, _, _ = Answers(client).next()
        self.ledger.response(status, "/livez")
        return certificate


class Restarting(Service):
    """The daemon that restarts: plain HTTP, PROXY protocol."""

    names = "http:metrics"

    def __init__(self, run):
        super().__init__(run, "restarting")
        self.metrics_listener = self.sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))

    def inherited(self):
        return self.listener, self.metrics_listener

    def settings(self):
        return {"proxy-protocol": True}

    def restart(self):
        """Stops the process by SIGTERM and starts the next, as systemctl restart does. Clients that connect meanwhile wait.

        A process that shuts down no longer accepts connections, but still reads the first request of those that it has accepted, for
        about 1.2 seconds. So the last scrape is after the last response to a client, except for streams that are still being read, and
        except if something was stalled. What clients have counted since is therefore only possible."""
        with contextlib.ExitStack() as stack:
            opened = time.monotonic()
            held = [stack.enter_context(socket.create_connection(self.metrics, TIMEOUT)) for _ in range(METRICS_CLIENTS)]
            last = self.scrape()  # connections are accepted in the order in which they arrived, so the held ones are
            self.epoch += 1
            begin = time.monotonic()
            self.signal(signal.SIGTERM)
            for number, client in enumerate(held):
                self.wait_until(begin + DRAIN_SCRAPE + number * SCRAPE_INTERVAL)
                try:
                    last = self.scrape(client)
                except (OSError, AssertionError) as error:
                    now, least = time.monotonic(), opened + NEW_MIN
                    if now < least or (self.asked or now) < least and not self.excuse_unread(self.epoch):
                        self.problems.add(f"{self.name}: no scrape during the drain: {error}")
                    break
                if last["http_connections"] == 0:
                    break
        self.ended()
        for _ in range(CATCH_UP_STEPS):
            self.run.over.wait(CATCH_UP_STEP)
        self.ledger.doubt(self.scraped)
        self.earlier.update({series: value for series, value in last.items() if ledger.name_of(series) in SUMMED})
        self.start()
        self.epoch += 1

    def wait_until(self, moment):
        self.run.over.wait(max(0.0, moment - time.monotonic()))

"""Three daemons, node_exporter and a Prometheus with the rules of the repository, on loopback, and what happens to them."""

import contextlib
import errno
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.parse
from pathlib import Path

from support import certificates, peers
from support.conditions import TIMEOUT, expect, until
from support.daemon import Daemon
from support.kernel import Getrandom, stopped
from support.monitoring import grafana
from support.monitoring.rules import RULES

CONNECTIONS = 32  # few, so that the test can take them all
# (seconds, requests a second)
LOAD = [(5, 100), (5, 200)]
LOAD_TO_PLOT = [(10, 50), (10, 150), (10, 300), (10, 100)]
SIZES = [1, 16, 32, 64, 256, 1024]

# The job of a daemon with TLS. The rules do not look at it.
TLS = "key-service-tls"

# In Grafana these come from the time range and from its menus.
VARIABLES = {"$__rate_interval": "15s", "$instance": ".*", "$node": ".*"}
# Data only while an alert fires, which the run brings about.
BUDGET_BURNS = "KeyServiceErrorBudgetBurn1h"
PROXY = "127.0.0.9"  # whose connections begin with a PROXY header
STRANGER = "127.0.0.8"


class Prometheus:
    """A Prometheus of the test's own, with the rules of the repository, but without the times that alerts wait for: what is
    true for a moment fires at once, and no history is asked for.

    It watches three daemons, which are treated as `story` says: `reach` goes on with that until it is so far."""

    def __init__(self, folder, stack, to_plot):
        self.folder, self.stack, self.load = folder, stack, LOAD_TO_PLOT if to_plot else LOAD
        self.config = folder / "prometheus.yml"
        settings = {"max-connections": CONNECTIONS, "head-timeout": 3600}
        self.daemon = stack.enter_context(Daemon(self.make("daemon"), settings=settings))
        node = f"127.0.0.1:{stack.enter_context(peers.HeldPort()).number}"
        self.start("prometheus-node-exporter", f"--web.listen-address={node}")
        self.broken = stack.enter_context(BrokenDaemon(self.make("broken")))
        self.others = {"node": node, TLS: self.start_tls(self.make("tls"))}
        alerts = re.sub(r"^ +for: .*\n", "", (RULES / "alerts.yml").read_text(), flags=re.M)
        (folder / "alerts.yml").write_text(re.sub(r" offset \w+\)", ")", alerts))
        self.configure()
        self.port = stack.enter_context(peers.HeldPort()).number
        self.process = self.start(
            "prometheus",
            f"--config.file={self.config}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        )
        self.passed, self.story = [], self.happens()
        stack.callback(self.story.close)

    def make(self, name):
        (self.folder / name).mkdir()
        return self.folder / name

    def start(self, *command):
        # Whatever ends this process ends that one as well.
        with open(self.folder / f"{command[0]}.log", "wb") as log:
            process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.stack.callback(peers.stop_peer, process, command[0])
        return process

    def start_tls(self, folder):
        """A daemon that exports what only TLS has. Returns where it serves metrics."""
        certificates.self_signed(folder / "key.pem", folder / "cert.pem")
        files = {"tls-cert": folder / "cert.pem", "tls-key": folder / "key.pem"}
        daemon = self.stack.enter_context(Daemon(folder, settings=files))
        expect(status(daemon, "GET /key/32 HTTP/1.1\r\nHost: localhost\r\n\r\n"), 400, "the status of plain HTTP where TLS is on")
        return daemon.metrics

    def reach(self, moment):
        """Goes on with the story to a moment of it, unless that has passed."""
        while moment not in self.passed:
            came = next(self.story, None)
            assert came, f"the story ended, or failed before, without {moment!r}; it came to {self.passed}"
            self.passed.append(came)

    def happens(self):
        """All that is done to the daemons, one after the other, and what Prometheus sees of it."""
        self.until('count(count_over_time(up{job="key-service"}[1m]) >= 2 and up{job="key-service"} == 1) == 2')
        self.until(f'count(count_over_time(up{{job=~"node|{TLS}"}}[1m]) >= 2 and up == 1) == 2')
        self.begun = time.time()
        sent = load(self.daemon, self.load)
        yield "the load is over"
        self.malformed = malformed(self.daemon)
        yield "malformed requests were sent"
        self.turned_away = exhaust(self.daemon, sent // 20)  # 5 %, where 1.44 % fire
        yield "all connections were taken"
        yield self.fires(BUDGET_BURNS)

        yield from self.broken.breaks(self)
        # Each rule has been evaluated since the last of the load.
        self.until(f'count_over_time(ALERTS{{alertname="{BUDGET_BURNS}",alertstate="firing"}}[1m]) >= 3', "three more evaluations")
        yield "all rules have data"

        yield from self.loses_a_namespace()
        peers.stop_daemon(self.broken.process, "key-service")
        yield self.fires("KeyServiceTargetDown", instance=self.broken.metrics)
        peers.stop_daemon(self.daemon.process, "key-service")
        yield self.fires("KeyServiceDown")

    def loses_a_namespace(self):
        """All of its targets, as an uninstalled release or a broken service discovery does."""
        self.reload(lost=self.daemon.metrics)
        self.until('up{namespace="lost"} == 1')
        self.reload()
        yield self.fires("KeyServiceNamespaceAbsent", namespace="lost")
        self.reload(lost=self.daemon.metrics)
        yield self.fires("KeyServiceNamespaceAbsent", False)
        self.reload()
        self.until('absent(up{namespace="lost"})')

    def fires(self, alert, does=True, **labels):
        """Waits until an alert fires, or has ended, and names that moment."""
        labels = ",".join(f'{name}="{value}"' for name, value in {"alertname": alert, "alertstate": "firing", **labels}.items())
        query = f"ALERTS{{{labels}}}"
        moment = f"{alert} {'fires' if does else 'has ended'}"
        self.until(query if does else f"absent({query})", f"the time when {moment}")
        return moment

    def configure(self, **namespaces):
        """Writes what is scraped: the daemons, and the same one again as that of a namespace."""
        targets = [{"targets": [self.daemon.metrics, self.broken.metrics]}]
        targets += [{"targets": [target], "labels": {"namespace": namespace}} for namespace, target in namespaces.items()]
        jobs = {"key-service": targets, **{job: [{"targets": [target]}] for job, target in self.others.items()}}
        self.config.write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
                    "rule_files": [str(RULES / "recording.yml"), str(self.config.with_name("alerts.yml"))],
                    "scrape_configs": [{"job_name": job, "static_configs": targets} for job, targets in jobs.items()],
                }
            )
        )

    def reload(self, **namespaces):
        self.configure(**namespaces)
        self.process.send_signal(signal.SIGHUP)

    def get(self, path, **parameters):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        with contextlib.closing(connection):
            connection.request("GET", f"{path}?{urllib.parse.urlencode(parameters)}")
            answer = json.loads(connection.getresponse().read())
        if answer["status"] != "success":
            raise ValueError(answer.get("error"))
        return answer["data"]

    def query(self, text):
        return self.get("/api/v1/query", query=text)["result"]

    def found(self, query, *when):
        """What the dashboard would be given, at a time or from one to another in steps."""
        names = ("time",) if len(when) == 1 else ("start", "end", "step")
        path = "/api/v1/query" if len(when) == 1 else "/api/v1/query_range"
        return self.get(path, query=filled(query), **dict(zip(names, when, strict=True)))["result"]

    def lacks_data(self, query):
        """The sentence that says so, or None."""
        try:
            values = [sample["value"][1] for sample in self.query(query)]
        except ValueError as error:
            return f"{error}: {query}"
        return None if any(value != "NaN" for value in values) else f"expected data, found {values or 'none'}: {query}"

    def until(self, query, what=None):
        log = self.folder / "prometheus.log"

        def is_so():
            assert self.process.poll() is None, f"prometheus ended with {self.process.returncode}:\n{log.read_text()}"
            with contextlib.suppress(OSError, ValueError):  # it is still starting
                return self.query(query)

        try:
            until(what or query, is_so)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{log.read_text()[-2000:]}") from None


class BrokenDaemon(Daemon):
    """A daemon that is treated as badly as test_adversity.py does: it audits to a log that nobody reads, gives credentials
    from a generator that fails, expects PROXY headers, and has few connections for a client."""

    def __init__(self, folder):
        self.supervisor = Getrandom()
        self.credentials = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.credentials.bind(str(folder / "credential"))
        self.credentials.listen()
        log, stderr = os.pipe()
        self.reader = open(log, "rb")  # noqa: SIM115  # closed below, or when the daemon has ended
        super().__init__(
            folder,
            config("info"),
            settings={"workers": 2},
            watchdog=1,  # how soon a worker that is blocked is found out
            inherit=[self.credentials],
            names="credential",
            stderr=open(stderr, "wb"),  # noqa: SIM115  # Daemon closes it
            **self.supervisor.hooks(),
        )

    def __exit__(self, *error):
        with contextlib.closing(self.reader), self.credentials:
            super().__exit__(*error)

    def configure(self, level):
        (self.directory / "config.toml").write_text(config(level))

    def breaks(self, prometheus):
        """One thing after the other, and for each an alert."""

        def fires(alert, does=True):
            return prometheus.fires(alert, does, instance=self.metrics)

        self.configure("loud")
        yield fires("KeyServiceReloadRefused")
        self.configure("warn")
        yield fires("KeyServiceReloadRefused", False)

        with contextlib.ExitStack() as held:
            for _ in range(24):  # 2, 8 more that get a 503, and those that are closed
                held.enter_context(self.connect(STRANGER))
            yield fires("KeyServiceClientConnectionsExhausted")

        with self.connect(PROXY) as connection:
            connection.sendall(b"GET /key/32 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                connection.recv(1)
        yield fires("KeyServiceProxyProtocolErrors")

        self.reader.close()  # a write to the log fails from now on
        status(self, "GET /key/32 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        for alert in ("KeyServiceAuditRecordsDropped", "KeyServiceLogWriteErrors"):
            yield fires(alert)

        workers = [int(task.name) for task in Path(f"/proc/{self.pid}/task").iterdir() if (task / "comm").read_text() == "worker\n"]
        with stopped(workers[:1]):
            yield fires("KeyServiceWorkersStalled")
        yield fires("KeyServiceWorkersStalled", False)

        self.supervisor.answer = lambda length: -errno.EPERM
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as unit:  # as systemd does for LoadCredential=
            unit.bind(f"\0{os.getpid():x}/unit/web.service/key")
            unit.connect(str(self.directory / "credential"))
            while unit.recv(1 << 16):
                pass
        for alert in ("KeyServiceGeneratorFailed", "KeyServiceCredentialsFailed"):
            yield fires(alert)


# The moments of the story at which an alert fires or has ended, in their order.
MOMENTS = [
    f"{BUDGET_BURNS} fires",
    "KeyServiceReloadRefused fires",
    "KeyServiceReloadRefused has ended",
    "KeyServiceClientConnectionsExhausted fires",
    "KeyServiceProxyProtocolErrors fires",
    "KeyServiceAuditRecordsDropped fires",
    "KeyServiceLogWriteErrors fires",
    "KeyServiceWorkersStalled fires",
    "KeyServiceWorkersStalled has ended",
    "KeyServiceGeneratorFailed fires",
    "KeyServiceCredentialsFailed fires",
]
LAST_MOMENTS = [
    "KeyServiceNamespaceAbsent fires",
    "KeyServiceNamespaceAbsent has ended",
    "KeyServiceTargetDown fires",
    "KeyServiceDown fires",
]


def config(level):
    """What the broken daemon reads."""
    return f'audit = true\nlog-level = "{level}"\nmax-connections-per-client = 2\nproxy-protocol = true\ntrusted-proxies = ["{PROXY}"]\n'


def filled(query):
    """A query of the dashboard as Grafana would send it, with the job that has such metrics."""
    query = query.replace("$job", TLS if re.search(r"\btls_", query) else "key-service")
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    return query


def queries(panel):
    """What a panel asks, and each part of that: a fallback such as «or vector(0)» would hide that what stands before it is wrong."""
    wholes = [filled(target["expr"]) for target in panel.get("targets", [])]
    return [part for query in wholes for part in [query, *query.split(" or ")]]


def panels():
    """The panels that show something, by their titles."""
    return {panel["title"]: panel for panel in grafana.panels(grafana.dashboard()["panels"]) if panel["type"] != "row"}


def load(daemon, phases):
    """Keys of several sizes and what is not there, on one connection, at a given pace. Returns how many requests."""
    paths = [f"/key/{size}" for size in SIZES] * 3 + ["/health", "/key/0", "/nothing", "/key/999999999"]
    connection, sent = http.client.HTTPConnection(daemon.authority, timeout=TIMEOUT), 0
    for length, pace in phases:
        first = time.monotonic()
        for number in range(length * pace):
            time.sleep(max(0, first + number / pace - time.monotonic()))
            connection.request("GET", paths[sent % len(paths)])
            connection.getresponse().read()
            sent += 1
    connection.close()
    return sent


def malformed(daemon):
    """The statuses of what can't be answered, and of what can."""
    paths = ("/key/32", "/key/0", "/nothing", "/key/2048")
    statuses = {path: status(daemon, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") for path in paths}
    return {**statuses, "no Host": status(daemon, "GET /key/32 HTTP/1.1\r\n\r\n")}


def exhaust(daemon, count):
    """Takes every slot, then asks `count` times for a key. Returns the statuses."""
    limit = time.monotonic() + TIMEOUT
    with contextlib.ExitStack() as stack:
        held = []
        while len(held) < CONNECTIONS and time.monotonic() < limit:
            connection = stack.enter_context(daemon.connect())
            # With the beginning of another request: an idle connection would make room for a new one.
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\nGET ")
            # Whoever has no place is told so; the one of a client that has just left is freed a moment after its end is seen.
            if b"\r\nconnection: close\r\n" in connection.recv(4096):
                connection.close()
            else:
                held.append(connection)
        request = "GET /key/32 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        return [status(daemon, request) for _ in range(count)]


def status(daemon, request):
    with daemon.connect() as connection:
        connection.sendall(request.encode())
        return int(connection.recv(4096).split(b" ")[1])

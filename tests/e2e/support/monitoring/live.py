"""Three daemons, node_exporter and a Prometheus with the repository's rules, on loopback, and the scenario that they go through."""

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
from support.conditions import TIMEOUT, expect, retry_if_stalled, until
from support.daemon import Daemon
from support.kernel import Getrandom, stopped
from support.monitoring import grafana
from support.monitoring.rules import RULES

CONNECTIONS = 32  # few, so that the test can use all of them
# (seconds, requests a second)
LOAD = [(5, 100), (5, 200)]
LOAD_TO_PLOT = [(10, 50), (10, 150), (10, 300), (10, 100)]
SIZES = [1, 16, 32, 64, 256, 1024]

# The job of the daemon with TLS. No rule selects it.
TLS = "key-service-tls"

# Grafana sets these from the time range and its menus.
VARIABLES = {"$__rate_interval": "15s", "$instance": ".*", "$node": ".*"}
# The dashboard has a query that returns data only while an alert fires, so the scenario makes this one fire.
BUDGET_BURNS = "KeyServiceErrorBudgetBurn1h"
PROXY = "127.0.0.9"  # a trusted proxy: its connections must begin with a PROXY header
STRANGER = "127.0.0.8"


class Prometheus:
    """A Prometheus with the repository's rules, but without their `for:` and `offset`: an alert fires as soon as its expression is
    true, and requires no history.

    It scrapes three daemons. `scenario` generates what happens to them; `reach` advances it to a given moment."""

    def __init__(self, directory, stack, to_plot):
        self.directory, self.stack, self.load = directory, stack, LOAD_TO_PLOT if to_plot else LOAD
        self.config = directory / "prometheus.yml"
        settings = {"max-connections": CONNECTIONS, "head-timeout": 3600}
        self.daemon = stack.enter_context(Daemon(self.make("daemon"), settings=settings))
        node = f"127.0.0.1:{stack.enter_context(peers.HeldPort()).number}"
        self.start("prometheus-node-exporter", f"--web.listen-address={node}")
        self.broken = stack.enter_context(BrokenDaemon(self.make("broken")))
        self.others = {"node": node, TLS: self.start_tls(self.make("tls"))}
        alerts = re.sub(r"^ +for: .*\n", "", (RULES / "alerts.yml").read_text(), flags=re.M)
        (directory / "alerts.yml").write_text(re.sub(r" offset \w+\)", ")", alerts))
        self.configure()
        self.port = stack.enter_context(peers.HeldPort()).number
        self.process = self.start(
            "prometheus",
            f"--config.file={self.config}",
            f"--storage.tsdb.path={directory / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        )
        self.passed, self.scenario = [], self.run_scenario()
        stack.callback(self.scenario.close)

    def make(self, name):
        (self.directory / name).mkdir()
        return self.directory / name

    def start(self, *command):
        # --pdeathsig: when this process ends, for whatever reason, that one is killed.
        with open(self.directory / f"{command[0]}.log", "wb") as log:
            process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.stack.callback(peers.stop_peer, process, command[0])
        return process

    def start_tls(self, directory):
        """Starts a daemon that exports the metrics of TLS. Returns the address of its metrics."""
        certificates.self_signed(directory / "key.pem", directory / "cert.pem")
        files = {"tls-cert": directory / "cert.pem", "tls-key": directory / "key.pem"}
        daemon = self.stack.enter_context(Daemon(directory, settings=files))
        expect(status(daemon, "GET /key/32 HTTP/1.1\r\nHost: localhost\r\n\r\n"), 400, "status of plain HTTP on a TLS port")
        return daemon.metrics

    def reach(self, moment):
        """Advances the scenario to a moment, unless that has passed."""
        while moment not in self.passed:
            reached = next(self.scenario, None)
            assert reached, f"the scenario ended or had failed before {moment!r}; it reached {self.passed}"
            self.passed.append(reached)

    def run_scenario(self):
        """Does one thing after the other to the daemons, waits until Prometheus sees it, and yields the name of that moment."""
        self.until('count(count_over_time(up{job="key-service"}[1m]) >= 2 and up{job="key-service"} == 1) == 2')
        self.until(f'count(count_over_time(up{{job=~"node|{TLS}"}}[1m]) >= 2 and up == 1) == 2')
        self.start_time = time.time()
        sent = load(self.daemon, self.load)
        yield "the load is over"
        self.invalid = send_invalid(self.daemon)
        yield "invalid requests were sent"
        self.turned_away = exhaust(self.daemon, sent // 20)  # 5 %; the alert fires at 1.44 %
        yield "all connections are in use"
        yield self.fires(BUDGET_BURNS)

        yield from self.broken.breaks(self)
        # Each rule must have been evaluated since the end of the load.
        self.until(f'count_over_time(ALERTS{{alertname="{BUDGET_BURNS}",alertstate="firing"}}[1m]) >= 3', "three more evaluations")
        yield "all rules have data"

        yield from self.loses_a_namespace()
        peers.stop_daemon(self.broken.process, "key-service")
        yield self.fires("KeyServiceTargetDown", instance=self.broken.metrics)
        peers.stop_daemon(self.daemon.process, "key-service")
        yield self.fires("KeyServiceDown")

    def loses_a_namespace(self):
        """Removes all targets of a namespace, as an uninstalled release or a broken service discovery does."""
        self.reload(lost=self.daemon.metrics)
        self.until('up{namespace="lost"} == 1')
        self.reload()
        yield self.fires("KeyServiceNamespaceAbsent", namespace="lost")
        self.reload(lost=self.daemon.metrics)
        yield self.fires("KeyServiceNamespaceAbsent", False)
        self.reload()
        self.until('absent(up{namespace="lost"})')

    def fires(self, alert, does=True, **labels):
        """Waits until an alert fires, or has ended, and returns the name of that moment."""
        labels = ",".join(f'{name}="{value}"' for name, value in {"alertname": alert, "alertstate": "firing", **labels}.items())
        query = f"ALERTS{{{labels}}}"
        moment = f"{alert} {'fires' if does else 'has ended'}"
        self.until(query if does else f"absent({query})", f"the moment when {moment}")
        return moment

    def configure(self, **namespaces):
        """Writes the targets: the daemons, and for each given namespace the same daemon once more, with that label."""
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
        """The data that the dashboard would get, at a time, or over a range in steps."""
        names = ("time",) if len(when) == 1 else ("start", "end", "step")
        path = "/api/v1/query" if len(when) == 1 else "/api/v1/query_range"
        return self.get(path, query=filled(query), **dict(zip(names, when, strict=True)))["result"]

    def missing_data(self, query):
        """An error message if the query returns no data, otherwise None."""
        try:
            values = [sample["value"][1] for sample in self.query(query)]
        except ValueError as error:
            return f"{error}: {query}"
        return None if any(value != "NaN" for value in values) else f"expected data, found {values or 'none'}: {query}"

    def until(self, query, what=None):
        log = self.directory / "prometheus.log"

        def has_result():
            assert self.process.poll() is None, f"prometheus ended with {self.process.returncode}:\n{log.read_text()}"
            with contextlib.suppress(OSError, ValueError):  # Prometheus is still starting
                return self.query(query)

        try:
            until(what or query, has_result)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{log.read_text()[-2000:]}") from None


class BrokenDaemon(Daemon):
    """A daemon that is put through failures, as in test_adversity.py: it writes audit records to a log that nobody reads, serves
    credentials from a generator that fails, expects PROXY headers, and allows few connections per client."""

    def __init__(self, directory):
        self.supervisor = Getrandom()
        self.credentials = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.credentials.bind(str(directory / "credential"))
        self.credentials.listen()
        log, stderr = os.pipe()
        self.reader = open(log, "rb")  # noqa: SIM115  # closed below, or when the daemon has ended
        super().__init__(
            directory,
            config("info"),
            settings={"workers": 2},
            watchdog=1,  # seconds until a blocked worker is detected
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
        """Causes one failure after the other, and waits for the alert of each."""

        def fires(alert, does=True):
            return prometheus.fires(alert, does, instance=self.metrics)

        self.configure("loud")
        yield fires("KeyServiceReloadRefused")
        self.configure("warn")
        yield fires("KeyServiceReloadRefused", False)

        with contextlib.ExitStack() as held:
            for _ in range(24):  # 2 are served, 8 more get a 503, the others are closed
                held.enter_context(self.connect(STRANGER))
            yield fires("KeyServiceClientConnectionsExhausted")

        with self.connect(PROXY) as connection:
            connection.sendall(b"GET /key/32 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                connection.recv(1)
        yield fires("KeyServiceProxyProtocolErrors")

        self.reader.close()  # from now on, writes to the log fail
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


# The moments of the scenario at which an alert fires or has ended, in order.
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
    """The configuration of the broken daemon."""
    return f'audit = true\nlog-level = "{level}"\nmax-connections-per-client = 2\nproxy-protocol = true\ntrusted-proxies = ["{PROXY}"]\n'


def filled(query):
    """A query of the dashboard as Grafana would send it, with the job that exports its metrics."""
    query = query.replace("$job", TLS if re.search(r"\btls_", query) else "key-service")
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    return query


def queries(panel):
    """The queries of a panel, and each operand of "or": a fallback such as "or vector(0)" would hide an error in the other operand."""
    wholes = [filled(target["expr"]) for target in panel.get("targets", [])]
    return [part for query in wholes for part in [query, *query.split(" or ")]]


def panels():
    """All panels except rows, by title."""
    return {panel["title"]: panel for panel in grafana.panels(grafana.dashboard()["panels"]) if panel["type"] != "row"}


def load(daemon, phases):
    """Requests keys of several sizes, and invalid paths, on one connection at the given rates. Returns the number of requests."""
    paths = [f"/key/{size}" for size in SIZES] * 3 + ["/health", "/key/0", "/nothing", "/key/999999999"]
    connection, sent = http.client.HTTPConnection(daemon.authority, timeout=TIMEOUT), 0
    for duration, rate in phases:
        first = time.monotonic()
        for number in range(duration * rate):
            time.sleep(max(0, first + number / rate - time.monotonic()))
            connection.request("GET", paths[sent % len(paths)])
            connection.getresponse().read()
            sent += 1
    connection.close()
    return sent


def send_invalid(daemon):
    """Sends a valid request and several invalid ones. Returns their statuses."""
    paths = ("/key/32", "/key/0", "/nothing", "/key/2048")
    statuses = {path: status(daemon, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") for path in paths}
    return {**statuses, "no Host": status(daemon, "GET /key/32 HTTP/1.1\r\n\r\n")}


def exhaust(daemon, count):
    """Uses all connections, then requests a key `count` times. Returns the statuses."""
    limit = time.monotonic() + TIMEOUT
    with contextlib.ExitStack() as stack:
        held = []
        while len(held) < CONNECTIONS and time.monotonic() < limit:
            connection = stack.enter_context(daemon.connect())
            # The beginning of a second request keeps the connection busy: an idle one would be closed for a new one.
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\nGET ")
            # An over-limit connection gets "Connection: close". The slot of a closed connection is released a moment later.
            # It gets no response, and is closed, if this process was stalled for a second before the request.
            response = connection.recv(4096)
            if not response or b"\r\nconnection: close\r\n" in response:
                connection.close()
            else:
                held.append(connection)
        request = "GET /key/32 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        return [status(daemon, request) for _ in range(count)]


def status(daemon, request):
    def attempt():
        with daemon.connect() as connection:
            connection.sendall(request.encode())
            response = connection.recv(4096)
            assert response, "the connection was closed without a response"
            return int(response.split(b" ")[1])

    return retry_if_stalled(attempt)

#!/usr/bin/env python3
"""Checks the rules, the runbooks and the dashboard with real tools, on real data.

    tests/monitoring/run           all checks
    tests/monitoring/run --plot    the same with a longer run, in which the dashboard is drawn into docs/dashboard.svg

promtool checks the rules and runs their cases. Then three daemons, one of them under load, node_exporter and a Prometheus
with these rules run on loopback; every query of the dashboard must return data, and alerts must fire, and end, when clients
are refused and when the second daemon is treated badly. The rules of that run have no "for:" and ask for no history.
Beside that, debian.py does what docs/monitoring.md says, in namespaces of its own, and grafana.py holds the dashboard to Grafana's
schema.

Needs Debian's prometheus, prometheus-alertmanager and prometheus-node-exporter, as they are installed, unshare (util-linux),
ip (iproute2), openssl, nodejs and npm, and root or unprivileged user namespaces. The daemon is $KEY_SERVICE_BIN, else
what is built in target/, else it is built.
"""
import contextlib
import errno
import http.client
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from contextlib import ExitStack
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY / "tests/common"))
sys.dont_write_bytecode = True
import certificates  # noqa: E402
import grafana  # noqa: E402
import peers  # noqa: E402
import picture  # noqa: E402
from daemon import PATIENCE, binary, environment  # noqa: E402

RULES = REPOSITORY / "helm-chart/files"
DASHBOARD = REPOSITORY / "helm-chart/files/dashboard.json"
RUNBOOKS = REPOSITORY / "docs/runbooks.md"
GUIDE = REPOSITORY / "docs/monitoring.md"
PICTURE = REPOSITORY / "docs/dashboard.svg"
RUNBOOK_URL = "https://github.com/key-service/key-service/blob/main/docs/runbooks.md#"

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
FIRES = "KeyServiceErrorBudgetBurn1h"
PROXY = "127.0.0.9"  # whose connections begin with a PROXY header
STRANGER = "127.0.0.8"

# Its end is the end of all that it starts.
UNSHARE = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--net", "--mount", "--pid", "--fork",
           "--kill-child", "sh", "-ec", 'ip link set lo up && mount -t proc proc /proc && exec "$@"', "sh"]

results = {True: 0, False: 0}


class Stuck(Exception):
    """What keeps the run from going on, as a sentence."""


def check(what, problems):
    """Counts one check; `problems` are sentences, none if it passes."""
    problems = [problem for problem in problems if problem]
    results[not problems] += 1
    print(f"{'FAIL' if problems else 'ok  '} {what}", flush=True)
    for problem in problems:
        print("       " + problem.strip().replace("\n", "\n       "))


def finish():
    print(f"{results[True]} passed, {results[False]} failed")
    sys.exit(1 if results[False] or not results[True] else 0)


def main():
    if sys.argv[1:] not in ([], ["--plot"]):
        sys.exit(__doc__)
    plotting = sys.argv[1:] == ["--plot"]
    needed = {"promtool": "prometheus", "prometheus": "prometheus", "prometheus-node-exporter": "prometheus-node-exporter",
              "prometheus-alertmanager": "prometheus-alertmanager", "amtool": "prometheus-alertmanager",
              "unshare": "util-linux", "ip": "iproute2", "openssl": "openssl", "node": "nodejs", "npm": "npm"}
    missing = sorted({package for tool, package in needed.items() if not shutil.which(tool)})
    if missing:
        check("tools", [f"apt-get install --no-install-recommends {' '.join(missing)}"])
        finish()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="key-service-monitoring-")))
        cases = Cases(folder / "cases", RULES / "alerts.yml")  # in the background: it takes CPU, the run takes time
        stack.callback(cases.stop)
        guided = subprocess.Popen([*UNSHARE, sys.executable, Path(__file__).parent / "debian.py"], stdin=subprocess.DEVNULL,
                                  stdout=(folder / "debian.log").open("w"), stderr=subprocess.STDOUT)
        stack.enter_context(peers.killed_after(guided, "debian.py"))
        (folder / "grafana").mkdir()
        check("the dashboard is what Grafana's schema says", grafana.problems(json.loads(DASHBOARD.read_text()), folder / "grafana"))
        check("promtool check rules", promtool("check", "rules", RULES / "recording.yml", RULES / "alerts.yml"))
        try:
            live(folder, stack, plotting)
        except Stuck as stuck:
            check("the run on real data comes to its end", [str(stuck)])
        try:
            check("promtool test rules", [] if cases.wait() == 0 else [cases.output])
        except Stuck as stuck:
            check("promtool test rules", [str(stuck)])
        status = guided.wait()  # it has deadlines of its own
        check(f"{GUIDE.relative_to(REPOSITORY)} on Debian, up to the mail of an alert",
              [] if status == 0 else [(folder / "debian.log").read_text()])
    finish()


def promtool(*arguments, given=None):
    done = subprocess.run(["promtool", *map(str, arguments)], input=given, capture_output=True, text=True, timeout=PATIENCE)
    return [] if done.returncode == 0 else [done.stdout + done.stderr]


class Cases:
    """promtool test rules on all cases, in the background: alerts.yml and recording.yml, or the given broken alerts."""

    def __init__(self, folder, alerts):
        (folder / "helm-chart/files").mkdir(parents=True)
        (folder / "tests/monitoring").mkdir(parents=True)
        if isinstance(alerts, Path):
            shutil.copy(RULES / "recording.yml", folder / "helm-chart/files")
            shutil.copy(alerts, folder / "helm-chart/files/alerts.yml")
        else:  # YAML holds JSON; alerts that read nothing need no recording rules, which take most of the time
            (folder / "helm-chart/files/recording.yml").write_text('{"groups": []}')
            (folder / "helm-chart/files/alerts.yml").write_text(json.dumps(alerts))
        files = [shutil.copy(path, folder / "tests/monitoring")
                 for path in sorted(Path(__file__).parent.glob("*.test.yml"))]
        self.log = folder / "output"
        self.process = subprocess.Popen(["promtool", "test", "rules", *files], stdout=self.log.open("w"),
                                        stderr=subprocess.STDOUT)

    def wait(self):
        try:
            return self.process.wait(timeout=5 * PATIENCE)
        except subprocess.TimeoutExpired:
            raise Stuck(f"promtool did not finish within {5 * PATIENCE} s") from None

    def stop(self):
        peers.stop_peer(self.process, "promtool")

    @property
    def output(self):
        return self.log.read_text()


def live(folder, stack, plotting):
    """The daemon, node_exporter and Prometheus, under load; then all that is asked of Prometheus."""
    daemon, keys, metrics = start_daemon(folder, stack)
    node = f"127.0.0.1:{stack.enter_context(peers.HeldPort()).number}"
    start(stack, folder / "node_exporter.log", "prometheus-node-exporter", f"--web.listen-address={node}")
    broken = BrokenDaemon(folder / "broken", stack)
    prometheus = Prometheus(folder, stack, [metrics, broken.metrics], {"node": node, TLS: start_tls(folder / "tls", stack)})

    prometheus.until('count(count_over_time(up{job="key-service"}[1m]) >= 2 and up{job="key-service"} == 1) == 2')
    prometheus.until(f'count(count_over_time(up{{job=~"node|{TLS}"}}[1m]) >= 2 and up == 1) == 2')
    begun = time.time()
    sent = load(keys, LOAD_TO_PLOT if plotting else LOAD)
    check("what can't be answered is refused", refuse_malformed(keys))
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=PATIENCE) as response:
        text = response.read().decode()
        check("promtool check metrics", promtool("check", "metrics", given=text))
        check("each metric is in a rule, a panel or the guide", unused(text))
    check("connections above the limit are told 503", exhaust(keys, sent // 20))  # 5 %, where 1.44 % fire
    prometheus.until(f'ALERTS{{alertname="{FIRES}",alertstate="firing"}}', f"{FIRES} to fire")
    broken.breaks(prometheus)
    # Each rule has been evaluated since the last of the load.
    prometheus.until(f'count_over_time(ALERTS{{alertname="{FIRES}",alertstate="firing"}}[1m]) >= 3', "three more evaluations")

    groups = prometheus.get("/api/v1/rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    check("no rule fails on real data", [f"{rule['name']}: {rule['health']} {rule.get('lastError', '')}"
                                        for rule in rules if rule["health"] != "ok"])
    alerts = [rule for rule in rules if rule["type"] == "alerting"]
    annotations(alerts)
    guide(alerts, [rule["name"] for rule in rules if rule["type"] == "recording"])
    dashboard(prometheus)
    if plotting:
        PICTURE.write_text(picture.draw(json.loads(DASHBOARD.read_text()), prometheus.found, begun, time.time()))
        check(f"{PICTURE.relative_to(REPOSITORY)} is drawn", [])
    cases_tell(folder, stack, groups)
    check("the daemon is still there", [f"it ended with {daemon.poll()}" if daemon.poll() is not None else ""])
    prometheus.loses_a_namespace(metrics)
    peers.stop_daemon(broken.process, "key-service")
    prometheus.fires("KeyServiceTargetDown", instance=broken.metrics)
    peers.stop_daemon(daemon, "key-service")
    prometheus.fires("KeyServiceDown")


def unused(text):
    """Metrics that nobody looks at: each is in a rule, in a panel, or in a sentence that says why not."""
    readers = "".join(path.read_text() for path in [RULES / "recording.yml", RULES / "alerts.yml", DASHBOARD, GUIDE])
    names = re.findall(r"^# TYPE (\w+)", text, re.M)
    return [f"{name}: expected it in a rule, a panel or {GUIDE.name}" for name in names if not re.search(rf"\b{name}(_|\b)", readers)]


def annotations(alerts):
    """What every alert has to say, and where it leads."""
    anchors = re.findall(r"^#+ (.+)$", RUNBOOKS.read_text(), re.M)
    anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in anchors]  # as GitHub makes them
    problems = []
    for alert in alerts:
        name, notes = alert["name"], alert["annotations"]
        if alert["labels"].get("severity") not in ("critical", "warning", "info"):
            problems.append(f"{name}: expected severity critical, warning or info, found {alert['labels']}")
        problems += [f"{name}: no {note}" for note in ("summary", "description") if not notes.get(note)]
        if notes.get("runbook_url") != RUNBOOK_URL + name.lower():
            problems.append(f"{name}: expected runbook_url {RUNBOOK_URL}{name.lower()}, found {notes.get('runbook_url')}")
        if name.lower() not in anchors:
            problems.append(f"{name}: no section «## {name}» in {RUNBOOKS.relative_to(REPOSITORY)}")
    names = {alert["name"].lower() for alert in alerts}
    problems += [f"{RUNBOOKS.name}: a section for {anchor}, which is no alert"
                 for anchor in anchors if anchor.startswith("keyservice") and anchor not in names]
    problems += [f"{RUNBOOKS.name}: {anchor} is there twice" for anchor in set(anchors) if anchors.count(anchor) > 1]
    check(f"{len(alerts)} alerts say how bad, what, and where the runbook is", problems or ([] if alerts else ["no alerts"]))


def guide(alerts, records):
    """docs/monitoring.md has a table of the alerts, and names the recording rules."""
    text = GUIDE.read_text() if GUIDE.exists() else ""
    rows = dict(re.findall(r"^\| \[(\w+)\]\(runbooks\.md#\w+\) \| (\w+) \| .+ \|$", text, re.M))
    alerts = {alert["name"]: alert["labels"].get("severity") for alert in alerts}
    problems = [f"{name}: expected a row with severity {severity}, found {rows.get(name)}"
                for name, severity in alerts.items() if rows.get(name) != severity]
    problems += [f"{name}: a row for what is no alert" for name in rows if name not in alerts]
    # One row may stand for all windows of a rule.
    named = set(re.findall(r"`([\w:]+?)(?:\d+[mhd])?`", text))
    problems += [f"{name}: not in the table of recording rules" for name in sorted(set(records))
                 if re.sub(r"\d+[mhd]$", "", name) not in named]
    check(f"{GUIDE.relative_to(REPOSITORY)} has every alert and recording rule", problems)


def dashboard(prometheus):
    """Every query of every panel returns data."""
    queries = 0
    for panel in panels(json.loads(DASHBOARD.read_text())["panels"]):
        if panel["type"] == "row":
            continue
        problems = [] if panel.get("targets") else ["no query"]
        for target in panel.get("targets", []):
            query = filled(target["expr"])
            # A fallback such as «or vector(0)» would hide that what stands before it is wrong.
            for part in [query, *query.split(" or ")]:
                queries += 1
                problems.append(prometheus.lacks_data(part))
        check(f"panel «{panel['title']}»", dict.fromkeys(problems))
    check(f"{queries} queries were asked", ["expected some"] if not queries else [])


def filled(query):
    """A query of the dashboard as Grafana would send it, with the job that has such metrics."""
    query = query.replace("$job", TLS if re.search(r"\btls_", query) else "key-service")
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    return query


def panels(found):
    for panel in found:
        yield panel
        yield from panels(panel.get("panels", []))


def cases_tell(folder, stack, groups):
    """Breaks the alerts, to see that the cases notice: for each alert one in which it fires, one in which it is quiet, and
    one in which it ends: it fires, and later does not. An alert that never ends fails that one."""
    groups = [group for group in groups if any(rule["type"] == "alerting" for rule in group["rules"])]
    names = {rule["name"] for group in groups for rule in group["rules"]}

    def broken(expression):
        return {"groups": [{"name": group["name"], "rules": [
            {"alert": rule["name"], "expr": expression, "labels": rule["labels"]} for rule in group["rules"]
        ]} for group in groups]}

    def failed(name, expression):
        run = Cases(folder / name, broken(expression))
        stack.callback(run.stop)
        run.wait()
        found, file = [], ""
        for path, case, alert, at, expected in re.findall(
                r"^Unit Testing: +(\S+)$|^    name: (.*?),\n    alertname: ?(\w+), time: (\w+),\s+exp:\[(.*?)\],?\s",
                run.output, re.S | re.M):
            file = Path(path).name or file
            if alert:
                found.append((alert, (file, case), seconds(at), bool(expected.strip())))
        return found, run.output

    def complain(what, noticed, sentence, found, output):
        check(what, [f"{name}: {sentence}" for name in sorted(names - noticed)] + ([] if found else [output[:2000]]))

    quiet, output = failed("never", "vector(1) == 0")
    fires = [(alert, case, at) for alert, case, at, expected in quiet if expected]
    complain("every alert has a case in which it fires", {alert for alert, *_ in fires}, "no case notices that it never fires",
             quiet, output)
    loud, output = failed("always", "vector(1)")
    ends = [(alert, case, at) for alert, case, at, expected in loud if not expected]
    complain("every alert has a case in which it is quiet", {alert for alert, *_ in ends}, "no case notices that it always fires",
             loud, output)
    ended = {alert for alert, case, at in ends if any(each[:2] == (alert, case) and each[2] < at for each in fires)}
    complain("every alert has a case in which it ends", ended, "no case notices that it never ends", loud, output)


def seconds(duration):
    """Of a duration as Prometheus writes it: 1h2m."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([dhms])", duration))


class Prometheus:
    """A Prometheus of the test's own, with the rules of the repository, but without the times that alerts wait for: what is
    true for a moment fires at once, and no history is asked for."""

    def __init__(self, folder, stack, daemons, others):
        self.config, self.daemons, self.others = folder / "prometheus.yml", daemons, others
        alerts = re.sub(r"^ +for: .*\n", "", (RULES / "alerts.yml").read_text(), flags=re.M)
        (folder / "alerts.yml").write_text(re.sub(r" offset \w+\)", ")", alerts))
        config = self.configure()
        self.port, self.log = stack.enter_context(peers.HeldPort()).number, folder / "prometheus.log"
        self.process = start(stack, self.log, "prometheus", f"--config.file={config}",
                             f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address=127.0.0.1:{self.port}")

    def configure(self, **namespaces):
        """Writes what is scraped: the daemons, and the same one again as that of a namespace."""
        targets = [{"targets": self.daemons}]
        targets += [{"targets": [target], "labels": {"namespace": namespace}} for namespace, target in namespaces.items()]
        self.config.write_text(json.dumps({
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES / "recording.yml"), str(self.config.with_name("alerts.yml"))],
            "scrape_configs": [{"job_name": "key-service", "static_configs": targets},
                               *({"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in self.others.items())],
        }))
        return self.config

    def reload(self, **namespaces):
        self.configure(**namespaces)
        self.process.send_signal(signal.SIGHUP)

    def loses_a_namespace(self, target):
        """All of its targets, as an uninstalled release or a broken service discovery does."""
        self.reload(lost=target)
        self.until('up{namespace="lost"} == 1')
        self.reload()
        self.fires("KeyServiceNamespaceAbsent", namespace="lost")
        self.reload(lost=target)
        self.fires("KeyServiceNamespaceAbsent", False)
        self.reload()
        self.until('absent(up{namespace="lost"})')

    def fires(self, alert, does=True, **labels):
        """Checks that an alert fires, or has ended."""
        labels = ",".join(f'{name}="{value}"' for name, value in {"alertname": alert, "alertstate": "firing", **labels}.items())
        query = f"ALERTS{{{labels}}}"
        what = f"{alert} {'fires' if does else 'has ended'}"
        self.until(query if does else f"absent({query})", f"the time when {what}")
        check(what, [])

    def get(self, path, **parameters):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET", f"{path}?{urllib.parse.urlencode(parameters)}")
        answer = json.loads(connection.getresponse().read())
        connection.close()
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
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise Stuck(f"prometheus ended with {self.process.returncode}:\n{self.log.read_text()}")
            try:
                if self.query(query):
                    return
            except (OSError, ValueError):  # it is still starting
                pass
            time.sleep(0.1)
        raise Stuck(f"waited {PATIENCE} s in vain for {what or query}\n{self.log.read_text()[-2000:]}")


class BrokenDaemon:
    """A daemon that is treated as badly as tests/adversity/run does: it audits to a log that nobody reads, gives credentials
    from a generator that fails, expects PROXY headers, and has few connections for a client."""

    def __init__(self, folder, stack):
        folder.mkdir()
        self.folder, self.config = folder, folder / "config.toml"
        self.adversity = adversity()
        self.configure("info")
        manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.bind(str(folder / "notify"))
        manager.settimeout(PATIENCE)
        credentials = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        credentials.bind(str(folder / "credential"))
        credentials.listen()
        self.supervisor = self.adversity.Getrandom()
        log, stderr = os.pipe()
        self.log = stack.enter_context(open(log, "rb"))
        # The watchdog's limit is how soon a worker that is blocked is found out.
        variables = environment() | {"NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": "1000000", "LISTEN_FDS": "1",
                                     "LISTEN_FDNAMES": "credential", "KEYSERVICE_WORKERS": "2"}
        self.process = subprocess.Popen(
            ["sh", "-c", 'exec 3<&0 && exec "$@" </dev/null', "sh", binary(), "--config", str(self.config), "--host", "127.0.0.1",
             "--srv-port", "0", "--metrics-port", "0"],
            stdin=credentials, stdout=subprocess.DEVNULL, stderr=stderr, env=variables, preexec_fn=self.supervisor.install)
        os.close(stderr)
        stack.push(lambda kind, error, trace: peers.stop_daemon(self.process, "key-service", error)
                   if self.process.poll() is None else None)
        self.supervisor.start()
        addresses = re.search(r"^STATUS=Keys on ([^;]+);.* metrics on (.+)$", manager.recv(4096).decode(), re.M)
        if not addresses:
            raise Stuck("the second daemon did not get ready")
        self.keys, self.metrics = addresses.groups()

    def configure(self, level):
        self.config.write_text(f'audit = true\nlog-level = "{level}"\nmax-connections-per-client = 2\n'
                               f'proxy-protocol = true\ntrusted-proxies = ["{PROXY}"]\n')
        self.config.chmod(0o644)  # whatever the umask is

    def breaks(self, prometheus):
        """One thing after the other, and for each an alert."""
        def fires(alert, does=True):
            prometheus.fires(alert, does, instance=self.metrics)

        self.configure("loud")
        fires("KeyServiceReloadRefused")
        self.configure("warn")
        fires("KeyServiceReloadRefused", False)

        host, port = self.keys.split(":")
        with contextlib.ExitStack() as held:
            for _ in range(24):  # 2, 8 more that get a 503, and those that are closed
                held.enter_context(peers.connect((host, int(port)), PATIENCE, STRANGER))
            fires("KeyServiceClientConnectionsExhausted")

        with peers.connect((host, int(port)), PATIENCE, PROXY) as connection:
            connection.sendall(b"GET /key/32 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                connection.recv(1)
        fires("KeyServiceProxyProtocolErrors")

        self.log.close()  # a write to it fails from now on
        status(self.keys, "GET /key/32 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        for alert in ("KeyServiceAuditRecordsDropped", "KeyServiceLogWriteErrors"):
            fires(alert)

        workers = [int(task.name) for task in Path(f"/proc/{self.process.pid}/task").iterdir()
                   if (task / "comm").read_text() == "worker\n"]
        with self.adversity.stopped(workers[:1]):
            fires("KeyServiceWorkersStalled")
        fires("KeyServiceWorkersStalled", False)

        self.supervisor.answer = lambda length: -errno.EPERM
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as unit:  # as systemd does for LoadCredential=
            unit.bind(f"\0{os.getpid():x}/unit/web.service/key")
            unit.connect(str(self.folder / "credential"))
            while unit.recv(1 << 16):
                pass
        for alert in ("KeyServiceGeneratorFailed", "KeyServiceCredentialsFailed"):
            fires(alert)


def adversity():
    """tests/adversity/run as a module: what it does to the system calls and threads of a process."""
    loader = importlib.machinery.SourceFileLoader("adversity", str(REPOSITORY / "tests/adversity/run"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("adversity", loader))
    loader.exec_module(module)
    return module


def start_tls(folder, stack):
    """A daemon that exports what only TLS has. Returns where it serves metrics."""
    folder.mkdir()
    certificates.self_signed(folder / "key.pem", folder / "cert.pem")
    _, keys, metrics = start_daemon(folder, stack, TLS_CERT=folder / "cert.pem", TLS_KEY=folder / "key.pem")
    if status(keys, "GET /key/32 HTTP/1.1\r\nHost: localhost\r\n\r\n") != 400:
        raise Stuck("expected 400 for plain HTTP where TLS is on")
    return metrics


def start_daemon(folder, stack, **settings):
    """The process, and where it serves keys and metrics: it says so to the service manager, which is this test."""
    (folder / "config.toml").write_text("")
    manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    manager.bind(str(folder / "notify"))
    manager.settimeout(PATIENCE)
    variables = environment() | {"NOTIFY_SOCKET": str(folder / "notify"), "KEYSERVICE_MAX_CONNECTIONS": str(CONNECTIONS),
                                 "KEYSERVICE_HEAD_TIMEOUT": "3600"}
    variables |= {f"KEYSERVICE_{name}": str(value) for name, value in settings.items()}
    process = start(stack, folder / "daemon.log", binary(), "--config", folder / "config.toml", "--host", "127.0.0.1",
                    "--srv-port", "0", "--metrics-port", "0", environment=variables)
    try:
        message = manager.recv(4096).decode()
    except TimeoutError:
        raise Stuck(f"the daemon did not get ready:\n{(folder / 'daemon.log').read_text()}") from None
    addresses = re.search(r"^STATUS=Keys on ([^;]+); metrics on (.+)$", message, re.M)
    if not addresses or "READY=1" not in message:
        raise Stuck(f"expected READY=1 and two addresses, found {message!r}")
    return process, *addresses.groups()


def start(stack, log, *command, environment=None):
    process = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=log.open("w"),
                               stderr=subprocess.STDOUT, env=environment)
    if command[0] == binary():
        stack.push(lambda kind, error, trace: peers.stop_daemon(process, "key-service", error)
                   if process.poll() is None else None)
    else:
        stack.callback(peers.stop_peer, process, command[0])
    return process


def load(keys, phases):
    """Keys of several sizes and what is not there, on one connection, at a given pace. Returns how many requests."""
    paths = [f"/key/{size}" for size in SIZES] * 3 + ["/health", "/key/0", "/nothing", "/key/999999999"]
    connection, sent = http.client.HTTPConnection(keys, timeout=PATIENCE), 0
    for seconds, pace in phases:
        first = time.monotonic()
        for number in range(seconds * pace):
            time.sleep(max(0, first + number / pace - time.monotonic()))
            connection.request("GET", paths[sent % len(paths)])
            connection.getresponse().read()
            sent += 1
    connection.close()
    return sent


def refuse_malformed(keys):
    statuses = {path: status(keys, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                for path in ("/key/32", "/key/0", "/nothing", "/key/2048")}
    statuses["no Host"] = status(keys, "GET /key/32 HTTP/1.1\r\n\r\n")
    expected = {"/key/32": 200, "/key/0": 400, "/nothing": 404, "/key/2048": 413, "no Host": 400}
    return [f"expected {expected}, found {statuses}"] if statuses != expected else []


def exhaust(keys, count):
    """Takes every slot, then asks `count` times for a key."""
    limit = time.monotonic() + PATIENCE
    held = []
    while len(held) < CONNECTIONS and time.monotonic() < limit:
        connection = connect(keys)
        # With the beginning of another request: an idle connection would make room for a new one.
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\nGET ")
        # Whoever has no place is told so; the one of a client that has just left is freed a moment after its end is seen.
        if b"\r\nconnection: close\r\n" in connection.recv(4096):
            connection.close()
        else:
            held.append(connection)
    request = "GET /key/32 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    statuses = [status(keys, request) for _ in range(count)]
    for connection in held:
        connection.close()
    return [f"expected 503, found {statuses}"] if set(statuses) != {503} else []


def connect(address):
    host, port = address.rsplit(":", 1)
    return peers.connect((host, int(port)), PATIENCE)


def status(address, request):
    with connect(address) as connection:
        connection.sendall(request.encode())
        return int(connection.recv(4096).split(b" ")[1])


main()

"""Follows "On hosts" in docs/monitoring.md, with Debian's Prometheus and Alertmanager as installed, up to the mail of an alert.

test_monitoring.py runs it as python3 -m support.monitoring.debian, in separate namespaces. Ports and paths are the real ones, but
changes in /etc/prometheus and /var/lib/prometheus are discarded afterwards. The commands run unchanged, except those of apt and
systemctl: for these, this module does what the packages' units and maintainer scripts do.
"""

import contextlib
import json
import re
import shlex
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path

from support import conditions, peers
from support.daemon import REPOSITORY, binary, environment

TIMEOUT = 300  # seconds; the alert's own "for:" takes a minute of them
INTERVAL = 1  # second; polling starts programs, which takes most of the CPU time here
GUIDE = REPOSITORY / "docs/monitoring.md"
ETC = Path("/etc/prometheus")
WRITTEN = {"configuration": ETC, "defaults": Path("/etc/default/prometheus-alertmanager"), "data": Path("/var/lib/prometheus")}
CONFIGURATION, ALERTMANAGER = ETC / "prometheus.yml", ETC / "alertmanager.yml"
PACKAGES = ("prometheus", "prometheus-alertmanager", "prometheus-node-exporter")


def main():
    section = GUIDE.read_text().split("\n## On hosts\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", section, re.M | re.S)
    with contextlib.ExitStack() as stack:
        host = Host(stack)
        for language, text in blocks:
            if language == "sh":
                for line in re.sub(r"\\\n\s*", "", text).splitlines():
                    host.do(line)
            elif "receivers:" in text:
                ALERTMANAGER.write_text(text)
                host.check_routes()
            elif "rule_files:" in text:
                shipped = CONFIGURATION.read_text()
                CONFIGURATION.write_text(added(text, shipped))
            else:  # the job for a file that lacks it
                without = re.sub(r"^  - job_name: node\n(    .*\n)*", "", shipped, flags=re.M)
                assert without != shipped, f"expected the job node in {CONFIGURATION}, found\n{shipped}"
                copy = ETC / "without-node.yml"
                copy.write_text(added(f"scrape_configs:\n{text}", added(blocks[2][1], without)))
                run(f"promtool check config {copy}")
                copy.unlink()
        assert host.mails, "expected the section to end with an alert's mail, found none"


def added(block, configuration):
    """Adds the lines of a block to a configuration: the entries of each section below the section's name."""
    for section, lines in re.findall(r"^(\w+:\n)((?: .*\n)+)", block, re.M):
        before, name, after = configuration.partition(f"\n{section}")
        assert name, f"expected a line {section!r}, found\n{configuration}"
        configuration = before + name + lines + after
    return configuration


def run(command):
    done = subprocess.run(["sh", "-ec", f'sudo() {{ "$@"; }}\n{command}'], cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def api(path):
    with urllib.request.urlopen(f"http://localhost:9090/api/v1/{path}", timeout=TIMEOUT) as response:
        return json.load(response)["data"]


class Host:
    """A host with the daemon, node_exporter, Prometheus, Alertmanager and a mail server."""

    def __init__(self, stack):
        self.stack, self.processes, self.mails = stack, {}, []
        self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="key-service-debian-")))
        self.directory.chmod(0o755)
        # An unprivileged user namespace maps a single user, which owns everything.
        self.has_users = Path("/proc/self/uid_map").read_text().split()[2] != "1"
        for package in PACKAGES:
            self.check_as_installed(package)
        for name, path in WRITTEN.items():  # in this mount namespace only
            copy = self.directory / name
            subprocess.run(["cp", "--recursive", *(["--preserve"] if self.has_users else []), path, copy], check=True)
            subprocess.run(["mount", "--bind", copy, path], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", path], check=True)
        server = Mail(("127.0.0.1", 25), Mail.Session)
        server.mails = self.mails
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        self.start("key-service", binary(), "--config", self.empty("config.toml"))

    def empty(self, name):
        path = self.directory / name
        path.write_text("")
        path.chmod(0o644)
        return path

    def check_as_installed(self, package):
        """Checks that no file of the package in /etc was changed."""
        listed = run(f"dpkg-query --show --showformat='${{Conffiles}}' {package}")
        for path, expected in re.findall(r"^ (/etc\S+) (\w+)$", listed, re.M):
            found = run(f"md5sum {path}").split()[0]
            assert found == expected, f"{path}: expected the file that {package} installs, found another: this test needs Debian's"

    def do(self, line):
        """Runs one documented command and checks its effect."""
        words = [word for word in shlex.split(line) if word != "sudo"]
        match words:
            case ["apt", "install", package]:
                assert package in PACKAGES, f"expected one of {PACKAGES}, found {package}; add it there and in support/tools.py"
                self.start_package(package)
                if package == "prometheus":  # with Debian's configuration; a later reload applies the additions
                    self.until("Prometheus to start", lambda: api("status/runtimeinfo"))
            case ["systemctl", "reload", "prometheus"]:
                self.processes["prometheus"].send_signal(signal.SIGHUP)  # ExecReload= of its unit
                self.until("the rules", lambda: api("rules")["groups"])
                self.check_alerting()
            case ["systemctl", "restart", "prometheus-alertmanager"]:
                peers.stop_peer(self.processes.pop(words[2]), words[2])
                self.start_package(words[2])
            case ["systemctl", "stop", "key-service*.socket", "key-service"]:
                peers.stop_daemon(self.processes["key-service"], "key-service")
            case ["systemctl", "start", "key-service.target"]:
                self.start("key-service", binary(), "--config", self.directory / "config.toml")
                self.until("the end of the alert", lambda: "KeyServiceDown" not in run(self.alert_query))
            case ["promtool", "query", "instant", _, query]:
                count = 2 if query.startswith("up") else 1
                pattern = r"=> 1 @" if query.startswith("up") else r'alertname="KeyServiceDown".*alertstate="firing".*=> 1 @'
                self.until(f"{count} of {pattern!r} by {line}", lambda: len(re.findall(pattern, run(line))) == count)
            case ["amtool", "alert", *_]:
                self.until(f"an alert by {line}", lambda: "KeyServiceDown" in run(line))
                mail = self.until("a mail", lambda: self.mails and self.mails[0])
                assert mail["to"] == ["<pager@example.org>"] and "KeyServiceDown" in mail["text"], mail
                self.alert_query = line
            case _:
                run(line)

    def until(self, what, happens):
        """Waits for a result of another process, and returns it."""

        def has_happened():
            for name, process in self.processes.items():
                assert name not in PACKAGES or process.poll() is None, f"{name} ended with {process.returncode}\n{self.log(name)}"
            with contextlib.suppress(OSError):  # a server is still starting
                return happens()

        try:
            return conditions.until(what, has_happened, TIMEOUT, INTERVAL)
        except AssertionError as error:
            raise AssertionError(f"{error}" + "".join(f"\n{name}: {self.log(name)[-1000:]}" for name in self.processes)) from None

    def start_package(self, name):
        """Runs the command of the unit's ExecStart=."""
        self.start(name, "sh", "-ac", f". /etc/default/{name}; exec {name} $ARGS")

    def start(self, name, *command):
        user = {"user": "prometheus", "group": "prometheus", "extra_groups": []} if self.has_users and name in PACKAGES else {}
        log = self.directory / f"{name}.log"
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=log.open("a"),
            stderr=subprocess.STDOUT,
            env=environment(),
            cwd="/",
            **user,
        )
        self.processes[name] = process
        if name == "key-service":
            self.stack.push(lambda kind, error, trace: process.poll() is None and peers.stop_daemon(process, name, error))
        else:
            self.stack.callback(peers.stop_peer, process, name)

    def log(self, name):
        return (self.directory / f"{name}.log").read_text()

    def check_alerting(self):
        """Checks that Debian's alerting section is still in effect and that all rules are loaded."""
        found = self.until("an Alertmanager of Debian's alerting section", lambda: api("alertmanagers")["activeAlertmanagers"])
        assert [each["url"] for each in found] == ["http://localhost:9093/api/v2/alerts"], f"expected Debian's Alertmanager, found {found}"
        files = {Path(group["file"]).name for group in api("rules")["groups"]}
        assert files == {"alerts.yml", "recording.yml"}, f"expected the rules of both files, found {files}"
        shipped = run(f"promtool check rules {REPOSITORY}/helm-chart/files/*.yml")
        count = sum(map(int, re.findall(r"SUCCESS: (\d+) rules found", shipped)))
        loaded = sum(len(group["rules"]) for group in api("rules")["groups"])
        assert loaded == count > 0, f"expected {count} rules, found {loaded}"

    def check_routes(self):
        """Checks that each severity of the alerts has its receiver."""
        alerts = (REPOSITORY / "helm-chart/files/alerts.yml").read_text()
        expected = {"critical": "pager", "warning": "team", "info": "nobody"}
        severities = set(re.findall(r"severity: (\w+)$", alerts, re.M))
        assert severities == set(expected), f"expected {set(expected)}, found {severities}"
        found = {
            severity: run(f"amtool config routes test --config.file={ALERTMANAGER} severity={severity}").strip() for severity in expected
        }
        assert found == expected, f"expected {expected}, found {found}"


class Mail(socketserver.ThreadingTCPServer):
    """A mail server (RFC 5321) that stores received mail."""

    allow_reuse_address = daemon_threads = True

    class Session(socketserver.StreamRequestHandler):
        def handle(self):
            self.send("220 localhost")
            mail = {"to": [], "text": ""}
            while line := self.rfile.readline().decode().rstrip("\r\n"):
                verb = line.split(" ")[0].split(":")[0].upper()
                if verb == "RCPT":
                    mail["to"].append(line.partition(":")[2].split(" ")[0])
                elif verb == "DATA":
                    self.send("354 go on")
                    mail["text"] = "".join(iter(lambda: self.rfile.readline().decode(), ".\r\n"))
                    self.server.mails.append(mail)
                self.send("221 localhost" if verb == "QUIT" else "250 localhost")

        def send(self, line):
            self.wfile.write(f"{line}\r\n".encode())


if __name__ == "__main__":
    try:
        main()
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        sys.exit(str(error))

"""Runs the commands of README.md, docs/debian.md and docs/runbooks.md on a booted Debian 13 with the package and an operator's tools.

The commands run unchanged, but without sudo, because the user is root. Commands that begin with kubectl or helm need a cluster and are
left out. Commands that read the metrics of a pod read those of this daemon instead.
"""

import re

import pytest
from support import certificates
from support.conditions import expect, until
from support.daemon import REPOSITORY
from support.machine import PACKAGES, Machine, as_root
from support.pages import all_commands, commands

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.xdist_group("operations"),
    pytest.mark.tools("mmdebstrap", "systemd-nspawn", "curl", "openssl"),
]

# With these settings, the metrics have every series that a runbook looks for, except those of TLS.
CONFIGURATION = 'proxy-protocol = true\ntrusted-proxies = ["192.0.2.1"]\nrate-requests = 1000\n'
PROMETHEUS = """
rule_files: [/etc/prometheus/recording.yml]
scrape_configs:
  - job_name: key-service
    scrape_interval: 1s
    static_configs: [{targets: ["localhost:8000"]}]
"""
POD_METRICS = "kubectl -n $NS get --raw /api/v1/namespaces/$NS/pods/$POD:8000/proxy/metrics"
HOST_METRICS = "curl -fsS http://$HOST:8000/metrics"


class Host(Machine):
    """A machine with the tools that the runbooks use."""

    packages = PACKAGES + ",curl,iproute2,openssl,procps,prometheus,prometheus-node-exporter"
    kind = "-operations"


@pytest.fixture(scope="module")
def machine(packages, tmp_path_factory):
    """A machine after the installation steps of README.md. Its Prometheus scrapes the daemon."""
    with Host("trixie", tmp_path_factory.mktemp("operations"), packages["amd64"]) as machine:
        machine.run("mkdir -p /root/target/debian && mv /root/key-service.deb /root/target/debian/key-service_0_amd64.deb")
        build, install, request = as_root(commands("README.md", "packaging/build-deb")).splitlines()
        expect(build, "packaging/build-deb", "the command that builds the package")
        machine.write("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")  # as Debian's installer does
        machine.write("/etc/apt/apt.conf.d/99-yes", 'APT::Get::Assume-Yes "true";\n')
        machine.run(f"cd /root && {install}", timeout=300)
        assert re.fullmatch("[0-9a-f]{64}\n", machine.run(request).stdout)
        machine.write("/etc/key-service/config.toml", CONFIGURATION)
        machine.run("systemctl restart key-service")
        machine.install_file(REPOSITORY / "helm-chart/files/recording.yml", "/etc/prometheus/recording.yml")
        machine.write("/etc/prometheus/prometheus.yml", PROMETHEUS)
        machine.run("systemctl restart prometheus")
        until("a scrape", lambda: '"health":"up"' in machine.run("curl -s http://localhost:9090/api/v1/targets", ok=None).stdout)
        yield machine


def failures(machine, lines):
    """Runs each command, and returns a report for each one that fails or writes to standard error."""
    found = []
    for line in lines:
        # curl gives up after 5 s, and a machine that runs the tests may be stalled for as long.
        done = machine.run(f"HOST=localhost; {line.replace(' -m 5 ', ' -m 30 ')}", ok=None)
        # The log of a healthy service has no matches, and a machine without the memory controller reports no memory.
        may_find_nothing = line.startswith("journalctl") and ("grep" in line or " -g " in line)
        may_find_nothing |= "grep Memory" in line and machine.show("MemoryCurrent") == "[not set]"
        errors = re.sub(r"^curl: \(23\) .*\n", "", done.stderr, flags=re.M)  # head(1) closed the pipe
        if done.returncode > may_find_nothing or errors:
            found.append(f"{line}: status {done.returncode}\n{done.stdout[-300:]}{errors[-300:]}")
    return found


def runbook_lines(is_about_tls):
    """The commands of docs/runbooks.md for a host, without duplicates."""
    text = (REPOSITORY / "docs/runbooks.md").read_text()
    lines = [as_root(line.replace(POD_METRICS, HOST_METRICS)) for _, block in all_commands(text) for line in block.splitlines()]
    hosts = [line for line in lines if not re.match(r"kubectl |helm |\w+=", line)]
    return [line for line in dict.fromkeys(hosts) if bool(re.search(r"tls_|openssl", line)) == is_about_tls]


def test_runbook_commands_work(machine, figures):
    """each command of docs/runbooks.md for a host succeeds and finds its series and settings"""
    lines = runbook_lines(is_about_tls=False)
    assert len(lines) > 60, lines
    assert not (found := failures(machine, lines)), "\n".join(found)
    figures(f"{len(lines)} commands")


def test_runbook_commands_about_certificates_work(machine):
    """each command of docs/runbooks.md about certificates succeeds, with the drop-in of docs/tls.md"""
    lines = runbook_lines(is_about_tls=True)
    assert len(lines) >= 2, lines
    certificates.self_signed(machine.root / "root/privkey.pem", machine.root / "root/fullchain.pem", names="DNS:localhost")
    machine.run(f"cd /root && set -e\n{commands('docs/tls.md', 'install ')}")
    assert not (found := failures(machine, lines)), "\n".join(found)
    machine.run("rm -r /etc/systemd/system/key-service.service.d && systemctl daemon-reload && systemctl restart key-service")


def test_readme_commands_work(machine):
    """each troubleshooting command of README.md succeeds, and health is OK"""
    lines = as_root(commands("README.md", "systemctl status")).splitlines()
    assert not (found := failures(machine, lines)), "\n".join(found)
    expect(machine.run(next(line for line in lines if line.endswith("/health"))).stdout, "OK", "health")


def test_failing_command_is_detected(machine):
    """a misspelled program, series, option or unit is reported as a failure"""
    wrong = ["sss -Htn", f"{HOST_METRICS} | grep '^no_such_series'", "journalctl --no-such-option", "systemctl status key-serv"]
    expect(len(failures(machine, wrong)), len(wrong), "failures")


def test_commands_of_the_debian_table_work(machine):
    """each command in the table of docs/debian.md does what the table says"""
    section = (REPOSITORY / "docs/debian.md").read_text().split("\n## Operate\n")[1].split("\n## ")[0]
    table = [as_root(command) for command in re.findall(r"^\| `([^`]+)` \|", section, re.M)]
    assert len(table) >= 9, table
    follow = next(command for command in table if command.endswith(" -f"))
    expect(machine.run(f"timeout 2 {follow}", ok=None).returncode, 124, "status of the command that follows the log, at the timeout")
    stop = next(command for command in table if " stop " in command)
    others = [command for command in table if command not in (follow, stop)]
    assert not (found := failures(machine, others)), "\n".join(found)
    assert "REASON" in machine.run(next(command for command in table if "json" in command)).stdout, "expected the field REASON in the log"
    machine.run(stop)
    machine.curl("http://127.0.0.1:1123/key/32", ok=7)
    [start] = set(re.findall(r"`sudo (systemctl start [\w.-]+)`", section))
    machine.run(start)
    expect(machine.get("/key/32")[0], 200, "status after the start")

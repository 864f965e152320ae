"""Tests the Debian package on booted systems: apt installs it, systemd runs it, and clients use it.

A system has systemd and the package's dependencies, and nothing else: no procps, no D-Bus, no curl. Clients run on the host. The
tests of a system run in the order of this file, and each one leaves the system as it found it.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import certificates, peers
from support.conditions import TIMEOUT, expect, retry_if_stalled, until
from support.machine import SUPPORT, Machine, as_root, upgrade
from support.pages import commands

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.tools("mmdebstrap", "systemd-nspawn", "gcc", "curl", "dpkg-deb", "openssl"),
]

EXPOSURE_MAX = 0.1
SOCKETS = ["key-service.socket", "key-service-metrics.socket", "key-service-credential.socket"]


@pytest.fixture(scope="module", params=[pytest.param(suite, marks=pytest.mark.xdist_group(suite)) for suite in ("bookworm", "trixie")])
def machine(request, packages, tmp_path_factory):
    """A booted Debian system with the package installed. No client has connected yet."""
    with Machine(request.param, tmp_path_factory.mktemp(request.param), packages["amd64"]) as machine:
        install(machine)
        yield machine


def install(machine):
    for program in ("kill", "curl", "ip", "dbus-daemon"):
        assert machine.run(f"env which {program}", ok=None).returncode, (
            f"{program} is installed: the tests would not notice that the package needs it"
        )
    machine.run("apt-get install -y --no-install-recommends /root/key-service.deb", timeout=120)


def test_the_package_installs(machine):
    """apt installs the package with only its dependencies: the sockets listen, and the service waits for its first connection"""
    for unit, state in [*((name, "active") for name in SOCKETS), ("key-service.service", "inactive")]:
        expect(machine.show("ActiveState", unit), state, unit)
    for unit in SOCKETS:
        expect(machine.run(f"systemctl is-enabled {unit}").stdout.strip(), "enabled", unit)
    expect(machine.run("stat -c '%a %U %F' /run/key-service/credential.sock").stdout.strip(), "600 root socket", "the credential socket")


def test_the_first_connection_starts_the_service(machine):
    """the first connection starts the service and gets its response"""
    status, key = machine.get("/key/32")
    expect((status, len(key)), (200, 32), "status and length")
    # The first key may arrive before systemd has read READY=1.
    until("the service to be active", lambda: machine.show("ActiveState") == "active")
    expect(machine.get("/health"), (200, b"OK"), "health")
    text = machine.run("systemctl status key-service --no-pager").stdout
    expected = "Keys on [::]:1123; credentials on unix:/run/key-service/credential.sock; metrics on [::]:8000"
    assert f'Status: "{expected}"' in text, text


def test_process_metrics_are_correct(machine):
    """the process metrics (start time, CPU, descriptors) are correct inside the sandbox"""
    pid = machine.show("MainPID")
    assert abs(time.time() - machine.metric("process_start_time_seconds")) < 600
    started = int(machine.run(f"cut -d' ' -f22 /proc/{pid}/stat").stdout) / os.sysconf("SC_CLK_TCK")  # seconds after the boot
    before = time.time()
    uptime = float(machine.run("cut -d' ' -f1 /proc/uptime").stdout)
    boot = before - uptime, time.time() - uptime
    assert boot[0] + started - 2 < machine.metric("process_start_time_seconds") < boot[1] + started + 2
    before = machine.metric("process_cpu_seconds_total")
    for _ in range(20):
        machine.get("/key/1024")
    assert machine.metric("process_cpu_seconds_total") > before > 0
    open_now = len(machine.run(f"ls /proc/{pid}/fd").stdout.split())
    assert abs(machine.metric("process_open_fds") - open_now) <= 3
    assert machine.metric("process_max_fds") == 16384
    assert machine.metric("process_resident_memory_bytes") > 500e3


def test_journal_entries_have_fields_and_no_key(machine):
    """journal entries have structured fields and no key byte"""
    machine.get("/key/32")
    machine.wait_for_log("ready: Keys on ")
    entry = [entry for entry in machine.journal() if str(entry.get("MESSAGE", "")).startswith("ready: Keys on ")][-1]
    expect((entry.get("PRIORITY"), entry.get("SYSLOG_IDENTIFIER")), ("5", "key-service"), "priority and identifier")
    assert re.fullmatch(r"\d+\.\d+\.\d+", entry.get("VERSION", "")), entry
    machine.run("mkdir -p /run/systemd/system/key-service.service.d")
    machine.write("/run/systemd/system/key-service.service.d/debug.conf", "[Service]\nEnvironment=KEYSERVICE_LOG_LEVEL=trace\n")
    machine.run("systemctl daemon-reload && systemctl restart key-service")
    keys = [machine.get("/key/32")[1] for _ in range(50)]
    text = machine.run("journalctl --sync; journalctl -o export --no-pager --all", timeout=120).stdout
    for key in keys:
        assert key.hex()[:16] not in text and ", ".join(map(str, key[:6])) not in text
    machine.run("rm /run/systemd/system/key-service.service.d/debug.conf && systemctl daemon-reload && systemctl restart key-service")


def test_the_unit_is_sandboxed(machine, figures):
    """systemd-analyze rates the exposure of the unit 0.1 at most, and rates a weakened unit higher"""
    found = exposure(machine, "key-service.service")
    assert found <= EXPOSURE_MAX, found
    unit = machine.read("/usr/lib/systemd/system/key-service.service").decode()
    weaker = unit.replace("PrivateNetwork=yes", "PrivateNetwork=no").replace("ProtectClock=yes\n", "")
    machine.write("/run/systemd/system/weaker.service", weaker)
    machine.run("systemctl daemon-reload")
    assert exposure(machine, "weaker.service") > EXPOSURE_MAX, "the check passes a weakened unit"
    machine.run("rm /run/systemd/system/weaker.service && systemctl daemon-reload")
    figures(f"exposure {found}")


def exposure(machine, unit):
    text = machine.run(f"systemd-analyze security --no-pager {unit}").stdout
    return float(re.search(r"Overall exposure level for \S+ ([\d.]+)", text)[1])


def test_systemctl_controls_the_service(machine):
    """systemctl stop, start, restart and reload work, and a refused reload fails"""
    machine.run("systemctl stop key-service")
    expect(machine.show("ActiveState"), "inactive", "after stop")
    expect(machine.show("ExecMainStatus"), "0", "exit status")
    machine.run("systemctl start key-service")
    expect(machine.show("ActiveState"), "active", "after start")
    pid = machine.show("MainPID")
    machine.run("systemctl restart key-service")
    assert machine.show("MainPID") != pid
    pid = machine.show("MainPID")
    expect(machine.get("/key/2000")[0], 413, "above max-size")
    machine.write("/etc/key-service/config.toml", "max-size = 2000\n")
    machine.run("systemctl reload key-service")
    expect(machine.get("/key/2000")[0], 200, "after reload")
    expect(machine.show("MainPID"), pid, "the process after reload")
    machine.write("/etc/key-service/config.toml", "max-size = 0\n")
    machine.run("systemctl reload key-service", ok=1)
    refused = "reload 2 was refused: /etc/key-service/config.toml:1: max-size: expected a whole number from 1 to 1073741824, found 0"
    status = machine.run("systemctl status key-service --no-pager", ok=None).stdout
    assert refused in status, status
    expect((machine.show("ActiveState"), machine.show("MainPID")), ("active", pid), "the service after a refused reload")
    expect(machine.get("/key/2000")[0], 200, "a key after a refused reload")
    machine.write("/etc/key-service/config.toml", "")
    machine.run("systemctl reload key-service")
    expect(machine.get("/key/2000")[0], 413, "max-size as soon as the reload has returned")
    # A reload also fails if the process does not respond.
    machine.run(f"kill -STOP {pid}")
    machine.run("systemctl reload key-service", ok=1)
    until("a new process", lambda: machine.show("MainPID") not in (pid, "0"))


def test_restarts_lose_nothing(machine, figures):
    """during 100 restarts under 500 requests per second, no request is refused or fails"""
    slowest = 0
    with machine.load() as seen:
        for _ in range(100):
            begin = time.monotonic()
            machine.run("systemctl restart key-service")
            slowest = max(slowest, time.monotonic() - begin)
    expect((seen["failed"], seen["failures"]), (0, []), "failures")
    assert seen["served"] > 100 * seen["seconds"], seen
    timeouts = [entry["MESSAGE"] for entry in machine.journal() if "timed out" in str(entry.get("MESSAGE"))]
    expect(timeouts, [], f"starts and stops that timed out in systemd; the slowest restart took {slowest:.1f} s")
    load = f"{seen['served']} requests in {seen['seconds']} s, the slowest {seen['slowest']} s, {seen['late']} late"
    figures(f"{load}; the slowest restart {slowest:.1f} s")


def test_upgrades_lose_nothing(machine, figures):
    """during an upgrade under load, no request is refused or fails, and the new version runs after it"""
    pid = machine.show("MainPID")
    with machine.load() as seen:
        upgrade(machine)
    expect((seen["failed"], seen["failures"]), (0, []), "failures")
    assert machine.show("MainPID") != pid, "the old process still runs"
    figures(f"{seen['served']} requests, the slowest {seen['slowest']} s")


def test_an_upgrade_with_errors_keeps_the_old_process(machine):
    """an upgrade with an invalid configuration reports the errors and keeps the old process running"""
    pid = machine.show("MainPID")
    machine.write("/etc/key-service/config.toml", "max-sise = 1\n")
    output = upgrade(machine)
    assert "max-sise: not a setting" in output and "old version keeps running" in output, output
    expect((machine.show("MainPID"), machine.get("/key/32")[0]), (pid, 200), "process and status")
    machine.write("/etc/key-service/config.toml", "")
    machine.run("systemctl restart key-service")


def test_an_upgrade_checks_with_the_units_credentials(machine):
    """an upgrade with tokens in a credential starts the new version; without the credential, the old one keeps running"""

    def statuses():
        return [machine.status_of(*header, "http://127.0.0.1:1123/key/32") for header in ([], ["-H", f"Authorization: Bearer {token}"])]

    dropin = "/etc/systemd/system/key-service.service.d/tokens.conf"
    token, line = machine.run("key-service token new --name ci").stdout.splitlines()
    # The file is in a directory that the unit sees, but only root can read it: only systemd can pass it to the unit.
    machine.write("/etc/key-service/tokens", line + "\n")
    machine.run("chmod 600 /etc/key-service/tokens")
    machine.write("/etc/key-service/config.toml", 'tokens-file = "credential:tokens"\n')
    machine.write(dropin, "[Service]\nLoadCredential=tokens:/etc/key-service/tokens\nEnvironment=KEYSERVICE_MAX_SIZE=2000\n")
    machine.run("systemctl daemon-reload && systemctl restart key-service")
    expect(statuses(), ["401", "200"], "without and with a token")
    pid = machine.show("MainPID")
    output = upgrade(machine)
    assert machine.show("MainPID") != pid, f"the old process still runs\n{output}"
    assert "would not start" not in output, output
    expect(statuses(), ["401", "200"], "without and with a token after the upgrade")
    # The check sees the unit's credentials and its environment.
    for text, expected in [
        ("[Service]\n", "tokens-file: expected the name of a credential"),
        ("[Service]\nLoadCredential=tokens:/etc/key-service/absent\n", "a credential of the unit can't be loaded"),
        ("[Service]\nLoadCredential=tokens:/etc/key-service/tokens\nEnvironment=KEYSERVICE_MAX_SIZE=1k\n", "(KEYSERVICE_MAX_SIZE)"),
    ]:
        pid = machine.show("MainPID")
        machine.write(dropin, text)
        output = upgrade(machine)
        assert expected in output and "The old version keeps running" in output, output
        expect((machine.show("MainPID"), statuses()), (pid, ["401", "200"]), "process and statuses")
    # If the check can't run as a unit, the upgrade does not count that as a configuration error.
    machine.write(dropin, "[Service]\nLoadCredential=tokens:/etc/key-service/tokens\n")
    machine.run("systemctl mask --runtime key-service-check.service")
    output = upgrade(machine)
    assert "credential:tokens is not checked" in output and machine.show("MainPID") != pid, output
    expect(machine.run("ls /run/systemd/system /run | grep check", ok=None).stdout, "", "files that the check leaves behind")
    machine.run(f"rm {dropin} /etc/key-service/tokens && systemctl daemon-reload")
    machine.write("/etc/key-service/config.toml", "")
    machine.run("systemctl restart key-service")
    expect(machine.get("/key/32")[0], 200, "a key without tokens again")


def test_a_missing_file_keeps_the_protection(machine):
    """in the sandbox, the daemon reloads a changed file by itself, and a missing configuration file changes nothing, named or not"""
    machine.write("/etc/key-service/config.toml", "max-size = 2000\n")
    until("the new max-size", lambda: machine.get("/key/2000")[0] == 200)
    machine.write("/etc/key-service/tokens", "")
    protected = 'tokens-file = "/etc/key-service/tokens"\nrate-requests = 1000\naudit = true\n'
    dropin = "/run/systemd/system/key-service.service.d/default.conf"
    for unit in ("", "[Service]\nExecStart=\nExecStart=/usr/bin/key-service\n"):
        machine.write("/etc/key-service/config.toml", protected)
        machine.write(dropin, unit)
        machine.run("systemctl daemon-reload && systemctl restart key-service")
        expect(machine.get("/key/32")[0], 401, "a key without a token")
        machine.run("mv /etc/key-service/config.toml /etc/key-service/away")
        machine.run("systemctl reload key-service", ok=1)
        wait_for_status(machine, "was refused: /etc/key-service/config.toml: the file is gone")
        expect((machine.get("/key/32")[0], machine.metric("config_last_reload_successful")), (401, 0), "status and metric without the file")
        machine.run("mv /etc/key-service/away /etc/key-service/config.toml")
        until("the reload", lambda: machine.metric("config_last_reload_successful") == 1)
    machine.run(f"rm {dropin} && systemctl daemon-reload")
    # Without the file, the shipped unit does not start, and its status tells what to do.
    machine.run("rm /etc/key-service/config.toml /etc/key-service/tokens && systemctl restart key-service", ok=1)
    wait_for_status(machine, "config.toml: there is no such file; an empty file leaves every setting at its default")
    machine.write("/etc/key-service/config.toml", "")
    machine.run("systemctl restart key-service")
    expect(machine.get("/key/32")[0], 200, "a key with an empty file")


def wait_for_status(machine, text):
    """Waits until `systemctl status` shows this text. Between two starts of a service that fails, it shows nothing for a moment."""
    until(f"{text!r} in the status", lambda: text in machine.run("systemctl status key-service --no-pager", ok=None).stdout)


def test_the_socket_survives_kills(machine, figures):
    """after 50 kills in 10 seconds, the sockets are active and a key is served"""
    killed, begin = 0, time.monotonic()
    while killed < 50:
        time.sleep(max(0, begin + killed * 0.2 - time.monotonic()))
        machine.run("systemctl kill -s KILL key-service", ok=None)
        killed += 1
    expect(machine.get("/key/32")[0], 200, "status")
    for unit in ["key-service.socket", "key-service-metrics.socket"]:
        expect(machine.show("ActiveState", unit), "active", unit)
    figures(f"{killed} kills in {time.monotonic() - begin:.0f} s, {machine.show('NRestarts')} restarts")


def test_a_frozen_process_is_replaced(machine, figures):
    """the watchdog replaces a process that SIGSTOP has frozen"""
    expect(machine.get("/key/32")[0], 200, "a key before that")
    pid = machine.show("MainPID")
    machine.run(f"kill -STOP {pid}")
    since = time.monotonic()
    until("a new process", lambda: machine.show("MainPID") not in (pid, "0"))
    expect(machine.get("/key/32")[0], 200, "a key after that")
    figures(f"after {time.monotonic() - since:.0f} s")


def test_the_sandbox_denies(machine):
    """the sandbox keeps the process from connecting, writing, reading, executing, tracing and more"""
    probe = machine.directory / "probe"
    subprocess.run([machine.compiler, "-static", "-O1", "-Wall", "-o", probe, SUPPORT / "probe.c"], check=True)
    machine.run("systemctl stop key-service.socket key-service-metrics.socket key-service.service")
    machine.run("mv /usr/bin/key-service /root/daemon")
    machine.install_file(probe, "/usr/bin/key-service")
    dropin = "/run/systemd/system/key-service.service.d/probe.conf"
    killed, denied = "killed by the system call filter", "denied"
    for attempt, expected in [
        ("connect", denied),
        ("write", denied),
        ("read", denied),
        ("exec", denied),
        ("jit", denied),
        ("ptrace", killed),
        ("memfd", killed),
        ("mount", killed),
        ("setuid", killed),
        ("fork-server", killed),
    ]:
        machine.write(dropin, f"[Service]\nType=oneshot\nRestart=no\nWatchdogSec=0\nExecStart=\nExecStart=/usr/bin/key-service {attempt}\n")
        machine.run("systemctl daemon-reload; systemctl start key-service", ok=None)
        code, status = machine.show("ExecMainCode"), machine.show("ExecMainStatus")
        found = {("1", "0"): denied, ("1", "1"): "possible", ("2", "31"): killed, ("3", "31"): killed}.get((code, status), (code, status))
        log = machine.run("journalctl -u key-service -n 15 --no-pager -o cat").stdout
        assert found == expected, f"{attempt}: expected {expected}, found {found}\n{log}"
    machine.run(f"rm {dropin}")
    machine.run("mv /root/daemon /usr/bin/key-service")
    machine.run(
        "systemctl daemon-reload; systemctl reset-failed key-service; systemctl start key-service.socket key-service-metrics.socket"
    )
    expect(machine.get("/key/32")[0], 200, "a key from the daemon again")


RESTART = "systemctl restart key-service.target"


def test_a_drop_in_changes_the_port(machine):
    """a drop-in changes the port; the commands of docs/debian.md apply it each time, even under load"""
    sequence = as_root(commands("docs/debian.md", "sudo systemctl restart key-service.target"))
    machine.write("/etc/key-service/config.toml", "max-size = 4096\n")
    machine.run("systemctl restart key-service")
    for _ in range(6):
        with machine.load(mode=["while-refused"]) as seen, machine.load(port=2123, mode=["while-refused"]):
            expect(machine.get("/key/32")[0], 200, "a key before that")
            machine.write("/etc/systemd/system/key-service.socket.d/port.conf", "[Socket]\nListenStream=\nListenStream=127.0.0.1:2123\n")
            machine.run(f"set -e; systemctl daemon-reload\n{sequence}")
            expect((machine.get("/key/4096", 2123)[0], machine.get("/key/4097", 2123)[0]), (200, 413), "port and size")
            machine.curl("http://127.0.0.1:1123/", ok=7)
            machine.run(f"set -e; rm -r /etc/systemd/system/key-service.socket.d; systemctl daemon-reload\n{sequence}")
            expect(machine.get("/key/32")[0], 200, "a key on the old port again")
        assert seen["served"], seen
    for unit in SOCKETS:
        expect(machine.show("ActiveState", unit), "active", unit)
    machine.write("/etc/key-service/config.toml", "")
    machine.run("systemctl restart key-service")


def listening(machine):
    """Returns the socket units whose sockets are open, according to the kernel."""

    def is_port(port):
        lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/{machine.leader}/net/{table}").read_text().splitlines()]
        return any(line[3] == "0A" and int(line[1].rsplit(":")[-1], 16) == port for line in lines[1:] if line[3] != "st")

    found = [is_port(1123), is_port(8000), "/run/key-service/credential.sock\n" in Path(f"/proc/{machine.leader}/net/unix").read_text()]
    return [unit for unit, listens in zip(SOCKETS, found, strict=True) if listens]


@pytest.mark.parametrize(
    ("off", "expected"),
    list(zip(SOCKETS, ["No keys over HTTP; credentials on", "no metrics", "Keys on [::]:1123; metrics"], strict=True)),
    ids=SOCKETS,
)
def test_a_disabled_socket_stays_disabled(machine, off, expected):
    """a disabled socket stays disabled after starts of the service, an upgrade and a boot; the documented commands enable it again"""
    unit_with_credential = "[Service]\nType=oneshot\nLoadCredential=key:/run/key-service/credential.sock\nExecStart=test -s %d/key\n"
    switch_off = as_root(commands("docs/debian.md", "sudo systemctl disable --now key-service-metrics.socket"))
    switch_on = as_root(commands("docs/debian.md", "sudo systemctl enable key-service-metrics.socket"))
    others = [unit for unit in SOCKETS if unit != off]
    machine.run(f"set -e\n{switch_off}".replace("key-service-metrics.socket", off))
    machine.write("/run/systemd/system/loads.service", unit_with_credential)
    machine.run("systemctl daemon-reload")

    def starts(when):
        """Starts the service by each of the other sockets in turn, and by systemctl."""
        for start in [*others, "key-service.service"]:
            machine.run("systemctl stop key-service")
            if start == "key-service.socket":
                expect(machine.get("/key/32")[0], 200, f"{when}, without {off}: keys")
            elif start == "key-service-metrics.socket":
                expect(machine.get("/metrics", 8000)[0], 200, f"{when}, without {off}: metrics")
            elif start == "key-service-credential.socket":
                machine.run("systemctl start loads.service")
            else:
                machine.run("systemctl start key-service")
            until(f"the service {when}, without {off}, started by {start}", lambda: machine.show("ActiveState") == "active")
            expect(listening(machine), others, f"{when}, without {off}: sockets, service started by {start}")
            expect(machine.show("ActiveState", off), "inactive", off)

    starts("before an upgrade")
    status = machine.show("StatusText")
    assert expected in status, status
    upgrade(machine)
    expect(listening(machine), others, f"after an upgrade, without {off}")
    starts("after an upgrade")
    machine.reboot()
    expect(listening(machine), others, f"after a boot, without {off}")
    machine.write("/run/systemd/system/loads.service", unit_with_credential)
    machine.run("systemctl daemon-reload")
    starts("after a boot")
    machine.run("rm /run/systemd/system/loads.service")
    machine.run(f"set -e\n{switch_on}".replace("key-service-metrics.socket", off))
    expect(listening(machine), SOCKETS, "sockets after they are all enabled again")
    expect(machine.get("/key/32")[0], 200, "a key after that")


def test_a_start_without_sockets_names_the_unit(machine):
    """without any socket, the service does not start and names the socket unit; enabling or disabling the service changes no socket"""
    machine.run("systemctl stop 'key-service*.socket' key-service")
    expect((listening(machine), machine.show("ActiveState")), ([], "inactive"), "sockets and service after all were stopped")
    machine.run("systemctl start key-service", ok=1)
    wait_for_status(machine, "systemctl start key-service.socket")
    machine.run("systemctl stop key-service && systemctl start key-service.target")
    machine.run("systemctl enable --now key-service && systemctl disable --now key-service")
    expect(listening(machine), SOCKETS, "sockets after only the service was disabled")
    for unit in SOCKETS:
        expect(machine.run(f"systemctl is-enabled {unit}").stdout.strip(), "enabled", unit)
    expect(machine.get("/key/32")[0], 200, "a key after that")


def test_both_address_families_are_served(machine):
    """with net.ipv6.bindv6only=1, the ports still serve both IPv4 and IPv6"""

    def set_to(number):
        subprocess.run(machine.outside("sh", "-c", f"echo {number} >/proc/sys/net/ipv6/bindv6only"), check=True)
        machine.run(RESTART)

    set_to(1)
    for host in ("127.0.0.1", "[::1]"):
        expect(machine.status_of(f"http://{host}:1123/key/32"), "200", f"keys on {host}")
        expect(machine.status_of(f"http://{host}:8000/metrics"), "200", f"metrics on {host}")
    machine.write("/run/systemd/system/key-service.socket.d/weaker.conf", "[Socket]\nBindIPv6Only=default\n")
    machine.run("systemctl daemon-reload")
    set_to(1)
    machine.curl("http://127.0.0.1:1123/", ok=7)
    machine.run("rm -r /run/systemd/system/key-service.socket.d && systemctl daemon-reload")
    set_to(0)


def test_broken_links_and_renames_are_refused(machine):
    """a start fails if a link leads nowhere inside the sandbox, and a reload fails if the sandbox can't see the directory"""

    def is_protected():
        expect(machine.get("/key/32")[0], 401, "a key without a token")

    protected = 'tokens-file = "/etc/key-service/tokens"\n'
    machine.run("mkdir /opt/conf")
    machine.write("/opt/conf/key-service.toml", protected)
    machine.write("/etc/key-service/tokens", "")
    # Configuration management may link to a file elsewhere: key-service --check on the host accepts that.
    machine.run("ln -sf /opt/conf/key-service.toml /etc/key-service/config.toml && key-service --check")
    machine.run("systemctl restart key-service", ok=1)
    wait_for_status(machine, "config.toml: a symbolic link to /opt/conf/key-service.toml: No such file")
    done = machine.run("key-service-check", ok=1)
    assert "a symbolic link to /opt/conf/key-service.toml" in done.stderr, done
    # A link within the directory works like the file itself, and so does a link to the directory.
    machine.run("mv /opt/conf/key-service.toml /etc/key-service/real.toml && ln -sf real.toml /etc/key-service/config.toml")
    machine.run("systemctl restart key-service")
    is_protected()
    # The sandbox does not see a directory that is renamed into place. A reload reports that; a restart uses the new directory.
    machine.run("cp -a /etc/key-service /etc/key-service.new && echo 'max-size = 2000' >>/etc/key-service.new/real.toml")
    for _ in range(2):
        machine.run("mv /etc/key-service /etc/key-service.old && mv /etc/key-service.new /etc/key-service")
        machine.run("systemctl reload key-service", ok=1)
        machine.wait_for_log("/etc/key-service: expected the directory that was there when the service started")
        is_protected()
        machine.run("systemctl restart key-service && systemctl reload key-service")
        is_protected()
        machine.run("mv /etc/key-service.old /etc/key-service.new")
    machine.run("mv /etc/key-service /opt/conf/a && cp -a /opt/conf/a /opt/conf/b && ln -s /opt/conf/a /etc/key-service")
    machine.run("systemctl restart key-service && systemctl reload key-service")
    is_protected()
    machine.run("ln -sfn /opt/conf/b /etc/key-service")
    machine.run("systemctl reload key-service", ok=1)
    # A directory that is created later also fails the reload if no configuration file is named.
    machine.write("/run/systemd/system/key-service.service.d/default.conf", "[Service]\nExecStart=\nExecStart=/usr/bin/key-service\n")
    machine.run("rm /etc/key-service && systemctl daemon-reload && systemctl restart key-service")
    expect(machine.get("/key/32")[0], 200, "a key with the defaults")
    machine.run("mv /opt/conf/b /etc/key-service")
    machine.run("systemctl reload key-service", ok=1)
    machine.run("rm -r /opt/conf /etc/key-service.new /run/systemd/system/key-service.service.d && systemctl daemon-reload")
    machine.run("rm /etc/key-service/tokens /etc/key-service/real.toml /etc/key-service/config.toml")
    machine.write("/etc/key-service/config.toml", "")
    machine.run("systemctl restart key-service && systemctl reload key-service")


def test_an_upgrade_moves_the_sockets(machine):
    """after an upgrade or a drop-in changes the address of a socket, every socket listens and the service serves keys"""

    def moved(text):
        return text.replace("ListenStream=1123", "ListenStream=2123")

    def statuses():
        requests = [
            machine.outside("curl", "-s", "-o", "/dev/null", "--max-time", TIMEOUT, f"http://127.0.0.1:{port}/key/32")
            for port in (1123, 2123)
        ]
        return [subprocess.run(command, stdin=subprocess.DEVNULL).returncode for command in requests]

    unit = "usr/lib/systemd/system/key-service.socket"
    dropin = "/etc/systemd/system/key-service.socket.d/port.conf"
    for command in ("start", "stop"):
        machine.run(f"systemctl {command} key-service")
        output = upgrade(machine, {unit: moved})
        expect(statuses(), [7, 0], f"curl's statuses for the package's new address; {output}")
        output = upgrade(machine)
        expect(statuses(), [0, 7], f"curl's statuses for the old address; {output}")
        expect(listening(machine), SOCKETS, "all sockets")
    # An administrator's drop-in that systemd has not read before the upgrade, or has read already.
    for number, reload in enumerate(("true", "systemctl daemon-reload")):
        machine.run("systemctl start key-service")
        pid = machine.show("MainPID")
        machine.write(dropin, "[Socket]\nListenStream=\nListenStream=2123\n")
        machine.run(reload)
        # If the new version would not start, nothing changes, and the output says so.
        machine.write("/etc/key-service/config.toml", "max-sise = 1\n")
        output = upgrade(machine)
        expect((machine.show("MainPID"), statuses()), (pid, [0, 7]), output)
        assert "The old version keeps running" in output and "Until then it listens where it did" in output, output
        command = re.search(r"Fix the errors, then: (systemctl .*)$", output, re.M)[1]
        machine.write("/etc/key-service/config.toml", "")
        if number:
            machine.run(command)
        else:
            output = upgrade(machine)
            assert "restarting with the new address of key-service.socket" in output, output
        expect(statuses(), [7, 0], "curl's statuses after the fix")
        machine.run(f"rm -r /etc/systemd/system/key-service.socket.d && systemctl daemon-reload && {RESTART}")
        expect(statuses(), [0, 7], "curl's statuses without the drop-in")


def test_every_audit_record_is_counted(machine, figures):
    """each of 150,000 audit records in a burst is in the journal or counted as dropped, and so are records around a journal restart"""
    machine.write("/etc/systemd/journald.conf.d/room.conf", "[Journal]\nStorage=persistent\nSystemMaxUse=2G\n")
    machine.run("systemctl restart systemd-journald")
    machine.write("/etc/key-service/config.toml", "audit = true\nmax-connections-per-client = 0\n")
    machine.run("systemctl restart key-service")

    def recorded():
        machine.run("journalctl --sync", timeout=5 * TIMEOUT)
        lines = machine.run(
            f"journalctl -u key-service _PID={machine.show('MainPID')} MESSAGE='key issued' -o cat --output-fields=REQUEST_ID --no-pager",
            timeout=5 * TIMEOUT,
        ).stdout.splitlines()
        expect(len(lines), len(set(lines)), "records without duplicates")
        return len(lines), int(machine.metric("audit_records_dropped_total"))

    def settled():
        """Returns the records written and dropped, once they add up to the total or no longer change."""
        before, found = None, recorded()
        while sum(found) != total and found != before:
            time.sleep(5)  # two equal results: the writing has ended
            before, found = found, recorded()
        return found

    total, counts = 0, []
    sockets = "systemd-journald.socket systemd-journald-dev-log.socket systemd-journald.service"
    # The journal is stopped while nothing is written. Otherwise, entries that it had received but not read would be lost uncounted.
    for stage, count, before, during in [
        ("in a burst", 150_000, "true", None),
        ("after a restart of the journal", 30_000, f"systemctl stop {sockets} && systemctl start {sockets}", None),
        ("with a journal that starts late", 30_000, f"systemctl stop {sockets}", f"systemctl start {sockets}"),
    ]:
        failed = machine.metric("log_write_errors_total")
        machine.run(before)
        clients = subprocess.Popen(machine.outside(sys.executable, SUPPORT / "burst.py", "1123", str(count)))
        with peers.killed_after(clients, "burst.py"):
            if during:
                until("a failed write", lambda failed=failed: machine.metric("log_write_errors_total") > failed)
                machine.run(during)
            expect(clients.wait(5 * TIMEOUT), 0, "burst.py")
        total += count
        kept, dropped = settled()
        expect(kept + dropped, total, f"{stage}: {kept} recorded and {dropped} dropped")
        counts.append(f"{stage} {kept} + {dropped}")
    machine.write("/etc/key-service/config.toml", "")
    machine.run("systemctl restart key-service")
    figures("; ".join(counts))


def test_the_service_needs_no_journal(machine):
    """the service starts and serves keys without a journal"""
    sockets = "systemd-journald.socket systemd-journald-dev-log.socket systemd-journald.service"
    machine.run(f"systemctl stop key-service {sockets}; rm -r /run/systemd/journal")
    try:
        machine.run("systemctl start key-service")
        expect(machine.get("/key/32")[0], 200, "status")
    finally:
        machine.run(
            "systemctl start systemd-journald.socket systemd-journald-dev-log.socket && systemctl restart systemd-journald key-service"
        )
    machine.get("/key/32")


def test_a_task_limit_reduces_the_workers(machine):
    """where the task limit allows fewer threads than workers, the service starts with fewer and logs a warning"""
    # LimitNPROC= stands in for TasksMax=, for which a machine may lack the cgroup controller. test_adversity.py tests more limits.
    machine.write("/run/systemd/system/key-service.service.d/tasks.conf", "[Service]\nLimitNPROC=12\nEnvironment=KEYSERVICE_WORKERS=64\n")
    machine.run("systemctl daemon-reload && systemctl restart key-service")
    expect(machine.get("/key/32")[0], 200, "status")
    machine.wait_for_log("fewer workers are started than asked for", "TasksMax=")
    machine.run("rm -r /run/systemd/system/key-service.service.d && systemctl daemon-reload && systemctl restart key-service")


def test_an_idle_service_exits_until_the_next_connection(machine):
    """with exit-idle, the service exits and stays down, and the next connection starts it again"""
    machine.write("/etc/key-service/config.toml", "exit-idle = 2\n")
    machine.run("systemctl restart key-service")
    until("the exit", lambda: machine.show("ActiveState") == "inactive")
    time.sleep(2)  # longer than RestartSec: systemd does not restart it
    expect(machine.show("ActiveState"), "inactive", "the service after RestartSec")
    expect(machine.get("/key/32")[0], 200, "a key on the next connection")
    machine.write("/etc/key-service/config.toml", "")
    machine.run("systemctl restart key-service")


def test_an_invalid_configuration_fails_and_recovers(machine, figures):
    """an invalid configuration fails with one clear line and exit status 78, without a busy restart loop; clients that wait are served
    after the fix"""
    machine.run("systemctl stop key-service")
    machine.write("/etc/key-service/config.toml", 'max-size = "1k"\n')
    done = machine.run("systemctl start key-service", ok=None)
    assert done.returncode != 0, "systemctl start succeeded"
    wait_for_status(machine, 'max-size: expected a whole number from 1 to 1073741824, found "1k"')
    until("exit status 78", lambda: machine.show("ExecMainStatus") == "78")
    waiting = subprocess.Popen(
        machine.outside("curl", "-sS", "--max-time", TIMEOUT, "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:1123/key/32"),
        stdout=subprocess.PIPE,
        text=True,
    )
    with peers.killed_after(waiting, "curl"):
        since, restarts, cpu = time.monotonic(), int(machine.show("NRestarts")), cpu_seconds(machine)
        time.sleep(5)
        until("a restart", lambda: int(machine.show("NRestarts")) > restarts)
        restarts, cpu = int(machine.show("NRestarts")) - restarts, cpu_seconds(machine) - cpu
        seconds = time.monotonic() - since
        rate, share = restarts / seconds, cpu / seconds
        assert rate <= 2.5, f"{rate} restarts a second"
        assert share < 0.25, f"{share:.0%} of a CPU"
        expect(machine.show("ActiveState", "key-service.socket"), "active", "the socket")
        machine.write("/etc/key-service/config.toml", "")
        expect(waiting.communicate(timeout=TIMEOUT)[0], "200", "the client that waited")
    figures(f"{rate:.1f} restarts a second, {share:.1%} of a CPU")


def cpu_seconds(machine):
    """CPU seconds of the machine's first process and its reaped children: the cost of the restarts."""
    fields = Path(f"/proc/{machine.leader}/stat").read_text().rsplit(") ")[1].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def test_the_tls_drop_in_works(machine, figures):
    """with the drop-in of docs/tls.md, the service speaks TLS in its sandbox, and a restart loads a renewed certificate"""
    key, certificate = machine.directory / "privkey.pem", machine.directory / "fullchain.pem"

    def make(serial):
        certificates.self_signed(key, certificate, "/CN=keys", "IP:127.0.0.1", "-set_serial", str(serial))
        for file in (key, certificate):
            machine.install_file(file, f"/root/{file.name}")

    def get(path):
        return int(machine.curl("--cacert", certificate, "-o", "/dev/null", "-w", "%{size_download}", f"https://127.0.0.1:1123{path}"))

    make(1)
    machine.write("/root/example.sh", commands("docs/tls.md", "install "))
    machine.run("cd /root && sh -e example.sh")
    pid = machine.show("MainPID")
    expect((get("/key/32"), get("/key/1024"), get("/health")), (32, 1024, 2), "lengths over TLS")
    plain = machine.curl("http://127.0.0.1:1123/key/32")
    expect(json.loads(plain)["detail"], "This port speaks TLS: use https://", "plain HTTP")
    before = machine.metric("tls_certificate_not_after_timestamp_seconds")
    assert 0 < before - time.time() <= 86_400, before
    make(2)
    machine.run("systemctl reload key-service && cd /root && sh -e example.sh")
    assert machine.show("MainPID") != pid
    expect(get("/key/32"), 32, "length with the new certificate")
    found = exposure(machine, "key-service.service")
    assert found <= EXPOSURE_MAX, found

    # A shell does not know the unit's drop-in, but key-service-check checks what the unit would run.
    def check_health():
        done = machine.run("key-service health", ok=1)
        assert "speaks TLS" in done.stderr and done.stderr.isprintable() is False and done.stderr.strip().isprintable(), done

    retry_if_stalled(check_health)
    output = machine.run("key-service-check").stdout
    assert 'tls-cert = "credential:tls.crt"' in output, output
    pid = machine.show("MainPID")
    machine.run("echo nonsense >/etc/key-service/tls/key.pem")
    done = machine.run("key-service-check", ok=1)
    assert "tls-key" in done.stderr, done
    expect(machine.show("MainPID"), pid, "the running process")
    machine.run("rm /etc/key-service/tls/key.pem")
    done = machine.run("key-service-check", ok=1)
    assert "a credential of the unit can't be loaded" in done.stderr, done
    machine.run("cd /root && sh -e example.sh")
    # LXC images have such a drop-in. docs/tls.md names the file zzzz-tls.conf for them, which is read after theirs.
    machine.write("/run/systemd/system/service.d/zzz-lxc-service.conf", "[Service]\nLoadCredential=\n")
    machine.run("systemctl daemon-reload")
    done = machine.run("key-service-check", ok=1)
    assert "tls-cert: expected" in done.stderr, done
    machine.run("cd /etc/systemd/system/key-service.service.d && mv tls.conf zzzz-tls.conf && systemctl daemon-reload && key-service-check")
    machine.run("rm -r /run/systemd/system/service.d")
    machine.run("rm -r /etc/systemd/system/key-service.service.d /etc/key-service/tls && systemctl daemon-reload")
    machine.run("systemctl restart key-service")
    expect(machine.get("/key/32")[0], 200, "a key over plain HTTP again")
    figures(f"exposure {found}")


def test_each_unit_gets_its_own_key(machine, figures):
    """the example of docs/credentials.md works; each start of each unit gets its own key, and nobody else gets one"""
    machine.write("/root/example.sh", commands("docs/credentials.md", "cat "))
    lines = machine.run("sh -e /root/example.sh && journalctl --sync && journalctl -u web -o cat").stdout.split()
    # A setting that is appended to the file later belongs to the service, not to a table of the example.
    machine.run("echo 'max-size = 2000' >>/etc/key-service/config.toml && systemctl reload key-service")
    assert "89" in lines and any(re.fullmatch(r"[2-9A-HJ-NP-Za-km-z]{24}", word) for word in lines), lines
    # A credential without an entry in the configuration is 32 raw bytes. The unit is sandboxed as strictly as possible.
    machine.write("/etc/key-service/config.toml", "audit = true\n")
    machine.run("systemctl reload key-service")
    machine.write(
        "/run/systemd/system/demo@.service",
        "[Service]\nType=oneshot\nDynamicUser=yes\nPrivateNetwork=yes\n"
        "ProtectSystem=strict\nPrivateUsers=yes\nLoadCredential=cookie.key:/run/key-service/credential.sock\n"
        "StandardOutput=file:/root/key-%i\nExecStart=cat %d/cookie.key\n",
    )
    machine.run("systemctl daemon-reload")
    keys = set()
    for start in range(20):
        machine.run(f"systemctl start demo@{start % 4}")
        key = machine.read(f"/root/key-{start % 4}")
        expect(len(key), 32, "length")
        keys.add(key)
    expect(len(keys), 20, "different keys")

    def has_record():
        units = [entry.get("UNIT", entry.get("F_UNIT")) for entry in machine.journal() if entry.get("MESSAGE") == "key issued"]
        return "demo@3.service" in str(units)

    until("a record for demo@3", has_record)
    text = machine.run("journalctl -o export --no-pager --all", timeout=120).stdout
    assert not any(key.hex()[:16] in text for key in keys)
    # With the service stopped, its socket starts it while the unit waits.
    machine.run("systemctl stop key-service && systemctl start demo@0")
    expect(len(machine.read("/root/key-0")), 32, "length after activation")
    # Only root may connect, and a client whose address names no unit gets nothing.
    get = """perl -MIO::Socket::UNIX -e '$socket = IO::Socket::UNIX->new("/run/key-service/credential.sock") or exit 7; print <$socket>'"""
    expect(machine.run(f"setpriv --reuid 65534 --regid 65534 --clear-groups {get}", ok=None).returncode, 7, "as nobody")
    expect(machine.run(get).stdout, "", "root without a unit's name")
    until("the malformed request to be counted", lambda: machine.metric('credentials_total{outcome="malformed"}') == 1)
    until("the key served since the start to be counted", lambda: machine.metric('credentials_total{outcome="served"}') == 1)
    # When no key can be generated, the daemon's response has to fail the start of the unit, on this systemd version, too. Closing the
    # connection without a byte does not.
    outcomes = {}
    for name, response in [("empty", "true"), ("refusal", f"head -c {(1 << 20) + 8192} /dev/zero")]:
        for unit, text in [
            (f"{name}-response.socket", f"[Socket]\nListenStream=/run/{name}.sock\nAccept=yes\n"),
            (f"{name}-response@.service", f"[Service]\nExecStart={response}\nStandardOutput=socket\n"),
            (f"{name}.service", f"[Service]\nType=oneshot\nLoadCredential=key:/run/{name}.sock\nExecStart=true\n"),
        ]:
            machine.write(f"/run/systemd/system/{unit}", text)
        machine.run(f"systemctl daemon-reload && systemctl start {name}-response.socket")
        machine.run(f"systemctl start {name}", ok=None)
        outcomes[name] = machine.show("ExecMainStatus", f"{name}.service"), machine.show("Result", f"{name}.service")
        machine.run(f"systemctl stop {name}-response.socket")
    expect(outcomes["refusal"][0], "243", "exit status of a unit that gets no key")
    machine.run(
        "systemctl reset-failed; cd /run/systemd/system && rm demo@.service empty* refusal* /run/empty.sock /run/refusal.sock "
        "/etc/systemd/system/web.service /root/key-[0-9] /root/example.sh && systemctl daemon-reload"
    )
    machine.write("/etc/key-service/config.toml", "")
    machine.run("systemctl restart key-service")
    figures(f"closed without a byte: {outcomes['empty']}; more bytes than systemd accepts: {outcomes['refusal']}")


def test_machines_share_no_control_group(machine, tmp_path):
    """support/machine.py: a service that runs on one machine has no control group on another, and a stopped machine leaves none"""
    machine.write("/run/systemd/system/alone.service", "[Service]\nExecStart=sleep infinity\n")
    machine.run("systemctl daemon-reload && systemctl start alone")
    with Machine(machine.suite, tmp_path, machine.package) as other:
        found = [each.run("find /sys/fs/cgroup -name alone.service").stdout.split() for each in (machine, other)]
    assert found[0], "the machine that runs the service has no control group for it"
    expect(found[1], [], "control groups on the other machine")
    expect([str(group) for group in other.cgroups if group.exists()], [], "control groups of the stopped machine")
    machine.run("systemctl stop alone && rm /run/systemd/system/alone.service && systemctl daemon-reload")


def test_purge_removes_everything(machine):
    """apt-get purge leaves no file, user or unit"""
    machine.run("systemctl enable --now key-service && apt-get purge -y key-service", timeout=120)
    machine.run("rm -f /root/key-service*.deb")
    left = machine.run(
        "find / -xdev \\( -path /proc -o -path /sys -o -path /var/log/journal \\) -prune -o -name '*key-service*' -print"
    ).stdout.split()
    left = [path for path in left if not path.startswith(("/sys/", "/proc/", "/run/systemd/transient"))]
    expect(left, [], "files")
    # systemd forgets a unit shortly after the unit's file and the last unit that names it are removed.
    until("no more units", lambda: not machine.run("systemctl list-units --all --plain --no-legend 'key-service*'").stdout.strip())
    expect(machine.run("systemctl list-unit-files --no-legend 'key-service*'", ok=None).stdout.strip(), "", "unit files")
    machine.run("getent passwd key-service", ok=2)
    machine.run("bash -c '</dev/tcp/127.0.0.1/1123'", ok=1)
    machine.run("test ! -e /run/key-service -a ! -e /run/key-service-root")

"""Tests packaging/quadlet and compose.yaml, as documented in docs/containers.md, on a booted Debian 13 with Debian's Podman.

The machine is the one of test_system.py, with more packages and cgroup v2. If the host uses cgroup v1, the machine has no cgroup v2
controllers; the tests then read the memory and process limits from the container engine and from systemd instead of the kernel. The tests
run in the order of this file, and each one restores the machine's state.
"""

import contextlib
import ctypes
import importlib.util
import json
import re
import shutil
import socket
import subprocess
import threading
import time

import pytest
from support import certificates, images, pages, peers
from support import machine as debian
from support.conditions import TIMEOUT, expect, retry_if_stalled, until
from support.daemon import REPOSITORY
from support.machine import as_root

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(3600),  # the image is compiled for two architectures, and once more in another directory
    pytest.mark.xdist_group("image"),
    pytest.mark.tools("mmdebstrap", "systemd-nspawn", "podman", "openssl"),
]

BUILT, IMAGE = images.IMAGES["amd64"], "localhost/key-service"
SOCKETS = ["key-service.socket", "key-service-metrics.socket", "key-service-credential.socket"]
INSTALL = as_root(pages.commands("docs/containers.md", "sudo install -d /etc/key-service "))
BUILD, UPDATE = as_root(pages.commands("docs/containers.md", "sudo podman build -t localhost/key-service .\nsudo ")).splitlines()
DROPIN = "/etc/containers/systemd/key-service.container.d/test.conf"
SOURCE = "/srv/source"  # every user can read it
USER = "op"


class Machine(debian.Machine):
    """A booted Debian 13 with Podman and the parts of the source tree that docs/containers.md uses."""

    packages = debian.PACKAGES + (
        ",dbus,curl,iproute2,procps,podman,crun,runc,netavark,aardvark-dns,nftables,uidmap,dbus-user-session,libpam-systemd"
        ",docker-compose,python3-yaml,python3-dotenv"
    )
    kind = "-podman"
    # crun attaches BPF programs for device access, and creates a keyring for each container.
    options = ["--capability=all", "--system-call-filter=bpf keyctl add_key"]
    environment = {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}

    def prepare(self):
        for name in ["packaging", "systemd", "compose.yaml"]:
            source, target = REPOSITORY / name, self.root / SOURCE.lstrip("/") / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        if "pids" not in self.run("cat /sys/fs/cgroup/cgroup.controllers").stdout:
            # Podman sets a process limit by default, and crun fails to set it without the controller.
            self.write("/etc/containers/containers.conf.d/test.conf", "[containers]\npids_limit = 0\n")
            peers.log("no cgroup controllers in the machine: memory and process limits are not enforced")
        # Debian 13 has podman-compose 1.3, which runs the health check in a shell.
        self.install_file(importlib.util.find_spec("podman_compose").origin, "/usr/bin/podman-compose")
        self.run("chmod +x /usr/bin/podman-compose")
        self.run(f"podman load -q -i /root/key-service.tar && podman tag {BUILT} {IMAGE}")

    def script(self, commands, user=None):
        """Runs commands in the source tree and stops at the first that fails."""
        script = "set -e\n" + commands
        if user:
            identity = self.run(f"id -u {user}").stdout.strip()
            script = f"export XDG_RUNTIME_DIR=/run/user/{identity}\n" + script
        self.write("/srv/script.sh", script)
        command = f"cd {SOURCE} && sh /srv/script.sh"
        return self.run(f"su {user} -c '{command}'" if user else command)

    def quadlet(self, *lines):
        """Replaces the drop-in by these lines and restarts the service."""
        self.write(DROPIN, "\n".join(lines) + "\n")
        self.run("systemctl daemon-reload && systemctl restart key-service")

    def configure(self, text):
        self.write("/etc/key-service/config.toml", text)
        self.run("systemctl restart key-service")

    def container(self, name="key-service"):
        return json.loads(self.run(f"podman container inspect {name}").stdout)[0]

    def pid(self, name="key-service"):
        """The daemon's process id in the machine's PID namespace; 0 if the container is not running."""
        return int(self.run(f"podman container inspect -f '{{{{.State.Pid}}}}' {name}", ok=None).stdout or 0)

    def proc(self, pid, name):
        return self.run(f"cat /proc/{pid}/{name}").stdout


@pytest.fixture(scope="module")
def machine(image, tmp_path_factory):
    """A machine with the image, after the installation steps of docs/containers.md, before the first request."""
    directory = tmp_path_factory.mktemp("podman")
    archive = directory / "key-service.tar"
    images.run("podman", "save", "--quiet", "--format=docker-archive", f"--output={archive}", image)
    with Machine("trixie", directory, archive) as machine:
        machine.prepare()
        machine.run("rm -rf /etc/key-service")
        *commands, request = INSTALL.splitlines()
        assert request.startswith("curl "), request
        machine.script("\n".join(commands))
        yield machine


# Quadlet.


def test_installation_works_as_documented(machine):
    """the installation commands of docs/containers.md work unchanged, and the first connection starts the container"""
    for unit in SOCKETS:
        expect((machine.show("ActiveState", unit), machine.show("UnitFileState", unit)), ("active", "enabled"), unit)
    expect(machine.show("ActiveState"), "inactive", "the service before the first connection")
    assert re.fullmatch(r"[0-9a-f]{64}\n", machine.run(INSTALL.splitlines()[-1]).stdout)
    until("the service is active", lambda: machine.show("ActiveState") == "active")
    expect(machine.get("/metrics", 8000)[0], 200, "metrics")
    expect(
        machine.show("StatusText"),
        "Keys on [::]:1123; credentials on unix:/run/key-service/credential.sock; metrics on [::]:8000",
        "the status text",
    )


def test_generated_unit_is_valid(machine):
    """systemd-analyze accepts the generated unit, and drain timeout < container stop timeout < unit stop timeout"""
    done = machine.run("systemd-analyze --generators=true verify key-service.service")
    output = (done.stdout + done.stderr).splitlines()
    warnings = [line for line in output if "key-service" in line and "Loading source" not in line]
    expect(warnings, [], "warnings")
    generated = machine.run("systemctl cat key-service").stdout
    effective = machine.run(f"podman run --rm --network none {IMAGE} --check").stdout
    drain = int(re.search(r"^drain-timeout = (\d+)$", effective, re.M)[1])
    stop = int(re.search(r"--stop-timeout[ =](\d+)", generated)[1])
    kill = int(machine.run("systemctl show -P TimeoutStopUSec key-service").stdout.strip().removesuffix("s"))
    assert drain < stop < kill, (drain, stop, kill)
    limits = {name: machine.show(name) for name in ["MemoryMax", "MemorySwapMax", "TasksMax", "StartLimitIntervalUSec", "Restart"]}
    expect(
        limits,
        {"MemoryMax": str(512 << 20), "MemorySwapMax": "0", "TasksMax": "300", "StartLimitIntervalUSec": "0", "Restart": "always"},
        "limits of the unit",
    )
    packaged = (REPOSITORY / "systemd/key-service.service").read_text()
    for line in ["MemoryMax=512M", "MemorySwapMax=0", "TasksMax=300", "WatchdogSec=10s", "TimeoutStopSec=30s", "RestartSec=500ms"]:
        assert line in packaged and line in generated, line
    wants = machine.run("systemctl show -P Wants -P After key-service").stdout
    assert "network" not in wants, wants


def exposures(machine, name="key-service"):
    """The privileges that the container has and does not need, one word each."""
    pid = machine.pid(name)
    found = set()
    interfaces = [line.split(":")[0].strip() for line in machine.proc(pid, "net/dev").splitlines()[2:]]
    namespaces = {machine.run(f"readlink /proc/{process}/ns/net").stdout for process in [1, pid]}
    if interfaces != ["lo"] or len(namespaces) != 2:
        found.add("network")
    status = dict(line.split(":\t", 1) for line in machine.proc(pid, "status").splitlines() if ":\t" in line)
    if any(int(status[kind], 16) for kind in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"]):
        found.add("capabilities")
    if status["NoNewPrivs"] != "1":
        found.add("privileges")
    if status["Uid"].split() + status["Gid"].split() != ["65532"] * 8 or status["Groups"].split() not in ([], ["65532"]):
        found.add("user")
    # The container has its own filter, in addition to those that nspawn may set for the whole machine.
    monitor = re.search(r"^Seccomp_filters:\t(\d+)$", machine.proc(status["PPid"], "status"), re.M)[1]
    if int(status["Seccomp_filters"]) <= int(monitor):
        found.add("system calls")
    mounts = [line.split() for line in machine.proc(pid, "mountinfo").splitlines()]
    writable = {mount[4] for mount in mounts if "ro" not in mount[5].split(",")}
    if "/" in writable:
        found.add("root")
    if writable - {"/", "/proc", "/dev/mqueue", "/dev/pts"}:
        found.add("mounts")
    limits = machine.proc(pid, "limits")
    if not re.search(r"^Max core file size +1 +1 ", limits, re.M):
        found.add("core")
    if not re.search(r"^Max open files +16384 +16384 ", limits, re.M):
        found.add("files")
    return found


def test_is_confined(machine):
    """no network but lo, read-only root, no capability or new privilege, user 65532; each weakened container is detected"""
    expect(exposures(machine), set(), "exposures")
    for line, expected in [
        ("Network=\nNetwork=host", "network"),
        ("ReadOnly=false", "root"),
        ("ReadOnlyTmpfs=true", "mounts"),
        ("AddCapability=CAP_NET_RAW", "capabilities"),
        ("NoNewPrivileges=false", "privileges"),
        ("User=0:0", "user"),
        ("SeccompProfile=unconfined", "system calls"),
        ("Tmpfs=/tmp", "mounts"),
        ("Ulimit=core=0:0", "core"),
        ("Ulimit=nofile=1024:1024", "files"),
    ]:
        machine.quadlet("[Container]", line)
        assert expected in exposures(machine), f"{line} must not pass"
    machine.quadlet()
    health = machine.run("systemctl list-timers --all --no-legend").stdout
    assert machine.container()["Id"] not in health, health


def test_journal_has_fields_and_audit_records(machine):
    """the journal has the log entries with fields and priorities, and the audit record has the client's real address"""
    machine.configure("audit = true\n")
    machine.get("/key/32")

    def issued():
        return [entry for entry in machine.journal() if entry.get("MESSAGE") == "key issued"]

    entries = until("an audit record", issued)
    expect(entries[-1].get("ADDRESS"), "127.0.0.1", "the client's address")
    machine.configure("")
    entry = [entry for entry in machine.journal() if str(entry.get("MESSAGE", "")).startswith("ready: Keys on ")][-1]
    expect((entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"], entry["_UID"]), ("5", "key-service", "65532"), "priority, identifier and user")
    assert re.fullmatch(r"\d+\.\d+\.\d+", entry.get("VERSION", "")), entry
    assert machine.run("journalctl -u key-service REASON=SIGTERM -o cat").stdout.strip(), "no entry with REASON=SIGTERM"


def test_reload_and_stop_work(machine):
    """a reload keeps the process, a stop ends it with status 0, and the next connection starts it again"""
    pid = machine.pid()
    expect(machine.get("/key/2000")[0], 413, "above max-size")
    machine.write("/etc/key-service/config.toml", "max-size = 2000\n")
    machine.run("systemctl reload key-service")
    until("the reload", lambda: machine.get("/key/2000")[0] == 200)
    machine.write("/etc/key-service/config.toml", "max-size = 0\n")
    machine.run("systemctl reload key-service")
    until("the rejected reload", lambda: "reload 2 was refused: " in machine.show("StatusText"))
    expect((machine.get("/key/2000")[0], machine.pid()), (200, pid), "status and process after a rejected reload")
    machine.write("/etc/key-service/config.toml", "")
    machine.run("systemctl stop key-service")
    expect((machine.show("ActiveState"), machine.show("ExecMainStatus")), ("inactive", "0"), "state and exit status")
    expect(machine.run("podman ps -aq").stdout, "", "remaining containers")
    expect(machine.get("/key/32")[0], 200, "the next connection")


def test_restarts_lose_no_request(machine, figures):
    """no request is refused or fails during 20 restarts under 500 requests per second"""
    with machine.load() as seen:
        for _ in range(20):
            machine.run("systemctl restart key-service")
    expect((seen["failed"], seen["failures"]), (0, []), "failures")
    assert seen["served"] > 100 * seen["seconds"], seen
    figures(f"{seen['served']} requests in {seen['seconds']} s, slowest {seen['slowest']} s")


# A client that reads nothing uses the whole drain timeout, which is longer than the 10 s stop timeout of Podman and Docker.
STALLS = {"KEYSERVICE_MAX_SIZE": 1 << 30, "KEYSERVICE_DRAIN_TIMEOUT": 12, "KEYSERVICE_WRITE_TIMEOUT": 60}


def stalled(machine):
    """A connection to the machine's port 1123 that requests a streamed key and stops reading it.

    A thread opens it, because the socket belongs to the network namespace of the thread."""
    created = []

    def create():
        with open(f"/proc/{machine.leader}/ns/net") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000) != 0:  # CLONE_NEWNET
                raise OSError(ctypes.get_errno(), "setns")
        created.append(socket.create_connection(("127.0.0.1", 1123), TIMEOUT))

    thread = threading.Thread(target=create)  # setns(2) changes the namespace of this thread only
    thread.start()
    thread.join()
    created[0].sendall(f"GET /key/{1 << 30} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert created[0].recv(12) == b"HTTP/1.1 200"
    return created[0]


def test_stop_waits_for_the_drain(machine):
    """a client that never reads delays a stop until the drain timeout, beyond Podman's default of 10 s, and the exit is clean"""
    machine.quadlet("[Container]", *(f"Environment={name}={value}" for name, value in STALLS.items()))
    with contextlib.closing(stalled(machine)):
        machine.run("systemctl stop key-service")
    expect((machine.show("Result"), machine.show("ExecMainStatus")), ("success", "0"), "result and exit status")
    messages = [entry.get("MESSAGE") for entry in machine.journal() if entry.get("SYSLOG_IDENTIFIER") == "key-service"]
    assert any("stopped with connections still open" in str(message) for message in messages[-5:]), messages[-5:]
    machine.quadlet()


def test_killed_container_is_restarted(machine, figures):
    """after each kill of the daemon or of its monitor, the service restarts and the sockets stay active"""
    begin = time.monotonic()
    for number in range(11):
        before = machine.pid()
        machine.run(f"kill -9 {before if number < 8 else machine.show('MainPID')}")
        until("a new process", lambda old=before: machine.show("ActiveState") == "active" and machine.pid() not in (0, old))
        expect(machine.get("/key/32")[0], 200, "status")
    for unit in SOCKETS:
        expect(machine.show("ActiveState", unit), "active", unit)
    figures(f"11 kills in {time.monotonic() - begin:.0f} s, {machine.show('NRestarts')} restarts")


def test_watchdog_replaces_a_frozen_process(machine, figures):
    """the watchdog works through the container: a healthy process keeps running, a frozen one is replaced without StopTimeout="""
    pid = machine.pid()
    time.sleep(11)  # longer than WatchdogSec=
    expect(machine.pid(), pid, "process id of the healthy daemon")
    machine.run(f"kill -STOP {pid}")
    since = time.monotonic()
    expect(machine.get("/key/32")[0], 200, "status after the freeze")
    seconds = time.monotonic() - since
    assert seconds < 25, f"{seconds:.0f} s"
    assert machine.pid() != pid, "another process than the frozen one answers"
    figures(f"after {seconds:.0f} s")


def test_sockets_keep_their_names_with_crun_and_runc(machine, figures):
    """with crun and with runc, each socket has its name, in any order"""
    orders = set()
    for runtime in ["crun", "runc"]:
        machine.quadlet("[Container]", f"GlobalArgs=--runtime={runtime}")
        for _ in range(5):
            machine.run("systemctl restart key-service")
            assert f"/{runtime} " in machine.proc(machine.show("MainPID"), "cmdline").replace("\0", " "), runtime
            environment = machine.proc(machine.pid(), "environ").split("\0")
            names = next(line for line in environment if line.startswith("LISTEN_FDNAMES=")).split("=")[1]
            expect(sorted(names.split(":")), ["credential", "http", "metrics"], f"names with {runtime}")
            expect((machine.get("/key/32")[0], machine.get("/metrics", 8000)[0]), (200, 200), f"statuses with {runtime}")
            orders.add(names)
    machine.quadlet()
    figures(f"{len(orders)} orders")


def test_credential_socket_issues_a_key_for_each_unit(machine):
    """the credential socket starts the container and issues a new key for each start of a unit"""
    machine.write(
        "/run/systemd/system/demo.service",
        "[Service]\nType=oneshot\nDynamicUser=yes\nPrivateNetwork=yes\n"
        "LoadCredential=cookie.key:/run/key-service/credential.sock\nStandardOutput=append:/root/keys\n"
        "ExecStart=cat %d/cookie.key\n",
    )
    machine.run("systemctl daemon-reload && systemctl stop key-service && systemctl start demo && systemctl start demo")
    keys = (machine.root / "root/keys").read_bytes()
    assert len(keys) == 64 and keys[:32] != keys[32:], keys
    expect(machine.metric('credentials_total{outcome="served"}'), 2, "credentials served")
    machine.run("rm /run/systemd/system/demo.service /root/keys && systemctl daemon-reload")


def test_idle_container_exits(machine):
    """with exit-idle the daemon exits, is not restarted, and the next connection starts it again"""
    machine.configure("exit-idle = 2\n")
    until("the idle exit", lambda: machine.show("ActiveState") == "inactive")
    time.sleep(2)  # longer than RestartSec=: systemd does not restart it
    expect(machine.show("ActiveState"), "inactive", "state of the service")
    expect(machine.get("/key/32")[0], 200, "the next connection")
    machine.configure("")


def test_invalid_configuration_recovers(machine):
    """an invalid configuration exits with 78 and logs the error, and a waiting client is served after the fix"""
    machine.run("systemctl stop key-service")
    machine.write("/etc/key-service/config.toml", 'max-size = "1k"\n')
    waiting = subprocess.Popen(
        machine.inside("curl -sS --max-time 300 -o /dev/null -w '%{http_code}' http://127.0.0.1:1123/key/32"),
        stdout=subprocess.PIPE,
        text=True,
    )
    with peers.killed_after(waiting, "curl"):
        # More than the default start limits of units and sockets.
        until("25 starts", lambda: int(machine.show("NRestarts")) >= 25, 3 * TIMEOUT)
        machine.wait_for_log('max-size: expected a whole number from 1 to 1073741824, found "1k"', "status=78/CONFIG")
        expect(machine.show("ActiveState", "key-service.socket"), "active", "the socket")
        machine.write("/etc/key-service/config.toml", "")
        expect(waiting.communicate(timeout=TIMEOUT)[0], "200", "status of the waiting client")


def test_tls_and_token_examples_work(machine):
    """the TLS and token examples of docs/containers.md work, and a removed token is rejected without a restart"""
    source = machine.root / SOURCE.lstrip("/")
    certificates.self_signed(source / "privkey.pem", source / "fullchain.pem", names="IP:127.0.0.1")
    machine.script(as_root(pages.commands("docs/containers.md", "sudo podman secret ")))
    token, line = machine.script(as_root(pages.commands("docs/containers.md", "sudo podman run "))).stdout.splitlines()
    machine.write("/etc/key-service/tokens", line + "\n")
    machine.write("/srv/token.header", f"Authorization: Bearer {token}\n")
    machine.configure('tokens-file = "/etc/key-service/tokens"\n')
    curl = f"curl -s --max-time 60 --cacert {SOURCE}/fullchain.pem -o /dev/null -w '%{{http_code}}' https://127.0.0.1:1123/key/32"
    statuses = [machine.run(f"{curl} {header}").stdout for header in ("", "-H @/srv/token.header")]
    expect(statuses, ["401", "200"], "without and with a token")
    pid = machine.pid()
    secrets = machine.run(f"stat -c '%a %u %n' /proc/{pid}/root/run/secrets/tls.key /proc/{pid}/root/run/secrets/tls.crt").stdout
    expect([entry.split()[:2] for entry in secrets.splitlines()], [["400", "65532"]] * 2, "modes and owners")
    expect(exposures(machine), set(), "exposures")
    machine.write("/etc/key-service/tokens", "")
    until("the token to be rejected", lambda: machine.run(f"{curl} -H @/srv/token.header").stdout == "401")
    expect(machine.pid(), pid, "process id")
    machine.run("rm /etc/containers/systemd/key-service.container.d/tls.conf /etc/key-service/tokens && systemctl daemon-reload")
    machine.configure("")


def test_auto_update_loses_no_request(machine, figures):
    """podman auto-update under load loses no request, and rolls back an image that does not start"""

    def build(line):
        machine.write(f"{SOURCE}/Dockerfile", f"FROM {BUILT}\n{line}\n")
        machine.script(BUILD)
        return machine.run(f"podman image inspect -f '{{{{.Id}}}}' {IMAGE}").stdout.strip()

    old = machine.container()["Image"]
    with machine.load(200) as seen:
        new = build("LABEL test=new")
        assert new != old
        machine.run(UPDATE)
        expect(machine.container()["Image"], new, "the image after the update")
        broken = build("ENV KEYSERVICE_MAX_SIZE=broken")
        update = machine.run(UPDATE, ok=None)
        assert "rolled back" in update.stdout, update
        until("the old image", lambda: machine.show("ActiveState") == "active")
        found = machine.container()["Image"]
        assert found == new != broken, "the image after the rollback"
    expect((seen["failed"], seen["failures"]), (0, []), "failures")
    machine.run(f"podman tag {BUILT} {IMAGE} && systemctl restart key-service")
    figures(f"{seen['served']} requests, slowest {seen['slowest']} s")


def test_user_installation_works(machine, figures):
    """an unprivileged user installs the same unit: a connection starts it, it is confined, and restarts lose no request"""
    machine.run("systemctl stop 'key-service*.socket' key-service")
    machine.run(f"useradd -m {USER} && loginctl enable-linger {USER}")
    identity = machine.run(f"id -u {USER}").stdout.strip()
    until("the user's service manager", lambda: machine.run(f"systemctl is-active user@{identity}", ok=None).stdout.strip() == "active")

    def as_user(command):
        return machine.run(f"su {USER} -c 'export XDG_RUNTIME_DIR=/run/user/{identity}; cd; {command}'").stdout

    machine.run("install -m 644 /root/key-service.tar /srv/")
    as_user(f"podman load -q -i /srv/key-service.tar && podman tag {BUILT} {IMAGE}")
    assert re.search(r"^[0-9a-f]{64}$", machine.script(pages.commands("docs/containers.md", "install -d ~/"), USER).stdout, re.M)
    pid = as_user('podman inspect -f "{{.State.Pid}}" key-service').strip()
    expect(machine.proc(pid, "net/dev").count(":"), 1, "interfaces")
    status = dict(line.split(":\t", 1) for line in machine.proc(pid, "status").splitlines() if ":\t" in line)
    first = int(machine.run(f"grep ^{USER}: /etc/subuid").stdout.split(":")[1])
    rights = int(status["Uid"].split()[0]), int(status["CapBnd"], 16), status["NoNewPrivs"]
    expect(rights, (first + 65531, 0, "1"), "user, capabilities and new privileges")
    expect(machine.get("/metrics", 8000)[0], 200, "metrics")
    as_user("echo max-size = 2000 >.config/key-service/config.toml && systemctl --user reload key-service")
    until("the reload of the user's configuration", lambda: machine.get("/key/2000")[0] == 200)
    with machine.load() as seen:
        for _ in range(5):
            as_user("systemctl --user restart key-service")
    expect((seen["failed"], seen["failures"]), (0, []), "failures")
    as_user("systemctl --user disable --now key-service.socket key-service-metrics.socket; systemctl --user stop key-service")
    figures(f"{seen['served']} requests")


# Compose.


def compose(machine, tool, *arguments, file="compose.yaml", ok=0):
    # The build API of Podman's socket is the one that Docker had before BuildKit.
    environment = "" if tool == "podman-compose" else "DOCKER_HOST=unix:///run/podman/podman.sock DOCKER_BUILDKIT=0 "
    return machine.run(f"cd {SOURCE} && {environment}{tool} -f {file} {' '.join(arguments)}", ok=ok)


def write_compose(machine, **environment):
    """Writes compose.yaml with these variables, and without limits for which the machine has no cgroup controller."""
    text = (REPOSITORY / "compose.yaml").read_text()
    if "pids" not in machine.run("cat /sys/fs/cgroup/cgroup.controllers").stdout:
        text = re.sub(r"^    (mem_limit|memswap_limit|pids_limit): .*\n", "", text, flags=re.M)
    variables = "".join(f'      {name}: "{value}"\n' for name, value in environment.items())
    machine.write(f"{SOURCE}/test.yaml", text.replace("    ports:\n", f"    environment:\n{variables}    ports:\n"))


def test_compose_file_is_valid(machine):
    """compose.yaml and the examples in its comments are valid by docker-compose's schema, which rejects typos"""
    compose(machine, "docker-compose", "config", "--quiet")
    text = (REPOSITORY / "compose.yaml").read_text()
    examples = re.sub(r"^    # (?=(environment|command|volumes):|  \S)", "    ", text, flags=re.M)
    assert examples != text
    machine.write(f"{SOURCE}/examples.yaml", examples)
    rendered = compose(machine, "docker-compose", "config", "--format=json", file="examples.yaml").stdout
    found = json.loads(rendered)["services"]["key-service"]
    expect(
        (found["environment"], found["command"], found["volumes"][0]["read_only"]),
        ({"KEYSERVICE_MAX_SIZE": "4096"}, ["--config", "/etc/key-service/config.toml"], True),
        "the examples",
    )
    for right, wrong in [("read_only:", "readonly:"), ("cap_drop: [ALL]", "cap_drop: ALL"), ("pids_limit: 300", "pids_limit: many")]:
        assert right in text
        machine.write(f"{SOURCE}/wrong.yaml", text.replace(right, wrong))
        done = compose(machine, "docker-compose", "config", "--quiet", file="wrong.yaml", ok=None)
        assert done.returncode != 0, f"{wrong} must not pass"


def test_compose_builds_a_missing_image(machine):
    """docker-compose and podman-compose build a missing image instead of pulling it from a registry"""
    machine.run("systemctl stop key-service; systemctl start podman.socket")
    machine.write(f"{SOURCE}/Dockerfile", f"FROM {BUILT}\nLABEL test=built\n")
    for tool in ["docker-compose", "podman-compose"]:
        machine.run(f"podman untag {IMAGE} {IMAGE}")
        compose(machine, tool, "up", "--no-start")
        label = machine.run(f"podman image inspect -f '{{{{.Labels.test}}}}' {IMAGE}").stdout.strip()
        expect(label, "built", f"the image of {tool}")
        compose(machine, tool, "down")
    machine.run(f"podman tag {BUILT} {IMAGE}")


def test_compose_containers_are_confined(machine):
    """docker-compose and podman-compose run a container that serves keys, is healthy, confined and limited, and drains"""
    machine.run("systemctl stop 'key-service*.socket' key-service; systemctl start podman.socket")
    for tool, name in [("docker-compose", "key-service-key-service-1"), ("podman-compose", "key-service_key-service_1")]:
        compose(machine, tool, "up", "--no-start")
        host = machine.container(name)["HostConfig"]
        limits = host["Memory"], host["PidsLimit"], *([host["MemorySwap"]] if tool == "docker-compose" else [])
        # podman-compose ignores memswap_limit.
        expect(limits, (512 << 20, 300, 512 << 20)[: len(limits)], f"limits of {tool}")
        compose(machine, tool, "down")
        write_compose(machine, **STALLS)
        compose(machine, tool, "up", "--detach", file="test.yaml")
        until("a key", lambda: machine.run("curl -fsS http://127.0.0.1:1123/key/32 | wc -c", ok=None).stdout.strip() == "32")
        expect(machine.get("/metrics", 8000)[0], 200, "metrics")
        # This container has a network, and Podman mounts writable file systems in memory that Docker does not.
        expect(exposures(machine, name) - {"mounts"}, {"network"}, f"exposures of {tool}")
        retry_if_stalled(lambda name=name: machine.run(f"podman healthcheck run {name}"))
        found = machine.container(name)
        host = found["HostConfig"]
        published = {(port, one["HostIp"] or "0.0.0.0", one["HostPort"]) for port, to in host["PortBindings"].items() for one in to}
        expect(published, {("1123/tcp", "0.0.0.0", "1123"), ("8000/tcp", "127.0.0.1", "8000")}, "ports")
        expect(host["RestartPolicy"]["Name"], "unless-stopped", "restart")
        expect(found["Config"]["Healthcheck"]["Test"], ["CMD", "/key-service", "health"], "the health check")
        with contextlib.closing(stalled(machine)):
            compose(machine, tool, "stop", file="test.yaml")
        expect(machine.container(name)["State"]["ExitCode"], 0, "exit status")
        compose(machine, tool, "down", file="test.yaml")

"""packaging/quadlet and compose.yaml on a booted Debian 13 with its own Podman: what docs/containers.md says of them.

The machine is that of test_system.py, with more packages and cgroup v2. Where the host's own cgroups are v1, it has no controllers:
limits of memory and processes are then read from the container engine and from systemd, and not from the kernel. The tests run in the
order of this file, and each leaves the machine as it found it.
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
from support.conditions import TIMEOUT, expect, until
from support.daemon import REPOSITORY
from support.machine import as_root

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # the image is compiled, for two architectures, and once more elsewhere
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
    """A booted Debian 13 with Podman, and the source tree as far as the document uses it."""

    packages = debian.PACKAGES + (
        ",dbus,curl,iproute2,procps,podman,crun,runc,netavark,aardvark-dns,nftables,uidmap,dbus-user-session,libpam-systemd"
        ",docker-compose,python3-yaml,python3-dotenv"
    )
    kind = "-podman"
    # crun attaches BPF programs that decide on devices, and keeps a keyring for each container.
    options = ["--capability=all", "--system-call-filter=bpf keyctl add_key"]
    environment = {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}

    def prepare(self):
        for name in ["packaging", "systemd", "compose.yaml"]:
            source, target = REPOSITORY / name, self.root / SOURCE.lstrip("/") / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        if "pids" not in self.run("cat /sys/fs/cgroup/cgroup.controllers").stdout:
            # Podman limits processes unless it is told not to, and crun fails without the controller.
            self.write("/etc/containers/containers.conf.d/test.conf", "[containers]\npids_limit = 0\n")
            peers.log("no cgroup controllers in the machine: limits of memory and processes are not enforced")
        # Debian 13 has podman-compose 1.3, which runs the health check in a shell.
        self.install_file(importlib.util.find_spec("podman_compose").origin, "/usr/bin/podman-compose")
        self.run("chmod +x /usr/bin/podman-compose")
        self.run(f"podman load -q -i /root/key-service.tar && podman tag {BUILT} {IMAGE}")

    def script(self, commands, user=None):
        """Runs commands in the source tree, until one fails."""
        script = "set -e\n" + commands
        if user:
            identity = self.run(f"id -u {user}").stdout.strip()
            script = f"export XDG_RUNTIME_DIR=/run/user/{identity}\n" + script
        self.write("/srv/script.sh", script)
        command = f"cd {SOURCE} && sh /srv/script.sh"
        return self.run(f"su {user} -c '{command}'" if user else command)

    def quadlet(self, *lines):
        """Lines of a drop-in, until the next ones, and a service that runs with them."""
        self.write(DROPIN, "\n".join(lines) + "\n")
        self.run("systemctl daemon-reload && systemctl restart key-service")

    def configure(self, text):
        self.write("/etc/key-service/config.toml", text)
        self.run("systemctl restart key-service")

    def container(self, name="key-service"):
        return json.loads(self.run(f"podman container inspect {name}").stdout)[0]

    def pid(self, name="key-service"):
        """The daemon's process, as the machine numbers it; 0 while there is none."""
        return int(self.run(f"podman container inspect -f '{{{{.State.Pid}}}}' {name}", ok=None).stdout or 0)

    def proc(self, pid, name):
        return self.run(f"cat /proc/{pid}/{name}").stdout


@pytest.fixture(scope="module")
def machine(image, tmp_path_factory):
    """The machine with the image, on which the document's installation has been followed, up to its first request."""
    folder = tmp_path_factory.mktemp("podman")
    archive = folder / "key-service.tar"
    images.run("podman", "save", "--quiet", "--format=docker-archive", f"--output={archive}", image)
    with Machine("trixie", folder, archive) as machine:
        machine.prepare()
        machine.run("rm -rf /etc/key-service")
        *commands, request = INSTALL.splitlines()
        assert request.startswith("curl "), request
        machine.script("\n".join(commands))
        yield machine


# Quadlet.


def test_installs(machine):
    """the installation of docs/containers.md works as it stands: the first connection starts the container"""
    for unit in SOCKETS:
        expect((machine.show("ActiveState", unit), machine.show("UnitFileState", unit)), ("active", "enabled"), unit)
    expect(machine.show("ActiveState"), "inactive", "the service before its first connection")
    assert re.fullmatch(r"[0-9a-f]{64}\n", machine.run(INSTALL.splitlines()[-1]).stdout)
    until("the service is active", lambda: machine.show("ActiveState") == "active")
    expect(machine.get("/metrics", 8000)[0], 200, "metrics")
    expect(
        machine.show("StatusText"),
        "Keys on [::]:1123; credentials on unix:/run/key-service/credential.sock; metrics on [::]:8000",
        "the status",
    )


def test_is_a_sound_unit(machine):
    """systemd has no objection to the generated unit, and each time to stop is longer than the one before"""
    done = machine.run("systemd-analyze --generators=true verify key-service.service")
    said = (done.stdout + done.stderr).splitlines()
    complaints = [line for line in said if "key-service" in line and "Loading source" not in line]
    expect(complaints, [], "complaints")
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
    """What the container has beyond what it needs, a word for each."""
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
    # A filter of its own, beside those that the whole machine may have from nspawn.
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
    """no network but lo, read-only root, no capability or new privilege, user 65532; each weaker container is noticed"""
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


def test_logs(machine):
    """the journal has the log with its fields and priorities, and the audit record has the client's own address"""
    machine.configure("audit = true\n")
    machine.get("/key/32")
    machine.run("journalctl --sync")
    entries = [entry for entry in machine.journal() if entry.get("MESSAGE") == "key issued"]
    assert entries, "no audit record"
    expect(entries[-1].get("ADDRESS"), "127.0.0.1", "the client's address")
    machine.configure("")
    machine.run("journalctl --sync")
    entry = [entry for entry in machine.journal() if str(entry.get("MESSAGE", "")).startswith("Keys on ")][-1]
    expect((entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"], entry["_UID"]), ("5", "key-service", "65532"), "priority, name and user")
    assert re.fullmatch(r"\d+\.\d+\.\d+", entry.get("VERSION", "")), entry
    assert machine.run("journalctl -u key-service REASON=SIGTERM -o cat").stdout.strip(), "no entry has the reason"


def test_obeys(machine):
    """reload keeps the process, stop ends it with 0, and the next connection starts it again"""
    pid = machine.pid()
    expect(machine.get("/key/2000")[0], 413, "above max-size")
    machine.write("/etc/key-service/config.toml", "max-size = 2000\n")
    machine.run("systemctl reload key-service")
    until("the reload", lambda: machine.get("/key/2000")[0] == 200)
    machine.write("/etc/key-service/config.toml", "max-size = 0\n")
    machine.run("systemctl reload key-service")
    until("the refusal", lambda: "reload 2 was refused: " in machine.show("StatusText"))
    expect((machine.get("/key/2000")[0], machine.pid()), (200, pid), "answer and process after a reload that was refused")
    machine.write("/etc/key-service/config.toml", "")
    machine.run("systemctl stop key-service")
    expect((machine.show("ActiveState"), machine.show("ExecMainStatus")), ("inactive", "0"), "state and exit status")
    expect(machine.run("podman ps -aq").stdout, "", "what is left of the container")
    expect(machine.get("/key/32")[0], 200, "the next connection")


def test_restarts_lose_nothing(machine, figures):
    """20 restarts under 500 requests a second refuse and fail none"""
    with machine.load() as seen:
        for _ in range(20):
            machine.run("systemctl restart key-service")
    expect((seen["failed"], seen["failures"]), (0, []), "failures")
    assert seen["served"] > 100 * seen["seconds"], seen
    figures(f"{seen['served']} requests in {seen['seconds']} s, the slowest {seen['slowest']} s")


# A client that reads nothing is in the drain until its end, after Podman's and Docker's default of 10 s to stop.
STALLS = {"KEYSERVICE_MAX_SIZE": 1 << 30, "KEYSERVICE_DRAIN_TIMEOUT": 12, "KEYSERVICE_WRITE_TIMEOUT": 60}


def stalled(machine):
    """A connection to the machine's port 1123, by a thread in its network namespace, that reads no more of a long key."""
    made = []

    def make():

        with open(f"/proc/{machine.leader}/ns/net") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000) != 0:  # CLONE_NEWNET
                raise OSError(ctypes.get_errno(), "setns")
        made.append(socket.create_connection(("127.0.0.1", 1123), TIMEOUT))

    thread = threading.Thread(target=make)  # a thread's namespace is its own
    thread.start()
    thread.join()
    made[0].sendall(f"GET /key/{1 << 30} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert made[0].recv(12) == b"HTTP/1.1 200"
    return made[0]


def test_a_stop_keeps_the_drain(machine):
    """a client that never reads holds a stop for the drain, longer than Podman's default of 10 s, and the exit is clean"""
    machine.quadlet("[Container]", *(f"Environment={name}={value}" for name, value in STALLS.items()))
    with contextlib.closing(stalled(machine)):
        machine.run("systemctl stop key-service")
    expect((machine.show("Result"), machine.show("ExecMainStatus")), ("success", "0"), "result and exit status")
    machine.run("journalctl --sync")
    said = [entry.get("MESSAGE") for entry in machine.journal() if entry.get("SYSLOG_IDENTIFIER") == "key-service"]
    assert any("stopped with connections still open" in str(line) for line in said[-5:]), said[-5:]
    machine.quadlet()


def test_survives_kills(machine, figures):
    """killed again and again, the container or its monitor, it comes back and the sockets stay"""
    begin = time.monotonic()
    for number in range(11):
        before = machine.pid()
        machine.run(f"kill -9 {before if number < 8 else machine.show('MainPID')}")
        until("another process", lambda old=before: machine.show("ActiveState") == "active" and machine.pid() not in (0, old))
        expect(machine.get("/key/32")[0], 200, "status")
    for unit in SOCKETS:
        expect(machine.show("ActiveState", unit), "active", unit)
    figures(f"11 kills in {time.monotonic() - begin:.0f} s, {machine.show('NRestarts')} restarts")


def test_a_frozen_process_is_replaced(machine, figures):
    """the watchdog reaches into the container: a healthy process stays, a frozen one is replaced without StopTimeout="""
    pid = machine.pid()
    time.sleep(11)  # longer than WatchdogSec=
    expect(machine.pid(), pid, "the healthy process")
    machine.run(f"kill -STOP {pid}")
    since = time.monotonic()
    expect(machine.get("/key/32")[0], 200, "after")
    seconds = time.monotonic() - since
    assert seconds < 25, f"{seconds:.0f} s"
    figures(f"after {seconds:.0f} s")


def test_tells_its_sockets_apart(machine, figures):
    """with crun and with runc sockets have their names, whatever their order"""
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


def test_gives_units_their_keys(machine):
    """the credential socket gives each unit and start a key of its own, and starts the container"""
    machine.write(
        "/run/systemd/system/demo.service",
        "[Service]\nType=oneshot\nDynamicUser=yes\nPrivateNetwork=yes\n"
        "LoadCredential=cookie.key:/run/key-service/credential.sock\nStandardOutput=append:/root/keys\n"
        "ExecStart=cat %d/cookie.key\n",
    )
    machine.run("systemctl daemon-reload && systemctl stop key-service && systemctl start demo && systemctl start demo")
    keys = (machine.root / "root/keys").read_bytes()
    assert len(keys) == 64 and keys[:32] != keys[32:], keys
    expect(machine.metric('credentials_total{outcome="served"}'), 2, "the count")
    machine.run("rm /run/systemd/system/demo.service /root/keys && systemctl daemon-reload")


def test_ends_when_idle(machine):
    """with exit-idle it ends, stays ended, and the next connection starts it again"""
    machine.configure("exit-idle = 2\n")
    until("the end", lambda: machine.show("ActiveState") == "inactive")
    time.sleep(2)  # longer than RestartSec: it is not restarted but waited for
    expect(machine.show("ActiveState"), "inactive", "the service")
    expect(machine.get("/key/32")[0], 200, "the next connection")
    machine.configure("")


def test_a_broken_configuration_recovers(machine):
    """an invalid configuration fails with 78 and its line, and a client that waits is served after the fix"""
    machine.run("systemctl stop key-service")
    machine.write("/etc/key-service/config.toml", 'max-size = "1k"\n')
    waiting = subprocess.Popen(
        machine.inside("curl -sS --max-time 60 -o /dev/null -w '%{http_code}' http://127.0.0.1:1123/key/32"),
        stdout=subprocess.PIPE,
        text=True,
    )
    with peers.killed_after(waiting, "curl"):
        until("25 starts", lambda: int(machine.show("NRestarts")) >= 25)  # beyond the default limits of units and sockets
        said = machine.run("journalctl -u key-service -n 40 -o cat --no-pager").stdout
        assert 'max-size: expected a whole number from 1 to 1073741824, found "1k"' in said, said
        assert "status=78/CONFIG" in said, said
        expect(machine.show("ActiveState", "key-service.socket"), "active", "the socket")
        machine.write("/etc/key-service/config.toml", "")
        expect(waiting.communicate(timeout=TIMEOUT)[0], "200", "the client that waited")


def test_takes_tls_and_tokens(machine):
    """the examples of docs/containers.md for TLS and tokens work, and a removed token is refused without a restart"""
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
    until("the end of the token", lambda: machine.run(f"{curl} -H @/srv/token.header").stdout == "401")
    expect(machine.pid(), pid, "the process")
    machine.run("rm /etc/containers/systemd/key-service.container.d/tls.conf /etc/key-service/tokens && systemctl daemon-reload")
    machine.configure("")


def test_updates_lose_nothing(machine, figures):
    """podman auto-update under load takes the new image and loses nothing, and goes back from one that does not start"""

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
        said = machine.run(UPDATE, ok=None)
        assert "rolled back" in said.stdout, said
        until("the old image", lambda: machine.show("ActiveState") == "active")
        found = machine.container()["Image"]
        assert found == new != broken, "the image after the rollback"
    expect((seen["failed"], seen["failures"]), (0, []), "failures")
    machine.run(f"podman tag {BUILT} {IMAGE} && systemctl restart key-service")
    figures(f"{seen['served']} requests, the slowest {seen['slowest']} s")


def test_works_without_root(machine, figures):
    """a user installs the same file as docs/containers.md says: started by a connection, confined, restarted without loss"""
    machine.run("systemctl stop 'key-service*.socket' key-service")
    machine.run(f"useradd -m {USER} && loginctl enable-linger {USER}")
    identity = machine.run(f"id -u {USER}").stdout.strip()
    until("the user's manager", lambda: machine.run(f"systemctl is-active user@{identity}", ok=None).stdout.strip() == "active")

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
    until("the reload of the user's own file", lambda: machine.get("/key/2000")[0] == 200)
    with machine.load() as seen:
        for _ in range(5):
            as_user("systemctl --user restart key-service")
    expect((seen["failed"], seen["failures"]), (0, []), "failures")
    as_user("systemctl --user disable --now key-service.socket key-service-metrics.socket; systemctl --user stop key-service")
    figures(f"{seen['served']} requests")


# Compose.


def compose(machine, tool, *arguments, file="compose.yaml", ok=0):
    # Podman's socket builds as Docker did before BuildKit.
    environment = "" if tool == "podman-compose" else "DOCKER_HOST=unix:///run/podman/podman.sock DOCKER_BUILDKIT=0 "
    return machine.run(f"cd {SOURCE} && {environment}{tool} -f {file} {' '.join(arguments)}", ok=ok)


def write_compose(machine, **environment):
    """The file with variables, and without the limits that no controller of this machine could enforce."""
    text = (REPOSITORY / "compose.yaml").read_text()
    if "pids" not in machine.run("cat /sys/fs/cgroup/cgroup.controllers").stdout:
        text = re.sub(r"^    (mem_limit|memswap_limit|pids_limit): .*\n", "", text, flags=re.M)
    variables = "".join(f'      {name}: "{value}"\n' for name, value in environment.items())
    machine.write(f"{SOURCE}/test.yaml", text.replace("    ports:\n", f"    environment:\n{variables}    ports:\n"))


def test_compose_is_valid(machine):
    """docker-compose finds compose.yaml, and its examples in comments, valid by the schema; a typo is refused"""
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


def test_compose_builds(machine):
    """docker-compose and podman-compose build the image if there is none, and ask no registry for it"""
    machine.run("systemctl stop key-service; systemctl start podman.socket")
    machine.write(f"{SOURCE}/Dockerfile", f"FROM {BUILT}\nLABEL test=built\n")
    for tool in ["docker-compose", "podman-compose"]:
        machine.run(f"podman untag {IMAGE} {IMAGE}")
        compose(machine, tool, "up", "--no-start")
        label = machine.run(f"podman image inspect -f '{{{{.Labels.test}}}}' {IMAGE}").stdout.strip()
        expect(label, "built", f"the image of {tool}")
        compose(machine, tool, "down")
    machine.run(f"podman tag {BUILT} {IMAGE}")


def test_compose_runs_confined(machine):
    """docker-compose and podman-compose start compose.yaml: curl gets a key, it is healthy, confined, limited, and drains"""
    machine.run("systemctl stop 'key-service*.socket' key-service; systemctl start podman.socket")
    for tool, name in [("docker-compose", "key-service-key-service-1"), ("podman-compose", "key-service_key-service_1")]:
        compose(machine, tool, "up", "--no-start")
        host = machine.container(name)["HostConfig"]
        limits = host["Memory"], host["PidsLimit"], *([host["MemorySwap"]] if tool == "docker-compose" else [])
        # podman-compose passes no memswap_limit on.
        expect(limits, (512 << 20, 300, 512 << 20)[: len(limits)], f"limits of {tool}")
        compose(machine, tool, "down")
        write_compose(machine, **STALLS)
        compose(machine, tool, "up", "--detach", file="test.yaml")
        until("a key", lambda: machine.run("curl -fsS http://127.0.0.1:1123/key/32 | wc -c", ok=None).stdout.strip() == "32")
        expect(machine.get("/metrics", 8000)[0], 200, "metrics")
        # A network is what it has here, and Podman has writable file systems in memory where Docker has none.
        expect(exposures(machine, name) - {"mounts"}, {"network"}, f"exposures of {tool}")
        machine.run(f"podman healthcheck run {name}")
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

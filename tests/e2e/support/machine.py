"""Booted Debian systems, in containers of systemd-nspawn(1)."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from support import peers
from support.conditions import TIMEOUT, until

SUPPORT = Path(__file__).resolve().parent
# Root file systems are built once and kept here; each machine boots a copy.
ROOTS = Path(os.environ.get("KEY_SERVICE_ROOTS", "/var/cache/key-service-roots"))
PACKAGES = "systemd,systemd-sysv"
# The hierarchies of control groups that systemd manages, with their names in /proc/PID/cgroup; cgroups(7). A host has the first, or the
# other two.
HIERARCHIES = [("", "/sys/fs/cgroup"), ("", "/sys/fs/cgroup/unified"), ("name=systemd", "/sys/fs/cgroup/systemd")]
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}


class Machine:
    """A booted Debian system. Commands run inside it through the namespaces of its first process."""

    # Other machines override these: packages and name of the root file system, options of mmdebstrap, options and environment of
    # systemd-nspawn, and the C compiler.
    packages, kind, bootstrap, options, environment, compiler = PACKAGES, "-minimal", [], [], {}, "gcc"

    def __init__(self, suite, directory, package):
        self.suite, self.directory, self.package, self.upgrades = suite, Path(directory), package, 0
        self.disk = self.directory / "root"
        self.disk.mkdir()
        # In memory, because fsync(2) on a disk waits for what all other processes write to it: Podman and dpkg call it all the time.
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755,size=50%", "key-service-test", self.disk], check=True)
        try:
            # Not shutil.copytree: it reads devices as if they were files, and /dev/full never ends.
            subprocess.run(["cp", "-a", f"{self.base()}/.", self.disk], check=True)
            (self.disk / "etc/hostname").write_text("keys\n")
            shutil.copy(package, self.disk / f"root/key-service{Path(package).suffix}")
            self.boot()
        except BaseException:
            self.unmount()
            raise

    def base(self):
        """The root file system that the machines of this kind are copies of."""
        root = ROOTS / f"{self.suite}{self.kind}"
        if not root.exists():
            print(f"building the root file system for {self.suite}{self.kind} in {root}", flush=True)
            new = ROOTS / f"{root.name}.new"  # an interrupted build is not used
            shutil.rmtree(new, ignore_errors=True)
            ROOTS.mkdir(parents=True, exist_ok=True)
            options = ["--quiet", "--variant=minbase", f"--include={self.packages}", *self.bootstrap]
            subprocess.run(["mmdebstrap", *options, self.suite, new], check=True)
            new.rename(root)
        return root

    def boot(self):
        # systemd-nspawn keeps the control groups it is started in. Two machines in the same one would have a service of the same name
        # in the same group: each would try to kill the other's processes, and remove groups that the other has just made.
        self.cgroups = make_cgroups()
        # The system is killed when this process ends, for whatever reason.
        command = [
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *in_cgroups(self.cgroups),
            "systemd-nspawn",
            "-q",
            "-D",
            self.disk,
            f"--machine={self.cgroups[0].name}",
            "--boot",
            "--register=no",
            "--keep-unit",
            "--private-network",
            *self.options,
        ]
        with open(self.directory / "console", "wb") as console:
            self.nspawn = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, env={**os.environ, **self.environment}
            )
        try:
            self.leader = until("the first process", self.first_process)
            self.commands = [payload / "commands" for group in self.cgroups if (payload := group / "payload").exists()]
            for group in self.commands:
                group.mkdir()
            self.root = Path(f"/proc/{self.leader}/root")  # the file system as seen inside, with its mounts
            until("the boot", self.is_up, 3 * TIMEOUT)
        except BaseException as error:
            self.kill()
            error.add_note((self.directory / "console").read_text(errors="replace")[-2000:])
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
        self.unmount()

    def unmount(self):
        subprocess.run(["umount", "--lazy", self.disk], check=True)

    def reboot(self):
        self.stop()
        self.boot()

    def is_up(self):
        return self.run("systemctl is-system-running", ok=None).stdout.strip() in ("running", "degraded")

    def first_process(self):
        assert self.nspawn.poll() is None, (self.directory / "console").read_text()
        children = Path(f"/proc/{self.nspawn.pid}/task/{self.nspawn.pid}/children").read_text().split()
        return next(filter(is_first_process, children), None)  # systemd-nspawn has short-lived children before that one

    def install_file(self, source, target):
        place = self.root / target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, place)

    def read(self, path):
        return (self.root / path.lstrip("/")).read_bytes()

    def write(self, path, text):
        """Writes a file as an editor does: a new file replaces the old one."""
        place = self.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        new = place.with_name(place.name + ".new")
        new.write_text(text)
        new.rename(place)

    def outside(self, *command):
        """Returns the command line that runs a program of the host in this system's network."""
        return ["nsenter", "-t", self.leader, "-n", "--", *map(str, command)]

    def curl(self, *arguments, ok=0):
        """Runs curl in this system's network, and returns its output."""
        done = subprocess.run(
            self.outside("curl", "-sS", "--max-time", TIMEOUT, *arguments),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT + 5,
        )
        assert done.returncode == ok, f"curl {arguments}: expected status {ok}, found {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def status_of(self, *arguments):
        """Requests a URL, and returns the status code of the response."""
        return self.curl("-o", "/dev/null", "-w", "%{http_code}", *arguments)

    def inside(self, command):
        """Returns the command line that runs a shell command inside this system, and in a control group of it: systemd's programs
        refuse to work for a process whose control group is outside."""
        return [*in_cgroups(self.commands), "nsenter", "-t", self.leader, "-m", "-u", "-i", "-n", "-p", "--", "/bin/sh", "-c", command]

    def run(self, command, ok=0, timeout=TIMEOUT):
        done = subprocess.run(
            self.inside(command),
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            timeout=timeout,
            errors="replace",
            stdin=subprocess.DEVNULL,
        )
        if ok is not None:
            assert done.returncode == ok, f"{command}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def show(self, name, unit="key-service.service"):
        return self.run(f"systemctl show -P {name} {unit}").stdout.strip()

    def get(self, path, port=1123):
        """Returns status and body. curl waits for as long as systemd's socket holds the connection."""
        url = f"http://127.0.0.1:{port}{path}"
        done = subprocess.run(
            self.outside("curl", "-sS", "--max-time", TIMEOUT, "-w", "%{http_code}", url), capture_output=True, timeout=TIMEOUT + 5
        )
        assert done.returncode == 0, done.stderr.decode()
        return int(done.stdout[-3:]), done.stdout[:-3]

    def metric(self, name):
        text = self.get("/metrics", 8000)[1].decode()
        return float(re.search(rf"^{re.escape(name)} (.*)$", text, re.M)[1])

    @contextlib.contextmanager
    def load(self, rate=500, port=1123, mode=()):
        """Runs load.py while the block runs; the dictionary holds its results afterwards."""
        command = self.outside(sys.executable, SUPPORT / "load.py", port, rate, *mode)
        asking = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        seen = {}
        with peers.killed_after(asking, "load.py"):
            yield seen
            output = asking.communicate(timeout=TIMEOUT + 30)[0]
            seen.update(json.loads(output))

    def journal(self):
        """Returns the service's journal entries. The daemon logs on a thread of its own, so the entry of an event may come after what
        a client sees of it."""
        lines = self.run("journalctl --sync; journalctl -u key-service.service -o json --no-pager --all").stdout.splitlines()
        return [json.loads(line) for line in lines]

    def wait_for_log(self, *texts):
        """Waits until each of these texts is in the service's last journal entries."""

        def has_texts():
            log = self.run("journalctl --sync; journalctl -u key-service.service -n 40 -o cat --no-pager").stdout
            return all(text in log for text in texts)

        until(f"{texts} in the journal", has_texts)

    def stop(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(self.leader), signal.SIGRTMIN + 4)  # systemd(1): power off
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.nspawn.wait(20)
        if self.nspawn.poll() is None:
            peers.log(f"the {self.suite} system did not power off within 20 s; killing it")
        self.kill()

    def kill(self):
        peers.kill(self.nspawn, "systemd-nspawn")
        for cgroup in self.cgroups:
            until(f"the end of all processes in {cgroup}", lambda cgroup=cgroup: removed(cgroup))


def make_cgroups():
    """Makes a control group of the same new name, below the one of this process, in each hierarchy that systemd manages."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    name = f"key-service-{secrets.token_hex(8)}"
    groups = [Path(root + own[key]) / name for key, root in HIERARCHIES if Path(root, "cgroup.procs").exists()]
    for group in groups:
        group.mkdir()
    return groups


def in_cgroups(cgroups):
    """Returns the beginning of a command line: it joins the control groups, and then runs the rest."""
    return ["sh", "-c", 'while [ "$1" != -- ]; do echo 0 >"$1/cgroup.procs" || exit; shift; done; shift; exec "$@"', "sh", *cgroups, "--"]


def removed(cgroup):
    """Removes a control group with those inside it, and returns whether it is gone: one with processes stays."""
    for directory, *_ in os.walk(cgroup, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    return not cgroup.exists()


def is_first_process(pid):
    """Returns whether a process has PID 1 in a child PID namespace; proc_pid_status(5), NSpid."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return bool(re.search(r"^NSpid:\t.*\t1$", Path(f"/proc/{pid}/status").read_text(), re.M))
    return False


def repack(package, target, suffix, change=()):
    """Copies a package, with a suffix to its version; `change` maps files of the package to functions that edit their text."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        subprocess.run(["dpkg-deb", "-R", package, tree], check=True)
        control = tree / "DEBIAN/control"
        control.write_text(re.sub(r"^Version: (.*)$", rf"Version: \g<1>{suffix}", control.read_text(), flags=re.M))
        for path, changed in dict(change).items():
            (tree / path).write_text(changed((tree / path).read_text()))
        subprocess.run(["dpkg-deb", "--root-owner-group", "-b", tree, target], check=True, stdout=subprocess.DEVNULL)
    return target


def upgrade(machine, change=()):
    """Installs the same package with a higher version, and returns the output; for `change` see repack()."""
    machine.upgrades += 1
    target = repack(machine.package, machine.directory / "key-service-new.deb", f"+new{machine.upgrades}", change)
    machine.install_file(target, "/root/key-service-new.deb")
    done = machine.run(
        "apt-get install -y --no-install-recommends -o Dpkg::Options::=--force-confold /root/key-service-new.deb", timeout=120
    )
    return done.stdout + done.stderr


def as_root(script):
    """Removes sudo from the commands of a page: a machine runs them as root, and has no sudo."""
    return script.replace("sudo ", "")

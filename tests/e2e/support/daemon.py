"""A daemon on loopback, as a child of the test."""

import contextlib
import os
import re
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from support import peers
from support.answers import Answers
from support.conditions import TIMEOUT

REPOSITORY = Path(__file__).resolve().parents[3]
# As systemd hands over sockets (sd_listen_fds(3)), less LISTEN_PID: they are the standard input and output of this shell.
INHERITS = ["sh", "-c", 'exec 3<&0 4<&1 && exec "$@"', "sh"]


def binary():
    """$KEY_SERVICE_BIN, else what is built in target/, else what is built now."""
    if "KEY_SERVICE_BIN" in os.environ:
        return os.path.abspath(os.environ["KEY_SERVICE_BIN"])
    for profile in ("debug", "release"):
        path = REPOSITORY / "target" / profile / "key-service"
        if path.exists():
            return str(path)
    return built("debug")


def built(profile):
    """What is built now, as `debug` or `release`."""
    options = ["--release"] if profile == "release" else []
    subprocess.run(["cargo", "build", "--quiet", "--locked", *options], cwd=REPOSITORY, check=True)
    return str(Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target")) / profile / "key-service")


def environment():
    """This one, without what would reach the daemon."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("KEYSERVICE_", "LISTEN_", "WATCHDOG_")) and name != "JOURNAL_STREAM"
    }


class Daemon:
    """Runs while it is entered, on free ports or a held one: through a notify socket of the test's it says READY, and where it
    is. What it logs is appended to the file `log`, by default one in its folder.

    folder: where its files are; without one it has its own, which goes with it
    config: the text of its configuration file; `settings` are variables of its environment, and stand above it
    watchdog: seconds within which it has to report to its service manager
    wrapper: a command that becomes the daemon
    before, after: called in the child before exec(2), and here after that
    ready: whether it is ready once it is entered; else nothing is known of it yet
    inherit, names: the sockets that it is passed, at most two, and their names
    environment: called with the daemon and its log, and gives further variables
    stderr: what its log goes to instead, which is closed here"""

    def __init__(
        self,
        folder=None,
        config="",
        port=0,
        log=None,
        *,
        settings=None,
        watchdog=None,
        wrapper=(),
        before=None,
        after=None,
        ready=True,
        inherit=(),
        names="http:metrics",
        environment=None,
        stderr=None,
    ):
        self.folder, self.config, self.port, self.log = folder, config, port, log
        self.settings, self.watchdog, self.wrapper, self.before, self.after = settings or {}, watchdog, wrapper, before, after
        self.ready, self.inherit, self.names, self.environment, self.stderr = ready, inherit, names, environment, stderr

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.start(stack)
            self.resources = stack.pop_all()
        return self

    def start(self, stack):
        self.folder = Path(self.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="key-service-")))
        self.log = self.log or self.folder / "log"
        notify = self.folder / "notify"
        notify.unlink(missing_ok=True)
        file = self.folder / "config.toml"
        file.write_text(self.config)
        file.chmod(0o644)  # whatever the umask is: a file that others may write to is refused
        self.notifications = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.notifications.bind(str(notify))
        settings = {"host": "127.0.0.1", "srv-port": self.port, "metrics-port": 0, **self.settings}
        variables = {f"KEYSERVICE_{name.upper().replace('-', '_')}": str(value) for name, value in settings.items()}
        command = [*self.command(), "--config", file]
        stdin = stdout = subprocess.DEVNULL
        if self.inherit:
            stdin, stdout = [*self.inherit, subprocess.DEVNULL][:2]
            variables |= {"LISTEN_FDS": str(len(self.inherit)), "LISTEN_FDNAMES": self.names}
            command = [*INHERITS, *command]
            tcp = [(name, each) for name, each in zip(self.names.split(":"), self.inherit, strict=False) if each.family == socket.AF_INET]
            addresses = {name: "{}:{}".format(*each.getsockname()) for name, each in tcp}
            self.authority, self.metrics = addresses.get("http"), addresses.get("metrics")
        if self.watchdog:
            variables["WATCHDOG_USEC"] = str(int(self.watchdog * 1e6))
        command = [*self.wrapper, *command]
        if not self.before:  # which is about what the first program meets
            command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
        with open(self.log, "ab") as own, self.stderr or own as log:
            self.process = subprocess.Popen(
                command,
                env={
                    **environment(),
                    "NOTIFY_SOCKET": str(notify),
                    **variables,
                    **(self.environment(self, log) if self.environment else {}),
                },
                cwd=self.folder,
                stdin=stdin,
                stdout=stdout,
                stderr=log,
                preexec_fn=self.before,
            )
        self.pid = self.process.pid
        stack.callback(peers.kill, self.process, "key-service")
        if self.after:
            self.after()
        if self.ready:
            message = self.heard("READY=1")
            self.authority = re.search(r"Keys on ([0-9.:]+)", message)[1]
            self.metrics = re.search(r"metrics on ([0-9.:]+)", message)[1]
            self.address = f"http://{self.authority}"

    def command(self):
        return [binary()]

    def __exit__(self, kind, error, _):
        with self.resources:
            if error:
                print(self.logged()[-3000:], flush=True)
            self.stop(error)

    def stop(self, error):
        peers.stop_daemon(self.process, "key-service", error)

    def logged(self):
        return self.log.read_text(errors="replace")

    def lines(self, text):
        """The lines of the log that have `text`."""
        return [line for line in self.logged().splitlines() if text in line]

    def heard(self, wanted):
        """The next message to the service manager that has `wanted`."""
        self.notifications.settimeout(0.05)
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                message = self.notifications.recv(4096).decode()
                if wanted in message:
                    return message
                continue
            assert self.process.poll() is None, f"it ended with {self.process.returncode} before {wanted}\n{self.logged()}"
        raise AssertionError(f"{wanted} did not come within {TIMEOUT} s\n{self.logged()}")

    def pings(self, seconds):
        """How often the watchdog is told in `seconds`, what was said before left out."""
        self.notifications.setblocking(False)
        count, begun, deadline = 0, False, 0.0
        while not begun or time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                count += b"WATCHDOG=1" in self.notifications.recv(4096)
                continue
            if not begun:
                begun, count, deadline = True, 0, time.monotonic() + seconds
            time.sleep(0.005)
        return count

    def connect(self, source="127.0.0.1", to=None):
        """A connection to its port for keys, or to an authority."""
        host, port = (to or self.authority).split(":")
        return peers.connect((host, int(port)), TIMEOUT, source)

    def get(self, path, to=None):
        """Status, fields and body of an answer on a new connection."""
        with self.connect(None, to) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            return Answers(client).next()

    def status(self, path):
        return self.get(path)[0]

    def metrics_text(self):
        return self.get("/metrics", self.metrics)[2].decode()

    def metric(self, name):
        return float(re.search(rf"^{re.escape(name)} (\S+)$", self.metrics_text(), re.M)[1])

    def resident(self, field="VmHWM"):
        """Bytes of resident memory: the most there ever were, or VmRSS."""
        return int(re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())[1]) * 1024

    def signal(self, number):
        os.kill(self.pid, number)

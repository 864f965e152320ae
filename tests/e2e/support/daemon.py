"""A daemon on loopback, run as a child process of the test."""

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
# Passes sockets as systemd does (sd_listen_fds(3)), without LISTEN_PID. They are the standard input and output of this shell.
INHERITS = ["sh", "-c", 'exec 3<&0 4<&1 && exec "$@"', "sh"]


def binary():
    """The path of the binary: $KEY_SERVICE_BIN, else a build in target/, else a new debug build."""
    if "KEY_SERVICE_BIN" in os.environ:
        return os.path.abspath(os.environ["KEY_SERVICE_BIN"])
    for profile in ("debug", "release"):
        path = REPOSITORY / "target" / profile / "key-service"
        if path.exists():
            return str(path)
    return built("debug")


def built(profile):
    """Builds the binary with the profile `debug` or `release`, and returns its path."""
    options = ["--release"] if profile == "release" else []
    subprocess.run(["cargo", "build", "--quiet", "--locked", *options], cwd=REPOSITORY, check=True)
    return str(Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target")) / profile / "key-service")


def environment():
    """The environment of the test, without the variables that the daemon reads."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("KEYSERVICE_", "LISTEN_", "WATCHDOG_")) and name != "JOURNAL_STREAM"
    }


class Daemon:
    """A context in which the daemon runs, on free ports or a held one. The daemon reports READY and its addresses over a notify socket of
    the test. Its log is appended to the file `log`, which by default is in its directory.

    directory: the directory of its files; by default a temporary one that is deleted at the end
    config: the text of its configuration file
    settings: settings that are passed as environment variables, which take precedence over the configuration file
    watchdog: the watchdog timeout in seconds
    wrapper: a command that executes the daemon in its own process
    before, after: functions that are called in the child before exec(2), and in this process after it
    ready: whether to wait until the daemon is ready; otherwise its addresses are unknown
    inherit, names: the sockets that are passed to it, at most two, and their names
    environment: a function that gets the daemon and its log, and returns further environment variables
    stderr: a file for its standard error in place of the log; it is closed here"""

    def __init__(
        self,
        directory=None,
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
        self.directory, self.config, self.port, self.log = directory, config, port, log
        self.settings, self.watchdog, self.wrapper, self.before, self.after = settings or {}, watchdog, wrapper, before, after
        self.ready, self.inherit, self.names, self.environment, self.stderr = ready, inherit, names, environment, stderr

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.start(stack)
            self.resources = stack.pop_all()
        return self

    def start(self, stack):
        self.directory = Path(self.directory or stack.enter_context(tempfile.TemporaryDirectory(prefix="key-service-")))
        self.log = self.log or self.directory / "log"
        notify = self.directory / "notify"
        notify.unlink(missing_ok=True)
        file = self.directory / "config.toml"
        file.write_text(self.config)
        file.chmod(0o644)  # independent of the umask, because the daemon rejects a file that others may write to
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
        if not self.before:  # which concerns the first program that is executed
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
                cwd=self.directory,
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
        """The lines of the log that contain `text`."""
        return [line for line in self.logged().splitlines() if text in line]

    def heard(self, wanted):
        """Waits for the next message to the service manager that contains `wanted`, and returns it."""
        self.notifications.settimeout(0.05)
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            status = self.process.poll()  # before the receive: the last message may arrive just before the exit
            with contextlib.suppress(TimeoutError):
                message = self.notifications.recv(4096).decode()
                if wanted in message:
                    return message
                continue
            assert status is None, f"the daemon exited with status {status} before {wanted}\n{self.logged()}"
        raise AssertionError(f"no {wanted} within {TIMEOUT} s\n{self.logged()}")

    def pings(self, seconds):
        """The number of watchdog pings within `seconds`. Earlier messages are discarded: those that arrive until there is none for 0.1 s,
        because the daemon holds more of them than the socket. Its pings have to be rarer than that."""
        self.notifications.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            while True:
                self.notifications.recv(4096)
        count, deadline = 0, time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.notifications.settimeout(left)
            with contextlib.suppress(TimeoutError):
                count += b"WATCHDOG=1" in self.notifications.recv(4096)
        return count

    def connect(self, source="127.0.0.1", to=None):
        """Connects to the port for keys, or to another HOST:PORT."""
        host, port = (to or self.authority).split(":")
        return peers.connect((host, int(port)), TIMEOUT, source)

    def get(self, path, to=None):
        """Status, headers and body of a response on a new connection."""
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
        """Bytes of resident memory: the peak (VmHWM), or the current value with VmRSS."""
        return int(re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())[1]) * 1024

    def socket_memory(self):
        """Bytes that the kernel holds for connections to the key port: received, unsent, allocated ahead and in the backlog."""
        port = self.authority.split(":")[1]
        listed = subprocess.run(["ss", "-tmnH", "sport", "=", f":{port}"], capture_output=True, text=True, check=True).stdout
        return sum(int(size) for size in re.findall(r"(?<=[(,])(?:r|w|f|bl)(\d+)", listed))

    def signal(self, number):
        os.kill(self.pid, number)

"""A daemon on loopback, for the runners that are written in Python."""

import os
import re
import socket
import subprocess
from pathlib import Path

from support import peers
from support.conditions import TIMEOUT

REPOSITORY = Path(__file__).resolve().parents[3]


def binary():
    """$KEY_SERVICE_BIN, else what is built in target/, else what is built now."""
    if "KEY_SERVICE_BIN" in os.environ:
        return os.environ["KEY_SERVICE_BIN"]
    for profile in ("debug", "release"):
        path = REPOSITORY / "target" / profile / "key-service"
        if path.exists():
            return str(path)
    subprocess.run(["cargo", "build", "--locked"], cwd=REPOSITORY, check=True)
    return str(REPOSITORY / "target/debug/key-service")


def environment():
    """This one, without what would reach the daemon."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("KEYSERVICE_", "LISTEN_", "WATCHDOG_")) and name != "JOURNAL_STREAM"
    }


class Daemon:
    """Runs while it is entered, on free ports or a held one: through a notify socket of the test's it says READY, and where it
    is. What it logs is appended to the file `log`, if there is one."""

    def __init__(self, folder, config="", port=0, log=None):
        self.folder, self.config, self.port, self.log = folder, config, port, log

    def __enter__(self):
        notify = self.folder / "notify"
        notify.unlink(missing_ok=True)
        file = self.folder / "config.toml"
        file.write_text(self.config)
        file.chmod(0o644)  # whatever the umask is: a file that others may write to is refused
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, open(self.log or os.devnull, "ab") as log:
            manager.bind(str(notify))
            manager.settimeout(TIMEOUT)
            self.process = subprocess.Popen(
                [*self.command(), "--config", file, "--host", "127.0.0.1", "--srv-port", str(self.port), "--metrics-port", "0"],
                env={**environment(), "NOTIFY_SOCKET": str(notify)},
                stderr=log,
            )
            try:
                message = manager.recv(4096).decode()
                assert "Keys on" in message, f"expected READY, found {message!r}"
                self.authority = re.search(r"Keys on ([0-9.:]+)", message).group(1)
                self.metrics = re.search(r"metrics on ([0-9.:]+)", message).group(1)
            except BaseException:  # __exit__ is not called then
                peers.kill(self.process, "key-service")
                raise
        self.address = f"http://{self.authority}"
        return self

    def command(self):
        return [binary()]

    def __exit__(self, kind, error, _):
        peers.stop_daemon(self.process, "key-service", error, TIMEOUT)

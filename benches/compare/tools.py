"""What all parts of the benchmark share: the programs it needs, how it runs them, the cores, and the units."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "tests/e2e"))
from support import peers  # noqa: E402, F401

SERVER_CORE, LOAD_CORE = 0, 1
MB, KIB, MICROSECOND, MILLISECOND = 1e6, 1024, 1e-6, 1e-3
PASSED, SHORT, MISSING, UNMEASURED = 0, 1, 3, 4  # exit codes; 2 is a wrong command line

# program: Debian package
TOOLS = {
    "nginx": "nginx-light",
    "haproxy": "haproxy",
    "h2o": "h2o",
    "wrk": "wrk",
    "valgrind": "valgrind",
    "strace": "strace",
    "curl": "curl",
    "openssl": "openssl",
    "cc": "gcc",
    "dpkg-deb": "dpkg",
    "taskset": "util-linux",
    "chrt": "util-linux",
    "unshare": "util-linux",
}
GATE_TOOLS = ["nginx", "valgrind", "taskset", "chrt", "unshare"]
COSTS_TOOLS = [*GATE_TOOLS, "openssl"]
GROWTH_TOOLS = ["valgrind", "cc", "taskset"]


class Failed(Exception):
    """A measurement failed."""


def fail(reason):
    raise Failed(reason)


def require(tools):
    """Exits with MISSING if a program or one of the two cores is missing."""
    os.environ["PATH"] += ":/usr/sbin"  # the directory of nginx and haproxy, which only root has in its path
    missing = [TOOLS[tool] for tool in tools if not shutil.which(tool)]
    if missing:
        print(f"missing tools; install them with: apt-get install --no-install-recommends {' '.join(missing)}", file=sys.stderr)
        sys.exit(MISSING)
    if not {SERVER_CORE, LOAD_CORE} <= os.sched_getaffinity(0):
        print(f"needs cores {SERVER_CORE} and {LOAD_CORE}, for the server and the load", file=sys.stderr)
        sys.exit(MISSING)


def run(command):
    """Runs a command and returns its output."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout


def build(*command):
    """Runs a build command on all cores, then restores the CPU affinity of the measurements."""
    pinned = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count()))
    try:
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    finally:
        os.sched_setaffinity(0, pinned)
    if done.returncode != 0:
        raise Failed(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}{done.stderr}"[-4000:])

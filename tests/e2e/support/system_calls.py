"""Counts the getrandom(2) calls for each key, with the C libraries of Debian 12 and 13.

Since glibc 2.41, on Linux 6.11 or newer, the C library's getrandom() answers from a pool in user space. A key from that pool
would need no system call, and would have been in the process's memory before it was requested. A dynamically linked daemon
runs under strace with the C library of each release. The libraries are extracted once and kept in KEY_SERVICE_ROOTS (default:
/var/cache/key-service-roots).
"""

import re
import shutil
import subprocess

from support.daemon import Daemon
from support.machine import ROOTS

REPEATED = 20

# (method, path, calls for one request). EXACT requests make exactly that many calls; a stream makes at least one call for each
# 32 KiB of its output.
EXACT = [
    ("GET", "/key/1", 1),
    ("GET", "/key/32", 1),
    ("GET", "/key/128", 1),
    ("GET", "/key/129", 1),
    ("GET", "/key/32768", 1),
    ("GET", "/key/32?format=hex", 1),
    ("GET", "/key/32?format=jwk", 2),  # one more for the kid
    ("GET", "/key/32?format=json&count=50", 50),
    ("GET", "/key/32?format=jwk&count=50", 100),
    ("GET", "/password/20", 1),
    ("HEAD", "/key/32", 0),
    ("GET", "/livez", 0),
]
STREAMS = [("GET", "/key/32769", 2), ("GET", "/key/1048576", 32), ("GET", "/key/1048576?format=base64", 43)]

# The end of a line of strace. It also matches a call that strace resumes after it printed another thread's call.
CALL = re.compile(r", (\d+), (\w+)\) += (-?\d+|\?)")


def counted(directory, command):
    """Runs a daemon by `command`, and returns the number of getrandom(2) calls and a list of what is wrong with them."""
    total, wrong = 0, []
    with Traced(directory, command) as daemon, daemon.connect() as connection, connection.makefile("rb") as answers:
        for method, path, _ in EXACT + STREAMS:  # warm up: the first request of a thread may seed its hash maps
            request(connection, answers, method, path)
        for method, path, wanted in EXACT + STREAMS:
            seen = daemon.trace.stat().st_size
            for _ in range(REPEATED):
                request(connection, answers, method, path)
            # The first thread generates no keys: it checks the generator every few seconds.
            lines = [line for line in daemon.trace.read_text()[seen:].splitlines() if not line.startswith(f"{daemon.pid} ")]
            calls = [match for line in lines if (match := CALL.search(line))]
            are_complete = all(length == read and flags == "0" for length, flags, read in (call.groups() for call in calls))
            found, expected = len(calls), wanted * REPEATED
            total += found
            is_enough = found == expected if (method, path, wanted) in EXACT else found >= expected
            if not (are_complete and is_enough):
                wrong.append(f"{method} {path}, {REPEATED} times: expected {expected} complete calls, found {found}")
    return total, wrong


def request(connection, answers, method, path):
    connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    status, *headers = iter(answers.readline, b"\r\n")
    if not status.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"{method} {path}: expected 200, found {status} {headers}")
    [length] = [int(header.split(b":")[1]) for header in headers if header.startswith(b"content-length:")]
    if method != "HEAD" and len(answers.read(length)) != length:
        raise RuntimeError(f"{method} {path}: the response is incomplete")


def extracted(suite):
    """Returns the command that runs a program with the C library of a Debian release, and the version of that library."""
    tree = ROOTS / f"libc-{suite}"
    if not tree.exists():
        new = ROOTS / f"libc-{suite}.new"
        shutil.rmtree(new, ignore_errors=True)
        ROOTS.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mmdebstrap", "--quiet", "--variant=extract", "--include=libc6,libgcc-s1", suite, new], check=True)
        new.rename(tree)
    libraries = sorted({str(path.parent) for name in ("libc.so.6", "libgcc_s.so.1") for path in tree.glob(f"**/{name}")})
    loader = next(path for path in tree.glob("**/ld-linux-*.so.*") if path.is_file())
    version = subprocess.run([loader, "--version"], capture_output=True, text=True, check=True).stdout
    return [str(loader), "--library-path", ":".join(libraries)], re.search("[0-9.]+[0-9]", version)[0]


class Traced(Daemon):
    """A daemon under strace. The tracer runs as a detached process (-D), so the process that the test starts and stops is the daemon."""

    def __init__(self, directory, command):
        super().__init__(directory, "max-size = 1048576\n")
        self.traced, self.trace = command, directory / "trace"

    def command(self):
        self.trace.unlink(missing_ok=True)
        # -s 0: no key byte is written to the trace.
        return ["strace", "-D", "-f", "-qq", "-s", "0", "-e", "trace=getrandom", "-e", "signal=none", "-o", self.trace, *self.traced]

"""`key-service key` and `key-service password` when the kernel, the disk or the file system fails, and the commands of
docs/command-line.md."""

import contextlib
import errno
import itertools
import os
import re
import resource
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from support.conditions import TIMEOUT, expect, until
from support.daemon import binary, environment
from support.kernel import DenyFlag, Getrandom
from support.pages import commands

PAGE = 4096  # tmpfs allocates pages
MIB = 1 << 20
LARGE = ["key", str(1 << 30), "--max-size", str(1 << 30)]


def run(arguments, before=None, after=None, **rest):
    """The exit status, output and errors of a command. `before` is called in the child before exec(2), `after` in this process after it."""
    command = [binary(), *arguments] if isinstance(arguments, list) else ["sh", "-c", arguments, binary()]
    rest = {"stdout": subprocess.PIPE, **rest}
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, preexec_fn=before, **rest) as process:
        if after:
            after()
        try:
            output, errors = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    return process.returncode, output, errors.decode()


def expect_failure(result, reason):
    status, output, errors = result
    expect((status, output), (1, b""), f"exit status and output ({errors})")
    assert errors.startswith("key-service: ") and reason in errors and errors.count("\n") == 1, errors


@contextlib.contextmanager
def running(arguments, **rest):
    with subprocess.Popen([binary(), *arguments], env=environment(), **rest) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def disk(tmp_path):
    """A tmpfs of four pages."""
    directory = tmp_path / "disk"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * PAGE}", "none", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)


@pytest.mark.root
@pytest.mark.tools("mount")
@pytest.mark.parametrize("key", ["key 64", "key 64 --format hex", "key 100000 --max-size 100000"])
def test_a_full_disk_leaves_an_appended_file_as_it_was(disk, key):
    """half a key that fits the disk is removed, and what is written next follows the former content"""
    former = bytes(4 * PAGE - 32)
    (disk / "file").write_bytes(former)
    result = run(f'{{ "$0" {key}; status=$?; printf end; exit $status; }} >>file', cwd=disk)
    expect_failure(result, "failed to write to standard output: No space left on device")
    expect((disk / "file").read_bytes() == former + b"end", True, "whether the file has only its former content and the end")


@pytest.mark.root
@pytest.mark.tools("mount")
@pytest.mark.parametrize("size", [30_000, 100_000])
def test_a_full_disk_leaves_a_new_file_empty(disk, size):
    """the file is empty again, and what is written next is at its beginning"""
    (disk / "others").write_bytes(bytes(3 * PAGE))
    result = run(f'{{ "$0" key {size} --max-size {size}; status=$?; printf end; exit $status; }} >file', cwd=disk)
    expect_failure(result, "failed to write to standard output: No space left on device")
    expect((disk / "file").read_bytes(), b"end", "the file")


@pytest.mark.root
@pytest.mark.tools("mount")
def test_a_full_disk_leaves_no_new_file(disk):
    """a file that does not fit is not there, and neither is a temporary one"""
    for arguments in (["key", "100000", "--max-size", "100000"], ["key", "1000", "--count", "60", "--format", "json"]):
        result = run([*arguments, "--output", "file"], cwd=disk)
        expect_failure(result, "failed to write to file: No space left on device")
        expect(list(disk.iterdir()), [], "files")
    expect(run(["key", "64", "--output", "file"], cwd=disk)[0], 0, "exit status of a key that fits")


# How the system has no unnamed files, or does not let everybody name one. The system calls are openat and linkat.
WITHOUT_UNNAMED_FILES = DenyFlag(2, os.O_TMPFILE & ~os.O_DIRECTORY, errno.EOPNOTSUPP, x86_64=257, aarch64=56)
WITHOUT_EMPTY_PATHS = DenyFlag(4, 0x1000, errno.ENOENT, x86_64=265, aarch64=37)


@pytest.mark.root
@pytest.mark.parametrize("deny", [WITHOUT_UNNAMED_FILES, WITHOUT_EMPTY_PATHS], ids=["unnamed files", "empty paths"])
def test_other_file_systems_and_kernels_work(deny, tmp_path):
    """without unnamed files, and with an old kernel, a new file is exclusive, private and complete as well"""
    os.mkdir(tmp_path / "files")
    for _ in range(2):
        expect(run(["key", "100000", "--max-size", "100000", "--output", "key"], deny.install, cwd=tmp_path / "files")[0], 0, "exit status")
        [file] = (tmp_path / "files").iterdir()
        expect((file.name, file.stat().st_size, file.stat().st_mode), ("key", 100_000, 0o100600), "name, size and mode")
        result = run(["key", "32", "--output", "key"], deny.install, cwd=tmp_path / "files")
        expect_failure(result, "failed to write to key: it exists already")
        expect(list((tmp_path / "files").iterdir()), [file], "files")
        file.unlink()


@pytest.mark.root
def test_a_temporary_name_is_never_the_final_one(tmp_path):
    """without unnamed files, a killed command leaves a private file with a temporary name"""
    calls, never = itertools.count(), threading.Event()
    supervisor = Getrandom(lambda length: never.wait() if next(calls) == 200 else None)  # the command never ends by itself

    def install():
        WITHOUT_UNNAMED_FILES.install()
        supervisor.install()

    with running([*LARGE, "--output", "key"], cwd=tmp_path, preexec_fn=install) as process:
        supervisor.start()
        until("a part of the key", lambda: sum(file.stat().st_size for file in tmp_path.iterdir()) > MIB)
        process.kill()
        expect(process.wait(), -signal.SIGKILL, "exit status")
    [left] = tmp_path.iterdir()
    assert re.fullmatch(r"\.key-service-[0-9a-f]{16}", left.name), left
    expect(left.stat().st_mode, 0o100600, "mode")


@pytest.mark.root
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(lambda length: -errno.EPERM, "the random source can't be read: Operation not permitted", id="EPERM"),
        pytest.param(bytes, "the random source returned a constant block", id="constant"),
    ],
)
def test_a_broken_getrandom_prevents_output(answer, reason, tmp_path):
    """with getrandom(2) denied or broken, nothing is written, and the error is the daemon's"""
    for arguments in (["key", "32"], ["password", "24"], ["key", "32", "--output", "file"]):
        supervisor = Getrandom(answer)
        result = run(arguments, supervisor.install, supervisor.start, cwd=tmp_path)
        expect_failure(result, f"key-service: no keys can be generated: {reason}")
        expect(list(tmp_path.iterdir()), [], "files")


def unlimited():
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.mark.root
@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGQUIT", "SIGXFSZ"])
def test_a_fatal_signal_leaves_no_core_dump(name, tmp_path):
    """a signal that dumps core kills the command without a core file, even with an unlimited `ulimit -c`"""
    with running(LARGE, cwd=tmp_path, preexec_fn=unlimited, stdout=subprocess.PIPE) as process:
        expect(len(process.stdout.read(MIB)), MIB, "bytes of the key")
        status, deadline = None, time.monotonic() + TIMEOUT
        while status is None:
            assert time.monotonic() < deadline, f"{name} does not end the command"
            # Rust's handler of SIGSEGV returns from the first one, so that a real fault raises it again.
            os.kill(process.pid, getattr(signal, name))
            pid, found = os.waitpid(process.pid, os.WNOHANG)
            status = found if pid else None
        process.returncode = -os.WTERMSIG(status)
    expect((os.WTERMSIG(status), os.WCOREDUMP(status)), (getattr(signal, name), False), "signal and core dump")
    expect(list(tmp_path.iterdir()), [], "files")


def test_documented_commands_work(tmp_path):
    """README.md and docs/command-line.md: keys and passwords, to standard output, a pipe and files"""

    def run_block(block):
        path = f"{Path(binary()).parent}:{os.environ['PATH']}"
        return subprocess.run(
            ["sh", "-e"], input=block, cwd=tmp_path, env={**environment(), "PATH": path}, capture_output=True, text=True, timeout=TIMEOUT
        )

    done = run_block(commands("README.md", "key-service key 32 --output"))
    assert re.fullmatch(r"[0-9A-Za-z]{24}\n", done.stdout), done
    expect([(file.name, file.stat().st_size) for file in tmp_path.iterdir()], [("session.key", 32)], "files")
    (tmp_path / "session.key").unlink()
    done = run_block(commands("docs/command-line.md", "key-service key 32 --format hex"))
    assert re.fullmatch(r"[0-9a-f]{64}\n([\w-]{43}\n){3}[2-9A-Za-z]{20}\n", done.stdout), done
    done = run_block(commands("docs/command-line.md", "key-service key 64 --output"))
    expect((done.returncode, done.stderr), (0, ""), "exit status and errors")
    modes = {file.name: (file.stat().st_size, file.stat().st_mode & 0o777) for file in tmp_path.iterdir()}
    expect(modes, {"disk.key": (64, 0o600), "password": (25, 0o600)}, "sizes and modes")
    key = (tmp_path / "disk.key").read_bytes()
    done = run_block(commands("docs/command-line.md", "key-service key 64 --output"))
    expect(
        (done.returncode, done.stderr), (1, "key-service: failed to write to disk.key: it exists already, and no file is replaced\n"), ""
    )
    expect((tmp_path / "disk.key").read_bytes(), key, "the key")
    expect(run_block(commands("docs/command-line.md", "key-service key 64 --keep-existing")).returncode, 0, "exit status")
    expect((tmp_path / "disk.key").read_bytes(), key, "the key")

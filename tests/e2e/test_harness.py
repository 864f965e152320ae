"""Tests what the other tests rely on: a hung peer hides no result, a held port stays free for its server, and only stalls excuse a failure.

The tests about ports run in their own network namespace with eight ephemeral ports, so that a race for a port shows up at once. They need
root or unprivileged user namespaces. No daemon is built: scripts that hang take its place.
"""

import contextlib
import errno
import fcntl
import functools
import importlib
import io
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
from support import conditions, peers
from support.conditions import TIMEOUT, Late, expect, repeated_if_late, retry_if_stalled
from support.daemon import REPOSITORY, Daemon

EPHEMERAL_PORTS = "40000 40007"


# Exits at the SIGTERM with the number in the first argument (0: never), after a delay of as many seconds as the second argument. The exit
# status is the number of signals that came during the delay.
STUBBORN = """
import os, signal, sys, time
limit, count = int(sys.argv[1]), 0
def handler(*_):
    global count
    count += 1
    if count == limit:
        time.sleep(float(sys.argv[2]) if sys.argv[2:] else 0)
        os._exit(count - limit)  # sys.exit() would let a further signal interrupt the exit
signal.signal(signal.SIGTERM, handler)
print("ready", flush=True)
while True:
    signal.pause()
"""

# Reports READY as the daemon does, and ignores SIGTERM.
HUNG_DAEMON = """
import os, signal, socket
signal.signal(signal.SIGTERM, signal.SIG_IGN)
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.sendto(b"READY=1\\nSTATUS=Keys on 127.0.0.1:1; metrics on 127.0.0.1:2", os.environ["NOTIFY_SOCKET"])
while True:
    signal.pause()
"""

# A key server on 127.0.0.1 that writes counts like callgrind: 100 instructions for each request, and 5,000 for the start. If HANGS names
# a file that does not exist, the server creates the file and ignores SIGTERM. DELAY is the number of seconds before it binds.
SERVER = """
import os, signal, socket, sys, threading, time
counts = next((each.partition("=")[2] for each in sys.argv if each.startswith("--callgrind-out-file=")), None)
served = []
def finish(*_):
    if counts:
        open(counts, "w").write(f"totals: {5000 + 100 * len(served)}\\n")
    os._exit(0)
signal.signal(signal.SIGTERM, finish)
hangs = os.environ.get("HANGS")
if hangs and not os.path.exists(hangs):
    open(hangs, "w").close()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(float(os.environ.get("DELAY", 0)))
listener = socket.create_server(("127.0.0.1", int(sys.argv[-1])))
def serve(client):
    while request := client.recv(4096):
        served.append(request)
        client.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 32\\r\\n\\r\\n" + bytes(32))
while True:
    threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()
"""


@contextlib.contextmanager
def stubborn(*arguments):
    with subprocess.Popen([sys.executable, "-c", STUBBORN, *map(str, arguments)], stdout=subprocess.PIPE, text=True) as process:
        try:
            expect(process.stdout.readline(), "ready\n", "the process")
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def logged():
    """Captures standard error during the block."""
    with contextlib.redirect_stderr(io.StringIO()) as written:
        yield written.getvalue


def test_hung_peer_is_killed_and_logged():
    """a peer that ignores SIGTERM is killed by its process id, reaped, and logged in one line"""
    with stubborn(0) as process, logged() as log:
        expect(peers.stop_peer(process, "nginx", timeout=0.3), False, "whether the peer exited by itself")
        expect(process.returncode, -signal.SIGKILL, "return code")
        expect(log(), f"nginx (process {process.pid}) did not exit within 0.3 s of SIGTERM and is killed\n", "the log")


def test_peer_that_misses_a_signal_gets_another(monkeypatch):
    """a peer that ignores the first SIGTERM gets further ones, and nothing is logged"""
    monkeypatch.setattr(peers, "SIGNAL_INTERVAL", 0.1)
    with stubborn(3) as process, logged() as log:
        expect(peers.stop_peer(process, "nginx"), True, "whether the peer exited by itself")
        assert process.returncode >= 0, f"killed by signal {-process.returncode}"
        expect(log(), "", "the log")


def test_hung_daemon_is_a_failure():
    """a daemon that ignores SIGTERM is killed and raises Hung; if the block has failed, its error is kept"""
    with stubborn(0) as process, logged() as log:
        try:
            peers.stop_daemon(process, "key-service", timeout=0.3)
        except peers.Hung as hung:
            found = str(hung)
        expect(found, f"key-service (process {process.pid}) did not exit within 0.3 s of SIGTERM and is killed", "the error")
        expect((process.returncode, log()), (-signal.SIGKILL, ""), "return code and log")
    with stubborn(0) as process, logged() as log:
        peers.stop_daemon(process, "key-service", ValueError("the block's"), timeout=0.3)
        expect(log().count("did not exit within 0.3 s"), 1, "lines in the log")
        expect(process.returncode, -signal.SIGKILL, "return code")


def test_daemon_gets_one_signal(monkeypatch):
    """a slow daemon gets a single SIGTERM, because a second one would end its drain"""
    monkeypatch.setattr(peers, "SIGNAL_INTERVAL", 0.1)
    with stubborn(1, 1) as process, logged() as log:
        peers.stop_daemon(process, "key-service")
        expect((process.returncode, log()), (0, ""), "exit status (the number of further signals) and log")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(ValueError("the block's"), "ValueError: the block's"), (None, "Hung: key-service (process")],
    ids=["block-failed", "block-passed"],
)
def test_daemon_context_keeps_the_first_error(raised, expected, tmp_path, monkeypatch):
    """support/daemon.py: a hung daemon does not replace the error that ended the block, and fails a block that passed"""
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable}\n{HUNG_DAEMON}")
    program.chmod(0o755)
    monkeypatch.setenv("KEY_SERVICE_BIN", str(program))
    monkeypatch.setattr(peers, "DAEMON_TIMEOUT", 1)
    found = None
    try:
        with logged(), Daemon(tmp_path) as running:
            if raised:
                raise raised
    except (ValueError, peers.Hung) as error:
        found = f"{type(error).__name__}: {error}"
    assert found and found.startswith(expected), f"expected {expected!r}, found {found!r}"
    expect(running.process.poll(), -signal.SIGKILL, "return code")


def compare(*modules):
    """Modules of benches/compare."""
    sys.path.append(str(REPOSITORY / "benches/compare"))
    return [importlib.import_module(name) for name in modules]


def compare_with_server(scratch):
    """The modules `servers` and `measure.instructions`, with SERVER in place of nginx, and a minimal Bench."""
    servers, instructions = compare("servers", "measure.instructions")
    servers.reserve_descriptors()
    servers.SERVERS["nginx"] = lambda bench, port: [sys.executable, "-c", SERVER, str(port)]
    return servers, instructions, types.SimpleNamespace(scratch=scratch, nginx_constants="", prepared=lambda kind: (kind, {}))


def measure_with_a_hung_peer():
    peers.PEER_TIMEOUT = 8  # of all peers, one hangs
    with tempfile.TemporaryDirectory(prefix="key-service-harness-") as directory:
        directory = Path(directory)
        (directory / "bin").mkdir()
        valgrind = directory / "bin/valgrind"  # the same server; an option of callgrind tells it to write counts
        valgrind.write_text(f"#!{sys.executable}\n{SERVER}")
        valgrind.chmod(0o755)
        os.environ["PATH"] = f"{directory}/bin:{os.environ['PATH']}"
        _, module, bench = compare_with_server(directory)
        measure = functools.partial(module.instructions.__wrapped__, bench, name="nginx", requests=200)
        expect(measure(), 100, "instructions per request")
        os.environ["HANGS"] = str(directory / "hangs")
        with logged() as log:
            expect(measure(), 100, "instructions per request of a peer that hangs once")
        assert (directory / "hangs").exists(), "no peer hung"
        expect(len(log().splitlines()), 1, f"lines in the log {log()!r}")


def connects_to_itself(port, host="127.0.0.1", tries=200):
    """Whether a client that polls a port without a server gets a connection, which is then to itself."""
    for _ in range(tries):
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection((host, port), source_address=(host, 0)).close()
            return True
    return False


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def check_held_port():
    # Control: the checks below prove something only if a client can connect to itself.
    assert connects_to_itself(closed_port()), "expected a client to connect to itself on a closed port"
    refused, port = 0, closed_port()
    while refused < 200:
        try:
            peers.connect(("127.0.0.1", port), 10, "127.0.0.1")
            raise AssertionError("connected to a port where no server listens")
        except ConnectionRefusedError as error:
            refused += 1
            if "no server listens" in str(error):
                break  # peers.connect detected a connection to itself
    assert refused < 200, "expected peers.connect to meet a connection to itself"
    with peers.HeldPort() as port:
        for family, host in (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"):
            check_held_port_of(family, (host, port.number))
    # A port that is in use for IPv6 is not given away for IPv4: of the few ports of this network only one is free in both.
    with contextlib.ExitStack() as others:
        low, high = map(int, EPHEMERAL_PORTS.split())
        for number in range(low, high):
            others.enter_context(socket.create_server(("::1", number), family=socket.AF_INET6))
        with peers.HeldPort() as port:
            expect(port.number, high, "the port that is free in both families")


def check_held_port_of(family, address):
    host, number = address
    assert not connects_to_itself(number, host), f"a client connected to itself at {host}"
    with contextlib.ExitStack() as others:
        given = set()
        with contextlib.suppress(OSError):
            while True:
                listener = others.enter_context(socket.create_server((host, 0), family=family))
                given.add(listener.getsockname()[1])
        assert given and number not in given, f"held {number}, given {given}"
    try:
        with socket.socket(family) as another:
            another.bind(address)
        raise AssertionError(f"another socket could bind the held port of {host}")
    except OSError as error:
        expect(error.errno, errno.EADDRINUSE, "the error of another bind")
    with socket.create_server(address, family=family) as listener, peers.connect(address, 10) as client:
        expect(listener.accept()[1], client.getsockname(), "the client of the server for which the port is held")


def connect_to_a_late_server():
    with tempfile.TemporaryDirectory(prefix="key-service-harness-") as directory:
        servers, _, bench = compare_with_server(Path(directory))
        with servers.Running(bench, "nginx", environment={"DELAY": "1"}) as server:
            with server.connect() as client:
                client.ask()
            check_responses(server)


def check_constants():
    """nginx, haproxy and h2o send the constant on a connection that stays open, by one thread of the process that is measured."""
    with tempfile.TemporaryDirectory(prefix="key-service-harness-") as directory:
        servers, tools = compare("servers", "tools")
        tools.require(["nginx", "haproxy", "h2o"])
        servers.reserve_descriptors()
        bench = types.SimpleNamespace(scratch=Path(directory), nginx_constants="")
        for name in ("nginx", "haproxy", "h2o"):
            with servers.Running(bench, name) as server, server.connect() as client:
                for _ in range(5000):
                    expect(client.ask(), servers.CONSTANT.encode(), f"the body that {name} sends")
                busy = sum(int(path.read_text().split()[2]) > 10 for path in Path(f"/proc/{server.pid}/task").glob("*/schedstat"))
                expect(busy, 1, f"threads of {name} that ran often")


def check_responses(server):
    """The client of benches/compare fails if a response has another status or length than its kind of request expects."""
    kinds, tools = compare("kinds", "tools")
    for name, wrong in ("404", "status 404 and 60 bytes"), ("hex", "status 200 and 65 bytes"):
        [kind] = [kind for kind in kinds.KINDS if kind.name == name]
        try:
            with server.connect(kind=kind) as client:
                client.ask()
            raise AssertionError(f"{name}: a wrong response was accepted")
        except tools.Failed as error:
            assert wrong in str(error), f"expected {wrong!r}, found {error}"


def set_up_network():
    """Brings up the loopback interface of this network namespace and limits its ephemeral ports."""
    with socket.socket() as any_socket:
        flags = struct.pack("16sh22x", b"lo", 1)  # IFF_UP; netdevice(7)
        fcntl.ioctl(any_socket, 0x8914, flags)  # SIOCSIFFLAGS
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(EPHEMERAL_PORTS)


def run_in_new_process(function, *command):
    """Runs one of the functions above in a new process group through `command`, and kills what is left of the group."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*command, sys.executable, __file__, function.__name__],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY / "tests/e2e")},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            status = process.wait(2 * TIMEOUT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        assert status == 0, f"status {status}\n{output.read()}"


def run_in_new_network(function):
    run_in_new_process(function, "unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--net")


@pytest.mark.tools("taskset", "chrt")
def test_hung_peer_is_measured_again():
    """benches/compare/run: a peer that is killed before callgrind writes its counts is measured again"""
    run_in_new_process(measure_with_a_hung_peer)


GATE = "# reason\ntolerance = 0.02\n\n[rows]\nraw = 0.500\nhex = 2.000\n"


@pytest.mark.parametrize(
    ("ratios", "errors", "lower"),
    [
        pytest.param({"raw": 0.509, "hex": 1.961}, [], None, id="within-the-tolerance"),
        pytest.param({"raw": 0.511, "hex": 2.1}, ["raw", "hex"], None, id="dearer"),
        pytest.param({"raw": 0.52, "hex": 1.9}, ["raw"], GATE.replace("2.000", "1.900"), id="dearer-and-cheaper"),
        pytest.param({"raw": 0.5}, ["expected the rows raw, found raw, hex"], None, id="other-rows"),
    ],
)
def test_gate_names_every_dearer_row(ratios, errors, lower):
    """benches/compare/gate.py: rows beyond the tolerance are errors, and only cheaper rows change the file"""
    [gate] = compare("gate")
    found, text = gate.compared(GATE, ratios)
    expect([error.partition(":")[0] for error in found], errors, "the errors")
    expect(text, lower, "the new file")


@pytest.mark.parametrize(
    ("failures", "runs", "raised"),
    [([], 1, None), ([Late, Late], 3, None), ([Late, Late, Late], 3, Late), ([AssertionError], 1, AssertionError)],
    ids=["none", "late-twice", "always-late", "fault"],
)
def test_only_late_tests_are_repeated(failures, runs, raised):
    """a test is repeated at most twice, and only if it found that it was late"""
    outcomes, found = iter([*failures, None]), 0

    @repeated_if_late
    def test():
        nonlocal found
        found += 1
        if failure := next(outcomes):
            raise failure

    error = None
    try:
        test()
    except AssertionError as caught:
        error = type(caught)
    expect((found, error), (runs, raised), "runs and the error of the last one")


@pytest.mark.parametrize(("stall", "calls"), [(TIMEOUT, 1), (0, 3)], ids=["at-once", "after-a-stall"])
def test_only_stalled_attempts_are_repeated(monkeypatch, stall, calls):
    """an attempt that always fails is repeated twice if it takes as long as a stall, otherwise never"""
    monkeypatch.setattr(conditions, "STALL", stall)
    called = []
    with pytest.raises(AssertionError):
        retry_if_stalled(lambda: expect(called.append("a call"), "a response", "result"))
    expect(len(called), calls, "calls")


@pytest.mark.tools("unshare")
def test_held_port_is_given_to_no_other_process():
    """no client and no other server gets a held port, and the server for which it is held can bind it"""
    run_in_new_network(check_held_port)


@pytest.mark.tools("unshare", "taskset")
def test_client_waits_for_a_server_that_binds_late():
    """benches/compare/run: a client that polls until a peer has bound its port connects to that peer"""
    run_in_new_network(connect_to_a_late_server)


@pytest.mark.tools("nginx", "haproxy", "h2o", "taskset")
def test_compared_servers_send_the_constant():
    """benches/compare: the servers that the daemon is compared with send what the benchmark assumes"""
    run_in_new_process(check_constants)


if __name__ == "__main__":
    if sys.argv[1] in (check_held_port.__name__, connect_to_a_late_server.__name__):
        set_up_network()
    globals()[sys.argv[1]]()

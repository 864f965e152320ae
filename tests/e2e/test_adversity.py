"""Fault injection: how the daemon behaves when the kernel, the machine or its clients fail or attack it.

The tests run the release build as a child process, on loopback or in network namespaces. A seccomp filter lets a test answer
getrandom(2), ptrace stops threads, and the journal's socket belongs to the test. docs/adversity.md lists the scenarios and the
measured figures. No test sleeps until something has started: conditions are polled.
"""

import concurrent.futures
import contextlib
import errno
import functools
import itertools
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import support.daemon
from support import certificates, network, peers
from support.answers import Answers
from support.conditions import TIMEOUT, Late, expect, repeated_if_late, until
from support.kernel import Accept4, DenySocket, Getrandom, stopped

pytestmark = [
    pytest.mark.root,
    pytest.mark.tools("ss", "openssl", "ip", "unshare", "nsenter", "mount", "setpriv"),
]

SUPPORT = Path(support.daemon.__file__).parent
MIB = 1 << 20
# The limits that docs/adversity.md states, in seconds and bytes.
OVERLOAD_RESPONSE_MAX = 0.05
STALLED_WRITE_MAX = 30
RESIDENT_MAX = 256 * MIB
# The shortest time after which the daemon closes a connection whose client is too slow, in seconds: EVICTION_GRACE.
LEAST_TIMEOUT = 0.25


@pytest.fixture(scope="module", autouse=True)
def many_open_files():
    """Raises the limit of open files to the hard limit, for this process and its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == resource.RLIM_INFINITY or hard >= 12_000, f"expected at least 12,000 open files for a process (ulimit -Hn), found {hard}"
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@functools.cache
def release_build():
    return os.environ.get("KEY_SERVICE_BIN") or support.daemon.built("release")


class Daemon(support.daemon.Daemon):
    """A daemon that is killed when its block ends, in whatever state it is. With `tls`, its clients speak TLS."""

    def __init__(self, settings=None, tls=None, binary=None, **options):
        super().__init__(settings={**(tls.settings if tls else {}), **(settings or {})}, **options)
        self.tls, self.binary = tls, binary

    def command(self):
        return [str(self.binary or release_build())]

    def stop(self, error):
        peers.kill(self.process, "key-service")

    def connect(self, source="127.0.0.1", to=None):
        client = super().connect(source, to)
        if self.tls and not to:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as curl and browsers do
            client = self.tls.wrap(client)
        self.resources.callback(client.close)
        return client


class Tls:
    """The TLS configuration of a daemon and its clients, with a certificate in `directory`. The certificate's name is not under test."""

    def __init__(self, directory):
        key, chain = directory / "key.pem", directory / "certificate.pem"
        certificates.self_signed(key, chain, "/CN=localhost")
        self.settings = {"tls-cert": chain, "tls-key": key}
        self.context = ssl.create_default_context()
        self.context.check_hostname, self.context.verify_mode = False, ssl.CERT_NONE

    def wrap(self, client):
        return self.context.wrap_socket(client)


@pytest.fixture(params=["plain", "tls"])
def tls(request, tmp_path):
    """The TLS configuration, or None for plain HTTP."""
    return Tls(tmp_path) if request.param == "tls" else None


class Fleet:
    """A process that runs many clients; see fleet.py."""

    def __init__(self, kind, daemon, count, net, *more):
        port, over = daemon.authority.split(":")[1], "tls" if daemon.tls else "plain"
        self.process = subprocess.Popen(
            [sys.executable, SUPPORT / "fleet.py", kind, port, str(count), str(net), over, *map(str, more)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.process:  # and its pipes
            peers.kill(self.process, "fleet.py")

    def connected(self):
        expect(self.process.stdout.readline(), "connected\n", "what the fleet reports")
        return self

    def end(self):
        self.process.stdin.close()
        line = self.process.stdout.readline()
        expect(self.process.wait(2 * TIMEOUT), 0, "the fleet's exit status")
        return json.loads(line)


def responses_of(*fleets):
    """The results of fleets that `ask`. Raises Late if requests failed, each after so long that the daemon may have closed its connection
    because a process or the machine was stalled."""
    results = [fleet.end() for fleet in fleets]
    failures = [each["soonest_failure"] for each in results if each["failed"]]
    if failures and min(failures) > LEAST_TIMEOUT:
        raise Late(f"requests failed after {min(failures):.2f} s or more: {results}")
    return results


# ---------------------------------------------------------------------------------------------------------------------
# The kernel


def repeating(period):
    """A source that returns the same `period` blocks over and over."""
    blocks, at = [os.urandom(256) for _ in range(period)], iter(range(1 << 40))
    return lambda length: blocks[next(at) % period][:length]


# How a source is broken, and what the daemon logs about it.
BROKEN = {
    "EPERM": (lambda: lambda length: -errno.EPERM, "the random source can't be read: Operation not permitted"),
    "ENOSYS": (lambda: lambda length: -errno.ENOSYS, "the random source can't be read: Function not implemented"),
    "no-bytes": (lambda: lambda length: b"", "the random source"),
    "zero": (lambda: lambda length: bytes(length), "the random source returned a constant block"),
    "stuck": (lambda: repeating(1), "the random source repeated a block"),
    "repeating": (lambda: repeating(3), "the random source repeated a block"),
}


# The kernel never returns 0 bytes. The standard library seeds its hash maps before the daemon's self-tests run, and would retry forever.
@pytest.mark.parametrize("name", [name for name in BROKEN if name != "no-bytes"])
def test_a_broken_getrandom_prevents_the_start(name):
    """with getrandom(2) denied or broken from the start, the daemon logs why, exits with 1, and never listens"""
    source, reason = BROKEN[name]
    supervisor = Getrandom(source())
    with Daemon(ready=False, **supervisor.hooks()) as daemon:
        expect(daemon.process.wait(TIMEOUT), 1, "exit status")
        assert f"no keys can be generated: {reason}" in daemon.logged(), daemon.logged()
        daemon.notifications.setblocking(False)
        message = daemon.notifications.recv(4096).decode()
        assert f"STATUS=no keys can be generated: {reason}" in message and "READY" not in message, message
        with contextlib.suppress(BlockingIOError):
            raise AssertionError(f"a second notification: {daemon.notifications.recv(4096)}")


@pytest.mark.parametrize("name", BROKEN)
def test_a_getrandom_that_breaks_stops_all_keys(name, figures):
    """once getrandom(2) breaks at run time, key requests get a 503, streams end short, and the process keeps reporting the failure"""
    source, reason = BROKEN[name]
    supervisor = Getrandom()
    with Daemon({"max-size": 1 << 30, "workers": 1}, watchdog=0.9, **supervisor.hooks()) as daemon:
        daemon.heard("WATCHDOG=1")
        expect(daemon.status("/key/32"), 200, "a key before the failure")
        with daemon.connect() as stream:
            stream.sendall(b"GET /key/1073741824 HTTP/1.1\r\nHost: a\r\n\r\n")
            received = len(stream.recv(4096))
            supervisor.answer = source()
            served = 0
            while daemon.status("/key/32") == 200:
                served += 1
                assert served < 4, f"{served} keys were served from a broken source"
            if name not in ("stuck", "repeating"):  # each block is bad by itself, so no key is served
                expect(served, 0, "keys served from a broken source")
            while chunk := or_nothing(lambda: stream.recv(MIB)):
                received += len(chunk)
        assert received < 1 << 30, "the stream is complete"
        for path in ["/key/1", "/key/100000", "/health", "/readyz"]:
            status, headers, body = daemon.get(path)
            expect(status, 503, path)
            assert "retry-after" in headers and b'"status":503' in body, f"{headers} {body}"
        until("the log line", lambda: daemon.lines("out of service"))
        # If the watchdog or the probe got no answer, the process would be restarted, and the new one would serve keys again.
        daemon.pings(0)  # discards the pings from before the failure
        for _ in range(5):
            daemon.heard("WATCHDOG=1")
        # It fails until the next ping if a worker was stalled.
        until("/livez to succeed", lambda: daemon.status("/livez") == 200)
        until("/livez on the metrics port to succeed", lambda: daemon.get("/livez", daemon.metrics)[0] == 200)
        supervisor.answer = lambda length: None
        expect(daemon.status("/key/32"), 503, "a key after the source has recovered")
        expect(daemon.metric("generator_healthy"), 0, "generator_healthy")
        lines = daemon.lines("out of service")
        assert len(lines) == 1 and reason in lines[0], f"expected one log line about it\n{daemon.logged()}"
        expect(daemon.process.poll(), None, "exit status")
    figures(f"keys served after it broke: {served}")


def test_the_watchdog_check_detects_a_broken_getrandom(figures):
    """the watchdog's check detects a broken getrandom(2) without any request, and exit-idle does not end the process then"""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    supervisor = Getrandom()
    try:
        # The failure has to come before exit-idle, even if the test is stalled.
        with Daemon({"exit-idle": 6}, watchdog=0.3, inherit=listeners, ready=False, **supervisor.hooks()) as daemon:
            daemon.heard("READY=1")
            supervisor.answer = lambda length: -errno.EPERM
            until("the log line", lambda: "the random generator is out of service" in daemon.logged())
            until("the log line", lambda: "exit-idle is ignored: the random generator has failed" in daemon.logged())
            for _ in range(5):
                daemon.heard("WATCHDOG=1")
            until("/livez to succeed", lambda: daemon.status("/livez") == 200)  # fails until the next ping if a worker was stalled
            expect([daemon.status(path) for path in ("/health", "/key/32")], [503, 503], "/health, a key")
            expect(daemon.metric("generator_healthy"), 0, "generator_healthy")
    finally:
        for listener in listeners:
            listener.close()
    figures("the process still runs after exit-idle")


def or_nothing(call):
    """Returns the result of `call`, or no bytes if the connection was reset."""
    try:
        return call()
    except ConnectionError:
        return b""


def test_short_and_interrupted_reads_are_continued(figures):
    """the daemon continues short and interrupted getrandom(2) reads: a key is exactly the bytes that the kernel wrote, in order"""
    calls = iter(range(1 << 40))
    interrupted = 0

    def answer(length):
        nonlocal interrupted
        if next(calls) % 3 == 0:
            interrupted += 1
            return -errno.EINTR
        return os.urandom(min(length, random.randrange(1, 9)))

    supervisor = Getrandom(answer)
    with Daemon({"max-size": MIB, "workers": 1}, **supervisor.hooks()) as daemon:
        for length in [32, 33, 100, 127, 128] * 10:
            key = daemon.get(f"/key/{length}")[2]
            expect(len(key), length, "length")
            written = list(supervisor.written.values())
            assert any(key in each for each in written), f"a key of {length} bytes has bytes that the kernel did not write"
        expect(len(daemon.get("/key/1000000")[2]), 1_000_000, "length of a streamed key")
        expect(daemon.status("/health"), 200, "/health")
    figures(f"{next(calls)} calls, {interrupted} of them interrupted, the others 1 to 8 bytes")


def unlimited():
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # background jobs of a shell ignore it, and so do their children


@pytest.fixture(scope="module")
def core_pattern(tmp_path_factory):
    """This machine's core_pattern. A control process must dump core here: otherwise the test could not fail."""
    with subprocess.Popen(["sleep", "600"], cwd=tmp_path_factory.mktemp("core"), preexec_fn=unlimited) as control:
        control.send_signal(signal.SIGSEGV)
        _, status = os.waitpid(control.pid, 0)
        control.returncode = -os.WTERMSIG(status)
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    assert os.WCOREDUMP(status), f"the control process did not dump core (core_pattern is {pattern!r}): the test would prove nothing"
    return pattern


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGQUIT", "SIGSYS", "SIGTRAP"])
def test_fatal_signals_leave_no_core_dump(name, core_pattern, figures):
    """when a signal that dumps core kills the daemon, it leaves no core file and no key byte, even with an unlimited `ulimit -c`"""
    with Daemon({"max-size": 1 << 30}, before=unlimited) as daemon:
        keys = [daemon.get("/key/64")[2] for _ in range(20)]
        with daemon.connect() as stream:
            stream.sendall(b"GET /key/1073741824 HTTP/1.1\r\nHost: a\r\n\r\n")
            keys.append(stream.recv(MIB)[-4096:])
            status, deadline = None, time.monotonic() + TIMEOUT
            while status is None:
                assert time.monotonic() < deadline, f"{name} does not end the daemon"
                # Rust's handler of SIGSEGV and SIGBUS returns from the first one, so that a real fault raises it again.
                daemon.signal(getattr(signal, name))
                pid, found = os.waitpid(daemon.pid, os.WNOHANG)
                status = found if pid else None
            daemon.process.returncode = -os.WTERMSIG(status)
        expect((os.WTERMSIG(status), os.WCOREDUMP(status)), (getattr(signal, name), False), "signal and core dump")
        expect(sorted(each.name for each in daemon.directory.iterdir()), ["config.toml", "log", "notify"], "files left behind")
        log = daemon.log.read_bytes()
        assert not any(key[:16] in log or key[:16].hex().encode() in log for key in keys), "a key is in the log"
    figures(f"core_pattern {core_pattern!r}: the control process dumps core, the daemon does not")


# ---------------------------------------------------------------------------------------------------------------------
# Clients


def test_slow_clients_are_closed(tls, figures):
    """10,000 clients (over TLS 3,000) that send nothing, half of the headers, or a byte every 5 seconds are closed, and a well-behaved
    client is served meanwhile"""
    kinds = {"silent": 3334, "half": 3333, "drip": 3333}
    if tls:  # two cores complete this many handshakes in a few seconds
        kinds = {"silent": 750, "quiet": 750, "half": 750, "drip": 750}
    count = sum(kinds.values())
    # With room for the well-behaved clients: another test covers what happens beyond max-connections. All clients connect within
    # head-timeout even on a slow machine.
    with Daemon({"max-connections": count + 100, "head-timeout": 15}, tls) as daemon, contextlib.ExitStack() as fleets:

        def good(net, kind):
            return fleets.enter_context(Fleet("ask", daemon, 1, net, "/key/32", 0.005, kind))

        idle = [good(1, "new").connected(), good(2, "kept").connected()]
        time.sleep(2)  # measures an idle daemon, for comparison
        idle = [fleet.end() for fleet in idle]
        under_load = [good(1, "new").connected(), good(2, "kept").connected()]
        slow = [fleets.enter_context(Fleet(kind, daemon, count, net)) for net, (kind, count) in enumerate(kinds.items(), 11)]
        for fleet in slow:
            fleet.connected()
        at_once = daemon.metric("http_connections")
        ends = [fleet.end() for fleet in slow]
        seen = [fleet.end() for fleet in under_load]
        for each in [*idle, *seen]:
            expect((list(each["statuses"]), each["failed"]), (["200"], 0), f"the well-behaved client: {each}")
        expect(sum(end["closed"] for end in ends), count, "connections that were closed")
        # With more than 128 handshakes at once, each has one second, which is not always enough on a busy machine.
        assert sum(end["unfinished"] for end in ends) < 0.1 * count, ends
        assert at_once > 0.9 * count, f"only {at_once} connections were open at once"
        # A byte now and then does not extend head-timeout (15 s); a busy machine may be late.
        assert all(end["latest"] < 25 for end in ends), ends
        assert daemon.resident() < RESIDENT_MAX, daemon.resident()
        until("the last of them to be closed", lambda: daemon.metric("http_connections") == 0)
        figures(
            f"{at_once:.0f} at once, closed after {min(e['earliest'] for e in ends):.1f} to {max(e['latest'] for e in ends):.1f} s; "
            f"a well-behaved client's p99 {milliseconds(seen[0]['p99'])} on new connections (idle: {milliseconds(idle[0]['p99'])}), "
            f"{milliseconds(seen[1]['p99'])} on a keep-alive one ({milliseconds(idle[1]['p99'])}); "
            f"resident {daemon.resident() / MIB:.0f} MiB"
        )


def milliseconds(seconds):
    return f"{seconds * 1000:.3g} ms"


def test_clients_that_never_read_are_closed(tls, figures):
    """1,000 clients that request 256 MiB each and never read cost at most 256 MiB and are closed within 30 s"""
    with Daemon({"max-size": 256 * MIB, "max-bulk-streams": 1000}, tls) as daemon, Fleet("deaf", daemon, 1000, 21) as fleet:
        fleet.connected()
        until("all of them to get a response", lambda: daemon.metric('http_responses_total{status_code="200"}') >= 1000)
        expect(daemon.status("/key/32"), 200, "a well-behaved client meanwhile")
        kernel = daemon.socket_memory()
        end = fleet.end()
        expect(end["closed"], 1000, "connections that were closed")
        assert end["latest"] < STALLED_WRITE_MAX, end
        peak = daemon.resident()
        assert peak <= RESIDENT_MAX, f"{peak / MIB:.0f} MiB"
        until("the last stream to be closed", lambda: daemon.metric("http_connections") == 0)
        expect(orphans(daemon), 0, "closed connections whose bytes the kernel still sends")
        figures(
            f"closed after {end['earliest']:.1f} to {end['latest']:.1f} s, at most {peak / MIB:.0f} MiB resident, "
            f"{kernel / MIB:.0f} MiB in the kernel's sockets"
        )


HELD_MAX = 200 * MIB
LEFT_MAX = 40e6  # bytes resident after the clients have left
# The memory limits that the chart and the unit set.
MEMORY_LIMITS = {"chart": 256 * MIB, "unit": 512 * MIB}


def test_unread_responses_hold_limited_memory(tls, figures):
    """10,000 connections from 40 addresses that pipeline requests and never read hold at most 200 MiB, and other clients are served"""
    with Daemon({"max-size": 256 * MIB}, tls) as daemon, contextlib.ExitStack() as fleets:
        good = fleets.enter_context(Fleet("steady", daemon, 1, 61, 0.005)).connected()
        hoarders = [fleets.enter_context(Fleet("hoard", daemon, 2500, 62, number * 2500)) for number in range(4)]
        peak = kernel = total = resident = 0
        connected = threading.Event()

        def wait():
            for fleet in hoarders:
                fleet.connected()
            connected.set()

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        stop = None
        while stop is None or time.monotonic() < stop:
            sockets, memory = daemon.socket_memory(), daemon.resident("VmRSS")
            total, kernel, resident = max(total, sockets + memory), max(kernel, sockets), max(resident, memory)
            peak = max(peak, daemon.metric("http_connections"))
            if stop is None and connected.is_set():
                stop = time.monotonic() + 5  # how long memory is sampled
            assert stop or waiting.is_alive(), "the hoarders failed"
        waiting.join(TIMEOUT)
        seen = good.end()
        expect(seen["failure"], None, f"the well-behaved client: {seen}")
        for fleet in hoarders:
            fleet.end()
        until("the hoarders to be disconnected", lambda: daemon.metric("http_connections") < 10)
        begin = time.monotonic()
        left = until("memory to be freed", lambda: (size := daemon.resident("VmRSS")) < LEFT_MAX and size)
        took = time.monotonic() - begin
        assert total <= HELD_MAX, f"{total / MIB:.0f} MiB held, of that {resident / MIB:.0f} MiB resident"
        for name, limit in MEMORY_LIMITS.items():
            assert total < limit, f"expected less than the memory limit of the {name}, found {total / MIB:.0f} MiB"
        figures(
            f"{peak:.0f} connections at once held at most {total / MIB:.0f} MiB (resident {resident / MIB:.0f}, kernel "
            f"{kernel / MIB:.0f}); {left / 1e6:.0f} MB {took:.1f} s after; the well-behaved client's p99 "
            f"{milliseconds(seen['p99'])} over {seen['count']} keys"
        )


def orphans(daemon):
    """Counts connections that the daemon has closed while the kernel still holds bytes to send."""
    port = f":{int(daemon.authority.split(':')[1]):04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(line[1].endswith(port) and line[3] in ("04", "0B") for line in lines)  # FIN_WAIT1, CLOSING


@pytest.mark.parametrize("name", ["EMFILE", "ENOBUFS", "EINVAL", "EBADF", "EPERM", "ECONNABORTED"])
def test_a_failing_accept_is_retried_and_logged_once(name, figures):
    """when accept(2) keeps failing, the daemon retries it at most 11 times a second, logs that once, and recovers"""
    skipped = 100 if name in ("EPERM", "ECONNABORTED") else 0  # errors of a single connection: up to 100 in a row are skipped
    calls = []

    def deny(_):
        calls.append(time.monotonic())
        return -getattr(errno, name)

    supervisor = Accept4()
    with Daemon({"workers": 1}, **supervisor.hooks()) as daemon:
        expect(daemon.status("/key/32"), 200, "a key before the failure")
        supervisor.answer = deny
        with daemon.connect() as waiting:
            waiting.sendall(b"GET /key/32 HTTP/1.1\r\nHost: a\r\n\r\n")
            until("ten retries", lambda: len(calls) > skipped + 10)
            until("the log line", lambda: "failed to accept connections" in daemon.logged())
            supervisor.answer = lambda _: None
            expect(Answers(waiting).next()[0], 200, "a client that waited")
        # A delay of the daemon or of this process makes an interval longer, and none shorter.
        shortest = min(later - earlier for earlier, later in itertools.pairwise(calls[skipped:]))
        assert shortest >= 0.09, f"a retry after {shortest:.3f} s"
        expect(daemon.logged().count("failed to accept connections"), 1, "log lines about it")
    figures(f"{len(calls)} calls, retried after {milliseconds(shortest)} or more")


WRITE_SETTING = "echo 1 >/proc/sys/net/ipv6/"


@pytest.mark.parametrize(
    ("prepare", "denied", "has_ipv6"),
    [
        pytest.param(":", [], True, id="as-it-is"),
        pytest.param(f"{WRITE_SETTING}bindv6only", [], True, id="bindv6only=1"),
        pytest.param(f"{WRITE_SETTING}conf/all/disable_ipv6", [], False, id="disable_ipv6=1"),
        pytest.param(":", [socket.AF_INET6], False, id="ipv6.disable=1"),
    ],
)
def test_each_available_address_family_is_served(prepare, denied, has_ipv6, figures):
    """without a host setting, the daemon serves IPv4 and IPv6, whatever bindv6only is, and IPv4 alone where IPv6 is not available"""
    # In a network namespace of its own, which has only loopback.
    wrapper = ["unshare", "--net", "sh", "-c", f'ip link set lo up && {prepare} && exec "$@"', "sh"]
    before = DenySocket(*denied).install if denied else None
    with Daemon({"host": "*"}, before=before, wrapper=wrapper, ready=False) as daemon:
        status = re.search("STATUS=(.*)", daemon.heard("READY=1"))[1]
        ports = re.findall(r":(\d+)(?:;|$)", status)
        expect(len(ports), 2, f"{status!r}, ports")

        def probe(url):
            command = ["nsenter", "--target", str(daemon.pid), "--net", *daemon.command(), "health", "--url", url]
            return subprocess.run(command, timeout=TIMEOUT, check=False).returncode

        for address, is_served in [("127.0.0.1", True), ("[::1]", has_ipv6)]:
            for port in ports:
                url = f"http://{address}:{port}"
                if is_served:  # the probe fails if it waits for two seconds
                    until(f"{url} to be served ({status})", lambda url=url: probe(url) == 0)
                else:
                    expect(probe(url), 1, f"{status!r}, exit status of the probe of {url}")
    figures(status.split(";")[0].removeprefix("Keys on ").rsplit(":", 1)[0])


NO_KEYS = "no keys are served over HTTP: key-service.socket passed no socket, and the sandbox forbids binding one"
NO_METRICS = "no metrics are served: key-service-metrics.socket passed no socket, and the sandbox forbids binding one"
# systemd sets this variable in the main process of a unit.
BY_SYSTEMD = ["sh", "-c", 'export SYSTEMD_EXEC_PID=$$ && exec "$@"', "sh"]


def credential(path):
    """Fetches a credential from the socket as systemd does for a unit, and returns its bytes."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(TIMEOUT)
        client.bind(f"\0{random.randbytes(8).hex()}/unit/a.service/key")
        client.connect(str(path))
        with client.makefile("rb") as stream:
            return stream.read()


SHARED = {"srv-port": 1123, "metrics-port": 1123}


@pytest.mark.parametrize(
    ("names", "settings", "code", "missing"),
    [
        pytest.param("http", {}, errno.EPERM, [NO_METRICS], id="http"),
        pytest.param("metrics", {}, errno.EAFNOSUPPORT, [NO_KEYS], id="metrics"),
        pytest.param("metrics", SHARED, errno.EPERM, [NO_KEYS], id="metrics-same-port"),
        pytest.param("credential", SHARED, errno.EAFNOSUPPORT, [NO_KEYS], id="credential-same-port"),
        pytest.param("credential", {}, errno.EPERM, [NO_KEYS, NO_METRICS], id="credential"),
        pytest.param("credential:metrics", {}, errno.EAFNOSUPPORT, [NO_KEYS], id="credential-metrics"),
        pytest.param("http:credential", {}, errno.EPERM, [NO_METRICS], id="http-credential"),
    ],
)
def test_disabled_sockets_are_reported_by_unit(names, settings, code, missing, tmp_path):
    """where sockets can't be created, the daemon serves on the inherited ones, and names the socket unit of each that is missing"""
    path = tmp_path / "socket"
    names = names.split(":")
    has = names.__contains__
    deny = DenySocket(socket.AF_INET, socket.AF_INET6, code=code).install
    with contextlib.ExitStack() as stack:
        sockets = {name: stack.enter_context(unix_socket(path) if name == "credential" else tcp_socket()) for name in names}
        options = {"watchdog": 0.3, "ready": False, "inherit": list(sockets.values()), "names": ":".join(names)}
        daemon = stack.enter_context(Daemon({**settings, "workers": 2}, before=deny, **options))
        status = re.search("STATUS=(.*)", daemon.heard("READY=1"))[1]
        expect(
            status,
            (f"Keys on {daemon.authority}" if has("http") else "No keys over HTTP")
            + (f"; credentials on unix:{path}" if has("credential") else "")
            + (f"; metrics on {daemon.metrics}" if has("metrics") else "; no metrics"),
            "the status",
        )
        # Five pings later, start-up is over: no further log line or thread follows.
        for _ in range(5):
            daemon.heard("WATCHDOG=1")
        until("the log line", lambda: status in daemon.logged())
        lines = [line for line in daemon.logged().splitlines() if "passed no socket" in line]
        expect([sentence for sentence in (NO_KEYS, NO_METRICS) for line in lines if sentence in line], missing, f"sentences in {lines}")
        assert "keys are served to every client" not in daemon.logged(), daemon.logged()
        expect(len(workers(daemon)), 2 if has("http") else 0, "workers")
        spent = sum(map(int, Path(f"/proc/{daemon.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
        assert spent < 40, f"{spent} ticks of CPU time while idle for 0.5 s"
        for role, authority in (("http", daemon.authority), ("metrics", daemon.metrics)):
            for route in ("/health", "/livez", "/readyz") if has(role) else ():
                expect(daemon.get(route, authority)[0], 200, f"{route} on {role}")
        if has("http"):
            expect(daemon.status("/key/32"), 200, "a key")
        if has("credential"):
            expect(len(credential(path)), 32, "bytes of a credential")
        daemon.signal(signal.SIGTERM)
        expect(daemon.process.wait(TIMEOUT), 0, "exit status")


def tcp_socket():
    return socket.create_server(("127.0.0.1", 0))


def unix_socket(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def workers(daemon):
    """The ids of the worker threads."""
    return [int(task.name) for task in Path(f"/proc/{daemon.pid}/task").iterdir() if (task / "comm").read_text() == "worker\n"]


@pytest.mark.parametrize(
    ("code", "by_systemd"),
    [(errno.EAFNOSUPPORT, True), (errno.EPERM, True), (errno.EAFNOSUPPORT, False)],
    ids=["EAFNOSUPPORT", "EPERM", "without-systemd"],
)
def test_no_socket_at_all_prevents_the_start(code, by_systemd):
    """without any socket the daemon exits with 1, and under systemd it names the unit to start"""
    deny = DenySocket(socket.AF_INET, socket.AF_INET6, code=code).install
    with Daemon(before=deny, wrapper=BY_SYSTEMD if by_systemd else (), ready=False) as daemon:
        expect(daemon.process.wait(TIMEOUT), 1, "exit status")
        bare = f"can't listen on 127.0.0.1:0 ({'srv-port' if code == errno.EPERM else 'host'}): {os.strerror(code)}"
        named = (
            "key-service.socket passed no socket: run `systemctl start key-service.socket`, or if it is active, see "
            f"`systemctl status key-service.socket` ({bare}"
        )
        message = daemon.notifications.recv(4096).decode()
        for text in (daemon.logged(), message):
            assert (named if by_systemd else bare) in text and ("passed no socket" in text) == by_systemd, text


def test_a_port_in_use_is_not_a_missing_socket():
    """where its port is in use, the daemon reports exactly that, and nothing about sockets that were not passed"""
    with tcp_socket() as taken, Daemon({"srv-port": taken.getsockname()[1]}, wrapper=BY_SYSTEMD, ready=False) as daemon:
        expect(daemon.process.wait(TIMEOUT), 1, "exit status")
        assert "(srv-port): Address already in use" in daemon.logged() and "passed no socket" not in daemon.logged(), daemon.logged()


def test_exit_idle_ends_only_socket_activated_services(tmp_path):
    """exit-idle ends a service that serves only inherited sockets, and not one that bound its own socket for keys"""
    with contextlib.ExitStack() as stack:

        def started(name, inherited, **more):
            stack.enter_context(inherited)
            daemon = stack.enter_context(Daemon({"exit-idle": 1}, ready=False, inherit=[inherited], names=name, **more))
            daemon.heard("READY=1")
            return daemon

        deny = DenySocket(socket.AF_INET, socket.AF_INET6).install
        own = started("metrics", tcp_socket())
        for name, inherited in (("credential", unix_socket(tmp_path / "socket")), ("metrics", tcp_socket())):
            daemon = started(name, inherited, before=deny)
            expect(daemon.process.wait(TIMEOUT), 0, f"{name}: exit status")
            assert 'reason="idle"' in daemon.logged() or "reason=idle" in daemon.logged(), daemon.logged()
        expect(own.process.poll(), None, "exit status of the service that bound its own socket for keys")


def test_too_few_descriptors_are_reported_once(figures):
    """with too few descriptors the daemon starts or reports why not; when it runs out of them, it logs that once, waits, and recovers"""

    def limited(count):
        return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))

    started = None
    for count in range(4, 48):
        with Daemon({"workers": 2}, before=limited(count), ready=False) as daemon:
            until("READY or an exit", lambda: b"READY=1" in received_or_nothing(daemon.notifications) or daemon.process.poll() is not None)
            assert "panicked" not in daemon.logged(), f"{count}: {daemon.logged()}"
            if daemon.process.poll() is not None:
                assert started is None, f"the daemon starts with {started} descriptors and not with {count}"
                assert daemon.process.returncode in (1, 78) and daemon.logged().strip(), (
                    f"{count}: {daemon.process.returncode}, {daemon.logged()}"
                )
            else:
                started = started or count
    with Daemon({"workers": 1}, before=limited(64)) as daemon:
        assert daemon.metric("http_connections_limit") >= 8
        until("the warning", lambda: "max-connections is lowered" in daemon.logged())
        held = [daemon.connect() for _ in range(200)]
        expect(daemon.status("/health"), 200, "/health")
        expect(daemon.metric('accept_errors_total{kind="resources"}'), 0, "connections refused for lack of a descriptor")
        for client in held:
            client.close()
        until("a key after that", lambda: daemon.status("/key/32") == 200)
    with Daemon({"workers": 1}) as daemon, daemon.connect() as kept:
        answers = Answers(kept)

        def ask():
            kept.sendall(b"GET /key/32 HTTP/1.1\r\nHost: a\r\n\r\n")
            return answers.next()[0]

        expect(ask(), 200, "a key before the limit is lowered")
        _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (0, hard))  # closing descriptors later does not free any, either
        with daemon.connect() as waiting:
            waiting.sendall(b"GET /key/32 HTTP/1.1\r\nHost: a\r\n\r\n")
            until("accept to run out of descriptors", lambda: "out of file descriptors" in daemon.logged())
            expect(ask(), 200, "a key on an open connection")
            expect(select.select([waiting], [], [], 0)[0], [], "a response although there is no descriptor")
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (hard, hard))
            expect(Answers(waiting).next()[0], 200, "a key for the client that waited")
        expect(daemon.logged().count("out of file descriptors"), 1, "log lines about it")
    figures(f"starts with {started} descriptors or more")


def few_tasks(count):
    """A hook that sets RLIMIT_NPROC as a separate user: the limit counts the threads of a user, and does not apply to root."""
    user = 54321 + count

    def prepare():
        for file, mode in ((".", 0o755), ("config.toml", 0o644), ("notify", 0o777)):
            os.chmod(file, mode)
        resource.setrlimit(resource.RLIMIT_NPROC, (count, count))
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)

    return prepare


@pytest.fixture(scope="module")
def public_binary():
    """A copy of the daemon that any user can run."""
    with tempfile.TemporaryDirectory(prefix="key-service-") as directory:
        os.chmod(directory, 0o755)
        binary = shutil.copy(release_build(), directory)
        os.chmod(binary, 0o755)
        yield binary


@pytest.mark.parametrize(("count", "missing"), [(1, "log"), (2, "notify"), (3, "worker")])
def test_no_room_for_a_worker_prevents_the_start(count, missing, public_binary):
    """where the task limit leaves no room for a worker, the daemon reports why and exits with 1"""
    with Daemon({"workers": 16}, before=few_tasks(count), ready=False, binary=public_binary) as daemon:
        expect(daemon.process.wait(TIMEOUT), 1, "exit status")
        sentence = (
            f"expected room for the {missing} thread within the limit of tasks (TasksMax=, a container's pids limit, ulimit -u), "
            "found: Resource temporarily unavailable"
        )
        message = daemon.notifications.recv(4096).decode()
        for text in (daemon.logged(), message):
            assert sentence in text and "panicked" not in text and "READY" not in text, text


@pytest.mark.parametrize(("count", "workers"), [(4, 1), (7, 1), (12, 5), (19, 16)])
def test_a_task_limit_reduces_the_workers(count, workers, public_binary):
    """where the task limit allows fewer threads than `workers`, the daemon serves with fewer workers and logs a warning"""
    with Daemon({"workers": 16}, before=few_tasks(count), watchdog=1.5, binary=public_binary) as daemon:
        until("the threads", lambda: len(os.listdir(f"/proc/{daemon.pid}/task")) == 3 + workers)
        for _ in range(5):
            daemon.heard("WATCHDOG=1")
        until("the log line", lambda: "Keys on" in daemon.logged())
        is_warned = (
            f"asked=16 started={workers} " in daemon.logged()
            and "fewer workers are started than asked for: the limit of tasks" in daemon.logged()
        )
        expect(is_warned, count < 19, f"whether it warns\n{daemon.logged()}")
        for authority in (daemon.authority, daemon.metrics):
            expect(daemon.get("/livez", authority)[0], 200, "/livez")
        expect({daemon.status("/key/32") for _ in range(50)}, {200}, "keys")
        assert "no progress" not in daemon.logged(), daemon.logged()
        daemon.signal(signal.SIGTERM)
        expect(daemon.process.wait(TIMEOUT), 0, "exit status")


def received_or_nothing(receiver):
    receiver.setblocking(False)
    try:
        return receiver.recv(4096)
    except BlockingIOError:
        return b""


BEGIN, REST = b"GET /key/32 HTTP/1.1\r\n", b"Host: a\r\n\r\n"


def busy_connection(daemon):
    """A connection that holds its slot: it received a key and sent the beginning of another request."""
    client = daemon.connect()
    client.sendall(BEGIN + REST + BEGIN)  # in one write: between two writes the connection would be idle
    expect(Answers(client).next()[0], 200, "a key on a connection with a slot")
    return client


@repeated_if_late
def test_overload_gets_503_at_once(tls, figures):
    """with every slot busy, ten times as many over-limit clients get a 503 at once, while health checks and connections with a slot
    are served"""
    slots = 25  # ten times as many fit into the 256 over-limit connections, however slow a busy machine is
    # Over TLS, as many handshakes as two slow cores have time for, beside those of the measured clients.
    pause = 5 if tls else 0.0625
    with Daemon({"max-connections": slots, "head-timeout": 3600}, tls) as daemon, contextlib.ExitStack() as fleets:

        def ask(count, net, path, pause, kind):
            return fleets.enter_context(Fleet("ask", daemon, count, net, path, pause, kind))

        served = [fleets.enter_context(busy_connection(daemon)) for _ in range(slots)]
        over_limit = [ask(5 * slots, net, "/key/32", pause, "new") for net in (32, 33)]
        for fleet in over_limit:
            fleet.connected()
        refused = ask(1, 34, "/key/32", 0.01, "new").connected()
        health = ask(1, 35, "/health", 0.01, "new").connected()
        begin = time.monotonic()
        time.sleep(5)  # how long responses are counted
        refused, health, *over_limit = responses_of(refused, health, *over_limit)
        took = time.monotonic() - begin
        for client in served:
            client.sendall(REST)
            expect(Answers(client).next()[0], 200, "a request that is completed on a connection with a slot")
        for each, wanted in [(health, "200"), (refused, "503"), *((fleet, "503") for fleet in over_limit)]:
            expect((list(each["statuses"]), each["failed"], each["without_retry"]), ([wanted], 0, 0), f"responses: {each}")
        # The limit for a 503 is 50 ms. Even on a busy machine, half of them meet it.
        assert refused["median"] < OVERLOAD_RESPONSE_MAX, refused
        rate = sum(fleet["statuses"]["503"] for fleet in over_limit) / took
        figures(
            f"{slots} slots busy, {rate:.0f} more requests per second: 503 in {milliseconds(refused['median'])} (p99 "
            f"{milliseconds(refused['p99'])}), /health p99 {milliseconds(health['p99'])}"
        )


def test_idle_connections_make_room_at_the_limit(tls, figures):
    """when idle connections take every slot, new clients still get keys: the connections that were idle for longest are closed"""
    slots = 1000
    with Daemon({"max-connections": slots}, tls) as daemon:
        idle = [daemon.connect(f"127.35.0.{1 + number // 200}") for number in range(slots)]
        for client in idle:
            client.sendall(BEGIN + REST)
            expect(Answers(client).next()[0], 200, "a key")
        pause = 2.5 if tls else 0.5  # the clients' first requests are spread over this time
        with Fleet("ask", daemon, 300, 36, "/key/32", pause, "kept") as fleet:
            fleet.connected()
            time.sleep(1 + 2 * pause)  # how long responses are counted
            new = fleet.end()
        expect((list(new["statuses"]), new["failed"]), (["200"], 0), f"responses to new connections: {new}")

        def closed():
            return [bool(select.select([client], [], [], 0)[0]) for client in idle]

        until("300 connections to be closed", lambda: sum(closed()) >= 300)
        expect(closed(), [True] * 300 + [False] * (slots - 300), "whether each connection is closed, the longest idle first")
    figures(f"300 new connections were served {new['statuses']['200']} times, p99 {milliseconds(new['p99'])}")


def count_lost_requests(connects, counts, count=100):
    """Uses idle connections of each server within 2 ms of their idle timeout, which is 1 s. Counts how many were used and how many
    of those were closed without a response. A connection that a busy machine uses too late does not count."""
    request, schedule = b"GET /key/32 HTTP/1.1\r\nHost: a\r\n\r\n", []
    with contextlib.ExitStack() as stack:
        for number, (server, connect) in itertools.product(range(count), connects.items()):
            client = stack.enter_context(connect())
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sendall(request)
            expect(Answers(client).next()[0], 200, "the first response")
            # As many before the timeout as after it, spread in the same way for each server.
            schedule.append((time.monotonic() + 1 + (number * 7 % count / count - 0.5) * 0.004, server, client))
            time.sleep(0.003)  # so that one request does not delay the next
        for when, server, client in sorted(schedule, key=lambda entry: entry[0]):
            time.sleep(max(0, when - time.monotonic() - 0.001))
            while time.monotonic() < when:
                pass
            with contextlib.suppress(ConnectionError):
                client.sendall(request)
            if time.monotonic() < when + 0.001:
                counts[server]["used"] += 1
                counts[server]["lost"] += Answers(client).next() is None


@pytest.mark.tools("nginx")
@repeated_if_late
def test_reuse_at_the_idle_timeout_loses_no_more_than_nginx(tmp_path, figures):
    """a connection that is reused just as its idle timeout ends loses a request no more often than with nginx"""
    counts = {server: {"used": 0, "lost": 0} for server in ("key-service", "nginx")}
    with Daemon({"idle-timeout": 1}) as daemon, contextlib.ExitStack() as stack:
        # A request that arrives in time is served, however late the daemon reads it.
        with daemon.connect() as client:
            begin, answers = time.monotonic(), Answers(client)
            client.sendall(BEGIN + REST)
            expect(answers.next()[0], 200, "the first response")
            daemon.signal(signal.SIGSTOP)
            if (took := time.monotonic() - begin) > 0.5:
                raise Late(f"the daemon is stopped {took:.1f} s after the first request")
            client.sendall(BEGIN + REST)
            time.sleep(1.5)  # past the idle timeout
            daemon.signal(signal.SIGCONT)
            expect(answers.next()[0], 200, "the response to a request that arrived in time")
        port = stack.enter_context(peers.HeldPort())
        temporary = " ".join(f"{name}_temp_path {tmp_path};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/log; events {{}} http {{ access_log off; {temporary} "
            f"keepalive_timeout 1s; server {{ listen 127.0.0.1:{port.number}; location / {{ return 200 x; }} }} }}"
        )
        command = ["setpriv", "--pdeathsig", "KILL", "--", "nginx", "-c", tmp_path / "nginx.conf"]
        nginx = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        stack.callback(peers.stop_peer, nginx, "nginx")

        def connect():
            return peers.connect(port.address, TIMEOUT)

        def listens():
            with contextlib.suppress(ConnectionRefusedError):
                return connect().close() or True

        until("nginx", listens)
        deadline = time.monotonic() + 5 * TIMEOUT
        while min(each["used"] for each in counts.values()) < 300:
            assert time.monotonic() < deadline, f"this machine is too busy to use connections in time: {counts}"
            count_lost_requests({"key-service": daemon.connect, "nginx": connect}, counts)
    ours, theirs = (each["lost"] / each["used"] for each in counts.values())
    assert ours <= theirs + 0.1, f"lost requests: {counts}"
    used = counts["key-service"]["used"]
    figures(f"lost within 2 ms of the idle timeout: {ours:.0%} of {used} requests, with nginx {theirs:.0%}")


def over_limit_status(daemon, path):
    """The status of a response on a new connection, which may get no slot. Raises Late if there is no response, after so long that the
    daemon may have closed the connection because a process or the machine was stalled."""
    begin, response, reason = time.monotonic(), None, "closed"
    try:
        response = daemon.get(path)
    except OSError as error:
        reason = error
    took = time.monotonic() - begin
    if not response:
        raise (Late if took > LEAST_TIMEOUT else AssertionError)(f"{path}: no response after {took:.2f} s: {reason}")
    return response[0]


@pytest.mark.parametrize(("tls", "kind"), [("plain", "silent"), ("tls", "silent"), ("tls", "stalled"), ("tls", "quiet")], indirect=["tls"])
@repeated_if_late
def test_silent_over_limit_clients_lock_out_nobody(tls, kind, figures):
    """1,000 silent clients beyond max-connections prevent neither health checks nor 503 responses nor the reuse of a free slot; over
    TLS, the same holds for clients that stall in their handshake or are silent after it"""
    slots = 100
    with Daemon({"max-connections": slots, "head-timeout": 3600}, tls) as daemon:
        served = [busy_connection(daemon) for _ in range(slots)]
        with Fleet(kind, daemon, 1000, 41) as fleet:
            fleet.connected()
            open_at_once, times = daemon.metric("http_connections") - slots, []
            for path, wanted in [("/health", 200), ("/key/32", 503)]:
                begin = time.monotonic()
                expect(over_limit_status(daemon, path), wanted, path)
                times.append(time.monotonic() - begin)
            served.pop().close()
            until("a key on the slot that became free", lambda: over_limit_status(daemon, "/key/32") == 200)
            end = fleet.end()
            expect(end["closed"], 1000, "connections that were closed")
        client = served[0]
        client.sendall(REST)
        expect(Answers(client).next()[0], 200, "a key on a connection that kept its slot")
        figures(
            f"/health after {milliseconds(times[0])}, then 503 after {milliseconds(times[1])}; "
            f"the silent clients, {open_at_once:.0f} of them at once, closed after {end['earliest']:.2f} to {end['latest']:.2f} s"
        )


@pytest.mark.parametrize("tls", ["tls"], indirect=True)
@repeated_if_late
def test_stalled_handshakes_lock_out_no_client(tls, figures):
    """4,000 connections from 20 addresses that stall in their handshake and reconnect keep no other client from a key"""
    with Daemon({"head-timeout": 30}, tls) as daemon, contextlib.ExitStack() as fleets:

        def good(net, kind):
            return fleets.enter_context(Fleet("ask", daemon, 1, net, "/key/32", 0.01, kind))

        kept = good(44, "kept").connected()
        stalled = fleets.enter_context(Fleet("stalled", daemon, 4000, 45, "again")).connected()
        new = good(43, "new").connected()
        time.sleep(5)  # how long responses are counted
        timeouts = daemon.metric('tls_handshake_failures_total{reason="timeout"}')
        seen = responses_of(new, kept)
        stalled.end()
        assert timeouts > 0, "no handshake timed out"
        for each in seen:
            expect((list(each["statuses"]), each["failed"]), (["200"], 0), f"the well-behaved client: {each}")
        # A client that has to wait for stalled handshakes waits for `head-timeout` (30 s), or is closed.
        assert seen[0]["longest"] < 15, f"the well-behaved client waited {seen[0]['longest']:.1f} s"
        figures(
            f"{timeouts:.0f} closed; a well-behaved client's p99 {milliseconds(seen[0]['p99'])} on "
            f"{seen[0]['statuses']['200']} new connections, {milliseconds(seen[1]['p99'])} on a keep-alive one"
        )


def test_a_million_addresses_use_little_memory(figures):
    """a million rate-limited client addresses behind a proxy use no memory of their own, and clear no other client's rate limit"""
    clients, batch = 1_000_000, 1000
    settings = {"rate-requests": 1, "rate-bytes": 1, "rate-burst": 3600, "max-size": 4000, "trusted-proxies": '["127.0.0.1"]'}
    with Daemon(settings) as daemon:

        def spend():
            with daemon.connect() as client:
                client.sendall(b"GET /key/3600 HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 203.0.113.7\r\n\r\n")
                return Answers(client).next()[0]

        expect([spend(), spend()], [200, 429], "a client that exceeds its rate limit")
        before = daemon.resident("VmRSS")

        def send(client):
            for first in range(0, clients, batch):
                # Half of them are IPv6 addresses, each in its own /64: one network counts as one client.
                addresses = (
                    f"100.{n >> 16}.{n >> 8 & 255}.{n & 255}" if n % 2 else f"2001:db8:{n >> 16:x}:{n & 65535:x}::1"
                    for n in range(first, first + batch)
                )
                client.sendall(
                    b"".join(b"HEAD /key/1 HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: %s\r\n\r\n" % each.encode() for each in addresses)
                )
            client.shutdown(socket.SHUT_WR)

        begin = time.monotonic()
        with daemon.connect() as client, concurrent.futures.ThreadPoolExecutor(1) as threads:
            sending = threads.submit(send, client)
            counts, rest = {b"200": 0, b"429": 0}, b""
            while chunk := client.recv(MIB):
                lines, _, rest = (rest + chunk).rpartition(b"\r\n")
                for status in counts:
                    counts[status] += lines.count(b"HTTP/1.1 " + status)
            sending.result()
        took = time.monotonic() - begin
        expect(sum(counts.values()), clients, "responses")
        grown = daemon.resident() - before
        assert grown < 16 * MIB, f"{grown / MIB:.1f} MiB more"
        expect(spend(), 429, "the client that had exceeded its rate limit")
        figures(f"{took:.0f} s, {grown / MIB:.1f} MiB more resident, {counts[b'200']} responses 200 and {counts[b'429']} 429")


SENTINEL = b"GET /key/7 HTTP/1.1\r\nHost: sentinel\r\n\r\n"


def corpus():
    """Yields each case of requests.tsv with its alternative lists of responses. In a request, escapes such as \\r are Python's, and
    {x*9} means nine times x."""
    for number, line in enumerate((SUPPORT / "requests.tsv").read_text().splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        name, responses, after, why, request = line.split("\t")
        assert after in ("open", "closed", "either", "cut") and why, f"requests.tsv:{number}"
        assert "|" not in responses or after == "closed", f"requests.tsv:{number}: alternatives of responses need `closed`"
        text = re.sub(r"\{(.+?)\*(\d+)\}", lambda match: match[1] * int(match[2]), request)
        raw = text.encode("latin-1").decode("unicode_escape").encode("latin-1")
        choices = [
            [tuple(int(part) for part in each.split(":")) for each in choice.split() if each != "none"] for choice in responses.split("|")
        ]
        yield name, choices, after, raw


def test_smuggled_requests_are_never_served(figures):
    """each message of requests.tsv gets exactly the listed responses, sent whole and byte by byte, and no smuggled request in it is
    served"""
    cases = list(corpus())
    expect(len({name for name, *_ in cases}), len(cases), "number of different names")
    wrong = []
    with Daemon({"head-timeout": 15, "idle-timeout": 15, "max-size": 1024}) as daemon:

        def try_case(case, size):
            name, choices, after, raw = case
            with daemon.connect() as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                message = raw if after == "cut" else raw + SENTINEL
                with contextlib.suppress(ConnectionError):  # the daemon may close the connection before the end of the message
                    for at in range(0, len(message), size):
                        if after in ("closed", "either") and select.select([client], [], [], 0)[0]:
                            break  # nobody reads what would follow the response
                        client.sendall(message[at : at + size])
                answers, found = Answers(client), []
                for _, *length in max(choices, key=len):
                    response = answers.next(has_body=length != [0])
                    if response is None:
                        break
                    code, headers, body = response
                    found.append((code, *([len(body)] if length else [])))
                    if headers["content-length"] != "0" and headers.get("cache-control") != "no-store":
                        found.append("a response that may be cached")
                if after in ("open", "either"):
                    response = answers.next()
                    end = after if response and (response[0], len(response[2])) == (200, 7) else f"ends with {response}"
                    if after == "either" and response is None:
                        end = after
                    with contextlib.suppress(OSError):  # the daemon may have closed it already
                        client.shutdown(socket.SHUT_WR)
                    response = answers.next()
                    end = end if response is None else f"and one more response: {response}"
                else:
                    response = answers.next()
                    end = after if response is None else f"one more response: {response[0]}, {len(response[2])} bytes"
                if found not in choices or end != after:
                    chunks = "whole" if size > 1024 else "in chunks"
                    wrong.append(f"{name} ({chunks}): expected {choices}, {after}; found {found}, {end}")

        with concurrent.futures.ThreadPoolExecutor(16) as threads:
            sizes = [1 << 20] * len(cases) + [1 if len(raw) < 1000 else 500 for *_, raw in cases]
            connections = len(list(threads.map(try_case, cases * 2, sizes)))
        assert not wrong, "\n" + "\n".join(wrong)
        expect(daemon.status("/health"), 200, "/health after all of them")
        assert "panicked" not in daemon.logged(), daemon.logged()
        text = daemon.get("/metrics", daemon.metrics)[2].decode()
        assert not re.search(r'status_code="5.."} [1-9]', text), "a response was a 5xx"
    figures(f"{len(cases)} messages, {connections} connections")


def test_shutdown_leaves_cut_streams_short(tls, figures):
    """on SIGTERM during 100 streams, clients that read get their whole response; streams that are cut off stay below their
    Content-Length, and over TLS they have no close_notify"""
    short, long = 2 * MIB if tls else 8 * MIB, 256 * MIB
    drain = 12  # seconds; even on a busy machine, a client that reads gets its whole response in this time
    # All clients share one address, which can have a quarter of the permits. No stream ends before the drain does.
    settings = {"max-size": long, "max-bulk-streams": 400, "drain-timeout": drain, "write-timeout": 60}
    with Daemon(settings, tls) as daemon:
        streams = []
        for number in range(100):
            length = long if number % 2 else short
            version = "1.0" if number % 10 > 7 else "1.1"  # in HTTP/1.0, the close could be taken for the end of the message
            client = daemon.connect()
            if tls:
                client.suppress_ragged_eofs = False  # report an end without close_notify as an error
            client.sendall(f"GET /key/{length} HTTP/{version}\r\nHost: a\r\n\r\n".encode())
            headers = b""
            while b"\r\n\r\n" not in headers:
                headers += client.recv(4096)
            headers, _, body = headers.partition(b"\r\n\r\n")
            assert b" 200 " in headers and f"\r\ncontent-length: {length}".encode() in headers.lower(), headers
            assert b"transfer-encoding" not in headers.lower()
            streams.append((client, length, len(body)))
        daemon.signal(signal.SIGTERM)
        daemon.heard("STOPPING=1")
        begin = time.monotonic()

        def read(client, received):
            """Returns the number of bytes received, and whether the connection ended without an error."""
            with client:
                try:
                    while chunk := client.recv(MIB):
                        received += len(chunk)
                except (ConnectionError, ssl.SSLError):
                    return received, False
            return received, True

        # The long streams are read after the process has exited, and then yield what the kernel still holds.
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            reading = [threads.submit(read, client, received) for client, length, received in streams if length == short]
            expect([each.result() for each in reading], [(short, True)] * 50, "bytes for clients that read, and a clean end")
        expect(daemon.process.wait(TIMEOUT), 0, "exit status")
        took = time.monotonic() - begin
        cut = [read(client, received) for client, length, received in streams if length == long]
        assert len(cut) == 50 and all(got < long for got, _ in cut), f"a stream that was cut off is complete: {cut}"
        if tls:
            assert not any(ended_cleanly for _, ended_cleanly in cut), f"a stream that was cut off has a close_notify: {cut}"
        assert "stopped with connections still open" in daemon.logged(), daemon.logged()
        figures(
            f"50 streams of {short // MIB} MiB complete, 50 cut off with at most {max(cut)[0] / MIB:.1f} of {long // MIB} MiB, exit after "
            f"{took:.1f} s (`drain-timeout` is {drain} s)"
        )


class Reader:
    """A client that requests one key."""

    def __init__(self, daemon, length, closes=False):
        self.client = daemon.connect(None)
        self.received, self.length = b"", length
        close = "Connection: close\r\n" if closes else ""
        self.client.sendall(f"GET /key/{length} HTTP/1.1\r\nHost: a\r\n{close}\r\n".encode())

    def is_complete(self):
        return len(self.received.partition(b"\r\n\r\n")[2]) == self.length

    def read_some(self):
        self.received += self.client.recv(4096)
        return self

    def read_all(self):
        while not self.is_complete():
            self.read_some()
        return self

    def ending(self):
        """Reads to the end, and returns how the connection ends: `whole` after a complete response, `cut` before that, `reset`, or
        `nothing` if it does not end within 10 s."""
        self.client.settimeout(10)
        try:
            while chunk := or_nothing(lambda: self.client.recv(MIB)):
                self.received += chunk
        except TimeoutError:
            return "nothing"
        # tcp(7), TCP_INFO: only a reset leads to the state CLOSE (7). Python's TLS reports a reset as an ordinary end.
        if self.client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 7:
            return "reset"
        return "whole" if self.is_complete() else "cut"


def in_a_pod(tls, settings, clients):
    """Runs a daemon in a network that disappears with its process, and returns the result of `clients`, called in another network.
    A client that lost segments needs the wire twice in the half second before the process exits."""
    addresses = {"host": network.SERVER, "metrics-host": network.SERVER, "max-size": 256 * MIB}
    with network.Network() as wire, wire.daemon(Daemon(addresses | settings, tls)) as daemon:
        try:
            return wire.clients(lambda: clients(daemon, wire))
        except AssertionError as error:
            if wire.longest_pause < 0.1:
                raise
            raise Late(f"the wire paused for {wire.longest_pause:.1f} s: {error}") from error


def stopped_by(daemon, *signals):
    """Sends the signals, waits for the exit, and returns how long that took."""
    begin = time.monotonic()
    for number, each in enumerate(signals):
        daemon.signal(each)
        if number == 0:
            daemon.heard("STOPPING=1")
    expect(daemon.process.wait(2 * TIMEOUT), 0, "exit status")
    return time.monotonic() - begin


def wait_until_sent(daemon):
    """Waits until the daemon has passed every response to its kernel."""
    until("responses to reach the kernel", lambda: daemon.metric("http_requests_in_flight") == 1)  # the request for the metrics


@repeated_if_late
def test_shutdown_resets_unread_connections_in_a_pod(tls, figures):
    """where the network disappears with the process, as in a pod, each client gets its whole response and a close, or a reset"""
    fits, long = 150_000, 256 * MIB  # bytes: a response that the kernels can hold unread, and one that they can't

    def clients(daemon, wire):
        closed, closed_late = (Reader(daemon, fits, closes=True) for _ in range(2))
        idle, idle_late = (Reader(daemon, fits) for _ in range(2))
        wait_until_sent(daemon)
        good = Reader(daemon, 32).read_all()
        cut, lossy = (Reader(daemon, long).read_some() for _ in range(2))
        # The next segments to `lossy` are lost. A reset after them is out of sequence, so its kernel sends a challenge ACK (RFC 5961).
        port = struct.pack("!H", lossy.client.getsockname()[1])
        wire.loses = lambda packet: network.has_data(packet) and packet[22:24] == port
        with contextlib.suppress(TimeoutError):
            lossy.client.settimeout(0.5)
            while lossy.read_some():
                pass
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            stopping = thread.submit(stopped_by, daemon, signal.SIGTERM)
            expect(good.ending(), "whole", "an idle client")
            expect(idle_late.ending(), "whole", "an idle client that reads late")
            expect(closed_late.ending(), "whole", "a client that reads late, with a response from before the drain")
            took = stopping.result()
        for name, reader in {"stream": cut, "stream with lost segments": lossy, "idle": idle, "response before the drain": closed}.items():
            expect(reader.ending(), "reset", f"{name}: a client that does not read")
        assert "stopped with connections still open" in daemon.logged(), daemon.logged()
        return took

    took = in_a_pod(tls, {"drain-timeout": 6}, clients)
    figures(f"3 whole, 4 reset; exit after {took:.1f} s (`drain-timeout` is 6 s)")


@repeated_if_late
def test_a_second_signal_resets_connections_in_a_pod(tls, figures):
    """where the network disappears with the process, a second signal resets each client that has not read its response"""

    def clients(daemon, wire):
        readers = [Reader(daemon, 150_000, closes=True), Reader(daemon, 150_000)]
        wait_until_sent(daemon)
        readers.append(Reader(daemon, 256 * MIB).read_some())
        took = stopped_by(daemon, signal.SIGTERM, signal.SIGTERM)
        for reader in readers:
            expect(reader.ending(), "reset", "a client that does not read")
        return took

    took = in_a_pod(tls, {"drain-timeout": 3600}, clients)
    figures(f"3 reset; exit after {took:.1f} s")


@repeated_if_late
def test_the_drain_waits_only_for_unread_responses(tls, figures):
    """the drain waits for clients that have not read their whole response, and not for those that have but keep their side open"""

    def clients(daemon, wire):
        kinds = [(length, closes) for length in (32, 150_000) for closes in (True, False)]
        readers = [Reader(daemon, length, closes=closes).read_all() for length, closes in kinds]
        late = [Reader(daemon, 150_000, closes=closes) for closes in (True, False)]
        wait_until_sent(daemon)
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            stopping = thread.submit(stopped_by, daemon, signal.SIGTERM)
            for reader in readers:
                expect(reader.ending(), "whole", "a client that has its response")
            for reader in late:
                expect(reader.ending(), "whole", "a client that reads late")
            took = stopping.result()
        assert "connections still open" not in daemon.logged(), daemon.logged()
        return took

    took = in_a_pod(tls, {"drain-timeout": 3600}, clients)
    figures(f"6 clients; exit after {took:.1f} s (`drain-timeout` is 3,600 s)")


# ---------------------------------------------------------------------------------------------------------------------
# The service manager


# Mounts a directory as /run/systemd/journal in a mount namespace, and runs a command there.
WITH_JOURNAL = 'mount -t tmpfs none /run && mkdir -p /run/systemd/journal && mount --bind "$0" /run/systemd/journal && exec "$@"'
# Since version 257, systemd bind-mounts the socket's file, too.
WITH_JOURNAL_257 = WITH_JOURNAL.replace("exec", 'mount --bind "$0/socket" /run/systemd/journal/socket && exec')


def journal_stream(daemon, log):
    """systemd.exec(5): stderr is connected to the journal if JOURNAL_STREAM names its device and inode."""
    status = os.fstat(log.fileno())
    return {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}


class Journal:
    """A thread that reads /run/systemd/journal/socket and keeps the request ids of the audit records."""

    def __init__(self, mounting):
        self.directory, self.ids, self.entries, self.socket = tempfile.mkdtemp(prefix="key-service-"), [], 0, None
        self.start()
        self.wrapper = ["unshare", "--mount", "sh", "-c", mounting, self.directory]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
        shutil.rmtree(self.directory)

    def start(self):
        """Binds the socket again, as systemd does; the file of the closed socket has to be removed first."""
        path = Path(self.directory, "socket")
        path.unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(0.05)
        self.ends, self.thread = threading.Event(), threading.Thread(target=self.read)
        self.thread.start()

    def stop(self):
        """Closes the socket after everything in it was read. Closing it earlier would lose entries that nobody can count."""
        if self.socket:
            self.socket.shutdown(socket.SHUT_RD)
            self.ends.set()
            self.thread.join()
            self.socket.close()
            self.socket = None

    def read(self):
        while True:
            is_last = self.ends.is_set()  # read this before the socket turns out to be empty
            try:
                entry = self.socket.recv(1 << 18)
            except TimeoutError:
                if is_last:
                    return
                continue
            self.entries += bool(entry)
            if identity := re.search(rb"^REQUEST_ID\n.{8}([0-9a-f]{32})\n", entry, re.M | re.S):
                self.ids.append(identity[1])


def issue(client, count):
    """Requests `count` keys, one after the other."""
    answers = Answers(client)
    for _ in range(count):
        client.sendall(b"GET /key/32 HTTP/1.1\r\nHost: a\r\n\r\n")
        expect(answers.next()[0], 200, "status")


def test_a_replaced_journal_socket_loses_nothing_uncounted(figures):
    """while the journal's socket is replaced again and again, each audit record arrives exactly once or is counted as dropped"""
    count, rounds = 30_000, 0
    with Journal(WITH_JOURNAL_257) as journal, Daemon({"audit": "true"}, wrapper=journal.wrapper, environment=journal_stream) as daemon:
        with daemon.connect() as client, concurrent.futures.ThreadPoolExecutor(1) as thread:
            issuing = thread.submit(issue, client, count)
            while not issuing.done() or rounds < 3:
                errors = daemon.metric("log_write_errors_total")
                journal.stop()
                if not issuing.done():
                    until("a failed write", lambda before=errors: daemon.metric("log_write_errors_total") > before or issuing.done())
                journal.start()
                received = len(journal.ids)
                until("a record on the new socket", lambda before=received: len(journal.ids) > before or issuing.done())
                rounds += 1
            issuing.result()

        def dropped():
            return int(daemon.metric("audit_records_dropped_total"))

        until(f"{count} records, received or dropped", lambda: len(journal.ids) + dropped() >= count)
        expect(len(set(journal.ids)) + dropped(), count, "records received and records dropped")
        expect(len(journal.ids), len(set(journal.ids)), "records received, without duplicates")
        errors = daemon.metric("log_write_errors_total")
        assert errors > 0, "no write failed"
        expect(daemon.logged(), "", "what the daemon wrote to stderr instead")
        figures(
            f"{count} keys, {rounds} sockets: {len(journal.ids)} records received, {dropped()} dropped and counted, none lost; "
            f"{errors:.0f} failed writes"
        )


def test_a_missing_journal_stalls_no_request(figures):
    """while no journal listens, no request waits, dropped records are counted, and the daemon retries ten times a second; at exit it
    reports the records that are lost"""
    count, stderr = 5_000, socket.socketpair()
    with contextlib.ExitStack() as stack:
        journal, stream = stack.enter_context(Journal(WITH_JOURNAL)), stack.enter_context(stderr[0])
        options = {"wrapper": journal.wrapper, "environment": journal_stream, "stderr": stderr[1]}
        with Daemon({"audit": "true"}, **options) as daemon:

            def counted(name):
                return int(daemon.metric(name))

            until("the log entries of the start", lambda: journal.entries)
            begin, before = time.monotonic(), counted("log_write_errors_total")
            journal.stop()
            with daemon.connect() as client:
                issue(client, count)
                # The queue holds 1,024 records, and the writer one more.
                assert counted("audit_records_dropped_total") >= count - 1025, "too few records are counted as dropped"
                until("failed writes", lambda: counted("log_write_errors_total") > before + 10)
                errors = counted("log_write_errors_total") - before
                tries = 5 + (time.monotonic() - begin) * 10
                assert errors <= tries, f"expected at most {tries:.0f} failed writes, found {errors}"
                journal.start()
                until("the records", lambda: len(journal.ids) + counted("audit_records_dropped_total") >= count)
                expect(len(set(journal.ids)) + counted("audit_records_dropped_total"), count, "records received and records dropped")
                journal.stop()
                issue(client, count)
            dropped = counted("audit_records_dropped_total")
            daemon.signal(signal.SIGTERM)
            begin = time.monotonic()
            expect(daemon.process.wait(TIMEOUT), 0, "exit status")
            took = time.monotonic() - begin
            report = stream.recv(4096).decode()
            lost = 2 * count - len(journal.ids)
            assert lost > dropped, "expected the exit to lose what was in the queue"
            assert report.startswith(f"<4>key-service: {lost} audit records and "), f"{lost} records were lost, the report is {report!r}"
            figures(
                f"{2 * count} keys without a wait; {errors} failed writes; {dropped} records dropped and counted, {lost - dropped} more "
                f"reported at exit, {took:.1f} s after SIGTERM"
            )


def test_a_stopped_journal_stalls_no_request(figures):
    """with a stopped journal and a service manager that reads nothing, no request waits, and lost records are counted"""
    journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listeners = [socket.create_server(("127.0.0.1", 0), backlog=4096) for _ in range(2)]
    directory = tempfile.mkdtemp(prefix="key-service-")
    count = 20_000

    def environment(daemon, log):
        filler = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        filler.setblocking(False)
        with contextlib.suppress(BlockingIOError), filler:
            while True:
                filler.sendto(b"full", str(daemon.directory / "notify"))
        return journal_stream(daemon, log)

    try:
        journal.bind(f"{directory}/socket")
        settings = {"log-level": "debug", "audit": "true"}
        with Daemon(
            settings,
            watchdog=0.05,
            wrapper=["unshare", "--mount", "sh", "-c", WITH_JOURNAL, directory],
            ready=False,
            inherit=listeners,
            environment=environment,
        ) as daemon:
            with daemon.connect() as client:
                answers, times = Answers(client), []
                for _ in range(count):
                    begin = time.monotonic()
                    client.sendall(b"GET /key/32 HTTP/1.1\r\nHost: a\r\n\r\n")
                    expect(answers.next()[0], 200, "status")
                    times.append(time.monotonic() - begin)
            lost = daemon.metric("audit_records_dropped_total")
            assert lost > count / 2, f"only {lost} of {count} records were lost: the journal is not stopped"
            entries = (journal.recv(65536) for _ in range(10))
            assert any(b"key issued" in entry for entry in entries), "the socket is not the journal's"
            expect(daemon.status("/health"), 200, "/health")
            daemon.signal(signal.SIGTERM)
            begin = time.monotonic()
            expect(daemon.process.wait(TIMEOUT), 0, "exit status")
            expect(daemon.logged(), "", "what the daemon wrote to stderr instead")
            times.sort()
            figures(
                f"{count} keys, p99 {milliseconds(times[count * 99 // 100])}, longest {milliseconds(times[-1])}; "
                f"{lost:.0f} records dropped and counted; exit after {time.monotonic() - begin:.1f} s"
            )
    finally:
        journal.close()
        for listener in listeners:
            listener.close()
        shutil.rmtree(directory)


def test_blocked_workers_stop_the_watchdog_pings(figures):
    """while one worker or all of them are blocked, the daemon sends no watchdog ping and /livez returns 503"""
    limit = 0.6  # seconds; the daemon sends a ping every third of it
    with Daemon({"workers": 3}, watchdog=limit) as daemon:
        tasks = until("three workers", lambda: len(found := workers(daemon)) == 3 and found)
        rounds = []
        for blocked in (tasks[:1], tasks):
            daemon.heard("WATCHDOG=1")
            before = daemon.logged().count("a worker missed a heartbeat")
            with stopped(blocked):
                until("the log line", lambda before=before: daemon.logged().count("a worker missed a heartbeat") > before)
                rounds.append(daemon.pings(10 * limit / 3))
                expect(daemon.get("/livez", daemon.metrics)[0], 503, "/livez on the metrics port")
                expect(daemon.metric("workers_healthy"), 0, "workers_healthy")
                expect(daemon.get("/health", daemon.metrics)[0], 200, "/health on the metrics port")
            daemon.heard("WATCHDOG=1")
            expect(daemon.get("/livez", daemon.metrics)[0], 200, "/livez after that")
            expect(daemon.metric("workers_healthy"), 1, "workers_healthy after that")
            expect(daemon.status("/key/32"), 200, "a key after that")
        expect(rounds, [0, 0], "pings while one worker and while all are blocked")
    figures(f"{rounds[0]} pings in the time of 10 with one of 3 workers blocked, {rounds[1]} with all")


def test_blocked_workers_do_not_delay_shutdown(figures):
    """blocked workers do not delay the shutdown: the daemon waits for them briefly, logs that they do not stop, and exits with 0"""
    with Daemon({"workers": 3, "drain-timeout": 1, "audit": "true", "max-size": MIB * 64}) as daemon:
        client = daemon.connect()
        client.sendall(f"GET /key/{MIB * 64} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert client.recv(MIB), "the stream did not begin"
        tasks = until("three workers", lambda: len(found := workers(daemon)) == 3 and found)
        with stopped(tasks):
            begin = time.monotonic()
            daemon.signal(signal.SIGTERM)
            until("the log line", lambda: "a worker does not stop" in daemon.logged())
            for task in tasks:
                os.waitpid(task, 0x40000000)  # the tracer has to reap each thread before the process itself can be reaped
            expect(daemon.process.wait(TIMEOUT), 0, "exit status")
            took = time.monotonic() - begin
        assert "outcome=started" in daemon.logged(), daemon.logged()
        figures(f"exit after {took:.1f} s (`drain-timeout` is 1 s)")

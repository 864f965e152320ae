"""Tests the daemon behind haproxy and nginx as load balancers that forward TCP and send PROXY headers.

Clients connect from loopback addresses such as 127.0.0.5 and ::1, and the proxy connects to the daemon from 127.0.0.9.
"""

import contextlib
import csv
import http.client
import io
import re
import socket
import ssl
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from support import certificates, peers
from support.conditions import TIMEOUT, expect, retry_if_stalled, until
from support.daemon import Daemon
from support.tools import STREAM_MODULE

pytestmark = pytest.mark.tools("haproxy", "nginx", STREAM_MODULE, "openssl", "setpriv")

PROXY = "127.0.0.9"
CLIENTS = ("127.0.0.5", "127.0.0.6", "::1")
VERSIONS = ("send-proxy", "send-proxy-v2")
TRUSTING = f'proxy-protocol = true\ntrusted-proxies = ["{PROXY}"]\naudit = true\n'

# Clients connect over IPv4 and IPv6, and haproxy connects to the daemon from 127.0.0.9.
HAPROXY = """
global
    maxconn 100
    stats socket {directory}/stats mode 600 level operator

defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout check 5s

frontend keys
    bind 127.0.0.1:{port}
    bind [::1]:{port}
    default_backend keys

backend keys
    source {proxy}
{backend}
    server one {authority} {server}
"""
NGINX = """
load_module {module};
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/proxy.log;
events {{}}
stream {{
    server {{
        listen 127.0.0.1:{port};
        listen [::1]:{port};
        proxy_pass {authority};
        proxy_protocol on;
        proxy_bind {proxy};
        proxy_connect_timeout 2s;
        proxy_timeout 80s;
    }}
}}
"""
HTTP_CHECK = """
    option httpchk
    http-check send meth GET uri /readyz ver HTTP/1.1 hdr Host keys
    http-check expect status 200
"""
OLD_HTTP_CHECK = """
    option httpchk GET /health
"""


class Stage:
    """A context in which a daemon runs behind haproxy, or behind nginx if `server` is None.

    server: the options of haproxy's server line"""

    def __init__(self, server, config=TRUSTING, backend="", tls=False):
        self.server, self.config, self.backend, self.tls = server, config, backend, tls
        self.name = "nginx" if server is None else "haproxy"

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="key-service-proxies-")))
            if self.tls:
                certificates.self_signed(self.directory / "key.pem", self.directory / "cert.pem", names="IP:127.0.0.1,IP:::1")
                self.config += f'tls-cert = "{self.directory}/cert.pem"\ntls-key = "{self.directory}/key.pem"\n'
            self.daemon = stack.enter_context(Daemon(self.directory, self.config, log=self.directory / "log"))
            self.port = stack.enter_context(peers.HeldPort()).number
            text, file = (NGINX, self.directory / "nginx.conf") if self.name == "nginx" else (HAPROXY, self.directory / "haproxy.cfg")
            file.write_text(
                text.format(
                    directory=self.directory,
                    port=self.port,
                    proxy=PROXY,
                    authority=self.daemon.authority,
                    module=STREAM_MODULE,
                    backend=self.backend,
                    server=(self.server or "").format(directory=self.directory),
                )
            )
            log = stack.enter_context(open(self.directory / "proxy.log", "wb"))
            command = ["nginx", "-c", file] if self.name == "nginx" else ["haproxy", "-db", "-f", file]
            # The proxy ends with this process, however this process ends. nginx ends its own worker.
            self.process = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", "--", *command], stdout=log, stderr=log)
            stack.callback(peers.stop_peer, self.process, self.name)
            until(f"{self.name} to listen", self.listens)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind, *error):
        if kind:
            print((self.directory / "log").read_text(), (self.directory / "proxy.log").read_text(), sep="\n")
        return self.stack.__exit__(kind, *error)

    def listens(self):
        """Whether the proxy listens: haproxy answers on its stats socket, or nginx has written its pid file. No client has to connect."""
        assert self.process.poll() is None, f"{self.name} exited:\n{(self.directory / 'proxy.log').read_text()}"
        if self.name == "nginx":
            return (self.directory / "nginx.pid").exists()  # nginx writes it after its sockets listen
        try:
            return bool(self.show("info"))
        except OSError:
            return False

    def show(self, what):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT)
            connection.connect(f"{self.directory}/stats")
            connection.sendall(f"show {what}\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def health(self):
        """The result of haproxy's last health check of the daemon: (status, check code). None before the first check, and if the check
        timed out: the daemon may have been stalled, and the next check decides."""
        rows = csv.DictReader(io.StringIO(self.show("stat").removeprefix("# ")))
        row = next(row for row in rows if row["svname"] == "one")
        # "* L4OK" means that a check is running, and that the previous result was L4OK.
        status = row["check_status"].removeprefix("* ")
        return (row["status"].split(" ")[0], status) if status not in ("", "INI") and not status.endswith("TOUT") else None

    def client(self, source=CLIENTS[0]):
        """A connection from a client to the proxy, not yet open."""
        host = "::1" if ":" in source else "127.0.0.1"
        if not self.tls:
            return http.client.HTTPConnection(host, self.port, timeout=TIMEOUT, source_address=(source, 0))
        context = ssl.create_default_context(cafile=f"{self.directory}/cert.pem")
        return http.client.HTTPSConnection(host, self.port, timeout=TIMEOUT, source_address=(source, 0), context=context)

    def get(self, path, source=CLIENTS[0]):
        """The status of a request on a new connection; None if the connection ends without a response."""
        with contextlib.closing(self.client(source)) as connection:
            try:
                connection.request("GET", path)
                response = connection.getresponse()
                response.read()
                return response.status
            except (ConnectionError, http.client.RemoteDisconnected, ssl.SSLError):
                return None


def addresses(stage, count):
    """Waits for `count` audit records, and returns their addresses."""
    lines = until(f"{count} audit records", lambda: len(found := stage.daemon.lines("key issued")) == count and found)
    return [re.search(r" address=(\S+) ", line).group(1) for line in lines]


def check_audit(server, tls):
    """Each client sends several requests on one connection, and the audit records have the client's address."""
    with Stage(server, tls=tls) as stage:
        for clients, source in enumerate(CLIENTS, 1):
            with contextlib.closing(stage.client(source)) as connection:
                for length in (32, 300, 32):
                    connection.request("GET", f"/key/{length}")
                    response = connection.getresponse()
                    expect((response.status, len(response.read())), (200, length), f"{source}: status and length")
            # A response is sent before its record is logged, so a record of the next client may come first.
            expect(addresses(stage, 3 * clients)[-3:], [source] * 3, "addresses in the audit records")
        expect(errors(stage.daemon), {}, "errors")


each_version = pytest.mark.parametrize("version", VERSIONS)


@each_version
def test_audit_records_the_client_address(version):
    """the audit records the client behind haproxy, over IPv4 and IPv6, for every request of a connection"""
    check_audit(version, tls=False)


@each_version
def test_audit_records_the_client_over_tls(version):
    """with TLS that haproxy forwards and the daemon terminates, the audit records the client"""
    check_audit(version, tls=True)


@pytest.mark.parametrize("tls", [pytest.param(False, id="http"), pytest.param(True, id="tls")])
def test_audit_records_the_client_behind_nginx(tls):
    """nginx as a stream proxy sends the client's address in a version 1 header, for plain HTTP and for TLS"""
    check_audit(None, tls)


@each_version
def test_each_client_has_its_own_rate(version):
    """a client behind haproxy over its rate limit gets a 429, and another client gets a key"""
    with Stage(version, TRUSTING + "rate-bytes = 1\nrate-burst = 1000\n") as stage:
        found = [stage.get("/key/900", source) for source in ("127.0.0.5", "127.0.0.5", "127.0.0.6", "127.0.0.5", "::1")]
        expect(found, [200, 429, 200, 429, 200], "statuses")


@each_version
def test_each_client_has_its_own_connections(version):
    """a client behind haproxy at its connection limit gets a 503, and another client gets a key"""
    with Stage(version, TRUSTING + "max-connections-per-client = 1\n") as stage, contextlib.closing(stage.client()) as held:
        held.request("GET", "/key/32")
        held.getresponse().read()
        retry_if_stalled(lambda: expect(stage.get("/key/32"), 503, "status of another connection"))
        expect(stage.get("/key/32", "127.0.0.6"), 200, "status of another client")


# One result decides. A check that takes longer than the interval times out.
CHECK = "check inter 1s fall 1 rise 1"
OVER_TLS = "check-ssl verify required ca-file {directory}/cert.pem"


@pytest.mark.parametrize(
    ("tls", "backend", "options", "expected"),
    [
        pytest.param(False, "", "", "L4OK", id="tcp"),
        pytest.param(False, HTTP_CHECK, "", "L7OK", id="http"),
        pytest.param(False, OLD_HTTP_CHECK, "", "L7OK", id="http1.0"),
        pytest.param(True, "", "", "L4OK", id="tcp-before-tls"),
        pytest.param(True, "", OVER_TLS, "L6OK", id="tls"),
        pytest.param(True, HTTP_CHECK, OVER_TLS, "L7OK", id="https"),
    ],
)
@each_version
def test_health_checks_pass(version, tls, backend, options, expected):
    """haproxy's TCP and HTTP checks pass, with and without TLS, and cause no errors and no log lines"""
    with Stage(f"{version} {CHECK} check-send-proxy {options}", backend=backend, tls=tls) as stage:
        until("the first log lines", lambda: stage.daemon.lines("Keys on"))
        before = stage.daemon.log.read_text()
        expect(until("a check", stage.health), ("UP", expected), "result of a health check")
        time.sleep(2)  # for further checks
        expect(until("another check", stage.health), ("UP", expected), "result after further checks")
        expect(errors(stage.daemon), {}, "errors")
        expect(stage.daemon.log.read_text(), before, "log")
        # haproxy closes a connection without a response while the last check has timed out.
        expect(until("a response", lambda: stage.get("/key/32")), 200, "status of a request between checks")


def test_missing_send_proxy_is_detected():
    """without send-proxy, haproxy marks the daemon as down, clients get no key, and the log has the reason"""
    with Stage(CHECK, backend=HTTP_CHECK) as stage:
        check_down(stage, "missing")


@each_version
def test_a_forgotten_trusted_proxy_is_noticed(version):
    """if trusted-proxies lacks haproxy's address, haproxy marks the daemon as down, and the log has the address"""
    with Stage(f"{version} {CHECK}", TRUSTING.replace(PROXY, "192.0.2.1"), HTTP_CHECK) as stage:
        check_down(stage, "untrusted")


def check_down(stage, reason):
    status, code = until("a check", stage.health)
    assert status == "DOWN" and not code.endswith("OK"), f"the daemon is {status} ({code})"
    expect(stage.get("/key/32"), None, "status of a request")
    expect(set(errors(stage.daemon)), {reason}, "reasons of closed connections")
    line = until("a warning", lambda: stage.daemon.lines("closed by proxy-protocol"))
    assert len(line) == 1 and f"address={PROXY} reason={reason}" in line[0], line


@each_version
def test_missing_proxy_protocol_setting_is_detected(version):
    """control for the checks above: a daemon without proxy-protocol answers 400, and haproxy marks it as down"""
    config = TRUSTING.replace("proxy-protocol = true", "proxy-protocol = false")
    with Stage(f"{version} {CHECK} check-send-proxy", config, HTTP_CHECK) as stage:
        expect(until("a check", stage.health), ("DOWN", "L7STS"), "result of a health check")
        expect(stage.get("/key/32"), None, "status of a request, which haproxy does not forward to a daemon that is down")
    with Stage(version, config) as stage:
        expect(stage.get("/key/32"), 400, "status of a request")
        expect(stage.daemon.lines("key issued"), [], "records")


def test_missing_headers_make_clients_share_a_rate():
    """control for the checks above: without headers the audit records haproxy, and its clients share one rate limit"""
    config = TRUSTING.replace("proxy-protocol = true", "proxy-protocol = false") + "rate-bytes = 1\nrate-burst = 1000\n"
    with Stage("", config) as stage:
        expect([stage.get("/key/900", source) for source in CLIENTS], [200, 429, 429], "statuses")
        expect(addresses(stage, 1), [PROXY], "addresses in the audit records")


def errors(daemon):
    """The reasons of closed connections, and their counts."""
    found = re.findall(r'^proxy_protocol_errors_total\{reason="(\w+)"\} (\d+)$', daemon.metrics_text(), re.MULTILINE)
    assert found, "expected the metric proxy_protocol_errors_total"
    return {reason: int(count) for reason, count in found if count != "0"}

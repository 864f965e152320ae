"""A real haproxy, and a real nginx, in front of a real daemon, as a load balancer that forwards TCP and sends PROXY headers.

Clients are addresses of loopback (127.0.0.5, ::1), and so is the side of the proxy that the daemon sees (127.0.0.9).
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
from support.conditions import TIMEOUT, expect, until
from support.daemon import Daemon
from support.tools import STREAM_MODULE

pytestmark = pytest.mark.tools("haproxy", "nginx", STREAM_MODULE, "openssl", "setpriv")

PROXY = "127.0.0.9"
CLIENTS = ("127.0.0.5", "127.0.0.6", "::1")
VERSIONS = ("send-proxy", "send-proxy-v2")
TRUSTING = f'proxy-protocol = true\ntrusted-proxies = ["{PROXY}"]\naudit = true\n'

# Clients come by IPv4 and by IPv6; the daemon sees haproxy at 127.0.0.9.
HAPROXY = """
global
    maxconn 100
    stats socket {folder}/stats mode 600 level operator

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
pid {folder}/nginx.pid;
error_log {folder}/proxy.log;
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
    """A daemon, and haproxy with such a `server` in front of it, while it is entered; nginx if there is none."""

    def __init__(self, server, config=TRUSTING, backend="", tls=False):
        self.server, self.config, self.backend, self.tls = server, config, backend, tls
        self.name = "nginx" if server is None else "haproxy"

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="key-service-proxies-")))
            if self.tls:
                certificates.self_signed(self.folder / "key.pem", self.folder / "cert.pem", names="IP:127.0.0.1,IP:::1")
                self.config += f'tls-cert = "{self.folder}/cert.pem"\ntls-key = "{self.folder}/key.pem"\n'
            self.daemon = stack.enter_context(Daemon(self.folder, self.config, log=self.folder / "log"))
            self.port = stack.enter_context(peers.HeldPort()).number
            text, file = (NGINX, self.folder / "nginx.conf") if self.name == "nginx" else (HAPROXY, self.folder / "haproxy.cfg")
            file.write_text(
                text.format(
                    folder=self.folder,
                    port=self.port,
                    proxy=PROXY,
                    authority=self.daemon.authority,
                    module=STREAM_MODULE,
                    backend=self.backend,
                    server=(self.server or "").format(folder=self.folder),
                )
            )
            log = stack.enter_context(open(self.folder / "proxy.log", "wb"))
            command = ["nginx", "-c", file] if self.name == "nginx" else ["haproxy", "-db", "-f", file]
            # Whatever ends this process ends the proxy as well, and nginx its worker.
            self.process = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", "--", *command], stdout=log, stderr=log)
            stack.callback(peers.stop_peer, self.process, self.name)
            until(f"{self.name} to listen", self.listens)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind, *error):
        if kind:
            print((self.folder / "log").read_text(), (self.folder / "proxy.log").read_text(), sep="\n")
        return self.stack.__exit__(kind, *error)

    def listens(self):
        """Whether the proxy is there: haproxy's own socket answers, or nginx has its socket, which no client needs to connect to."""
        assert self.process.poll() is None, f"{self.name} ended:\n{(self.folder / 'proxy.log').read_text()}"
        if self.name == "nginx":
            return (self.folder / "nginx.pid").exists()  # written once its sockets listen
        try:
            return bool(self.show("info"))
        except OSError:
            return False

    def show(self, what):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT)
            connection.connect(f"{self.folder}/stats")
            connection.sendall(f"show {what}\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def health(self):
        """What haproxy found at its last check of the daemon: (status, code of the check), or None before the first."""
        rows = csv.DictReader(io.StringIO(self.show("stat").removeprefix("# ")))
        row = next(row for row in rows if row["svname"] == "one")
        # "* L4OK" is a check that runs, with the result of the one before.
        status = row["check_status"].removeprefix("* ")
        return (row["status"].split(" ")[0], status) if status not in ("", "INI") else None

    def client(self, source=CLIENTS[0]):
        """A connection of a client to haproxy."""
        host = "::1" if ":" in source else "127.0.0.1"
        if not self.tls:
            return http.client.HTTPConnection(host, self.port, timeout=TIMEOUT, source_address=(source, 0))
        context = ssl.create_default_context(cafile=f"{self.folder}/cert.pem")
        return http.client.HTTPSConnection(host, self.port, timeout=TIMEOUT, source_address=(source, 0), context=context)

    def get(self, path, source=CLIENTS[0]):
        """The status of a request of its own connection; None where that ends without a response."""
        with contextlib.closing(self.client(source)) as connection:
            try:
                connection.request("GET", path)
                response = connection.getresponse()
                response.read()
                return response.status
            except (ConnectionError, http.client.RemoteDisconnected, ssl.SSLError):
                return None


def addresses(stage, count):
    """The addresses of the audit records, once there are so many."""
    lines = until(f"{count} records", lambda: len(found := stage.daemon.lines("key issued")) == count and found)
    return [re.search(r" address=(\S+) ", line).group(1) for line in lines]


def audited(server, tls):
    with Stage(server, tls=tls) as stage:
        for source in CLIENTS:
            with contextlib.closing(stage.client(source)) as connection:
                for length in (32, 300, 32):
                    connection.request("GET", f"/key/{length}")
                    response = connection.getresponse()
                    expect((response.status, len(response.read())), (200, length), f"{source}: a key")
        expect(addresses(stage, 9), [source for source in CLIENTS for _ in range(3)], "addresses of the audit")
        expect(errors(stage.daemon), {}, "errors")


each_version = pytest.mark.parametrize("version", VERSIONS)


@each_version
def test_the_audit_names_the_client(version):
    """the audit names the client behind haproxy, by IPv4 and IPv6, for every request of its connection"""
    audited(version, tls=False)


@each_version
def test_tls_passes_through(version):
    """haproxy passes TLS through, which ends in the daemon, and the audit names the client"""
    audited(version, tls=True)


@pytest.mark.parametrize("tls", [pytest.param(False, id="http"), pytest.param(True, id="tls")])
def test_nginx_names_the_client_too(tls):
    """nginx that forwards a stream names the client in a header of version 1, in front of plain HTTP and of TLS"""
    audited(None, tls)


@each_version
def test_each_client_has_its_own_rate(version):
    """a client behind haproxy that has used up its rate gets 429, and another one a key"""
    with Stage(version, TRUSTING + "rate-bytes = 1\nrate-burst = 1000\n") as stage:
        found = [stage.get("/key/900", source) for source in ("127.0.0.5", "127.0.0.5", "127.0.0.6", "127.0.0.5", "::1")]
        expect(found, [200, 429, 200, 429, 200], "statuses")


@each_version
def test_each_client_has_its_own_connections(version):
    """a client behind haproxy that has as many connections as it may gets 503, and another one a key"""
    with Stage(version, TRUSTING + "max-connections-per-client = 1\n") as stage, contextlib.closing(stage.client()) as held:
        held.request("GET", "/key/32")
        held.getresponse().read()
        expect([stage.get("/key/32"), stage.get("/key/32", "127.0.0.6")], [503, 200], "statuses")


OVER_TLS = "check-ssl verify required ca-file {folder}/cert.pem"


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
    """haproxy's checks pass, by TCP and by HTTP, in plain and over TLS, and are no errors and no lines in the log"""
    with Stage(f"{version} check check-send-proxy {options} inter 50ms fall 1 rise 1", backend=backend, tls=tls) as stage:
        until("the first lines of the log", lambda: stage.daemon.lines("Keys on"))
        before = stage.daemon.log.read_text()
        expect(until("a check", stage.health), ("UP", expected), "the daemon's health")
        time.sleep(0.3)  # for more of them
        expect(stage.health(), ("UP", expected), "the daemon's health after more checks")
        expect(errors(stage.daemon), {}, "errors")
        expect(stage.daemon.log.read_text(), before, "log")
        expect(stage.get("/key/32"), 200, "a request between checks")


def test_haproxy_that_sends_no_header_is_noticed():
    """without send-proxy, haproxy finds the daemon down, clients get no key, and the log says why"""
    with Stage("check inter 50ms fall 1 rise 1", backend=HTTP_CHECK) as stage:
        is_down(stage, "missing")


@each_version
def test_a_forgotten_trusted_proxy_is_noticed(version):
    """where trusted-proxies lacks haproxy's address, it finds the daemon down, and the log names the address"""
    with Stage(f"{version} check inter 50ms fall 1 rise 1", TRUSTING.replace(PROXY, "192.0.2.1"), HTTP_CHECK) as stage:
        is_down(stage, "untrusted")


def is_down(stage, reason):
    status, code = until("a check", stage.health)
    assert status == "DOWN" and not code.endswith("OK"), f"the daemon is {status} ({code})"
    expect(stage.get("/key/32"), None, "status of a request")
    expect(set(errors(stage.daemon)), {reason}, "reasons for which connections were closed")
    line = until("a warning", lambda: stage.daemon.lines("closed by proxy-protocol"))
    assert len(line) == 1 and f"address={PROXY} reason={reason}" in line[0], line


@each_version
def test_a_daemon_without_the_setting_is_noticed(version):
    """the checks above would fail: a daemon without proxy-protocol answers 400, and haproxy finds it down"""
    config = TRUSTING.replace("proxy-protocol = true", "proxy-protocol = false")
    with Stage(f"{version} check check-send-proxy inter 50ms fall 1 rise 1", config, HTTP_CHECK) as stage:
        expect(until("a check", stage.health), ("DOWN", "L7STS"), "the daemon's health")
        expect(stage.get("/key/32"), None, "status of a request, which haproxy passes to no daemon that is down")
    with Stage(version, config) as stage:
        expect(stage.get("/key/32"), 400, "status of a request")
        expect(stage.daemon.lines("key issued"), [], "records")


def test_the_address_of_haproxy_is_noticed():
    """the checks above would fail: without headers the audit names haproxy, and its clients share one rate"""
    config = TRUSTING.replace("proxy-protocol = true", "proxy-protocol = false") + "rate-bytes = 1\nrate-burst = 1000\n"
    with Stage("", config) as stage:
        expect([stage.get("/key/900", source) for source in CLIENTS], [200, 429, 429], "statuses")
        expect(addresses(stage, 1), [PROXY], "addresses of the audit")


def errors(daemon):
    """The reasons for which connections were closed, and how often."""
    found = re.findall(r'^proxy_protocol_errors_total\{reason="(\w+)"\} (\d+)$', daemon.metrics_text(), re.MULTILINE)
    assert found, "there is no proxy_protocol_errors_total"
    return {reason: int(count) for reason, count in found if count != "0"}

#!/usr/bin/python3
"""Puts a real haproxy, and a real nginx, in front of a real daemon, as a load balancer that forwards TCP and sends PROXY headers.

    tests/proxies/run [CHECK...]

Needs haproxy, nginx with its stream module, and openssl. The daemon is $KEY_SERVICE_BIN, else what is built in target/, else it is built. Clients are
addresses of loopback (127.0.0.5, ::1), and so is the side of the proxy that the daemon sees (127.0.0.9).
"""
import contextlib
import csv
import http.client
import io
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent

sys.path.insert(0, str(REPOSITORY / "tests/common"))
sys.dont_write_bytecode = True
import certificates  # noqa: E402
import peers  # noqa: E402
from daemon import Daemon, PATIENCE  # noqa: E402

STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
TOOLS = {"haproxy": "haproxy", "openssl": "openssl", "nginx": "nginx-light", STREAM_MODULE: "libnginx-mod-stream"}
PROXY = "127.0.0.9"
CLIENTS = ("127.0.0.5", "127.0.0.6", "::1")
VERSIONS = ("send-proxy", "send-proxy-v2")
TRUSTING = f'proxy-protocol = true\ntrusted-proxies = ["{PROXY}"]\naudit = true\n'
INTERVAL = 0.02  # seconds between two looks

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

checks = {}


def check(function):
    """A check is a function whose docstring is the sentence that it proves."""
    checks[function.__name__] = function
    return function


def expect(found, expected, what):
    assert found == expected, f"{what}: expected {expected!r}, found {found!r}"


def until(what, happens):
    """What `happens` returns, once that is something."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := happens():
            return found
        time.sleep(INTERVAL)
    raise AssertionError(f"waited in vain for {what}")


class Node(Daemon):
    def __init__(self, folder, config):
        super().__init__(folder, config, log=folder / "log")

    def lines(self, text):
        return [line for line in self.log.read_text().splitlines() if text in line]

    def metrics_text(self):
        connection = http.client.HTTPConnection(self.metrics, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()

    def metric(self, series):
        return float(re.search(rf"^{re.escape(series)} (\S+)$", self.metrics_text(), re.MULTILINE).group(1))

    def errors(self):
        """The reasons for which connections were closed, and how often."""
        found = re.findall(r'^proxy_protocol_errors_total\{reason="(\w+)"\} (\d+)$', self.metrics_text(), re.MULTILINE)
        assert found, "there is no proxy_protocol_errors_total"
        return {reason: int(count) for reason, count in found if count != "0"}


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
            self.daemon = stack.enter_context(Node(self.folder, self.config))
            self.port = stack.enter_context(peers.HeldPort()).number
            text, file = (NGINX, self.folder / "nginx.conf") if self.name == "nginx" else (HAPROXY, self.folder / "haproxy.cfg")
            file.write_text(text.format(folder=self.folder, port=self.port, proxy=PROXY, authority=self.daemon.authority, module=STREAM_MODULE,
                                        backend=self.backend, server=(self.server or "").format(folder=self.folder)))
            log = stack.enter_context(open(self.folder / "proxy.log", "wb"))
            command = ["nginx", "-c", file] if self.name == "nginx" else ["haproxy", "-db", "-f", file]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
            stack.callback(peers.stop_peer, self.process, self.name)
            until(f"{self.name} to listen", self.listens)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

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
            connection.settimeout(PATIENCE)
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
            return http.client.HTTPConnection(host, self.port, timeout=PATIENCE, source_address=(source, 0))
        context = ssl.create_default_context(cafile=f"{self.folder}/cert.pem")
        return http.client.HTTPSConnection(host, self.port, timeout=PATIENCE, source_address=(source, 0), context=context)

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
        name = f"{stage.name} {server}"
        for source in CLIENTS:
            with contextlib.closing(stage.client(source)) as connection:
                for length in (32, 300, 32):
                    connection.request("GET", f"/key/{length}")
                    response = connection.getresponse()
                    expect((response.status, len(response.read())), (200, length), f"{name}, {source}: a key")
        expect(addresses(stage, 9), [source for source in CLIENTS for _ in range(3)], f"{name}: addresses of the audit")
        expect(stage.daemon.errors(), {}, f"{name}: errors")


@check
def the_audit_names_the_client():
    """the audit names the client behind haproxy, by IPv4 and IPv6, for every request of its connection"""
    for version in VERSIONS:
        audited(version, tls=False)


@check
def tls_passes_through():
    """haproxy passes TLS through, which ends in the daemon, and the audit names the client"""
    for version in VERSIONS:
        audited(version, tls=True)


@check
def nginx_names_the_client_too():
    """nginx that forwards a stream names the client in a header of version 1, in front of plain HTTP and of TLS"""
    for tls in (False, True):
        audited(None, tls)


@check
def each_client_has_its_own_rate():
    """a client behind haproxy that has used up its rate gets 429, and another one a key"""
    for version in VERSIONS:
        with Stage(version, TRUSTING + "rate-bytes = 1\nrate-burst = 1000\n") as stage:
            found = [stage.get("/key/900", source) for source in ("127.0.0.5", "127.0.0.5", "127.0.0.6", "127.0.0.5", "::1")]
            expect(found, [200, 429, 200, 429, 200], f"{version}: statuses")


@check
def each_client_has_its_own_connections():
    """a client behind haproxy that has as many connections as it may gets 503, and another one a key"""
    for version in VERSIONS:
        with Stage(version, TRUSTING + "max-connections-per-client = 1\n") as stage, contextlib.closing(stage.client()) as held:
            held.request("GET", "/key/32")
            held.getresponse().read()
            found = [stage.get("/key/32"), stage.get("/key/32", "127.0.0.6")]
            expect(found, [503, 200], f"{version}: statuses")


@check
def health_checks_pass():
    """haproxy's checks pass, by TCP and by HTTP, in plain and over TLS, and are no errors and no lines in the log"""
    over_tls = "check-ssl verify required ca-file {folder}/cert.pem"
    for version in VERSIONS:
        for name, tls, backend, options, expected in [
            ("TCP", False, "", "", "L4OK"),
            ("HTTP", False, HTTP_CHECK, "", "L7OK"),
            ("HTTP/1.0", False, OLD_HTTP_CHECK, "", "L7OK"),
            ("TCP in front of TLS", True, "", "", "L4OK"),
            ("TLS", True, "", over_tls, "L6OK"),
            ("HTTPS", True, HTTP_CHECK, over_tls, "L7OK"),
        ]:
            server = f"{version} check check-send-proxy {options} inter 50ms fall 1 rise 1"
            with Stage(server, backend=backend, tls=tls) as stage:
                until("the first lines of the log", lambda: stage.daemon.lines("Keys on"))
                before = stage.daemon.log.read_text()
                expect(until("a check", stage.health), ("UP", expected), f"{version}, {name}: the daemon's health")
                time.sleep(0.3)  # for more of them
                expect(stage.health(), ("UP", expected), f"{version}, {name}: the daemon's health after more checks")
                expect(stage.daemon.errors(), {}, f"{version}, {name}: errors")
                expect(stage.daemon.log.read_text(), before, f"{version}, {name}: log")
                expect(stage.get("/key/32"), 200, f"{version}, {name}: a request between checks")


@check
def haproxy_that_sends_no_header_is_noticed():
    """without send-proxy, haproxy finds the daemon down, clients get no key, and the log says why"""
    with Stage("check inter 50ms fall 1 rise 1", backend=HTTP_CHECK) as stage:
        status, code = until("a check", stage.health)
        assert status == "DOWN" and not code.endswith("OK"), f"the daemon is {status} ({code})"
        expect(stage.get("/key/32"), None, "status of a request")
        assert set(stage.daemon.errors()) == {"missing"}, stage.daemon.errors()
        line = until("a warning", lambda: stage.daemon.lines("closed by proxy-protocol"))
        assert len(line) == 1 and f"address={PROXY} reason=missing" in line[0], line


@check
def a_forgotten_trusted_proxy_is_noticed():
    """where trusted-proxies lacks haproxy's address, it finds the daemon down, and the log names the address"""
    config = TRUSTING.replace(PROXY, "192.0.2.1")
    for version in VERSIONS:
        with Stage(f"{version} check inter 50ms fall 1 rise 1", config, HTTP_CHECK) as stage:
            status, code = until("a check", stage.health)
            assert status == "DOWN" and not code.endswith("OK"), f"the daemon is {status} ({code})"
            assert set(stage.daemon.errors()) == {"untrusted"}, stage.daemon.errors()
            line = until("a warning", lambda: stage.daemon.lines("closed by proxy-protocol"))
            assert len(line) == 1 and f"address={PROXY} reason=untrusted" in line[0], line


@check
def a_daemon_without_the_setting_is_noticed():
    """the checks above would fail: a daemon without proxy-protocol answers 400, and haproxy finds it down"""
    config = TRUSTING.replace("proxy-protocol = true", "proxy-protocol = false")
    for version in VERSIONS:
        with Stage(f"{version} check check-send-proxy inter 50ms fall 1 rise 1", config, HTTP_CHECK) as stage:
            status, code = until("a check", stage.health)
            expect((status, code), ("DOWN", "L7STS"), f"{version}: the daemon's health")
            expect(stage.get("/key/32"), None, "status of a request, which haproxy passes to no daemon that is down")
        with Stage(version, config) as stage:
            expect(stage.get("/key/32"), 400, f"{version}: status of a request")
            expect(stage.daemon.lines("key issued"), [], f"{version}: records")


@check
def the_address_of_haproxy_is_noticed():
    """the checks above would fail: without headers the audit names haproxy, and its clients share one rate"""
    config = TRUSTING.replace("proxy-protocol = true", "proxy-protocol = false") + "rate-bytes = 1\nrate-burst = 1000\n"
    with Stage("", config) as stage:
        expect([stage.get("/key/900", source) for source in CLIENTS], [200, 429, 429], "statuses")
        expect(addresses(stage, 1), [PROXY], "addresses of the audit")


def main():
    missing = [package for tool, package in TOOLS.items() if not shutil.which(tool) and not Path(tool).is_file()]
    if missing:
        print(f"FAIL a tool is missing: apt-get install --no-install-recommends {' '.join(missing)}\n0 passed, 1 failed")
        sys.exit(1)
    wanted = sys.argv[1:] or list(checks)
    if unknown := set(wanted) - set(checks):
        sys.exit(f"expected one of {', '.join(checks)}, found {', '.join(unknown)}")
    passed, failed = 0, 0
    for name in wanted:
        try:
            checks[name]()
            print(f"ok   {name}: {checks[name].__doc__}", flush=True)
            passed += 1
        except (AssertionError, OSError, KeyError, ValueError, AttributeError, subprocess.SubprocessError) as problem:
            print(f"FAIL {name}: {checks[name].__doc__}\n       {problem}", flush=True)
            failed += 1
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()

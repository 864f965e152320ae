"""The proxies of docs/proxies.md, configured as on that page, between a client and two daemons.

Only the addresses, ports and paths of the page are replaced. Clients connect from 127.0.0.9 and proxies from 127.0.0.1, so that an audit
record shows whether an address is the client's or the proxy's.
"""

import contextlib
import http.client
import os
import re
import signal
import ssl
import subprocess
import tempfile
from pathlib import Path

from support import pages, peers
from support.certificates import self_signed
from support.conditions import TIMEOUT, until
from support.daemon import REPOSITORY, Daemon
from support.tools import STREAM_MODULE

PAGE = REPOSITORY / "docs/proxies.md"
CLIENT, PROXY = "127.0.0.9", "127.0.0.1"
STREAMED = 64 * 1024 * 1024  # bytes of a key that is larger than all buffers between the daemon and the client

# What a proxy needs in addition to the page's file in order to run here. None of it changes the behaviour under test.
NGINX = """
{modules}
daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log; worker_processes 1; user root;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/client_temp; proxy_temp_path {directory}/proxy_temp; fastcgi_temp_path {directory}/fastcgi_temp;
    uwsgi_temp_path {directory}/uwsgi_temp; scgi_temp_path {directory}/scgi_temp;
    {http}
}}
{stream}
"""
CADDY = """
{{
	admin off
	storage file_system {directory}/storage
	http_port {port}
}}
"""
APACHE = """
ServerRoot {directory}
PidFile {directory}/apache.pid
DefaultRuntimeDir {directory}
ErrorLog {directory}/error.log
ServerName proxy.test
User www-data
Group www-data
StartServers 1
ServerLimit 1
ThreadsPerChild 16
MaxRequestWorkers 16
Listen 127.0.0.1:{port}
{modules}
"""
MODULES = "mpm_event authz_core socache_shmcb ssl slotmem_shm proxy proxy_http proxy_balancer lbmethod_byrequests proxy_hcheck"


class Stage:
    """A context in which two daemons run, and a proxy with the configuration of the page."""

    def __init__(self, name, upstream_tls=False, edit=lambda text: text, config="", trusted="ca", is_tcp=False):
        self.name, self.config, self.is_tcp, self.is_tls = name, config, is_tcp, name != "caddy" and not is_tcp
        self.upstream_tls, self.edit, self.trusted = upstream_tls, edit, trusted

    def __enter__(self):
        with contextlib.ExitStack() as self.stack:
            # Not a directory of pytest, which only its user can read: Apache runs as www-data.
            self.directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix=f"key-service-{self.name}-")))
            self.directory.chmod(0o755)
            self.stack.push(self.report)
            create_certificates(self.directory)
            if self.upstream_tls:
                self.config += f'tls-cert = "{self.directory}/upstream.pem"\ntls-key = "{self.directory}/upstream-key.pem"\n'
            self.held = [self.stack.enter_context(peers.HeldPort()) for _ in range(2)]
            self.port = self.stack.enter_context(peers.HeldPort()).number
            self.started = 0
            self.nodes = [None, None]
            for index in range(2):
                self.start(index)
            self.process = self.start_proxy(self.edit(self.configuration()))
            self.stack.callback(peers.stop_peer, self.process, self.name)
            self.first = self.until("the proxy to respond", lambda: self.get("/key/32")[0])
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def report(self, kind, *_):
        """Prints the last output of the proxy if the test fails."""
        if kind:
            print(self.output())

    def start(self, index):
        """Starts one of the two daemons, or restarts it at the same port."""
        self.started += 1
        directory = self.directory / f"daemon-{self.started}"
        directory.mkdir()
        config = f'trusted-proxies = ["{PROXY}"]\naudit = true\nmax-size = {STREAMED}\n{self.config}'
        self.nodes[index] = self.stack.enter_context(Daemon(directory, config, self.held[index].number, directory / "log"))
        self.stack.callback(self.nodes[index].process.send_signal, signal.SIGINT)  # SIGTERM follows: a second signal ends the drain

    def configuration(self):
        """The configuration file of the page, with the addresses, ports and paths of this test."""
        text = tcp_configuration(self.name) if self.is_tcp else configuration(self.name, self.upstream_tls)
        for old, new in [
            ("10.0.0.11:1123", self.nodes[0].authority),
            ("10.0.0.12:1123", self.nodes[1].authority),
            ("https://a.keys.internal:1123", f"https://localhost:{self.held[0].number}"),
            ("https://b.keys.internal:1123", f"https://localhost:{self.held[1].number}"),
            ("listen 443 ssl", f"listen 127.0.0.1:{self.port} ssl"),
            ("bind :443 ssl", f"bind 127.0.0.1:{self.port} ssl"),
            ("<VirtualHost *:443>", f"<VirtualHost *:{self.port}>"),
            ("listen 1123", f"listen 127.0.0.1:{self.port}"),
            ("bind :1123", f"bind 127.0.0.1:{self.port}"),
            ("keys.example.org {", f"http://127.0.0.1:{self.port} {{\nbind 127.0.0.1"),
        ]:
            text = text.replace(old, new)
        return re.sub(r"/etc/\w+/tls/|/etc/caddy/(?=keys-ca)", f"{self.directory}/", text).replace("keys-ca.pem", f"{self.trusted}.pem")

    def start_proxy(self, text):
        file = self.directory / "proxy.conf"
        file.write_text(text)
        if self.name == "nginx":
            main = self.directory / "nginx.conf"
            include, module = f"include {file};", f"load_module {STREAM_MODULE};"
            parts = {"modules": module, "http": "", "stream": include} if self.is_tcp else {"modules": "", "http": include, "stream": ""}
            main.write_text(NGINX.format(directory=self.directory, **parts))
            command = ["nginx", "-c", main]
        elif self.name == "haproxy":
            file.write_text(f"global\n    maxconn 1000\n\n{text}")
            command = ["haproxy", "-db", "-f", file]
        elif self.name == "caddy":
            file.write_text(CADDY.format(directory=self.directory, port=self.port) + text)
            command = ["caddy", "run", "--adapter", "caddyfile", "--config", file]
        else:
            modules = "\n".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in MODULES.split())
            file.write_text(APACHE.format(directory=self.directory, port=self.port, modules=modules) + text)
            command = ["apache2", "-D", "FOREGROUND", "-f", file]
        environment = {**os.environ, "HOME": str(self.directory)}
        # The proxy ends with this process, however this process ends. The proxy ends its own workers.
        command = ["setpriv", "--pdeathsig", "TERM", "--", *command]
        with open(self.directory / "output", "wb") as output:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)

    def connection(self):
        """A connection of a client, not yet open."""
        if not self.is_tls:
            return http.client.HTTPConnection(PROXY, self.port, timeout=TIMEOUT, source_address=(CLIENT, 0))
        context = ssl.create_default_context(cafile=self.directory / "ca.pem")
        context.check_hostname = False  # the client connects by address
        return http.client.HTTPSConnection(PROXY, self.port, timeout=TIMEOUT, source_address=(CLIENT, 0), context=context)

    def get(self, path, headers=None):
        """The (status, headers, body) of a request on a new connection; status 0 if there was no response."""
        with contextlib.closing(self.connection()) as connection:
            try:
                connection.request("GET", path, headers=headers or {})
                response = connection.getresponse()
                return response.status, response.headers, response.read()
            except (ConnectionError, http.client.HTTPException):
                return 0, {}, b""

    def record(self, headers):
        """The audit record of a response, from the daemon that sent it."""
        request = headers["X-Request-Id"]
        [line] = self.until(f"a record of {request}", lambda: [line for node in self.nodes for line in issued(node, request)])
        return dict(re.findall(r'(\w+)="?([^" ]+)', line))

    def connections(self):
        """The open connections to the daemons, as the addresses of the proxy's ends; see proc_pid_net(5)."""
        ports = {f"{port.number:04X}" for port in self.held}
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return {row[2] for row in rows if row[1].split(":")[1] in ports and row[3] == "01"}

    def until(self, what, happens):
        def check():
            assert self.process.poll() is None, f"{self.name} exited with status {self.process.returncode}\n{self.output()}"
            return happens()

        return until(what, check)

    def output(self):
        return "".join((self.directory / name).read_text()[-3000:] for name in ("output", "error.log") if (self.directory / name).exists())


def issued(node, request):
    """The audit records of a request in the log of a daemon; empty if another daemon served it."""
    return [line for line in node.lines("key issued") if request in line]


def configuration(name, upstream_tls):
    """The configuration file of the page for a proxy, with or without the page's lines for TLS to the daemons."""
    title = {"apache": "Apache", "caddy": "Caddy"}.get(name, name)
    text, tls = [text for language, text in dict(pages.sections(PAGE))[title] if language == name]
    if not upstream_tls:
        return text
    first, lines = tls.split("\n", 1)
    starts = re.fullmatch(r"# in place of the lines? that begins? with (.+)", first).group(1).split(" or ")
    found = [line for line in text.splitlines() if line.split() and line.split()[0] in starts]
    assert found, f"{name}: no line begins with {starts}"
    for number, line in enumerate(found):
        text = text.replace(f"{line}\n", "" if number else lines)
    return text


def tcp_configuration(name):
    return next(text for language, text in dict(pages.sections(PAGE))["TCP load balancers (PROXY protocol)"] if language == name)


def create_certificates(directory):
    """Creates ca.pem, the certificates of the proxy and of the daemons signed by it, and other.pem, a CA that signed neither."""

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=TIMEOUT)

    for name in ("ca", "other"):
        self_signed(directory / f"{name}-key.pem", directory / f"{name}.pem", f"/CN=test {name}")
    for name, names in (("cert", "DNS:keys.example.org"), ("upstream", "DNS:keys.internal,DNS:localhost")):
        (directory / "extensions").write_text(f"subjectAltName={names}\n")
        key = {"cert": "key.pem"}.get(name, f"{name}-key.pem")
        openssl(
            "req",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-keyout",
            key,
            "-out",
            f"{name}.csr",
            "-subj",
            f"/CN={name}",
        )
        openssl(
            "x509",
            "-req",
            "-in",
            f"{name}.csr",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca-key.pem",
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            "extensions",
            "-out",
            f"{name}.pem",
        )
    (directory / "cert-and-key.pem").write_text((directory / "cert.pem").read_text() + (directory / "key.pem").read_text())
    for path in directory.glob("*.pem"):
        path.chmod(0o600 if "key" in path.name else 0o644)

"""Runs the proxies of docs/proxies.md, configured as the page says, between a client and two daemons; used by tests/recipes/run.

The page's addresses, ports and paths are replaced, and nothing else. Clients connect from 127.0.0.9, so that an address in an
audit record is the client's or the proxy's (127.0.0.1), and never both.
"""
import contextlib
import http.client
import os
import re
import shutil
import signal
import ssl
import subprocess
import tempfile
import time
from pathlib import Path

import pages
import peers
from daemon import Daemon, PATIENCE, REPOSITORY, binary, environment

PAGE = REPOSITORY / "docs/proxies.md"
TOOLS = {"nginx": "nginx-light", "haproxy": "haproxy", "caddy": "caddy", "apache2": "apache2-bin", "openssl": "openssl"}
CLIENT, PROXY, SPOOFED = "127.0.0.9", "127.0.0.1", "203.0.113.9"
STREAMED = 64 * 1024 * 1024  # bytes of a key that is larger than every buffer on its way
INTERVAL = 0.05  # seconds between two looks

checks = []


def check(function):
    checks.append(function)
    return function


# What a proxy needs beside the page's file: where it runs, and nothing that changes what is tried.
NGINX = """
{modules}
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1; user root;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/client_temp; proxy_temp_path {folder}/proxy_temp; fastcgi_temp_path {folder}/fastcgi_temp;
    uwsgi_temp_path {folder}/uwsgi_temp; scgi_temp_path {folder}/scgi_temp;
    {http}
}}
{stream}
"""
STREAM_MODULE = "/usr/lib/nginx/modules/ngx_stream_module.so"  # libnginx-mod-stream
CADDY = """
{{
	admin off
	storage file_system {folder}/storage
	http_port {port}
}}
"""
APACHE = """
ServerRoot {folder}
PidFile {folder}/apache.pid
DefaultRuntimeDir {folder}
ErrorLog {folder}/error.log
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
MODULES = ("mpm_event authz_core socache_shmcb ssl slotmem_shm proxy proxy_http proxy_balancer lbmethod_byrequests "
           "proxy_hcheck").split()


class Node(Daemon):
    """A daemon behind the proxy, at a port that it keeps when it is started again."""

    def __init__(self, folder, port, config):
        folder.mkdir()
        super().__init__(folder, f'trusted-proxies = ["{PROXY}"]\naudit = true\nmax-size = {STREAMED}\n{config}', port, folder / "log")

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)  # and SIGTERM: a second signal ends the drain
        super().__exit__(*error)

    def metric(self, name):
        connection = http.client.HTTPConnection(self.metrics, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        values = re.findall(rf"^{re.escape(name)} ([0-9.e+]+)$", text, re.MULTILINE)
        return float(values[0]) if values else 0.0

    def keys(self):
        return self.metric("key_length_bytes_count")

    def record(self, request):
        """The audit record of a request; None if it went to another daemon."""
        lines = [line for line in self.log.read_text().splitlines() if request in line and "key issued" in line]
        return dict(re.findall(r'(\w+)="?([^" ]+)', lines[0])) if lines else None


class Stage:
    """Two daemons and a proxy that the page configures."""

    def __init__(self, stack, name, upstream_tls=False, edit=lambda text: text, config="", trusted="ca", is_tcp=False):
        self.name, self.stack, self.config, self.is_tcp = name, stack, config, is_tcp
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"key-service-{name}-")))
        self.folder.chmod(0o755)
        certificates(self.folder)
        if upstream_tls:
            self.config += f'tls-cert = "{self.folder}/upstream.pem"\ntls-key = "{self.folder}/upstream-key.pem"\n'
        self.held = [stack.enter_context(peers.HeldPort()) for _ in range(2)]
        self.port = stack.enter_context(peers.HeldPort()).number
        self.started = 0
        self.nodes = [None, None]
        for index in range(2):
            self.start(index)
        text = tcp_configuration(name) if is_tcp else configuration(name, upstream_tls)
        for old, new in [
            ("10.0.0.11:1123", self.nodes[0].authority), ("10.0.0.12:1123", self.nodes[1].authority),
            ("https://a.keys.internal:1123", f"https://localhost:{self.held[0].number}"),
            ("https://b.keys.internal:1123", f"https://localhost:{self.held[1].number}"),
            ("listen 443 ssl", f"listen 127.0.0.1:{self.port} ssl"), ("bind :443 ssl", f"bind 127.0.0.1:{self.port} ssl"),
            ("<VirtualHost *:443>", f"<VirtualHost *:{self.port}>"), ("listen 1123", f"listen 127.0.0.1:{self.port}"), ("bind :1123", f"bind 127.0.0.1:{self.port}"),
            ("keys.example.org {", f"http://127.0.0.1:{self.port} {{\nbind 127.0.0.1"),
        ]:
            text = text.replace(old, new)
        text = re.sub(r"/etc/\w+/tls/|/etc/caddy/(?=keys-ca)", f"{self.folder}/", text).replace("keys-ca.pem", f"{trusted}.pem")
        self.is_tls = name != "caddy" and not is_tcp
        self.process = self.start_proxy(edit(text))
        stack.callback(peers.stop_peer, self.process, name)
        self.first = self.wait(lambda: self.get("/key/32")[0] or None, "the proxy to answer")

    def start(self, index):
        """Starts a daemon, the first or the second, or starts it again."""
        self.started += 1
        node = Node(self.folder / f"daemon-{self.started}", self.held[index].number, self.config)
        self.nodes[index] = self.stack.enter_context(node)

    def start_proxy(self, text):
        file = self.folder / "proxy.conf"
        file.write_text(text)
        if self.name == "nginx":
            main = self.folder / "nginx.conf"
            include, module = f"include {file};", f"load_module {STREAM_MODULE};"
            parts = {"modules": module, "http": "", "stream": include} if self.is_tcp else {"modules": "", "http": include, "stream": ""}
            main.write_text(NGINX.format(folder=self.folder, **parts))
            command = ["nginx", "-c", main]
        elif self.name == "haproxy":
            file.write_text(f"global\n    maxconn 1000\n\n{text}")
            command = ["haproxy", "-db", "-f", file]
        elif self.name == "caddy":
            file.write_text(CADDY.format(folder=self.folder, port=self.port) + text)
            command = ["caddy", "run", "--adapter", "caddyfile", "--config", file]
        else:
            modules = "\n".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in MODULES)
            file.write_text(APACHE.format(folder=self.folder, port=self.port, modules=modules) + text)
            command = ["apache2", "-D", "FOREGROUND", "-f", file]
        environment = {**os.environ, "HOME": str(self.folder)}
        with open(self.folder / "output", "wb") as output:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)

    def connection(self):
        """A connection of a client's, which is not open yet."""
        if not self.is_tls:
            return http.client.HTTPConnection(PROXY, self.port, timeout=PATIENCE, source_address=(CLIENT, 0))
        context = ssl.create_default_context(cafile=self.folder / "ca.pem")
        context.check_hostname = False  # the client connects by address
        return http.client.HTTPSConnection(PROXY, self.port, timeout=PATIENCE, source_address=(CLIENT, 0), context=context)

    def get(self, path, headers=None):
        """(status, headers, body) of a request over a connection of its own; status 0 if none came."""
        with contextlib.closing(self.connection()) as connection:
            try:
                connection.request("GET", path, headers=headers or {})
                response = connection.getresponse()
                return response.status, response.headers, response.read()
            except (ConnectionError, http.client.HTTPException):
                return 0, {}, b""

    def record(self, headers):
        """The audit record of an answer, from whichever daemon gave it."""
        request = headers["X-Request-Id"]
        return self.wait(lambda: next((found for node in self.nodes if (found := node.record(request))), None), f"a record of {request}")

    def wait(self, look, what):
        deadline = time.monotonic() + PATIENCE
        while (found := look()) is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                output = "".join((self.folder / name).read_text()[-3000:] for name in ("output", "error.log") if (self.folder / name).exists())
                raise AssertionError(f"{self.name}: waited for {what}; exit status {self.process.poll()}:\n{output}")
            time.sleep(INTERVAL)
        return found


def configuration(name, upstream_tls):
    """The page's file for a proxy; with the lines for TLS to the daemons put in their place."""
    title = {"apache": "Apache", "caddy": "Caddy"}.get(name, name)
    whole, tls = [text for language, text in dict(pages.sections(PAGE))[title] if language == name]
    if not upstream_tls:
        return whole
    first, lines = tls.split("\n", 1)
    starts = re.fullmatch(r"# in place of the lines? that begins? with (.+)", first).group(1).split(" or ")
    found = [line for line in whole.splitlines() if line.split() and line.split()[0] in starts]
    assert found, f"{name}: no line begins with {starts}"
    for number, line in enumerate(found):
        whole = whole.replace(f"{line}\n", "" if number else lines)
    return whole


def tcp_configuration(name):
    return next(text for language, text in dict(pages.sections(PAGE))["TCP load balancers (PROXY protocol)"] if language == name)


def certificates(folder):
    """ca.pem, and by it the proxy's certificate and the daemons'; other.pem is a CA that signed neither."""
    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=PATIENCE)

    for name in ("ca", "other"):
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}-key.pem", "-out", f"{name}.pem",
                "-subj", f"/CN=test {name}", "-days", "2")
    for name, names in (("cert", "DNS:keys.example.org"), ("upstream", "DNS:keys.internal,DNS:localhost")):
        (folder / "extensions").write_text(f"subjectAltName={names}\n")
        key = {"cert": "key.pem"}.get(name, f"{name}-key.pem")
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key, "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-days", "2",
                "-extfile", "extensions", "-out", f"{name}.pem")
    (folder / "cert-and-key.pem").write_text((folder / "cert.pem").read_text() + (folder / "key.pem").read_text())
    for path in folder.glob("*.pem"):
        path.chmod(0o600 if "key" in path.name else 0o644)


def serves(stage):
    """A key comes through; its record names the client, whatever the client says; connections to the daemons are reused."""
    for headers in ({}, {"X-Forwarded-For": SPOOFED}, {"X-Forwarded-For": f"{SPOOFED}, {PROXY}"}, {"Forwarded": f"for={SPOOFED}"}):
        status, answer, key = stage.get("/key/32", headers)
        assert (status, len(key)) == (200, 32), (status, key)
        record = stage.record(answer)
        # A PROXY header makes the connection the client's own; the record has no proxy then.
        assert (record["address"], record.get("proxy")) == (CLIENT, None if stage.is_tcp else PROXY), f"{headers}: {record}"
    if stage.is_tcp:
        return
    for _ in range(30):
        status, _, key = stage.get("/key/32")
        assert (status, len(key)) == (200, 32), (status, key)
    # Each of these clients had a connection of its own. Health checks may have one each now.
    idle = sum(node.metric("http_connections") for node in stage.nodes)
    assert 1 <= idle <= 8, f"after 34 requests {idle:.0f} connections are open"


def leaves_a_daemon_out(stage, has_checks):
    """A daemon that stops gets no requests, and loses none; it gets some again when it is back."""
    a, b = stage.nodes
    stage.wait(lambda: serve_some(stage, b) or None, "both daemons to serve")
    b.process.send_signal(signal.SIGTERM)  # drain-delay: it is unready, and still serves
    if has_checks:
        stage.wait(lambda: None if serve_some(stage, b) else True, "no requests to a daemon that is not ready")
        assert b.process.poll() is None, "it still runs, so it is out by its health alone"
    b.process.send_signal(signal.SIGINT)  # a second signal ends it, and is not taken for the first as another SIGTERM might be
    while b.process.poll() is None:
        serve_some(stage, a)
    assert serve_some(stage, a) == 10, "all of them"
    stage.start(1)
    stage.wait(lambda: serve_some(stage, stage.nodes[1]) or None, "requests to the daemon that is back")


def serve_some(stage, node):
    """Ten requests in a row, each of which is served; how many of them by `node`."""
    before = node.keys()
    for _ in range(10):
        status, _, key = stage.get("/key/32")
        assert (status, len(key)) == (200, 32), (status, key)
    return node.keys() - before


def try_proxy(name, has_checks=True):
    with contextlib.ExitStack() as stack:
        stage = Stage(stack, name, config="drain-delay = 60\n")
        stage.wait(lambda: stage.get("/key/32")[0] == 200 or None, "a key")
        serves(stage)
        leaves_a_daemon_out(stage, has_checks)
    with contextlib.ExitStack() as stack:
        stage = Stage(stack, name, upstream_tls=True, config="drain-delay = 60\n")
        stage.wait(lambda: stage.get("/key/32")[0] == 200 or None, "a key")
        before, started = sum(node.metric("tls_handshakes_total") for node in stage.nodes), time.monotonic()
        serves(stage)
        handshakes = sum(node.metric("tls_handshakes_total") for node in stage.nodes) - before
        checked = 2 + time.monotonic() - started  # a health check of each daemon takes one in two seconds
        assert handshakes < 17 + checked, f"{handshakes:.0f} TLS handshakes for 34 requests"
        if has_checks:
            leaves_a_daemon_out(stage, has_checks)
    with contextlib.ExitStack() as stack:
        stage = Stage(stack, name, upstream_tls=True, trusted="other")
        found = {stage.first, *(stage.get("/key/32")[0] for _ in range(5))}
        assert found <= {500, 502, 503}, f"a proxy that trusts another CA answers {found}"


@check
def nginx():
    try_proxy("nginx", has_checks=False)


@check
def a_wrong_configuration_is_noticed():
    """Each of these checks can fail."""
    appended = "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"
    for what, old, new in [
        ("the client's address is missing", appended, ""),
        ("the client's own word is passed on", appended, "proxy_set_header X-Forwarded-For $http_x_forwarded_for;"),
        ("no connection is reused", "keepalive 32;", ""),
        ("a connection serves one request", 'proxy_set_header Connection "";', ""),
    ]:
        with contextlib.ExitStack() as stack:
            stage = Stage(stack, "nginx", edit=lambda text, old=old, new=new: replaced(text, old, new))
            try:
                serves(stage)
            except AssertionError:
                continue
            raise AssertionError(f"{what}, and nothing noticed it")
    with contextlib.ExitStack() as stack:
        stage = Stage(stack, "nginx", upstream_tls=True, trusted="other", edit=lambda text: replaced(text, "proxy_ssl_verify on;", ""))
        assert stage.first == 200, f"nginx verifies nothing by default; found {stage.first}"


def replaced(text, old, new):
    assert old in text, f"{old} is not in the configuration"
    return text.replace(old, new)


@check
def nginx_spools_no_streamed_key():
    """A large key passes through nginx's buffers, which are on, and none of it gets to its disk."""
    ignored = "proxy_ignore_headers X-Accel-Buffering;"
    # Where nginx does not look at the header it spools: this check can fail.
    with contextlib.ExitStack() as stack:
        stage = Stage(stack, "nginx", edit=lambda text: replaced(text, "proxy_pass ", f"{ignored}\nproxy_pass "))
        started = time.monotonic()
        with contextlib.closing(stage.connection()) as connection:
            connection.request("GET", f"/key/{STREAMED}")
            response = connection.getresponse()
            response.read(1024)
            stage.wait(lambda: spooled(stage) > STREAMED // 2 or None, "nginx to spool")
        needed = time.monotonic() - started
    with contextlib.ExitStack() as stack:
        stage = Stage(stack, "nginx")
        with contextlib.closing(stage.connection()) as connection:
            connection.request("GET", f"/key/{STREAMED}")
            response = connection.getresponse()
            assert response.status == 200
            # First a client that does not read for longer than spooling took, then one that reads slowly.
            # That is less than write-timeout, after which the daemon resets the connection.
            deadline, left = time.monotonic() + min(2 * needed, 8), STREAMED
            while left:
                if time.monotonic() > deadline:
                    left -= len(response.read(min(left, STREAMED // 64)))
                assert spooled(stage) == 0, f"{spooled(stage)} bytes are in files of nginx, {left} are unread"
                time.sleep(INTERVAL / 5)


def spooled(stage):
    """The bytes in files below proxy_temp: those that have a name, and those that nginx has deleted and still holds."""
    directory = stage.folder / "proxy_temp"
    total = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    children = Path(f"/proc/{stage.process.pid}/task/{stage.process.pid}/children").read_text().split()
    assert children, "nginx has a worker"
    for number in children:
        for link in Path(f"/proc/{number}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since
                if os.readlink(link).startswith(str(directory)):
                    total += os.stat(link).st_size
    return total


@check
def haproxy():
    try_proxy("haproxy")


@check
def caddy():
    try_proxy("caddy")


@check
def apache():
    try_proxy("apache")


def try_tcp(name, has_checks):
    with contextlib.ExitStack() as stack:
        stage = Stage(stack, name, is_tcp=True, config="proxy-protocol = true\ndrain-delay = 60\n")
        stage.wait(lambda: stage.get("/key/32")[0] == 200 or None, "a key")
        serves(stage)
        if has_checks:
            leaves_a_daemon_out(stage, has_checks)


def has_proxy_protocol():
    return "proxy-protocol" in (REPOSITORY / "packaging/config.toml").read_text()


if has_proxy_protocol():
    @check
    def haproxy_over_tcp():
        try_tcp("haproxy", has_checks=True)

    @check
    def nginx_over_tcp():
        try_tcp("nginx", has_checks=False)


@check
def kubernetes():
    """The Ingress is valid. No controller is run; tests/e2e/test_chart.py renders the values."""
    blocks = {pages.file_name(text): text for _, text in dict(pages.sections(PAGE))["Kubernetes"]}
    with tempfile.TemporaryDirectory(prefix="key-service-kubernetes-") as folder:
        (Path(folder) / "ingress.yaml").write_text(blocks["ingress.yaml"])
        validate = shutil.which("kubernetes-validate") or shutil.which("kubernetes-validate", path="/var/cache/key-service-tools/bin")
        subprocess.run([validate, "--strict", "ingress.yaml"], cwd=folder, check=True, capture_output=True, timeout=PATIENCE)

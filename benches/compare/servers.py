"""The servers: how each is configured, started, pinned and stopped."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import journal
from client import Connection
from kinds import RAW
from tools import HERE, KIB, SERVER_CORE, Failed, peers

# The command of each server.
SERVERS = {
    "key-service": lambda bench, port: [bench.daemon, "--log-level", "error"],
    "nginx": lambda bench, port: ["nginx", "-c", configuration(bench, "nginx.conf", port)],
    "haproxy": lambda bench, port: ["haproxy", "-db", "-f", configuration(bench, "haproxy.cfg", port)],
    "h2o": lambda bench, port: ["h2o", "-c", configuration(bench, "h2o.conf", port)],
    "bare hyper": lambda bench, port: [bench.floor],
    "raw loop": lambda bench, port: [bench.epoll, "constant"],
    "raw loop, getrandom": lambda bench, port: [bench.epoll, "getrandom"],
    "python": lambda bench, port: [sys.executable, HERE / "server.py"],
}
# The servers that are measured over TLS.
TLS_SERVERS = {
    "key-service": SERVERS["key-service"],
    "nginx": lambda bench, port: ["nginx", "-c", configuration(bench, "nginx.conf", port, tls=nginx_tls(bench))],
    "haproxy": lambda bench, port: ["haproxy", "-db", "-f", configuration(bench, "haproxy.cfg", port, tls=haproxy_tls(bench))],
}
# What each of them has to negotiate. The peers know no hybrid key exchange.
TLS_VERSION, TLS_CIPHER, TLS_GROUP = "TLSv1.3", "TLS_AES_256_GCM_SHA384", "X25519"
# The servers that are measured under every kind of load.
MAIN_SERVERS = ["key-service", "nginx", "bare hyper"]

CONSTANT = "0123456789abcdef0123456789abcdef"  # the response of nginx, haproxy and h2o
NGINX_RETURN_MAX = 1 << 10  # a longer constant is a file, which nginx sends without copying


def configuration(bench, name, port, **values):
    """Writes the configuration of a server, with names in braces replaced, and returns its path."""
    (bench.scratch / "constant").write_text(CONSTANT)
    text = (HERE / name).read_text()
    user = "user: root" if os.geteuid() == 0 else ""  # h2o would become nobody, who can't read the scratch directory
    values = {"port": str(port), "scratch": str(bench.scratch), "constants": bench.nginx_constants, "user": user, "tls": "", **values}
    for key, value in values.items():
        text = text.replace(f"{{{key}}}", value)
    path = bench.scratch / name
    path.write_text(text)
    return path


def nginx_tls(bench):
    """The rest of nginx's directive `listen`, and the directives of TLS. It accepts no earlier session and sends no tickets."""
    certificate, key = bench.certificate("P-256")
    return (
        f" ssl backlog=4096; ssl_certificate {certificate}; ssl_certificate_key {key}; ssl_protocols {TLS_VERSION}; "
        f"ssl_conf_command Ciphersuites {TLS_CIPHER}; ssl_ecdh_curve {TLS_GROUP}; ssl_session_cache off; ssl_conf_command NumTickets 0"
    )


def haproxy_tls(bench):
    """The rest of haproxy's directive `bind`."""
    both = bench.scratch / "certificate-and-key.pem"
    both.write_text("".join(path.read_text() for path in bench.certificate("P-256")))
    return f" ssl crt {both} ssl-min-ver {TLS_VERSION} ciphersuites {TLS_CIPHER} curves {TLS_GROUP} no-tls-tickets"


def nginx_constants(scratch, sizes):
    """nginx locations with constants of these sizes, each in nginx's fastest way: `return`, or a file if it is long."""
    locations = []
    (scratch / "key").mkdir()
    for size in sizes:
        if size <= NGINX_RETURN_MAX:
            directives = f'return 200 "{"0" * size}";'
        else:
            (scratch / f"key/{size}").write_bytes(bytes(size))
            directives = f"root {scratch}; sendfile on; tcp_nopush on; open_file_cache max=100;"
        locations.append(f"location = /key/{size} {{ {directives} }}")
    return "\n".join(locations)


@contextlib.contextmanager
def serving(bench, kind, name="key-service", under=(), **options):
    """Runs a server with the settings for a kind of request. Yields the server, and the kind with a valid token."""
    kind, settings = bench.prepared(kind)
    with (
        journal.reading(bench) if kind.journal else contextlib.nullcontext(((), None)) as (with_journal, entries),
        Running(bench, name, under=[*with_journal, *under], environment=settings, tls=bool(kind.tls), **options) as server,
    ):
        yield server, kind
    if kind.journal and not entries:
        raise Failed(f"{name}: no audit record reached the journal")


class Running:
    """A running server, pinned to its core. It is stopped by its process id at the end of the block."""

    def __init__(self, bench, name, cores=str(SERVER_CORE), under=(), environment=None, listener=None, tls=False):
        self.name = name
        self.log = bench.scratch / f"{name}.log"
        # nginx binds its port itself, because with one process it crashes on an inherited socket (1.22).
        self.port = peers.HeldPort() if name == "nginx" else None
        with listener or listening() as http, listening() as metrics, open(self.log, "w") as log:
            self.address = self.port.address if self.port else http.getsockname()
            self.metrics = metrics.getsockname()
            command = ["taskset", "-c", cores, *under, *(TLS_SERVERS if tls else SERVERS)[name](bench, self.address[1])]
            environment = {
                **{key: value for key, value in os.environ.items() if not key.startswith("KEYSERVICE_")},
                "LISTEN_FDS": "2",
                "LISTEN_FDNAMES": "http:metrics",  # as from systemd (sd_listen_fds(3)), but without LISTEN_PID
                "SERVER_STARTER_PORT": f"127.0.0.1:{self.address[1]}=3",  # for h2o
                **(environment or {}),
            }
            os.dup2(http.fileno(), 3)
            os.dup2(metrics.fileno(), 4)
            if self.port:
                reserve_descriptors()
            self.process = subprocess.Popen(
                command, env=environment, pass_fds=(3, 4), cwd=bench.scratch, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.pid = self.process.pid  # taskset and valgrind execute the server in this process
        self.kind = replace(RAW, tls="P-256") if tls else RAW
        self.origin = f"{'https' if tls else 'http'}://127.0.0.1:{self.address[1]}"
        reserve_descriptors()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        died = self.process.poll() is not None
        try:
            if self.name == "key-service":
                peers.stop_daemon(self.process, self.name, error)
            else:
                peers.stop_peer(self.process, self.name)
        finally:
            if self.port:
                self.port.close()
        if died or isinstance(error, (OSError, Failed)):
            reason = error or f"exited with status {self.process.returncode} during the measurement"
            raise Failed(f"{self.name}: {reason}\n{self.log.read_text()[-2000:]}") from error

    def connect(self, source="127.0.0.1", kind=None):
        deadline = time.monotonic() + 30
        while True:
            try:
                return Connection(self.address, source, kind or self.kind)
            except ConnectionRefusedError:  # happens only with nginx, until it has bound its port
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def cpu_seconds(self):
        """User and system time of all threads, from the clock of clock_getcpuclockid(3). Its resolution is 1 ns; that of /proc is 10 ms."""
        return time.clock_gettime(~self.pid << 3 | 2)

    def resident(self):
        return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())[1]) * KIB


def listening():
    return socket.create_server(("127.0.0.1", 0), backlog=4096)


def reserve_descriptors():
    """Reserves descriptors 3 and 4 for the sockets that a server inherits."""
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor in (3, 4):
        os.dup2(null, descriptor)
    if null not in (3, 4):
        os.close(null)

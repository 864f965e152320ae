"""What a run of the benchmark measures: the binaries, which are built when they are first needed, and the lengths of the measurements."""

import functools
import os
from dataclasses import replace
from pathlib import Path

from tools import HERE, LOAD_CORE, ROOT, build, run

# The arguments of openssl-req(1) for each kind of certificate key.
CERTIFICATE_KEYS = {"P-256": ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"], "RSA-2048": ["rsa:2048"]}


class Bench:
    """The binaries and settings of one run. Files are written to `scratch`."""

    def __init__(self, daemon, scratch, quick):
        self.given_daemon = daemon
        self.scratch = scratch
        self.rounds = 1 if quick else 7
        self.seconds = 1 if quick else 2
        self.requests = 2_000 if quick else 20_000
        self.starts = 5 if quick else 21
        self.handshakes = 640 if quick else 3_200
        self.nginx_constants = ""
        self.certificates = {}
        os.sched_setaffinity(0, {LOAD_CORE})  # this process is a client too, and wrk inherits the affinity

    @functools.cached_property
    def package(self):
        """The Debian package for this machine's architecture, newly built."""
        architecture = run(["dpkg", "--print-architecture"]).strip()
        build(ROOT / "packaging/build-deb", architecture)
        [package] = (ROOT / "target/debian").glob(f"key-service_*_{architecture}.deb")
        return package

    @functools.cached_property
    def packaged(self):
        """The binary of the package."""
        run(["dpkg-deb", "--extract", self.package, self.scratch / "package"])
        return self.scratch / "package/usr/bin/key-service"

    @functools.cached_property
    def daemon(self):
        return self.given_daemon or self.packaged

    @functools.cached_property
    def epoll(self):
        binary = self.scratch / "epoll"
        build("cc", "-O2", "-o", binary, HERE / "epoll.c")
        return binary

    @functools.cached_property
    def floor(self):
        directory, manifest = target() / "compare", HERE / "floor/Cargo.toml"
        build("cargo", "build", "--release", "--quiet", "--locked", "--target-dir", directory, "--manifest-path", manifest)
        return directory / "release/floor"

    @functools.cached_property
    def open_loop(self):
        """The generator of open-loop load, a program of the same package."""
        return self.floor.with_name("open-loop")

    @functools.cached_property
    def stream(self):
        return example("stream")

    @functools.cached_property
    def tls_handshakes(self):
        return example("tls_handshakes")

    @functools.cached_property
    def token(self):
        """A token, and the path of a file with its hash."""
        token, line = run([self.daemon, "token", "new", "--name", "bench"]).splitlines()
        path = self.scratch / "tokens"
        path.write_text(f"{line}\n")
        path.chmod(0o600)
        return token, path

    def certificate(self, kind):
        """The paths of a self-signed certificate of this kind and of its key."""
        if kind not in self.certificates:
            certificate, key = self.certificates[kind] = self.scratch / f"{kind}.pem", self.scratch / f"{kind}.key"
            options = ["-nodes", "-days", "1", "-subj", "/CN=localhost", "-keyout", key, "-out", certificate]
            # The client of the handshakes verifies it, and refuses the certificate of a CA as that of a server.
            options += ["-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"]
            run(["openssl", "req", "-x509", "-newkey", *CERTIFICATE_KEYS[kind], *options])
            for path in (key, certificate):
                path.chmod(0o600)
        return self.certificates[kind]

    def prepared(self, kind):
        """The kind of request with a valid token, and the environment of the daemon for it."""
        settings = {"KEYSERVICE_WORKERS": "1", **kind.settings}
        if kind.tls:
            certificate, key = self.certificate(kind.tls)
            settings |= {"KEYSERVICE_TLS_CERT": str(certificate), "KEYSERVICE_TLS_KEY": str(key)}
        if any("{token}" in header for header in kind.headers):
            token, path = self.token
            settings["KEYSERVICE_TOKENS_FILE"] = str(path)
            kind = replace(kind, headers=tuple(header.format(token=token) for header in kind.headers))
        return kind, settings


def example(name):
    build("cargo", "build", "--release", "--quiet", "--locked", "--example", name)
    return target() / "release/examples" / name


def target():
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))

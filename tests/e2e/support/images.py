"""The container image, built from the Dockerfile, and its containers.

No image is pulled: the base image of the Dockerfile is built here from Debian packages, this machine's Rust toolchain and the crates of
Cargo.lock. Builds have no access to a crate registry. Containers have no network but their own loopback interface.
"""

import contextlib
import ctypes
import functools
import hashlib
import http.client
import inspect
import itertools
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

from support import peers
from support.conditions import TIMEOUT, until
from support.daemon import REPOSITORY
from support.machine import SUPPORT

# Kept between runs, and separate from other images of this machine.
CACHE = Path(os.environ.get("KEY_SERVICE_IMAGES", "/var/cache/key-service-image"))
IMAGES = {"amd64": "localhost/key-service:test-amd64", "arm64": "localhost/key-service:test-arm64"}
TARGETS = {"amd64": "x86_64-unknown-linux-gnu", "arm64": "aarch64-unknown-linux-gnu"}
EPOCH = 1_700_000_000
LABELS = {"SOURCE": "https://example.org/source", "DOCUMENTATION": "https://example.org/docs", "REVISION": "f" * 40}
# The options of docs/containers.md, but without a network, which this machine can't provide.
CONFINED = ["--network=none", "--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges"]
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
CONTAINER_NUMBERS = itertools.count()


def run(*command, ok=0, timeout=TIMEOUT, **rest):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, errors="replace", timeout=timeout, stdin=subprocess.DEVNULL, **rest
    )
    if ok is not None:
        assert done.returncode == ok, f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def remove(*command):
    """Cleans up. A hung command is only logged, so that it does not hide an earlier error."""
    try:
        run(*command, ok=None)
    except subprocess.TimeoutExpired as hung:
        peers.log(str(hung))


def base():
    """Builds the base image of the Dockerfile, under the name that the Dockerfile has for it, unless it exists already."""
    name = re.search(r"^ARG RUST_IMAGE=(\S+)$", DOCKERFILE, re.M)[1]
    version, suite = re.fullmatch(r"docker\.io/library/rust:([\d.]+)-slim-(\w+)", name).groups()
    auditable = re.search(r"cargo install cargo-auditable --locked --version (\S+)", DOCKERFILE)[1]
    found = run("rustc", "--version").stdout.split()[1]
    if found != version:
        raise AssertionError(f"expected Rust {version} as in the Dockerfile, found {found}: rustup default {version}")
    for target in TARGETS.values():
        if not Path(run("rustc", "--print", "target-libdir", "--target", target).stdout.strip()).is_dir():
            raise AssertionError(f"the standard library of {target} is missing: rustup target add {target}")

    inputs = [inspect.getsource(base), name, auditable, (REPOSITORY / "Cargo.lock").read_text()]
    key = hashlib.sha256(repr(inputs).encode()).hexdigest()
    if run("podman", "image", "inspect", "--format", '{{index .Labels "key"}}', name, ok=None).stdout.strip() == key:
        return
    root = CACHE / f"{suite}.tar"
    if not root.exists():
        packages = "ca-certificates,gcc,libc6-dev,gcc-aarch64-linux-gnu,libc6-dev-arm64-cross"
        new = root.with_suffix(".new.tar")
        run("mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", suite, new, timeout=600)
        new.rename(root)
    tool = CACHE / f"cargo-auditable-{auditable}"
    run("cargo", "install", "--quiet", "--locked", "--version", auditable, "--root", tool, "cargo-auditable", timeout=900)
    run("cargo", "fetch", "--quiet", "--locked", cwd=REPOSITORY, timeout=600)

    container = run("buildah", "from", "scratch").stdout.strip()
    try:
        inside = Path(run("buildah", "mount", container).stdout.strip())
        run("tar", "-xf", root, "-C", inside, timeout=600)
        # The layout of the official image.
        rust, cargo = inside / "usr/local/rustup", inside / "usr/local/cargo"
        toolchain = rust / f"toolchains/{version}-x86_64-unknown-linux-gnu"
        toolchain.mkdir(parents=True)
        for part in ["bin", "lib"]:
            run("cp", "-a", Path(run("rustc", "--print", "sysroot").stdout.strip()) / part, toolchain, timeout=600)
        (rust / "settings.toml").write_text(f'version = "12"\ndefault_toolchain = "{toolchain.name}"\nprofile = "minimal"\n')
        shutil.copytree(tool, cargo)
        shutil.copy(shutil.which("rustup"), cargo / "bin/rustup")
        for proxy in ["cargo", "rustc"]:
            (cargo / "bin" / proxy).symlink_to("rustup")
        home = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo"))
        for part in ["index", "cache"]:
            shutil.copytree(home / "registry" / part, cargo / "registry" / part)
        if (home / "config.toml").exists():
            shutil.copy(home / "config.toml", cargo / "config.toml")
        path = "/usr/local/cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        for variable in ["RUSTUP_HOME=/usr/local/rustup", "CARGO_HOME=/usr/local/cargo", "CARGO_NET_OFFLINE=true", f"PATH={path}"]:
            run("buildah", "config", "--env", variable, container)
        run("buildah", "config", "--label", f"key={key}", "--arch", "amd64", container)
        run("buildah", "umount", container)
        run("buildah", "commit", "--quiet", container, name, timeout=600)
    finally:
        remove("buildah", "rm", container)


def build(directory, architecture, tag, *options):
    """Builds the image of the Dockerfile in `directory`, with the profile for tests, and returns its id."""
    environment = {**os.environ, **LABELS, "SOURCE_DATE_EPOCH": str(EPOCH)}
    settings = ["--isolation=chroot", "--pull-never", "--quiet", "--build-arg=PROFILE=quick", "--tag", tag]
    run(Path(directory) / "packaging/build-image", architecture, *settings, *options, timeout=3000, env=environment)
    return inspect_image(tag)["Id"]


def inspect_image(tag):
    return json.loads(run("podman", "image", "inspect", tag).stdout)[0]


def copy_source_tree(directory):
    """Copies the tracked and unignored files of the working tree to another directory, with new modification times."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=REPOSITORY).stdout.splitlines()
    for name in listed:
        if (REPOSITORY / name).exists():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, directory / name)
    return directory


def extract_entries(tag, directory):
    """Returns every entry of every layer, and extracts the binary to `directory`/key-service."""
    archive = directory / "image.tar"
    archive.unlink(missing_ok=True)
    run("podman", "save", "--quiet", "--format", "docker-archive", "-o", archive, tag)
    entries = []
    with tarfile.open(archive) as outer:
        for layer in json.load(outer.extractfile("manifest.json"))[0]["Layers"]:
            with tarfile.open(fileobj=outer.extractfile(layer)) as inner:
                for entry in inner:
                    entries.append(entry)
                    if entry.name == "key-service":
                        inner.extract(entry, directory)
    return entries


def sections(binary):
    """The machine type and the sections of a 64-bit little-endian ELF file; see elf(5)."""
    data = binary.read_bytes()
    machine = struct.unpack_from("<H", data, 18)[0]
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, table + size * n) for n in range(count)]
    text = data[headers[names][4] :][: headers[names][5]]
    return machine, {
        text[name : text.index(b"\0", name)].decode(): data[offset : offset + length] for name, _, _, _, offset, length in headers
    }


class Container:
    """A running container of the image, confined as in docs/containers.md. Its only network is its own loopback interface."""

    def __init__(self, *arguments, options=(), variables=None, starts=True):
        self.name = f"key-service-test-{os.getpid()}-{next(CONTAINER_NUMBERS)}"
        variables = [f"--env={name}={value}" for name, value in (variables or {}).items()]
        command = [
            "podman",
            "--runtime=runc",
            "run",
            "--detach",
            f"--name={self.name}",
            "--ulimit=nproc=4096:4096",
            *([] if any("nofile" in option for option in options) else ["--ulimit=nofile=4096:4096"]),
            # podman's timer for health checks needs systemd, which is not here; health() runs the check.
            "--health-interval=disable",
            *CONFINED,
            *options,
            *variables,
            IMAGES["amd64"],
            *arguments,
        ]
        run(*command)
        if starts:
            until("the daemon to start", lambda: self.has_ended() or "Keys on" in self.log())
            assert not self.has_ended(), self.log()

    def state(self):
        return json.loads(run("podman", "inspect", self.name).stdout)[0]["State"]

    def has_ended(self):
        return self.state()["Status"] in ("exited", "stopped")

    @functools.cached_property
    def pid(self):
        return self.state()["Pid"]

    def log(self):
        done = run("podman", "logs", self.name)
        return done.stdout + done.stderr

    def exit_status(self):
        return int(run("podman", "wait", self.name).stdout)

    def stop(self, grace=30):
        """Stops like `docker stop`: SIGTERM, then SIGKILL after `grace` seconds. Returns the exit status."""
        run("podman", "stop", f"--time={grace}", self.name, timeout=grace + TIMEOUT)
        return self.exit_status()

    def signal(self, name):
        run("podman", "kill", f"--signal={name}", self.name)

    def health(self):
        """Runs the health check of the image and returns its exit status."""
        done = run("podman", "healthcheck", "run", self.name, ok=None)
        return done.returncode

    def connect(self, port=1123):
        """A connection to a port in the container's network namespace. A socket stays in the namespace that it was created in."""
        created = []

        def create():
            with open(f"/proc/{self.pid}/ns/net") as namespace:
                setns(namespace.fileno())
            created.append(socket.socket(socket.AF_INET))

        thread = threading.Thread(target=create)  # setns(2) changes the namespace of this thread only
        thread.start()
        thread.join()
        [client] = created
        client.settimeout(TIMEOUT)
        try:
            client.connect(("127.0.0.1", port))
        except OSError:
            client.close()
            raise
        return client

    def get(self, path, port=1123):
        """The status and body of a response."""
        connection = http.client.HTTPConnection("localhost")
        connection.sock = self.connect(port)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    @contextlib.contextmanager
    def load(self, rate, *words):
        """Runs clients at a steady rate during the block. Afterwards the dictionary has their results."""
        script = SUPPORT / "load.py"
        command = ["nsenter", "-t", str(self.pid), "-n", "--", sys.executable, script, "1123", str(rate), *words]
        clients = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        seen = {}
        with peers.killed_after(clients, "load.py"):
            yield seen
            output = clients.communicate(timeout=TIMEOUT + 30)[0]
            seen.update(json.loads(output))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        remove("podman", "rm", "--force", "--time=0", self.name)


def setns(descriptor):
    """setns(2), because os.setns needs Python 3.12."""
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000) != 0:  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), "setns")


def run_to_exit(*arguments, **rest):
    """The exit status and the log of a container that is expected to exit by itself."""
    with Container(*arguments, starts=False, **rest) as container:
        until("an exit or a start", lambda: container.has_ended() or "Keys on" in container.log())
        assert container.has_ended(), f"expected an exit, but the daemon started: {container.log()}"
        return container.exit_status(), container.log()


def storage(directory):
    """Makes podman and buildah store their images in CACHE, for this process and its children."""
    CACHE.mkdir(parents=True, exist_ok=True)
    file = directory / "storage.conf"
    file.write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{CACHE}/storage"\nrunroot = "/run/key-service-image"\n')
    os.environ["CONTAINERS_STORAGE_CONF"] = str(file)

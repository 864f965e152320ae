"""Tests the contents of the container image and the behaviour of its containers under podman."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import time
import tomllib
import zlib
from pathlib import Path

import pytest
import yaml
from support import pages, peers
from support.conditions import TIMEOUT, Late, expect, repeated_if_late, retry_if_stalled, until
from support.daemon import REPOSITORY
from support.images import (
    CONFINED,
    DOCKERFILE,
    EPOCH,
    IMAGES,
    LABELS,
    TARGETS,
    Container,
    build,
    copy_source_tree,
    extract_entries,
    inspect_image,
    run,
    run_to_exit,
    sections,
)

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(3600),  # the image is compiled for two architectures, and once more in another directory
    pytest.mark.xdist_group("image"),
    pytest.mark.tools("podman", "buildah", "runc", "mmdebstrap", "qemu-aarch64-static", "nsenter"),
    pytest.mark.usefixtures("image"),
]

AMD64, ARM64 = IMAGES.values()
MACHINES = {"amd64": 62, "arm64": 183}  # e_machine, elf(5)
SIZE_MAX = 8_000_000
# All load of a test comes from one address, and these tests are not about the limits per client.
ONE_CLIENT = {"KEYSERVICE_MAX_CONNECTIONS_PER_CLIENT": "0", "KEYSERVICE_MAX_BULK_STREAMS": "1000"}
CONFIG = "/etc/key-service/config.toml"


# Contents of the image.


def test_dockerfile_passes_hadolint(tmp_path):
    """hadolint reports nothing about the Dockerfile"""
    run("hadolint", REPOSITORY / "Dockerfile")


def test_build_context_has_only_the_sources(tmp_path):
    """the build context has only the sources and their manifests, whatever other files are in the directory"""
    tree = copy_source_tree(tmp_path / "context")
    for name in [".env", ".git/config", "target/release/key-service", "server.key", "src/../tests/secret"]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("secret")
    (tree / "Dockerfile.context").write_text("FROM scratch\nCOPY . /\n")
    run("buildah", "build", "--quiet", "--isolation=chroot", "--tag=key-service-context", "-f", tree / "Dockerfile.context", tree)
    found = {entry.name for entry in extract_entries("key-service-context", tmp_path) if entry.isfile()}
    sources = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "src").rglob("*") if path.is_file()}
    expect(found, {"Cargo.toml", "Cargo.lock", ".cargo/config.toml", "benches/generator.rs", "build.rs"} | sources, "the context")


def test_image_is_one_small_file(image_arm64, packages, tmp_path, figures):
    """the image is a single file owned by root, without a shell, and has at most 8 MB"""
    entries = extract_entries(AMD64, tmp_path)
    found = [(entry.name, oct(entry.mode & 0o7777), entry.uid, entry.gid, entry.mtime) for entry in entries]
    expect(found, [("key-service", "0o755", 0, 0, EPOCH)], "the files of all layers")
    sizes = {}
    for architecture, tag in IMAGES.items():
        [binary] = extract_entries(tag, tmp_path)
        # This binary has the profile for tests. A release image has the packaged binary, plus the list of crates.
        listing = run("dpkg-deb", "--contents", packages[architecture]).stdout
        packaged = int(re.search(r"root/root +(\d+) .* \./usr/bin/key-service$", listing, re.M)[1])
        _, parts = sections(tmp_path / "key-service")
        sizes[architecture] = inspect_image(tag)["Size"] - binary.size + packaged + len(parts[".dep-v0"])
        assert sizes[architecture] <= SIZE_MAX, f"{sizes[architecture]} bytes for {architecture}"
    figures(", ".join(f"{size / 1e6:.2f} MB for {architecture}" for architecture, size in sizes.items()))


def test_binary_is_static(image_arm64, tmp_path):
    """the binary needs no loader and no shared library, on both architectures"""
    for tag, architecture in [(AMD64, "amd64"), (ARM64, "arm64")]:
        extract_entries(tag, tmp_path)
        machine, parts = sections(tmp_path / "key-service")
        expect((machine, ".interp" in parts), (MACHINES[architecture], False), f"machine and loader of {architecture}")
        expect(inspect_image(tag)["Architecture"], architecture, "the image's architecture")
        assert "NEEDED" not in run("readelf", "--dynamic", tmp_path / "key-service").stdout


def test_image_metadata_is_complete(tmp_path):
    """user, ports, entry point, stop signal, health check and labels match the Dockerfile and Cargo.toml"""
    found = inspect_image(AMD64)
    config = found["Config"]
    expect(config["User"], "65532:65532", "user")
    expect(sorted(config["ExposedPorts"]), ["1123/tcp", "8000/tcp"], "ports")
    expect(config["Entrypoint"], ["/key-service"], "entry point")
    expect(config.get("Cmd") or [], [], "arguments")
    expect(config["StopSignal"] in ("SIGTERM", "15"), True, "stop signal")
    expect(found["Healthcheck"]["Test"], ["CMD", "/key-service", "health"], "health check")
    package = json.loads(run("cargo", "metadata", "--no-deps", "--format-version=1", cwd=REPOSITORY).stdout)["packages"][0]
    expected = {
        "title": package["name"],
        "description": package["description"],
        "licenses": package["license"],
        "version": package["version"],
        "revision": LABELS["REVISION"],
        "source": LABELS["SOURCE"],
        "documentation": LABELS["DOCUMENTATION"],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(EPOCH)),
    }
    labels = {
        name.removeprefix("org.opencontainers.image."): value
        for name, value in found["Labels"].items()
        if name.startswith("org.opencontainers.image.")
    }
    expect(labels, expected, "labels")


def test_binary_lists_its_crates(image_arm64, tmp_path, figures):
    """the crate list in the binary has every linked crate, and only versions of Cargo.lock"""
    lock = tomllib.loads((REPOSITORY / "Cargo.lock").read_text())["package"]
    locked = {(crate["name"], crate["version"]) for crate in lock}
    for tag, architecture in [(AMD64, "amd64"), (ARM64, "arm64")]:
        extract_entries(tag, tmp_path)
        _, parts = sections(tmp_path / "key-service")
        assert ".dep-v0" in parts, f"no crate list in the binary for {architecture}"
        listed = {(crate["name"], crate["version"]) for crate in json.loads(zlib.decompress(parts[".dep-v0"]))["packages"]}
        tree = run("cargo", "tree", "--locked", "--edges=no-dev", "--prefix=none", "--target", TARGETS[architecture], cwd=REPOSITORY).stdout
        linked = {tuple(re.match(r"(\S+) v(\S+)", line).groups()) for line in tree.splitlines() if line}
        expect(linked - listed, set(), f"linked crates that are not listed for {architecture}")
        # The list also has crates of optional features that are off, because cargo metadata can't tell them apart.
        expect(listed - locked, set(), f"listed crates for {architecture} that Cargo.lock does not have in that version")
    figures(f"{len(listed)} crates")


def test_image_is_reproducible(tmp_path, figures):
    """a build in another directory gives the same file system and, in the OCI format, the same image id"""
    here, there = "key-service:oci", "key-service:oci-elsewhere"
    # The build in the other directory compiles everything. The build here reuses the layers of the image, which needs --layers.
    # That option changes the history of an image, so both builds have it.
    found = build(copy_source_tree(tmp_path / "elsewhere"), "amd64", there, "--format=oci", "--layers", "--no-cache")
    expect(inspect_image(there)["RootFS"]["Layers"], inspect_image(AMD64)["RootFS"]["Layers"], "layers in both formats")
    expect(found, build(REPOSITORY, "amd64", here, "--format=oci", "--layers"), "image id")
    figures(found[:12])


# Behaviour of a container.


def test_container_serves_keys_health_and_metrics(tmp_path):
    """a read-only container without capabilities serves keys, health and metrics as process 1"""
    with Container() as container:
        keys = [container.get("/key/32") for _ in range(10)]
        expect({(status, len(key)) for status, key in keys}, {(200, 32)}, "status and length")
        expect(len({key for _, key in keys}), 10, "number of different keys")
        expect(container.get("/health"), (200, b"OK"), "health")
        expect(container.get("/readyz")[0], 200, "readiness")
        assert b'key_bytes_total{format="raw"} 320' in container.get("/metrics", 8000)[1]
        status = dict(line.split(":\t") for line in Path(f"/proc/{container.pid}/status").read_text().splitlines())
        expect(status["NSpid"].split()[-1], "1", "process id")
        expect((set(status["Uid"].split()), set(status["Gid"].split())), ({"65532"}, {"65532"}), "user and group")
        expect((int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"]), (0, 0, "1"), "privileges")
        root = next(line.split() for line in Path(f"/proc/{container.pid}/mountinfo").read_text().splitlines() if line.split()[4] == "/")
        assert "ro" in root[5].split(","), root


def test_container_accepts_the_flags_of_the_daemon(tmp_path):
    """`docker run key-service --max-size 1024` takes the daemon's flags"""
    with Container("--max-size", "1024") as container:
        expect((container.get("/key/1024")[0], container.get("/key/1025")[0]), (200, 413), "at and above max-size")
    with Container("--max-size", "64") as container:
        expect((container.get("/key/64")[0], container.get("/key/65")[0]), (200, 413), "at and above another max-size")


def test_mounted_configuration_is_read_and_reloaded(tmp_path):
    """the daemon reads a mounted configuration file, and reads it again on SIGHUP"""
    file = tmp_path / "config.toml"
    file.write_text("max-size = 100\n")
    file.chmod(0o644)
    with Container(options=[f"--volume={file}:{CONFIG}:ro"]) as container:
        expect((container.get("/key/100")[0], container.get("/key/101")[0]), (200, 413), "at and above max-size")
        file.write_text("max-size = 200\n")  # written in place, because a file mount refers to the inode
        container.signal("HUP")
        until("the reload", lambda: container.get("/key/101")[0] == 200)


def test_health_check_detects_a_missing_server(tmp_path):
    """the image's health check reads the port from the environment, and fails if nothing answers"""
    with Container() as container:
        expect_healthy(container)
    with Container(variables={"KEYSERVICE_SRV_PORT": "9000"}) as container:
        expect_healthy(container)
        expect(container.get("/key/32", 9000)[0], 200, "status with the port in a variable")
    with Container("--srv-port", "9000") as container:
        expect(container.get("/key/32", 9000)[0], 200, "with the port in an argument")
        expect(container.health(), 1, "exit status of the health check, which does not see the argument")
        retry_if_stalled(lambda: run("podman", "exec", container.name, "/key-service", "--srv-port", "9000", "health"))


def expect_healthy(container):
    retry_if_stalled(lambda: expect(container.health(), 0, "exit status of the health check"))


def test_invalid_configuration_is_rejected(tmp_path):
    """invalid settings exit with status 78 and a message, invalid flags with 2"""
    status, log = run_to_exit(variables={"KEYSERVICE_MAX_SIZE": "1k"})
    expect(status, 78, "exit status")
    assert 'max-size: expected a whole number from 1 to 1073741824, found "1k" (KEYSERVICE_MAX_SIZE)' in log, log
    expect(run_to_exit("--srv-port", "99999")[0], 78, "exit status of a wrong port")
    expect(run_to_exit("--config", "/nowhere.toml")[0], 78, "exit status without the file")
    expect(run_to_exit("--no-such-flag")[0], 2, "exit status of a wrong flag")


def test_daemon_exits_without_getrandom(tmp_path):
    """if getrandom(2) is denied, the daemon exits with 1 instead of reading /dev/urandom"""
    for number, name in [(1, "EPERM"), (38, "ENOSYS")]:
        profile = tmp_path / f"{name}.json"
        rule = {"names": ["getrandom"], "action": "SCMP_ACT_ERRNO", "errnoRet": number}
        profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
        status, log = run_to_exit(options=[f"--security-opt=seccomp={profile}"])
        expect(status, 1, f"exit status under {name}")
        assert "no keys can be generated" in log, log


@pytest.fixture
def volume(tmp_path):
    """A tmpfs that is writable for every user, as the kubelet makes an emptyDir with `medium: Memory`."""
    directory = tmp_path / "volume"
    directory.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1m,mode=0777", "none", directory)
    yield directory
    run("umount", directory)


@pytest.mark.tools("mount")
def test_init_container_shares_a_key(volume, tmp_path):
    """docs/recipes.md: a container of the image writes a key that only a container with the same user can read, and keeps it"""
    [(_, text)] = dict(pages.sections(REPOSITORY / "docs/recipes.md"))["Kubernetes: an init container without the service"]
    spec = yaml.safe_load(text)["spec"]
    [init] = spec["initContainers"]
    user, file = spec["securityContext"]["runAsUser"], init["args"][init["args"].index("--output") + 1]
    mount = f"--volume={volume}:{init['volumeMounts'][0]['mountPath']}"

    def write(*arguments):
        return run_to_exit(*arguments, options=[f"--user={user}:{user}", mount])

    def read(user):
        image = re.search(r"^ARG RUST_IMAGE=(\S+)$", DOCKERFILE, re.M)[1]
        options = ["--rm", *CONFINED, f"--user={user}:{user}", "--ulimit=nproc=4096:4096", "--ulimit=nofile=4096:4096", f"{mount}:ro"]
        return run("podman", "--runtime=runc", "run", *options, image, "od", "-An", "-tx1", "-v", file, ok=None)

    expect(write(*init["args"]), (0, ""), "exit status and log of the init container")
    [written] = volume.iterdir()
    status = written.stat()
    expect((status.st_uid, status.st_mode, status.st_size), (user, 0o100600, 32), "owner, mode and size")
    key = read(user)
    expect((key.returncode, bytes.fromhex(key.stdout)), (0, written.read_bytes()), "exit status and output of the reader")
    assert "Permission denied" in read(10_001).stderr
    expect(write(*init["args"]), (0, ""), "exit status and log of a second run")
    expect(read(user).stdout, key.stdout, "the key after it")
    status, log = write(*(argument for argument in init["args"] if argument != "--keep-existing"))
    assert (status, "it exists already" in log) == (1, True), log


def test_documented_container_writes_a_key(tmp_path):
    """docs/containers.md: a container without a network writes a key into the current directory"""
    docker = tmp_path / "bin/docker"
    docker.parent.mkdir()
    docker.write_text('#!/bin/sh\nshift\nexec podman --runtime=runc run --ulimit=nproc=4096:4096 --ulimit=nofile=4096:4096 "$@"\n')
    docker.chmod(0o755)
    run("podman", "tag", AMD64, "localhost/key-service")
    script = pages.commands("docs/containers.md", "docker run --rm --network=none")
    run("sh", "-ec", script, cwd=tmp_path, env={**os.environ, "PATH": f"{docker.parent}:{os.environ['PATH']}"})
    found = (tmp_path / "session.key").stat()
    expect((found.st_size, found.st_mode, found.st_uid), (32, 0o100600, os.getuid()), "size, mode and owner")


def test_stop_signals_end_the_container(tmp_path):
    """SIGTERM, SIGINT and `docker stop` end the container with status 0"""
    with Container() as container:
        expect(container.stop(), 0, "exit status of stop")
    for name in ["TERM", "INT"]:
        with Container() as container:
            container.signal(name)
            expect(container.exit_status(), 0, f"exit status of SIG{name}")


def test_stop_ends_at_the_drain_timeout(tmp_path):
    """a client that never reads delays a stop until the drain timeout, not until the container is killed"""
    with Container(variables={"KEYSERVICE_DRAIN_TIMEOUT": "2", "KEYSERVICE_MAX_SIZE": str(1 << 30)}) as container:
        with contextlib.closing(container.connect()) as stalled:
            stalled.sendall(f"GET /key/{1 << 30} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert stalled.recv(1)
            expect(container.stop(), 0, "exit status")
        assert "stopped with connections still open" in container.log(), container.log()


@repeated_if_late
def test_stop_completes_requests_in_flight(figures):
    """a stop under 500 requests per second completes every request of an open connection, streamed keys too"""
    size = 256 << 20  # larger than any socket buffer
    with contextlib.ExitStack() as stack:
        variables = {"KEYSERVICE_MAX_SIZE": str(size), "KEYSERVICE_HEAD_TIMEOUT": "60"}
        container = stack.enter_context(Container(variables=variables))
        unfinished = [stack.enter_context(container.connect()) for _ in range(50)]
        for connection in unfinished:
            connection.sendall(b"GET /key/32 HTTP/1.1\r\n")
        streamed = stack.enter_context(container.connect())
        streamed.sendall(f"GET /key/{size} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        received = len(streamed.recv(1000))
        with container.load(500, "until-refused") as seen:
            until("some load", lambda: int(metric(container, 'http_responses_total{status_code="200"}')) > 500)
            begin = time.monotonic()
            os.kill(container.pid, signal.SIGTERM)
            # The drain begins, and goes on while the streamed key is in flight.
            until("the end of the listening socket", lambda: not listens(container), interval=0.005)
            for connection in unfinished:
                connection.sendall(b"Host: localhost\r\n\r\n")
            responses = [read_until_closed(connection) for connection in unfinished]
            seconds = time.monotonic() - begin
            while chunk := streamed.recv(1 << 20):
                received += len(chunk)
            assert received > size, f"{received} bytes of a key of {size}"
            expect(container.exit_status(), 0, "exit status")
        wrong = [response for response in responses if not is_last_key(response)] + seen["failures"]
        # After SIGTERM the daemon reads for another 250 ms. A request may fail if this process or the daemon was stalled for as long.
        if wrong and max(seconds, seen["slowest"]) > 0.2:
            raise Late(
                f"the responses were read {seconds:.1f} s after SIGTERM, and the slowest of the load took {seen['slowest']} s: {wrong}"
            )
        expect(wrong, [], "failed requests")
        assert seen["refused"] > 0, seen
        figures(f"{seen['served']} requests answered, none interrupted, {seen['refused']} connections refused afterwards")


def is_last_key(response):
    """Whether this is a complete response with a key, and announces that the connection closes."""
    head, _, key = response.partition(b"\r\n\r\n")
    return head.startswith(b"HTTP/1.1 200 ") and len(key) == 32 and b"connection: close" in head.lower()


def listens(container):
    """Whether a socket listens on the port for keys. Connecting would show it, too, but fill the queue of a daemon that is stalled."""
    sockets = "".join(Path(f"/proc/{container.pid}/net/{name}").read_text() for name in ("tcp", "tcp6"))
    return re.search(r":0463 \S+ 0A ", sockets)  # port 1123 and TCP_LISTEN; proc_pid_net(5)


def read_until_closed(connection):
    """Everything that the server sends before it closes the connection, or a sentence if it resets the connection."""
    response = b""
    try:
        while chunk := connection.recv(1 << 16):
            response += chunk
    except ConnectionError as error:
        return f"{error} after {len(response)} bytes".encode()
    return response


def metric(container, name):
    text = container.get("/metrics", 8000)[1].decode()
    found = re.search(rf"^{re.escape(name)} (.*)$", text, re.M)
    return float(found[1]) if found else 0.0


def test_32_mib_of_memory_are_enough(packages, tmp_path, figures):
    """with 32 MiB of memory it serves 1,000 connections, 200 of them with a streamed key that is not read"""
    # Memory use depends on the optimisation level, so this test runs the binary of the package.
    run("dpkg-deb", "-x", packages["amd64"], tmp_path)
    options = ["--memory=32m", "--memory-swap=32m", f"--volume={tmp_path}/usr/bin/key-service:/key-service:ro"]
    with Container(options=options, variables={"KEYSERVICE_MAX_SIZE": str(64 << 20), **ONE_CLIENT}) as container:
        group = memory_group(container.pid)
        expect(int((group / "memory.limit_in_bytes").read_text()), 32 << 20, "the limit")
        expect(metric(container, "cgroup_memory_limit_bytes"), 32 << 20, "the limit in the metrics")
        with contextlib.ExitStack() as stack:
            for n in range(1000):
                connection = stack.enter_context(contextlib.closing(container.connect()))
                path = f"/key/{64 << 20}" if n < 200 else "/key/32"
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert connection.recv(12) == b"HTTP/1.1 200"
            expect(container.get("/health"), (200, b"OK"), "health")
        with container.load(500) as seen:
            until("some load", lambda: metric(container, 'http_responses_total{status_code="200"}') > 3000)
        expect((seen["failed"], seen["failures"]), (0, []), "failures")
        expect(container.state()["OOMKilled"], False, "killed for memory")
        peak = int((group / "memory.max_usage_in_bytes").read_text())
        assert peak < 24 << 20, f"{peak / 2**20:.1f} MiB: too close to the limit"
        expect(container.stop(), 0, "exit status")
        figures(f"at most {peak / 2**20:.1f} MiB, including kernel and socket buffers")


def memory_group(pid):
    path = next(line.split(":")[2] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if ":memory:" in line)
    return Path("/sys/fs/cgroup/memory") / path.lstrip("/")


def test_few_descriptors_lower_the_connection_limit(tmp_path, figures):
    """with 1,024 file descriptors it logs the lower connection limit, and connections over the limit get a 503"""
    variables = ONE_CLIENT | {"KEYSERVICE_HEAD_TIMEOUT": "3600"}
    with Container(options=["--ulimit=nofile=1024:1024"], variables=variables) as container:
        assert "max-connections is lowered" in container.log(), container.log()
        limit = int(metric(container, "http_connections_limit"))
        assert 500 < limit < 1024, limit
        with contextlib.ExitStack() as stack:
            for _ in range(limit):
                connection = stack.enter_context(contextlib.closing(container.connect()))
                # Begins another request, because an idle connection would be closed in favour of a new one.
                connection.sendall(b"GET /key/32 HTTP/1.1\r\nHost: localhost\r\n\r\nGET ")
                assert connection.recv(12) == b"HTTP/1.1 200"
            expect(status(container), 503, "status over the limit")
            expect_healthy(container)
        until("a free slot", lambda: status(container) == 200)
        expect(metric(container, 'accept_errors_total{kind="resources"}'), 0, "accept errors")
        figures(f"{limit} connections")


def status(container):
    return retry_if_stalled(lambda: container.get("/key/32")[0])


def test_arm64_binary_works(image_arm64, tmp_path):
    """under emulation, the arm64 binary prints its version, reads its configuration, serves a key and stops"""
    extract_entries(ARM64, tmp_path)
    emulated = ["qemu-aarch64-static", str(tmp_path / "key-service")]
    labels = inspect_image(ARM64)["Labels"]
    number, commit, created = (labels[f"org.opencontainers.image.{name}"] for name in ("version", "revision", "created"))
    expect(run(*emulated, "--version").stdout, f"key-service {number} ({commit[:7]}, {created[:10]})\n", "version")
    assert "max-size = 77\n" in run(*emulated, "--max-size", "77", "--check").stdout
    command = [*emulated, "--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon, peers.killed_after(daemon, "key-service"):
        port = next(found[1] for line in daemon.stderr if (found := re.search(r"Keys on 127\.0\.0\.1:(\d+)", line)))
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=TIMEOUT)
        for size in [32, 1024]:
            connection.request("GET", f"/key/{size}")
            response = connection.getresponse()
            key = response.read()
            expect((response.status, len(key)), (200, size), "status and length")
            assert len(set(key)) > size // 8, key
        connection.close()
        health = retry_if_stalled(lambda: run(*emulated, "health", "--url", f"http://127.0.0.1:{port}"))
        expect(health.stdout, "OK\n", "health")
        peers.stop_daemon(daemon, "key-service")
        expect(daemon.returncode, 0, "exit status")

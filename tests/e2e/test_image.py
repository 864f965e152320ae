"""The container image: what it is, and what its containers do under podman."""

import contextlib
import http.client
import json
import re
import subprocess
import time
import tomllib
import zlib
from pathlib import Path

import pytest
from support import peers
from support.conditions import TIMEOUT, expect, until
from support.daemon import REPOSITORY
from support.images import EPOCH, IMAGES, LABELS, TARGETS, Container, build, copy_of_the_tree, ended, files_of, inspected, run, sections

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # the image is compiled, for two architectures, and once more elsewhere
    pytest.mark.xdist_group("image"),
    pytest.mark.tools("podman", "buildah", "runc", "mmdebstrap", "qemu-aarch64-static", "nsenter"),
    pytest.mark.usefixtures("image"),
]

AMD64, ARM64 = IMAGES.values()
MACHINES = {"amd64": 62, "arm64": 183}  # e_machine, elf(5)
SIZE_MAX = 8_000_000
# All the load of a test comes from one address, and no limit of a client is what is tested here.
ONE_CLIENT = {"KEYSERVICE_MAX_CONNECTIONS_PER_CLIENT": "0", "KEYSERVICE_MAX_BULK_STREAMS": "1000"}
CONFIG = "/etc/key-service/config.toml"


# What the image is.


def test_is_linted(tmp_path):
    """hadolint has no objection to the Dockerfile"""
    run("hadolint", REPOSITORY / "Dockerfile")


def test_takes_only_the_source(tmp_path):
    """the build context is the source and its manifests, whatever else lies in the tmp_path"""
    tree = copy_of_the_tree(tmp_path / "context")
    for name in [".env", ".git/config", "target/release/key-service", "server.key", "src/../tests/secret"]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("secret")
    (tree / "Dockerfile.context").write_text("FROM scratch\nCOPY . /\n")
    run("buildah", "build", "--quiet", "--isolation=chroot", "--tag=key-service-context", "-f", tree / "Dockerfile.context", tree)
    found = {entry.name for entry in files_of("key-service-context", tmp_path) if entry.isfile()}
    sources = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "src").rglob("*") if path.is_file()}
    expect(found, {"Cargo.toml", "Cargo.lock", ".cargo/config.toml", "benches/generator.rs"} | sources, "the context")


def test_is_one_file(image_arm64, packages, tmp_path, figures):
    """the image is one file of root's, with no shell, and has at most 8 MB"""
    entries = files_of(AMD64, tmp_path)
    found = [(entry.name, oct(entry.mode & 0o7777), entry.uid, entry.gid, entry.mtime) for entry in entries]
    expect(found, [("key-service", "0o755", 0, 0, EPOCH)], "the files of all layers")
    sizes = {}
    for architecture, tag in IMAGES.items():
        [binary] = files_of(tag, tmp_path)
        # This one is compiled for tests. A release has the binary of the package, with the list of its crates.
        listing = run("dpkg-deb", "--contents", packages[architecture]).stdout
        packaged = int(re.search(r"root/root +(\d+) .* \./usr/bin/key-service$", listing, re.M)[1])
        _, parts = sections(tmp_path / "key-service")
        sizes[architecture] = inspected(tag)["Size"] - binary.size + packaged + len(parts[".dep-v0"])
        assert sizes[architecture] <= SIZE_MAX, f"{sizes[architecture]} bytes for {architecture}"
    figures(", ".join(f"{size / 1e6:.2f} MB for {architecture}" for architecture, size in sizes.items()))


def test_is_static(image_arm64, tmp_path):
    """the binary asks for no loader and no library, on either architecture"""
    for tag, architecture in [(AMD64, "amd64"), (ARM64, "arm64")]:
        files_of(tag, tmp_path)
        machine, parts = sections(tmp_path / "key-service")
        expect((machine, ".interp" in parts), (MACHINES[architecture], False), f"machine and loader of {architecture}")
        expect(inspected(tag)["Architecture"], architecture, "the image's architecture")
        assert "NEEDED" not in run("readelf", "--dynamic", tmp_path / "key-service").stdout


def test_says_what_it_is(tmp_path):
    """user, ports, entry point, signal, health check and labels are those of the Dockerfile and of Cargo.toml"""
    found = inspected(AMD64)
    config = found["Config"]
    expect(config["User"], "65532:65532", "user")
    expect(sorted(config["ExposedPorts"]), ["1123/tcp", "8000/tcp"], "ports")
    expect(config["Entrypoint"], ["/key-service"], "entry point")
    expect(config.get("Cmd") or [], [], "arguments")
    expect(config["StopSignal"] in ("SIGTERM", "15"), True, "signal")
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


def test_lists_its_crates(image_arm64, tmp_path, figures):
    """the list of crates inside the binary has all that are in it, and no version that Cargo.lock has not"""
    lock = tomllib.loads((REPOSITORY / "Cargo.lock").read_text())["package"]
    locked = {(crate["name"], crate["version"]) for crate in lock}
    for tag, architecture in [(AMD64, "amd64"), (ARM64, "arm64")]:
        files_of(tag, tmp_path)
        _, parts = sections(tmp_path / "key-service")
        assert ".dep-v0" in parts, f"no list in the binary for {architecture}"
        listed = {(crate["name"], crate["version"]) for crate in json.loads(zlib.decompress(parts[".dep-v0"]))["packages"]}
        tree = run("cargo", "tree", "--locked", "--edges=no-dev", "--prefix=none", "--target", TARGETS[architecture], cwd=REPOSITORY).stdout
        linked = {tuple(re.match(r"(\S+) v(\S+)", line).groups()) for line in tree.splitlines() if line}
        expect(linked - listed, set(), f"crates that are not listed for {architecture}")
        # Some that optional features would bring are listed as well (cargo metadata can't tell them apart).
        expect(listed - locked, set(), f"crates that are listed for {architecture}, of another version or none")
    figures(f"{len(listed)} crates")


def test_is_reproducible(tmp_path, figures):
    """another folder gives the same file system, and in the OCI format the same image id"""
    here, there = "key-service:oci", "key-service:oci-elsewhere"
    # Elsewhere all is compiled; here what was compiled for the image is taken again, which needs --layers. It leaves its
    # mark in an image's history, so both are built with it.
    found = build(copy_of_the_tree(tmp_path / "elsewhere"), "amd64", there, "--format=oci", "--layers", "--no-cache")
    expect(inspected(there)["RootFS"]["Layers"], inspected(AMD64)["RootFS"]["Layers"], "layers, of the two formats")
    expect(found, build(REPOSITORY, "amd64", here, "--format=oci", "--layers"), "id")
    figures(found[:12])


# What a container does.


def test_serves(tmp_path):
    """read-only, without capabilities and privileges, it serves keys, health and metrics as process 1"""
    with Container() as container:
        keys = [container.get("/key/32") for _ in range(10)]
        expect({(status, len(key)) for status, key in keys}, {(200, 32)}, "status and length")
        expect(len({key for _, key in keys}), 10, "different keys")
        expect(container.get("/health"), (200, b"OK"), "health")
        expect(container.get("/readyz")[0], 200, "readiness")
        assert b'key_bytes_total{format="raw"} 320' in container.get("/metrics", 8000)[1]
        status = dict(line.split(":\t") for line in Path(f"/proc/{container.pid}/status").read_text().splitlines())
        expect(status["NSpid"].split()[-1], "1", "process")
        expect((set(status["Uid"].split()), set(status["Gid"].split())), ({"65532"}, {"65532"}), "user and group")
        expect((int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"]), (0, 0, "1"), "privileges")
        root = next(line.split() for line in Path(f"/proc/{container.pid}/mountinfo").read_text().splitlines() if line.split()[4] == "/")
        assert "ro" in root[5].split(","), root


def test_takes_arguments(tmp_path):
    """`docker run key-service --max-size 1024` takes the daemon's flags"""
    with Container("--max-size", "1024") as container:
        expect((container.get("/key/1024")[0], container.get("/key/1025")[0]), (200, 413), "at and above max-size")
    with Container("--max-size", "64") as container:
        expect((container.get("/key/64")[0], container.get("/key/65")[0]), (200, 413), "at and above another max-size")


def test_takes_a_file(tmp_path):
    """a configuration file mounted in its place is read, and again on SIGHUP"""
    file = tmp_path / "config.toml"
    file.write_text("max-size = 100\n")
    file.chmod(0o644)
    with Container(options=[f"--volume={file}:{CONFIG}:ro"]) as container:
        expect((container.get("/key/100")[0], container.get("/key/101")[0]), (200, 413), "at and above max-size")
        file.write_text("max-size = 200\n")  # in place: a mounted file is an inode
        container.signal("HUP")
        until("the reload", lambda: container.get("/key/101")[0] == 200)


def test_checks_its_health(tmp_path):
    """the image's health check finds a port given by variable, and fails where nothing answers"""
    with Container() as container:
        expect(container.health(), 0, "status of the check")
    with Container(variables={"KEYSERVICE_SRV_PORT": "9000"}) as container:
        expect((container.health(), container.get("/key/32", 9000)[0]), (0, 200), "with the port in a variable")
    with Container("--srv-port", "9000") as container:
        expect(container.get("/key/32", 9000)[0], 200, "with the port in an argument")
        expect(container.health(), 1, "the check, which does not know the argument")
        run("podman", "exec", container.name, "/key-service", "--srv-port", "9000", "health")


def test_refuses_a_broken_configuration(tmp_path):
    """wrong settings end it with 78, wrong usage with 2, each with a sentence"""
    status, log = ended(variables={"KEYSERVICE_MAX_SIZE": "1k"})
    expect(status, 78, "exit status")
    assert 'max-size: expected a whole number from 1 to 1073741824, found "1k" (KEYSERVICE_MAX_SIZE)' in log, log
    expect(ended("--srv-port", "99999")[0], 78, "exit status of a wrong port")
    expect(ended("--config", "/nowhere.toml")[0], 78, "exit status without the file")
    expect(ended("--no-such-flag")[0], 2, "exit status of a wrong flag")


def test_makes_no_keys_without_getrandom(tmp_path):
    """where getrandom(2) is denied it ends with 1 instead of reading /dev/urandom"""
    for number, name in [(1, "EPERM"), (38, "ENOSYS")]:
        profile = tmp_path / f"{name}.json"
        rule = {"names": ["getrandom"], "action": "SCMP_ACT_ERRNO", "errnoRet": number}
        profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
        status, log = ended(options=[f"--security-opt=seccomp={profile}"])
        expect(status, 1, f"exit status under {name}")
        assert "no keys can be made" in log, log


def test_stops_when_told(tmp_path):
    """SIGTERM, SIGINT and `docker stop` end it with 0"""
    with Container() as container:
        expect(container.stop(), 0, "exit status of stop")
    for name in ["TERM", "INT"]:
        with Container() as container:
            container.signal(name)
            expect(container.exit_status(), 0, f"exit status of SIG{name}")


def test_keeps_its_grace(tmp_path):
    """a client that never reads holds a stop for the drain's time, and not until it is killed"""
    with Container(variables={"KEYSERVICE_DRAIN_TIMEOUT": "2", "KEYSERVICE_MAX_SIZE": str(1 << 30)}) as container:
        with contextlib.closing(container.connect()) as idle:
            idle.sendall(f"GET /key/{1 << 30} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert idle.recv(1)
            expect(container.stop(), 0, "exit status")
        assert "stopped with connections still open" in container.log(), container.log()


def test_a_stop_loses_nothing_in_flight(tmp_path, figures):
    """a stop under 500 requests a second answers every request of an open connection, and long keys to the end"""
    size = 256 << 20  # longer than any socket buffer
    with contextlib.ExitStack() as stack:
        container = stack.enter_context(Container(variables={"KEYSERVICE_MAX_SIZE": str(size)}))
        half = [stack.enter_context(container.connect()) for _ in range(50)]
        for connection in half:
            connection.sendall(b"GET /key/32 HTTP/1.1\r\n")
        long = stack.enter_context(container.connect())
        long.sendall(f"GET /key/{size} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        received = len(long.recv(1000))
        with container.load(500, "until-refused") as seen:
            until("some load", lambda: int(counted(container, 'http_responses_total{status_code="200"}')) > 500)
            container.signal("TERM")
            until("the drain", lambda: "stopping" in container.log())
            for connection in half:
                connection.sendall(b"Host: localhost\r\n\r\n")
            for connection in half:
                head, _, key = whole(connection).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 ") and len(key) == 32, head
                assert b"connection: close" in head.lower(), head
            until("the listener's end", lambda: is_refused(container))  # the long key is still on its way then
            while piece := long.recv(1 << 20):
                received += len(piece)
            assert received > size, f"{received} bytes of a key of {size}"
            expect(container.exit_status(), 0, "exit status")
        expect((seen["failed"], seen["failures"]), (0, []), "failures")
        assert seen["refused"] > 0, seen
        figures(f"{seen['served']} requests answered, none cut, {seen['refused']} connections refused afterwards")


def is_refused(container):
    try:
        container.connect().close()
    except ConnectionRefusedError:
        return True
    return False


def whole(connection):
    """Everything until the server closes."""
    answer = b""
    while piece := connection.recv(1 << 16):
        answer += piece
    return answer


def counted(container, name):
    text = container.get("/metrics", 8000)[1].decode()
    found = re.search(rf"^{re.escape(name)} (.*)$", text, re.M)
    return float(found[1]) if found else 0.0


def test_lives_with_little_memory(packages, tmp_path, figures):
    """with 32 MiB it serves 1,000 connections of which 200 don't read their long keys"""
    # How much memory it takes depends on how it is optimised: what a release has is the package's binary.
    run("dpkg-deb", "-x", packages["amd64"], tmp_path)
    options = ["--memory=32m", "--memory-swap=32m", f"--volume={tmp_path}/usr/bin/key-service:/key-service:ro"]
    with Container(options=options, variables={"KEYSERVICE_MAX_SIZE": str(64 << 20), **ONE_CLIENT}) as container:
        group = memory_group(container.pid)
        expect(int((group / "memory.limit_in_bytes").read_text()), 32 << 20, "the limit")
        expect(counted(container, "cgroup_memory_limit_bytes"), 32 << 20, "the limit that it reports")
        with contextlib.ExitStack() as stack:
            for n in range(1000):
                connection = stack.enter_context(contextlib.closing(container.connect()))
                path = f"/key/{64 << 20}" if n < 200 else "/key/32"
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert connection.recv(12) == b"HTTP/1.1 200"
            expect(container.get("/health"), (200, b"OK"), "health")
        with container.load(500) as seen:
            until("some load", lambda: counted(container, 'http_responses_total{status_code="200"}') > 3000)
        expect((seen["failed"], seen["failures"]), (0, []), "failures")
        expect(container.state()["OOMKilled"], False, "killed for memory")
        peak = int((group / "memory.max_usage_in_bytes").read_text())
        assert peak < 24 << 20, f"{peak / 2**20:.1f} MiB: so near the limit that it is exceeded now and then"
        expect(container.stop(), 0, "exit status")
        figures(f"at most {peak / 2**20:.1f} MiB, kernel and socket buffers counted")


def memory_group(pid):
    path = next(line.split(":")[2] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if ":memory:" in line)
    return Path("/sys/fs/cgroup/memory") / path.lstrip("/")


def test_lives_with_few_descriptors(tmp_path, figures):
    """with 1,024 open files it says how many connections it grants, and answers those beyond with 503"""
    variables = ONE_CLIENT | {"KEYSERVICE_HEAD_TIMEOUT": "3600"}
    with Container(options=["--ulimit=nofile=1024:1024"], variables=variables) as container:
        assert "max-connections is lowered" in container.log(), container.log()
        granted = int(counted(container, "http_connections_limit"))
        assert 500 < granted < 1024, granted
        with contextlib.ExitStack() as stack:
            for _ in range(granted):
                connection = stack.enter_context(contextlib.closing(container.connect()))
                # With the beginning of another request: an idle connection would make room for a new one.
                connection.sendall(b"GET /key/32 HTTP/1.1\r\nHost: localhost\r\n\r\nGET ")
                assert connection.recv(12) == b"HTTP/1.1 200"
            expect(container.get("/key/32")[0], 503, "beyond the limit")
            expect(container.health(), 0, "the health check, at the limit")
        until("room", lambda: container.get("/key/32")[0] == 200)
        expect(counted(container, 'accept_errors_total{kind="resources"}'), 0, "failures of accept")
        figures(f"{granted} connections")


def test_runs_on_arm64(image_arm64, tmp_path):
    """the binary for arm64 tells its version, reads its configuration, serves a key and stops, under emulation"""
    files_of(ARM64, tmp_path)
    emulated = ["qemu-aarch64-static", str(tmp_path / "key-service")]
    version = inspected(ARM64)["Labels"]["org.opencontainers.image.version"]
    expect(run(*emulated, "--version").stdout, f"key-service {version}\n", "version")
    assert "max-size = 77\n" in run(*emulated, "--max-size", "77", "--check").stdout
    command = [*emulated, "--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon, peers.killed_after(daemon, "key-service"):
        port = next(found[1] for line in daemon.stderr if (found := re.search(r"Keys on 127\.0\.0\.1:(\d+)", line)))
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=TIMEOUT)
        for size in [32, 1024]:
            connection.request("GET", f"/key/{size}")
            answer = connection.getresponse()
            key = answer.read()
            expect((answer.status, len(key)), (200, size), "status and length")
            assert len(set(key)) > size // 8, key
        connection.close()
        expect(run(*emulated, "health", "--url", f"http://127.0.0.1:{port}").stdout, "OK\n", "health")
        peers.stop_daemon(daemon, "key-service")
        expect(daemon.returncode, 0, "exit status")

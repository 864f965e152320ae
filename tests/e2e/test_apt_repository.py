"""Tests the apt repository that `just apt-repository` writes: first the script alone, then with apt on booted Debian 12 and 13.

The systems get the repository from nginx, over HTTPS, in their own network. The commands are those of docs/debian.md.
"""

import contextlib
import fcntl
import gzip
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest
from support import certificates, peers
from support.conditions import TIMEOUT, expect, until
from support.daemon import REPOSITORY
from support.machine import PACKAGES, Machine, as_root, repack
from support.pages import commands

pytestmark = pytest.mark.tools("apt-ftparchive", "dpkg-deb", "git", "gpg", "gpgv", "sqv")

HOST = "packages.example.org"  # as in docs/debian.md
POOL = "pool/main/k/key-service"
ARCHITECTURES = ["amd64", "arm64"]
CREATE = commands("docs/debian.md", "gpg --quick-generate-key")
INSTALL = commands("docs/debian.md", "sudo curl -fsSLo /etc/apt/keyrings/key-service.asc")
UPGRADE = commands("docs/debian.md", "sudo apt update && sudo apt install --only-upgrade")
PIN = commands("docs/debian.md", "sudo tee /etc/apt/preferences.d/key-service")


class Publisher:
    """The publisher of a repository, whose home directory has the signing keys. It has a short path, because of the agent's socket."""

    def __init__(self):
        self.home = Path(tempfile.mkdtemp(prefix="key-service-apt-"))
        self.gnupg = self.home / ".gnupg"
        self.gnupg.mkdir(mode=0o700)
        # GnuPG asks for a passphrase otherwise.
        (self.home / "empty").touch()
        (self.gnupg / "gpg.conf").write_text(f"batch\npinentry-mode loopback\npassphrase-file {self.home}/empty\n")
        self.environment = {"PATH": os.environ["PATH"], "HOME": str(self.home)}
        # gpg would start the agent, too, and would wait for it for 5 s. This command returns when the agent listens.
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # the agent keeps them
        subprocess.run(["gpg-agent", "--daemon"], env=self.environment, check=True, timeout=TIMEOUT, **quiet)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        subprocess.run(["gpgconf", "--kill", "gpg-agent"], env=self.environment, check=True)
        shutil.rmtree(self.home)

    def run(self, *command, ok=0, **environment):
        """The standard output and error of a command in the directory of this repository."""
        done = subprocess.run(
            [*map(str, command)],
            env={**self.environment, **environment},
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == ok, f"{command}: expected status {ok}, found {done.returncode}\n{done.stdout}"
        return done.stdout

    def key(self, *options, name="Packages", expires="1d"):
        """Creates a signing key, and returns its fingerprint."""
        self.run("gpg", *options, "--quick-generate-key", name, "ed25519", "sign", expires)
        return self.fingerprints()[-1]

    def fingerprints(self):
        lines = self.run("gpg", "--no-auto-check-trustdb", "--list-secret-keys", "--with-colons").splitlines()
        return [line.split(":")[9] for line in lines if line.startswith("fpr:")]

    def publish(self, directory, *packages, key, ok=0, **environment):
        return self.run("packaging/apt-repository", directory, *packages, ok=ok, APT_SIGNING_KEY=key, **environment)


@pytest.fixture(scope="module")
def publisher():
    with Publisher() as publisher:
        yield publisher


@pytest.fixture(scope="module")
def key(publisher):
    return publisher.key()


def package(directory, version, architecture, name="key-service", description="none"):
    """Builds a package with no files but its description."""
    tree = Path(tempfile.mkdtemp(dir=directory))
    (tree / "DEBIAN").mkdir()
    control = (
        f"Package: {name}\nVersion: {version}\nArchitecture: {architecture}\nMaintainer: A <a@example.org>\nDescription: {description}\n"
    )
    (tree / "DEBIAN/control").write_text(control)
    target = tree / "built.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, target], check=True, stdout=subprocess.DEVNULL)
    return target


def both(directory, version):
    """A package for each architecture."""
    return [package(directory, version, architecture) for architecture in ARCHITECTURES]


def files(directory):
    """The hash of each file."""
    return {path.relative_to(directory): sha256(path) for path in directory.rglob("*") if path.is_file()}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fields(text):
    """The fields of a paragraph of deb822(5)."""
    return dict(re.findall(r"^([\w-]+): ?(.*(?:\n .*)*)", text, re.M))


def check_client_view(directory, keyring, signed):
    """Checks what a client with this InRelease finds: each index file by its hash, and each package. Returns the file names of those."""
    verified = subprocess.run(["gpgv", "--keyring", keyring, "--output", "-", signed], capture_output=True, text=True)
    assert verified.returncode == 0, verified.stderr
    found = set()
    for line in fields(verified.stdout)["SHA256"].split("\n")[1:]:
        digest, size, name = line.split()
        index = directory / "dists/stable" / Path(name).parent / "by-hash/SHA256" / digest
        expect((sha256(index), index.stat().st_size), (digest, int(size)), f"hash and size of {name}")
        data = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(Path(name).suffix, bytes)(index.read_bytes())
        for paragraph in data.decode().rstrip().split("\n\n"):
            listed = fields(paragraph)
            expect(sha256(directory / listed["Filename"]), listed["SHA256"], listed["Filename"])
            found.add(Path(listed["Filename"]).name)
    return found


def names(*versions):
    return {f"key-service_{version}_{architecture}.deb" for version in versions for architecture in ARCHITECTURES}


@pytest.fixture
def keyring(publisher, key, tmp_path):
    path = tmp_path / "keyring.gpg"
    publisher.run("gpg", "--no-auto-check-trustdb", "--output", path, "--export", key)
    return path


def test_repository_has_the_documented_files(publisher, key, keyring, tmp_path):
    """the repository has indexes for both architectures, signed, and the key and entry for clients"""
    directory = tmp_path / "new/packages"
    publisher.publish(directory, *both(tmp_path, "1.0"), key=key, APT_URL=f"https://{HOST}")
    suite = directory / "dists/stable"
    expect(check_client_view(directory, keyring, suite / "InRelease"), names("1.0"), "packages")
    release = fields((suite / "Release").read_text())
    wanted = {"Origin": "key-service", "Suite": "stable", "Components": "main", "Architectures": "amd64 arm64", "Acquire-By-Hash": "yes"}
    expect({name: release[name] for name in wanted}, wanted, "fields of Release")
    signature = ["gpgv", "--keyring", keyring, suite / "Release.gpg", suite / "Release"]
    subprocess.run(signature, check=True, capture_output=True)
    for line in release["SHA256"].split("\n")[1:]:
        digest, _, name = line.split()
        expect(sha256(suite / name), digest, name)
    expect(
        fields((directory / "key-service.sources").read_text()),
        {
            "Types": "deb",
            "URIs": f"https://{HOST}",
            "Suites": "stable",
            "Components": "main",
            "Signed-By": "/etc/apt/keyrings/key-service.asc",
        },
        "fields of key-service.sources",
    )
    entry = (directory / "key-service.sources").read_text()
    publisher.publish(directory, *both(tmp_path, "1.1"), key=key)
    expect((directory / "key-service.sources").read_text(), entry, "key-service.sources after a run without APT_URL")
    assert key in publisher.run("gpg", "--no-auto-check-trustdb", "--show-keys", directory / "key-service.asc")
    top = {path.relative_to(directory).parts[0] for path in directory.rglob("*")}
    expect(top, {"dists", "pool", "key-service.asc", "key-service.sources"}, "files at the top")
    unreadable = [path for path in directory.rglob("*") if path.stat().st_mode & 0o444 != 0o444]
    expect(unreadable, [], "files that a web server may not be able to read")


def test_same_packages_give_the_same_index(publisher, key, tmp_path):
    """the index depends on the packages and the commit only; a change gets a later date, so that clients ignore the index before it"""
    old, new = both(tmp_path, "1.0"), both(tmp_path, "1.1")
    first, second = tmp_path / "first", tmp_path / "second"

    def index(directory):
        return {name: digest for name, digest in files(directory / "dists").items() if name.name not in ("InRelease", "Release.gpg")}

    def date(directory):
        return parsedate_to_datetime(fields((directory / "dists/stable/Release").read_text())["Date"]).timestamp()

    publisher.publish(first, *old, *new, key=key)
    publisher.publish(second, *reversed(new), *reversed(old), key=key)
    expect(index(second), index(first), "index")
    commit = int(subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=REPOSITORY, capture_output=True, check=True).stdout)
    expect(date(first), commit, "date")
    before = index(first)
    publisher.publish(first, *old, key=key, SOURCE_DATE_EPOCH="2000000000")
    expect(index(first), before, "index without a change")
    publisher.publish(first, *both(tmp_path, "1.2"), key=key, SOURCE_DATE_EPOCH="1")
    expect(date(first), commit + 1, "date of a change at an older commit")
    publisher.publish(first, *both(tmp_path, "1.3"), key=key, SOURCE_DATE_EPOCH="2000000000")
    expect(date(first), 2_000_000_000, "date of a change at a newer commit")


def test_clients_see_the_old_or_the_new_state(publisher, key, keyring, tmp_path):
    """before each step of a publication, and for a client that began before it, each file that is named exists and has its hash"""
    directory, snapshots, programs = (tmp_path / name for name in ("packages", "snapshots", "programs"))
    for made in (snapshots, programs):
        made.mkdir()
    (programs / "mv").write_text(
        f'#!/bin/sh -e\n[ ! -e {directory}/dists ] || cp -al {directory} {snapshots}/$$\nexec {shutil.which("mv")} "$@"\n'
    )
    (programs / "mv").chmod(0o755)
    publisher.publish(directory, *both(tmp_path, "1.0"), key=key)
    before = shutil.copy(directory / "dists/stable/InRelease", tmp_path / "InRelease")
    publisher.publish(directory, *both(tmp_path, "1.1"), key=key, PATH=f"{programs}:{os.environ['PATH']}")
    seen = [check_client_view(each, keyring, each / "dists/stable/InRelease") for each in snapshots.iterdir()]
    assert len(seen) > 10, f"expected a snapshot for each file, found {len(seen)}"
    assert all(each == names("1.0") for each in seen), seen
    expect(check_client_view(directory, keyring, before), names("1.0"), "packages for a client that has the previous InRelease")
    expect(check_client_view(directory, keyring, directory / "dists/stable/InRelease"), names("1.0", "1.1"), "packages")


def test_withdrawn_version_is_removed(publisher, key, keyring, tmp_path):
    """a version whose files were removed from the pool is not in the next index"""
    directory = tmp_path / "packages"
    publisher.publish(directory, *both(tmp_path, "1.0"), *both(tmp_path, "1.1"), key=key)
    for path in (directory / POOL).glob("*_1.1_*"):
        path.unlink()
    publisher.publish(directory, *(directory / POOL).iterdir(), key=key)
    expect(check_client_view(directory, keyring, directory / "dists/stable/InRelease"), names("1.0"), "packages")


def test_wrong_input_changes_nothing(publisher, key, tmp_path):
    """a run that is refused states what it expected and found, and leaves the repository as it was"""
    directory, tools = tmp_path / "packages", tmp_path / "tools"
    publisher.publish(directory, *both(tmp_path, "1.0"), key=key)
    good = both(tmp_path, "1.1")
    other = package(tmp_path, "1.0", "amd64", description="changed")
    expired = publisher.key("--faked-system-time", "20200101T000000", name="Expired")
    weak = publisher.key("--cert-digest-algo", "SHA1", name="Weak")
    tools.mkdir()
    for tool in ("bash", "dirname", "realpath"):
        (tools / tool).symlink_to(shutil.which(tool))
    before = files(directory)
    for packages, changes, status, error in [
        (good, {"PATH": str(tools)}, 3, "apt-ftparchive is missing: apt-get install apt-utils"),
        (good, {"key": ""}, 1, "APT_SIGNING_KEY: expected the fingerprint of a signing key, found none"),
        (good, {"key": "Weak"}, 1, "APT_SIGNING_KEY: expected a fingerprint of 40 hexadecimal digits, found Weak"),
        (good, {"key": "A" * 40}, 1, f"expected a key in GnuPG's secret key ring, found none for {'A' * 40}"),
        (good, {"key": expired}, 2, "Unusable secret key"),
        (good, {"key": weak}, 1, "expected signatures that sqv accepts, found:"),
        ([tmp_path / "gone.deb"], {}, 1, f"expected a package, found no file {tmp_path}/gone.deb"),
        ([tools / "bash"], {}, 1, "is not a Debian format archive"),
        ([package(tmp_path, "1.0", "amd64", name="curl")], {}, 1, "expected a package key-service, found curl"),
        (good[:1], {}, 1, "expected both architectures of each version, found no key-service_1.1_arm64.deb"),
        ([other], {}, 1, f"{other}: expected the contents of {directory}/{POOL}/key-service_1.0_amd64.deb, which has the same version"),
    ]:
        output = publisher.publish(directory, *packages, ok=status, **{"key": key, **changes})
        assert error in output, f"expected {error!r}, found\n{output}"
        expect(files(directory), before, f"the repository after {error!r}")


def test_changed_published_package_is_refused(publisher, key, tmp_path):
    """a package that changed in the pool after its publication is not signed"""
    directory = tmp_path / "packages"
    publisher.publish(directory, *both(tmp_path, "1.0"), key=key)
    shutil.copy(package(tmp_path, "1.0", "amd64", description="changed"), directory / POOL / "key-service_1.0_amd64.deb")
    output = publisher.publish(directory, *both(tmp_path, "1.1"), key=key, ok=1)
    assert f"found other contents of {POOL}/key-service_1.0_amd64.deb" in output, output


def test_second_run_at_once_is_refused(publisher, key, tmp_path):
    """while one run changes the repository, another one is refused"""
    directory = tmp_path / "packages"
    directory.mkdir()
    held = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        output = publisher.publish(directory, *both(tmp_path, "1.0"), key=key, ok=1)
    finally:
        os.close(held)
    assert "another packaging/apt-repository changes it" in output, output


# On booted systems.

NGINX = """
daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log; worker_processes 1; user root;
events {{}}
http {{
    access_log {directory}/access.log;
    client_body_temp_path {directory}/client_temp; proxy_temp_path {directory}/proxy_temp; fastcgi_temp_path {directory}/fastcgi_temp;
    uwsgi_temp_path {directory}/uwsgi_temp; scgi_temp_path {directory}/scgi_temp;
    server {{
        listen 127.0.0.1:443 ssl;
        ssl_certificate {directory}/server.pem; ssl_certificate_key {directory}/server.key;
        root {directory}/served;
    }}
}}
"""


def marks(suite):
    tools = pytest.mark.tools("mmdebstrap", "systemd-nspawn", "nginx", "openssl", "curl", "just")
    return [pytest.mark.root, pytest.mark.slow, tools, pytest.mark.xdist_group(f"repository-{suite}")]


class Host(Machine):
    """A machine with curl. In its network, nginx serves as packages.example.org what `serve` named last."""

    packages = PACKAGES + ",ca-certificates,curl"
    kind = "-curl"

    def __init__(self, suite, directory, package, served):
        super().__init__(suite, directory, package)
        self.served = served

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.push(super().__exit__)
            self.run("rm /root/key-service.deb /etc/apt/sources.list")
            self.write("/etc/hosts", f"127.0.0.1 localhost {HOST}\n")
            self.write("/etc/apt/apt.conf.d/99-yes", 'APT::Get::Assume-Yes "true"; APT::Update::Error-Mode "any";\n')
            self.serve(self.served)
            certificates.self_signed(self.directory / "server.key", self.directory / "server.pem", names=f"DNS:{HOST}")
            self.install_file(self.directory / "server.pem", "/usr/local/share/ca-certificates/server.crt")
            self.run("update-ca-certificates")
            (self.directory / "nginx.conf").write_text(NGINX.format(directory=self.directory))
            command = ["nginx", "-c", self.directory / "nginx.conf", "-e", self.directory / "error.log"]
            web = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *self.outside(*command)])
            stack.callback(peers.stop_peer, web, "nginx")
            until(
                "nginx", lambda: not web.poll() and not self.run(f"curl -fsSo /dev/null https://{HOST}/key-service.asc", ok=None).returncode
            )
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def serve(self, directory):
        link = self.directory / "next"
        link.symlink_to(directory)
        link.rename(self.directory / "served")

    def apt(self, script, ok=0):
        done = self.run(as_root(script), ok=ok, timeout=120)
        return done.stdout + done.stderr

    def forget_indexes(self):
        """Makes apt load the indexes of the published repository again, whatever it has accepted before."""
        self.serve(self.served)
        self.apt("rm -r /var/lib/apt/lists && apt-get update")

    def installed(self):
        """The version of the package, and the process of the service."""
        return self.run("dpkg-query -W -f '${Version}' key-service").stdout, self.show("MainPID")

    def candidate(self):
        """The version that apt would install."""
        return re.search(r"Candidate: (.*)", self.apt("apt-cache policy key-service"))[1]


@pytest.fixture(scope="module")
def created(packages):
    """A publisher with the repository that the commands of docs/debian.md create, its signing key and the version in it."""
    with Publisher() as publisher:
        publisher.run("sh", "-ec", CREATE)
        [publisher.fingerprint] = publisher.fingerprints()
        publisher.directory = publisher.home / "key-service-packages"
        publisher.version = packages["amd64"].name.split("_")[1]
        yield publisher


def newer(publisher, packages, suffix):
    """Builds both packages with a suffix to their version, and returns them."""
    return [repack(path, publisher.home / f"key-service{suffix}_{name}.deb", suffix) for name, path in packages.items()]


@pytest.fixture(scope="module")
def attacked(created, packages):
    """A copy of the repository with a newer version, for attacks on clients that would install it."""
    directory = created.home / "attacked"
    shutil.copytree(created.directory, directory)
    created.publish(directory, *newer(created, packages, "+attacked"), key=created.fingerprint)
    return directory


@pytest.fixture(scope="module", params=[pytest.param(suite, marks=marks(suite)) for suite in ("bookworm", "trixie")])
def machine(request, created, packages, tmp_path_factory):
    """A machine that has installed the package from the repository, as in docs/debian.md."""
    served = tmp_path_factory.mktemp("repository") / "packages"
    shutil.copytree(created.directory, served)
    with Host(request.param, tmp_path_factory.mktemp(request.param), packages["amd64"], served) as machine:
        machine.output = machine.apt(f"set -e\n{INSTALL}")
        yield machine


def test_package_installs_from_the_repository(machine, created):
    """the commands of docs/debian.md add the repository and install the package, and the service answers"""
    assert re.search(r"^[0-9a-f]{64}$", machine.output, re.M), machine.output
    assert f"https://{HOST} stable/main amd64 key-service amd64 {created.version}" in machine.output, machine.output
    assert not re.search(r"^(W|Warning|N|Notice): ", machine.output, re.M), machine.output
    expect(machine.installed()[0], created.version, "version")
    requests = (machine.directory / "access.log").read_text()
    assert "/by-hash/SHA256/" in requests and "/Packages" not in requests, f"expected apt to load indexes by their hash: {requests}"


def test_arm64_package_is_in_the_repository(machine, packages):
    """a client of the architecture arm64 gets the arm64 package"""
    machine.apt("dpkg --add-architecture arm64 && apt-get update && cd /tmp && apt-get download key-service:arm64")
    [downloaded] = (machine.root / "tmp").glob("key-service_*_arm64.deb")
    expect(sha256(downloaded), sha256(packages["arm64"]), "hash of the package")
    machine.apt("rm /tmp/*.deb && dpkg --remove-architecture arm64")
    machine.forget_indexes()


def test_upgrades_from_the_repository_lose_nothing(machine, created, packages, figures):
    """during an upgrade to a version that is published meanwhile, no request is refused or fails; the old version can be installed again"""
    version, pid = machine.installed()
    old = shutil.copytree(machine.served, machine.directory / "old")
    built, wanted = newer(created, packages, "+1"), f"{created.version}+1"
    with machine.load() as seen:
        created.publish(machine.served, *built, key=created.fingerprint)
        machine.apt(UPGRADE)
    expect((seen["failed"], seen["failures"]), (0, []), "failures")
    expect(machine.installed()[0], wanted, "version")
    assert machine.installed()[1] not in (pid, "0"), "the old process still runs"
    figures(f"{seen['served']} requests in {seen['seconds']} s, the slowest {seen['slowest']} s")
    # A server that shows an old state, with its valid signature, can't hide the new version.
    machine.serve(old)
    machine.apt("apt-get update")
    offered = machine.apt("apt-cache madison key-service")  # unlike the candidate, not what is installed
    assert f"{wanted} | https://{HOST} stable/main" in offered, offered
    machine.serve(machine.served)
    machine.apt(f"apt-get install --allow-downgrades key-service={version}")
    expect(machine.installed()[0], version, "version after going back")
    machine.apt(UPGRADE)
    expect(machine.installed()[0], wanted, "version after the second upgrade")


def edit_index(directory, change):
    """Changes the text of the amd64 index, and its hashes in the index of the indexes, whose signature becomes wrong."""
    index = directory / "dists/stable/main/binary-amd64"
    text = change((index / "Packages").read_text()).encode()
    for name, data in [("Packages", text), ("Packages.gz", gzip.compress(text)), ("Packages.xz", lzma.compress(text))]:
        digest = hashlib.sha256(data).hexdigest()
        (index / name).write_bytes(data)
        (index / "by-hash/SHA256" / digest).write_bytes(data)
        for signed in ("InRelease", "Release"):
            path = directory / "dists/stable" / signed
            path.write_text(
                re.sub(rf"^ \w+ +\d+ (main/binary-amd64/{re.escape(name)})$", rf" {digest} {len(data)} \1", path.read_text(), flags=re.M)
            )


def sign(publisher, directory, *signers):
    """Signs the index as it is."""
    suite = directory / "dists/stable"
    for path in (suite / "InRelease", suite / "Release.gpg"):
        path.unlink(missing_ok=True)
    options = [option for signer in signers for option in ("--local-user", signer)]
    publisher.run("gpg", *options, "--output", suite / "InRelease", "--clearsign", suite / "Release")


def change_index(_, directory):
    for path in directory.glob("dists/stable/main/binary-amd64/by-hash/SHA256/*"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    for path in directory.glob("dists/stable/main/binary-amd64/Packages*"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")


def change_signed_index(_, directory):
    edit_index(directory, lambda text: text.replace("Priority: optional", "Priority: required"))


def remove_signature(_, directory):
    for name in ("InRelease", "Release.gpg"):
        (directory / "dists/stable" / name).unlink()


def sign_with_another_key(publisher, directory):
    sign(publisher, directory, publisher.key(name=f"Other {directory}"))


def replace_package(_, directory):
    [path] = (directory / POOL).glob("*+attacked_amd64.deb")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        pytest.param(change_index, "Hash Sum mismatch", id="index"),
        pytest.param(change_signed_index, "BADSIG|Message has been manipulated", id="signed-index"),
        pytest.param(remove_signature, r"https://\S+ stable Release' is no longer signed", id="unsigned"),
        pytest.param(sign_with_another_key, "NO_PUBKEY|Missing key", id="another-key"),
        pytest.param(replace_package, "Hash Sum mismatch", id="package"),
    ],
)
def test_tampered_repository_is_refused(machine, created, attacked, tmp_path, attack, message):
    """apt refuses a repository that was changed after it was signed, states why, and leaves the installed package as it is"""
    machine.forget_indexes()
    before, candidate = machine.installed(), machine.candidate()
    directory = shutil.copytree(attacked, tmp_path / "packages")
    attack(created, directory)
    machine.serve(directory)
    found = machine.apt("apt-get update", ok=None)
    if attack is replace_package:
        found = machine.apt("apt-get install key-service", ok=100)
    else:
        expect(machine.candidate(), candidate, "candidate")
    assert re.search(message, found), found
    expect(machine.installed(), before, "version and process")
    machine.forget_indexes()


def test_untampered_copy_is_accepted(machine, attacked):
    """the repository that the attacks change is accepted without them: its newer version is the candidate"""
    machine.serve(attacked)
    machine.apt("apt-get update")
    assert machine.candidate().endswith("+attacked"), machine.candidate()
    machine.forget_indexes()


def test_signing_key_can_be_replaced(machine, created, tmp_path):
    """while an index has signatures of both keys, hosts with the old key accept it; later they need the new key"""
    old, new = created.fingerprint, created.key(name=f"New {tmp_path}")
    directory = shutil.copytree(machine.served, tmp_path / "packages")
    built = list((directory / POOL).iterdir())
    machine.serve(directory)
    download = INSTALL.splitlines()[0]
    created.publish(directory, *built, key=f"{old} {new}")
    machine.apt("rm -r /var/lib/apt/lists && apt-get update")
    keyring = (machine.root / "etc/apt/keyrings/key-service.asc").read_text()
    machine.apt(download)
    created.publish(directory, *built, key=new)
    machine.apt("rm -r /var/lib/apt/lists && apt-get update")
    machine.write("/etc/apt/keyrings/key-service.asc", keyring)
    output = machine.apt("rm -r /var/lib/apt/lists && apt-get update", ok=100)
    assert re.search("NO_PUBKEY|Missing key", output), output
    machine.forget_indexes()


def test_pinned_repository_provides_no_other_package(machine, created, attacked, tmp_path):
    """with the preferences of docs/debian.md, another package in the repository is not a candidate; key-service is"""
    directory = shutil.copytree(attacked, tmp_path / "packages")
    other = f"Package: curl\nArchitecture: amd64\nVersion: 99\nFilename: pool/c.deb\nSize: 1\nSHA256: {'0' * 64}\n"
    edit_index(directory, lambda text: f"{text}\n{other}")
    sign(created, directory, created.fingerprint)
    machine.serve(directory)
    machine.apt("apt-get update")
    assert "Candidate: 99" in machine.apt("apt-cache policy curl"), "expected the other package without the preferences"
    machine.apt(PIN)
    assert "Candidate: 99" not in machine.apt("apt-cache policy curl")
    assert machine.candidate().endswith("+attacked"), machine.candidate()
    machine.apt("rm /etc/apt/preferences.d/key-service")
    machine.forget_indexes()

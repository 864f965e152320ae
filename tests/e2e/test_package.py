"""Tests the Debian packages themselves: lintian, contents, reproducibility, and the arm64 binary under emulation.

test_system.py tests the installed package on a booted Debian.
"""

import os
import re
import socket
import subprocess

import pytest
from support import peers
from support.conditions import TIMEOUT, retry_if_stalled
from support.daemon import REPOSITORY

pytestmark = pytest.mark.tools("dpkg-deb")

SIZE_MAX = 2_500_000  # bytes of a package
BINARY_MAX = 6_500_000

every_architecture = pytest.mark.parametrize("architecture", ["amd64", "arm64"])


def output(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def trees(packages, tmp_path_factory):
    """For each architecture, the directory with the unpacked package."""
    trees = {architecture: tmp_path_factory.mktemp(architecture) for architecture in packages}
    for architecture, package in packages.items():
        output("dpkg-deb", "-x", package, trees[architecture])
    return trees


@pytest.mark.slow
@pytest.mark.tools("git")
@pytest.mark.timeout(3600)
def test_package_is_reproducible(packages, tmp_path, figures):
    """a build in a new clone in another directory gives the same package, byte for byte"""
    # One architecture is enough: the same script builds both, with the same files, dates and flags. Only the C compiler and the linker
    # differ. They could put a path into a binary, which test_binary_is_static_and_stripped detects for both architectures.
    changed = output("git", "status", "--porcelain", cwd=REPOSITORY)
    assert not changed, f"expected no uncommitted changes, because the test builds a clone of this repository; found\n{changed}"
    clone = tmp_path / "a-directory-with-another-name" / "clone"
    output("git", "clone", "--quiet", "--shared", REPOSITORY, clone)
    output("packaging/build-deb", "amd64", cwd=clone)
    [theirs] = (clone / "target/debian").glob("key-service_*_amd64.deb")
    ours = packages["amd64"]
    differ = subprocess.run(["cmp", ours, theirs], capture_output=True, text=True)
    assert differ.returncode == 0, f"{differ.stdout}if {ours} is older than the last commit, rebuild it: just deb"
    figures(f"{ours.stat().st_size} bytes")


@pytest.mark.tools("git")
def test_binary_names_its_commit(trees, figures):
    """`key-service --version` prints the commit that the package was built from, and the commit's date"""
    version = output(trees["amd64"] / "usr/bin/key-service", "--version").strip()
    found = re.fullmatch(r"key-service \S+ \(([0-9a-f]{7}), (\S+)\)", version)
    assert found, version
    log = ["git", "log", "--format=%H %cd", "--date=format-local:%Y-%m-%d"]
    commits = output(*log, cwd=REPOSITORY, env={**os.environ, "TZ": "UTC"}).splitlines()
    # Seven digits may be those of several commits, which git would refuse to choose from.
    dates = {date for commit, date in map(str.split, commits) if commit.startswith(found[1])}
    assert found[2] in dates, f"expected the date of the commit, {dates}, found {version}"
    figures(version)


@pytest.mark.tools("lintian")
@every_architecture
def test_package_passes_lintian(architecture, packages, figures):
    """lintian reports nothing, and the package is within its size limit"""
    package = packages[architecture]
    found = output("lintian", "--allow-root", "--pedantic", "--fail-on", "error,warning,info,pedantic", package)
    assert not found.strip(), found
    size = package.stat().st_size
    assert size <= SIZE_MAX, f"{package.name}: {size} bytes"
    figures(f"{architecture} {size} bytes")


@pytest.mark.tools("readelf")
@every_architecture
def test_binary_is_static_and_stripped(architecture, trees, figures):
    """the binary needs no library, has no symbols, and is within its size limit"""
    binary = trees[architecture] / "usr/bin/key-service"
    assert "NEEDED" not in output("readelf", "--dynamic", "--wide", binary)
    sections = output("readelf", "--sections", "--wide", binary)
    assert ".symtab" not in sections and ".debug_info" not in sections, sections
    assert str(REPOSITORY).encode() not in binary.read_bytes(), "the binary contains the path of the build directory"
    size = binary.stat().st_size
    assert size <= BINARY_MAX, size
    figures(f"{size} bytes")


@pytest.mark.tools("mandoc")
def test_manual_pages_pass_mandoc(trees):
    """mandoc reports no errors in the manual pages"""
    pages = sorted((trees["amd64"] / "usr/share/man").glob("man*/*.gz"))
    assert len(pages) == len([*(REPOSITORY / "packaging/man").iterdir()]), f"expected every page of packaging/man, found {pages}"
    for page in pages:
        output("mandoc", "-T", "lint", "-W", "warning", page)


@pytest.mark.tools("qemu-aarch64-static", "curl", "readelf", "setpriv")
def test_arm64_binary_works(trees, tmp_path, figures):
    """under qemu, the arm64 binary prints its version, reads its configuration and serves a key"""
    binary = trees["arm64"] / "usr/bin/key-service"
    assert "AArch64" in output("readelf", "--file-header", binary)
    emulated = ["qemu-aarch64-static", binary]
    version = output(*emulated, "--version").strip()
    assert "max-size = 4096\n" in output(*emulated, "--check", "--max-size", "4096")
    address, notify = tmp_path / "keys", tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(notify))
        manager.settimeout(TIMEOUT)
        daemon = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *emulated, "--host", f"unix:{address}", "--metrics-port", "0"],
            stderr=subprocess.DEVNULL,
            env={**os.environ, "NOTIFY_SOCKET": str(notify)},
        )
        with peers.killed_after(daemon, "key-service"):
            while b"READY=1" not in manager.recv(4096):
                pass
            curl = ["curl", "-sSf", "--max-time", "30", "--unix-socket", address, "http://localhost/key/200"]
            key = subprocess.run(curl, capture_output=True, check=True).stdout
            assert len(key) == 200, len(key)
            retry_if_stalled(lambda: output(*emulated, "health", env={**os.environ, "KEYSERVICE_HOST": f"unix:{address}"}))
            peers.stop_daemon(daemon, "key-service")
    assert daemon.returncode == 0, f"exit status {daemon.returncode}"
    figures(version)

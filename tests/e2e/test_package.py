"""The Debian packages themselves: lintian, contents, reproducibility, and the arm64 binary at work.

What a booted Debian does with the package is in test_system.py.
"""

import os
import socket
import subprocess

import pytest
from support import peers
from support.conditions import TIMEOUT
from support.daemon import REPOSITORY

pytestmark = pytest.mark.tools("dpkg-deb")

SIZE_MAX = 2_500_000  # bytes of a package
BINARY_MAX = 6_000_000

every_architecture = pytest.mark.parametrize("architecture", ["amd64", "arm64"])


def output(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def trees(packages, tmp_path_factory):
    """What each architecture's package installs."""
    trees = {architecture: tmp_path_factory.mktemp(architecture) for architecture in packages}
    for architecture, package in packages.items():
        output("dpkg-deb", "-x", package, trees[architecture])
    return trees


@pytest.mark.slow
@pytest.mark.tools("git")
@pytest.mark.timeout(3600)
def test_the_same_source_gives_the_same_bytes(packages, tmp_path, figures):
    """two builds in different folders, one of them new, are the same byte for byte"""
    # One architecture is enough: both are made by one script, of the same files and with the same dates and flags. What differs is
    # the compiler of C and the linker, which could let a path in: test_the_binary_is_static_and_stripped sees that in both binaries.
    changed = output("git", "status", "--porcelain", cwd=REPOSITORY)
    assert not changed, f"expected every change to be committed, since a clone is built beside this tree; found\n{changed}"
    clone = tmp_path / "a-folder-of-another-name" / "clone"
    output("git", "clone", "--quiet", "--shared", REPOSITORY, clone)
    output("packaging/build-deb", "amd64", cwd=clone)
    [theirs] = (clone / "target/debian").glob("key-service_*_amd64.deb")
    ours = packages["amd64"]
    differ = subprocess.run(["cmp", ours, theirs], capture_output=True, text=True)
    assert differ.returncode == 0, f"{differ.stdout}if {ours} is not of the last commit: just deb"
    figures(f"{ours.stat().st_size} bytes")


@pytest.mark.tools("lintian")
@every_architecture
def test_lintian_is_content(architecture, packages, figures):
    """lintian finds nothing, and both packages are as small as promised"""
    package = packages[architecture]
    found = output("lintian", "--allow-root", "--pedantic", "--fail-on", "error,warning,info,pedantic", package)
    assert not found.strip(), found
    size = package.stat().st_size
    assert size <= SIZE_MAX, f"{package.name}: {size} bytes"
    figures(f"{architecture} {size} bytes")


@pytest.mark.tools("readelf")
@every_architecture
def test_the_binary_is_static_and_stripped(architecture, trees, figures):
    """the binary needs no library, carries no symbols, and is as small as promised"""
    binary = trees[architecture] / "usr/bin/key-service"
    assert "NEEDED" not in output("readelf", "--dynamic", "--wide", binary)
    sections = output("readelf", "--sections", "--wide", binary)
    assert ".symtab" not in sections and ".debug_info" not in sections, sections
    assert str(REPOSITORY).encode() not in binary.read_bytes(), "the path of the build is in the binary"
    size = binary.stat().st_size
    assert size <= BINARY_MAX, size
    figures(f"{size} bytes")


@pytest.mark.tools("mandoc")
def test_the_manuals_read(trees):
    """the manual pages have no mistakes of form"""
    pages = sorted((trees["amd64"] / "usr/share/man").glob("man*/*.gz"))
    assert len(pages) == len([*(REPOSITORY / "packaging/man").iterdir()]), f"expected every page of packaging/man, found {pages}"
    for page in pages:
        output("mandoc", "-T", "lint", "-W", "warning", page)


@pytest.mark.tools("qemu-aarch64-static", "curl", "readelf", "setpriv")
def test_arm64_works(trees, tmp_path, figures):
    """the arm64 binary says its version, reads its configuration and serves a key, under qemu"""
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
            output(*emulated, "health", env={**os.environ, "KEYSERVICE_HOST": f"unix:{address}"})
            peers.stop_daemon(daemon, "key-service")
    assert daemon.returncode == 0, f"exit status {daemon.returncode}"
    figures(version)

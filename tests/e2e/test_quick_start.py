"""Runs the quick start of README.md on a minimal Debian with only the packages that README.md names.

Each system is newly created. It has no network but loopback, no passwd entry for the user, no HOME and no curl. The checkout has the
files that git tracks, as they are in the working tree.

Nearly all of the time is spent in the compiler, and the optimisation level does not matter here. So the commands are those of README.md,
but a configuration file of cargo turns off optimisation and debugging information. Each system builds one of the two profiles: Debian 12
the one of `cargo run --release`, Debian 13 the one of `cargo test`, which also builds the daemon. With --full, both systems run both
commands, without that configuration file.
"""

import os
import re
import resource
import shutil
import subprocess
import tempfile
import time
import tomllib
from pathlib import Path

import pytest
from support.daemon import REPOSITORY
from support.pages import commands

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.tools("mmdebstrap", "git", "unshare", "setpriv", "ip", "cargo"),
    pytest.mark.timeout(3 * 3600),
]

MIRROR = "http://deb.debian.org"
# The package sources of an installed Debian.
SOURCES = {
    suite: [f"deb {MIRROR}/debian {suite} main", f"deb {MIRROR}/debian-security {suite}-security main"] for suite in ("bookworm", "trixie")
}
USER = "12345"
COMMAND_TIMEOUT = 3600  # seconds; a build with link-time optimisation takes minutes

# A configuration of cargo for short compile times. Link-time optimisation stays on: it needs the bitcode of the standard library, and it
# saves as much time as it costs, because no code is generated for some crates.
PROFILES = """
[profile.dev]
debug = 0
incremental = false

[profile.release]
opt-level = 0
codegen-units = 16
"""

# Runs a command in new namespaces. All processes in them end with the first one.
UNSHARE = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child=KILL", "sh", "-ec"]
ENTER = f"""
ip link set lo up
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
exec chroot "$1" setpriv --reuid {USER} --regid {USER} --clear-groups \\
    env -i PATH=/usr/bin:/bin CARGO_HOME=/cargo CARGO_NET_OFFLINE=true sh -ec "$2"
"""
# `key-service health` takes the place of curl in a second terminal.
SERVES = """
cd /checkout
{command} >/tmp/output 2>&1 &
until {client} health >/dev/null 2>&1; do
    kill -0 $! || {{ cat /tmp/output; exit 1; }}
    sleep 0.1
done
for address in 127.0.0.1 '[::1]'; do
    {client} health --url http://$address:1123
    {client} health --url http://$address:8000
done
grep 'Keys on' /tmp/output
"""


PACKAGES = commands("README.md", "sudo apt install cargo").removeprefix("sudo apt install ").split()
RUN, TEST = commands("README.md", "cargo run").strip(), commands("README.md", "cargo test").strip()
# (system, command)
STEPS = [("bookworm", RUN), ("trixie", TEST)]
FULL = [("bookworm", RUN), ("bookworm", TEST), ("trixie", RUN), ("trixie", TEST)]


def pytest_generate_tests(metafunc):
    steps = FULL if is_full(metafunc.config) else STEPS
    marked = [
        pytest.param(suite, command, id=f"{suite}-{command.split()[1]}", marks=pytest.mark.xdist_group(f"quick-start-{suite}"))
        for suite, command in steps
    ]
    metafunc.parametrize(("system", "command"), marked, indirect=["system"], scope="module")


def is_full(config):
    return config.getoption("--full", False)


@pytest.fixture(scope="module")
def system(request):
    """The root directory of a Debian with those packages, the crates and the checkout."""
    subprocess.run(["cargo", "fetch", "--quiet", "--locked"], cwd=REPOSITORY, check=True)
    registry = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo")) / "registry"
    with tempfile.TemporaryDirectory(prefix="key-service-quick-start-") as directory:
        root = Path(directory) / request.param
        root.mkdir()
        include = f"--include={','.join(PACKAGES)}"
        subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", include, request.param, root, *SOURCES[request.param]], check=True)
        # The crates in the form in which cargo downloads them; cargo unpacks them in the system.
        for part in ("cache", "index"):
            shutil.copytree(registry / part, root / "cargo/registry" / part)
        checkout = root / "checkout"
        checkout.mkdir()
        files = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
        for file in filter(None, files.split("\0")):
            target = checkout / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / file, target)
        if not is_full(request.config):
            (root / "cargo/config.toml").write_text(
                PROFILES + "".join(f"[profile.release.package.{name}]\nopt-level = 0\n" for name in optimised_crates())
            )
        subprocess.run(["chown", "-R", f"{USER}:{USER}", root / "cargo", checkout], check=True)
        yield root


def optimised_crates():
    """The crates with their own opt-level in Cargo.toml."""
    return tomllib.loads((REPOSITORY / "Cargo.toml").read_text())["profile"]["release"]["package"]


def run_inside(root, script):
    """Runs a script in a system, and returns its output and the time that it took."""
    begin, used = time.monotonic(), processor_time()
    ran = subprocess.run(
        [*UNSHARE, ENTER, "sh", root, script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=COMMAND_TIMEOUT,
        check=False,
    )
    # Without the lines of cargo about what went well, or the failure of an early test would be far above the last lines.
    well = re.compile(r"test .* \.\.\. ok|running \d+ tests?|test result: ok.*|\s*(Compiling|Downloaded|Running) .*|\s*")
    failed = "\n".join(line for line in ran.stdout.splitlines() if not well.fullmatch(line))
    assert ran.returncode == 0, f"{script}: status {ran.returncode}\n{failed[-6000:]}"
    return ran.stdout, f"{time.monotonic() - begin:.0f} s, {processor_time() - used:.0f} s of processor time"


def processor_time():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_quick_start(system, command, figures):
    """the command builds, and as README.md says all tests pass, or keys and metrics are served over IPv4 and IPv6"""
    version, _ = run_inside(system, "rustc --version")
    if command == TEST:
        output, took = run_inside(system, f"cd /checkout && {TEST} --no-fail-fast")
        passed = sum(map(int, re.findall(r"^test result: ok. (\d+) passed", output, re.M)))
        assert passed, f"expected tests, found none:\n{output}"
        figures(f"{version.strip()}: {passed} tests [{took}]")
        binary = command = "target/debug/key-service"
    else:
        _, took = run_inside(
            system, f"cd /checkout && {RUN.replace(' run ', ' build ')}"
        )  # `cargo run` builds first; built separately to measure the time
        figures(f"{version.strip()}: built [{took}]")
        binary = "target/release/key-service"
    run_inside(system, SERVES.format(command=command, client=binary))

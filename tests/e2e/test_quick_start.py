"""Runs the quick start of README.md, command by command, on a minimal Debian with only the packages that README.md names.

Each system is newly created. Root installs packages there with apt; the commands of a document run without their `sudo`. The other
commands run as a user without a passwd entry and without HOME, and without a network but loopback. curl is installed only after the
build and the tests. The checkout has the files that git tracks, as they are in the working tree. The daemon runs on a pseudo-terminal.

The times are printed, and not asserted. They lack the download of the crates, which are copied from this machine.

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
from support.machine import as_root
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
UNSHARE = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child=KILL"]
ENTER = """
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
exec chroot "$1" """
AS_ROOT = [*UNSHARE, "sh", "-ec", f'{ENTER} env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive sh -ec "$2"', "sh"]
AS_USER = [
    *UNSHARE,
    "--net",
    "sh",
    "-ec",
    f"""ip link set lo up
    {ENTER} setpriv --reuid {USER} --regid {USER} --clear-groups \\
        env -i PATH=/usr/bin:/bin CARGO_HOME=/cargo CARGO_NET_OFFLINE=true sh -ec "$2" """,
    "sh",
]
APT_SETTINGS = """
APT::Get::Assume-Yes "true";
APT::Install-Recommends "false";
"""

PREPARE = as_root(commands("README.md", "sudo apt update\nsudo apt install cargo"))
INSTALL_CURL, KEYS = as_root(commands("README.md", "sudo apt install curl")).split("\n", 1)
OTHERS = commands("README.md", "curl http://localhost:1123/password")
PAGE = re.search(r"In a browser, <(\S+)>", (REPOSITORY / "README.md").read_text())[1]
# Two terminals: the daemon's, and that of a user who tries what the daemon prints, and then what README.md shows.
SERVES = """
cd /checkout
rm -f /tmp/terminal
script --quiet --flush --command '{command}' /tmp/terminal </dev/null >/dev/null &
until grep -qs ^Try: /tmp/terminal; do
    kill -0 $! || {{ cat /tmp/terminal; exit 1; }}
    sleep 0.1
done
hint() {{ tr -d '\\r' </tmp/terminal | sed -n "s/^$1: *//p"; }}
exec 2>/dev/null  # curl shows its progress there
hint Page
sh -ec "$(hint Try)"
curl -fsS -H 'Accept: text/html' "$(hint Page)" | grep -c '</html>'
for address in 127.0.0.1 '[::1]'; do
    curl -fsS http://$address:1123/health http://$address:8000/health
done
echo
cd /
{keys}
{others}
"""
PRINTED = re.compile(
    rf"{re.escape(PAGE)}\n[0-9a-f]{{64}}\n1\nOKOKOKOK\n"  # the daemon's hint
    r"[0-9a-f]{64}\n((?: [0-9a-f]{2}){16}\n){2}[0-9A-Za-z]{24}\nOK# HELP (.|\n)*\nhttp_responses_total(.|\n)*"
)

RUN, TEST = commands("README.md", "cargo run").strip(), commands("README.md", "cargo test").strip()
# (system, command)
STEPS = [("bookworm", RUN), ("trixie", TEST)]
FULL = [("bookworm", TEST), ("bookworm", RUN), ("trixie", TEST), ("trixie", RUN)]


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
    """The root directory of a minimal Debian with the packages, the crates and the checkout, and the seconds that the packages took."""
    subprocess.run(["cargo", "fetch", "--quiet", "--locked"], cwd=REPOSITORY, check=True)
    registry = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo")) / "registry"
    with tempfile.TemporaryDirectory(prefix="key-service-quick-start-") as directory:
        root = Path(directory) / request.param
        root.mkdir()
        subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", request.param, root, *SOURCES[request.param]], check=True)
        (root / "etc/apt/apt.conf.d/99-test").write_text(APT_SETTINGS)
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
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
        _, seconds, _ = run_inside(root, PREPARE, AS_ROOT)
        run_inside(root, "! command -v curl")
        yield root, seconds


def optimised_crates():
    """The crates with their own opt-level in Cargo.toml."""
    return tomllib.loads((REPOSITORY / "Cargo.toml").read_text())["profile"]["release"]["package"]


def run_inside(root, script, enter=AS_USER):
    """Runs a script in a system, and returns its output, the seconds that it took and the processor time."""
    begin, used = time.monotonic(), processor_time()
    ran = subprocess.run(
        [*enter, root, script],
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
    return ran.stdout, time.monotonic() - begin, processor_time() - used


def processor_time():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_quick_start(system, command, figures):
    """the packages install, the command builds, and as README.md says all tests pass, or each request of README.md is answered"""
    system, seconds = system
    times = {"packages": seconds}
    version, _, _ = run_inside(system, "rustc --version")
    if command == TEST:
        output, times["tests"], used = run_inside(system, f"cd /checkout && {TEST} --no-fail-fast")
        passed = sum(map(int, re.findall(r"^test result: ok. (\d+) passed", output, re.M)))
        assert passed, f"expected tests, found none:\n{output}"
        what, command = f"{passed} tests", "target/debug/key-service"
    else:
        # `cargo run` builds first; built separately to measure the time.
        _, times["build"], used = run_inside(system, f"cd /checkout && {RUN.replace(' run ', ' build ')}")
        what = "built"
    _, times["curl"], _ = run_inside(system, INSTALL_CURL, AS_ROOT)
    printed, times["first requests"], _ = run_inside(system, SERVES.format(command=command, keys=KEYS, others=OTHERS))
    assert PRINTED.fullmatch(printed), printed
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items())
    figures(f"{version.strip()}: {what}, {used:.0f} s of processor time; {took}; together {sum(times.values()):.0f} s")

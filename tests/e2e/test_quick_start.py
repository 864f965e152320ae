#!/usr/bin/env python3
"""Follows the quick start of README.md on a Debian that has the packages named there and nothing else.

    tests/fresh/run [bookworm|trixie]...    both without an argument

Each system is made anew, and has no network but loopback, no user of that number, no HOME and no curl. The checkout is what
git tracks, as it is in the working tree. Needs root, mmdebstrap, iproute2 and cargo, which fetches the crates.
"""
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
MIRROR = "http://deb.debian.org"
# Where apt looks on a Debian as it is installed.
SOURCES = {suite: [f"deb {MIRROR}/debian {suite} main", f"deb {MIRROR}/debian-security {suite}-security main"]
           for suite in ("bookworm", "trixie")}
TOOLS = {"mmdebstrap": "mmdebstrap", "git": "git", "unshare": "util-linux", "ip": "iproute2", "cargo": "cargo"}
USER = "12345"
PATIENCE = 3600  # seconds; a build with link-time optimisation takes minutes

# A first process whose end is the end of all others, in a network of its own.
UNSHARE = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child=KILL", "sh", "-ec"]
ENTER = f"""
ip link set lo up
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
exec chroot "$1" setpriv --reuid {USER} --regid {USER} --clear-groups \
    env -i PATH=/usr/bin:/bin CARGO_HOME=/cargo CARGO_NET_OFFLINE=true sh -ec "$2"
"""
# The daemon's own client stands for the reader's other terminal.
SERVES = """
cd /checkout
{command} >/tmp/output 2>&1 &
until target/release/key-service health >/dev/null 2>&1; do
    kill -0 $! || {{ cat /tmp/output; exit 1; }}
    sleep 0.1
done
for address in 127.0.0.1 '[::1]'; do
    target/release/key-service health --url http://$address:1123
    target/release/key-service health --url http://$address:8000
done
grep 'Keys on' /tmp/output
"""


def blocks(readme):
    """The quick start's blocks: packages, the daemon, requests, tests."""
    quick_start = readme.split("\n## Quick start\n")[1].split("\n## ")[0]
    install, run, _, test = re.findall(r"^```sh\n(.*?)\n```$", quick_start, re.M | re.S)
    return install.removeprefix("sudo apt install ").split(), run, test


def system(root, suite, packages, registry):
    include = f"--include={','.join(packages)}"
    subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", include, suite, root, *SOURCES[suite]], check=True)
    # As cargo downloads them; it unpacks them there.
    for part in ("cache", "index"):
        shutil.copytree(registry / part, root / "cargo/registry" / part)
    (root / "checkout").mkdir()
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\0")
    for file in filter(None, files):
        target = root / "checkout" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / file, target)
    subprocess.run(["chown", "-R", f"{USER}:{USER}", root / "cargo", root / "checkout"], check=True)


def inside(root, script):
    begin, used = time.monotonic(), processor_time()
    ran = subprocess.run([*UNSHARE, ENTER, "sh", root, script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, timeout=PATIENCE, check=False)
    return ran.returncode, ran.stdout, f"{time.monotonic() - begin:.0f} s, {processor_time() - used:.0f} s of processor time"


def processor_time():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main():
    for tool, package in TOOLS.items():
        if not shutil.which(tool):
            sys.exit(f"{tool} is missing: apt-get install {package}")
    if os.geteuid() != 0:
        sys.exit("expected to be root: making a system takes it")
    if unknown := set(sys.argv[1:]) - set(SOURCES):
        sys.exit(f"expected suites ({', '.join(SOURCES)}), found {', '.join(sorted(unknown))}")
    subprocess.run(["cargo", "fetch", "--quiet", "--locked"], cwd=REPOSITORY, check=True)
    registry = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo")) / "registry"
    packages, run, test = blocks((REPOSITORY / "README.md").read_text())
    passed = failed = 0
    for suite in sys.argv[1:] or SOURCES:
        with tempfile.TemporaryDirectory(prefix="key-service-fresh-") as folder:
            root = Path(folder) / suite
            root.mkdir()
            system(root, suite, packages, registry)
            print(f"{suite}: {inside(root, 'rustc --version')[1].strip()}", flush=True)
            build = run.replace(" run ", " build ")  # what it does first, for its time
            steps = [(build, f"cd /checkout && {build}"), (run, SERVES.format(command=run)), (test, f"cd /checkout && {test} --no-fail-fast")]
            for command, script in steps:
                status, output, took = inside(root, script)
                if status == 0:
                    passed += 1
                    tests = sum(map(int, re.findall(r"^test result: ok. (\d+) passed", output, re.M)))
                    print(f"ok   {suite}: {command}: {f'{tests} tests' if tests else output.splitlines()[-1]} [{took}]", flush=True)
                else:
                    failed += 1
                    print(f"FAIL {suite}: {command}: status {status}\n{output[-6000:]}", flush=True)
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()

"""Tests the Debian package for arm64 on a booted Debian 13, whose processor qemu emulates. Runs only with --emulated: just arm64.

The tests of test_system.py that depend on the processor or on the system calls of an architecture run here as they are, on this
machine. The others are about what the architecture used.
"""

import contextlib
import json
import os
import re
import struct
import subprocess

import pytest
import test_system
from support import system_calls
from support.conditions import expect
from support.daemon import REPOSITORY
from support.emulated import EmulatedMachine
from support.machine import SUPPORT

pytestmark = [
    pytest.mark.root,
    pytest.mark.emulated,
    pytest.mark.timeout(1800),
    pytest.mark.tools("qemu-system-aarch64", "qemu-aarch64-static", "arch-test", "mmdebstrap", "mke2fs", "ssh", "unshare", "setpriv"),
    pytest.mark.tools("aarch64-linux-gnu-gcc", "curl", "dpkg-deb", "openssl"),
]

TARGET = "aarch64-unknown-linux-gnu"
TRACING = "/sys/kernel/tracing"
AES_OFF = "/root/without-aes"


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A booted Debian system for arm64 with the package installed. No client has connected yet."""
    packages = [*(REPOSITORY / "target/debian").glob("key-service_*_arm64.deb")]
    assert len(packages) == 1, f"expected one package for arm64 in target/debian, found {packages}: just deb arm64"
    with EmulatedMachine("trixie", tmp_path_factory.mktemp("arm64"), packages[0]) as machine:
        test_system.install(machine)
        program = machine.directory / "without-aes"
        subprocess.run([machine.compiler, "-static", "-O1", "-Wall", "-o", program, SUPPORT / "without_aes.c"], check=True)
        machine.install_file(program, AES_OFF)
        yield machine


@pytest.fixture(scope="module")
def rust_tests(machine):
    """Installs the Rust tests that run here: `library` are those in src/, `memory` those of tests/memory.rs."""
    command = ["cargo", "test", "--no-run", "--locked", "--quiet", "--profile=quick", f"--target={TARGET}", "--lib", "--test=memory"]
    variables = {**os.environ, f"CARGO_TARGET_{TARGET.upper().replace('-', '_')}_LINKER": machine.compiler}
    build = subprocess.run(
        [*command, "--message-format=json-render-diagnostics"], cwd=REPOSITORY, env=variables, stdout=subprocess.PIPE, text=True, check=True
    )
    built = [message for line in build.stdout.splitlines() if (message := json.loads(line)).get("profile", {}).get("test")]
    found = {"library" if "lib" in message["target"]["kind"] else message["target"]["name"]: message["executable"] for message in built}
    for name, program in found.items():
        machine.install_file(program, f"/root/tests-{name}")
    return found


def run_tests(machine, command):
    """Runs Rust tests in the machine, and returns how many passed."""
    output = machine.run(f"KEY_SERVICE_BIN=/usr/bin/key-service {command}", timeout=1200).stdout
    passed = int(re.search(r"^test result: ok\. (\d+) passed", output, re.M)[1])
    assert passed, output
    return passed


test_the_package_installs = test_system.test_the_package_installs
test_the_first_connection_starts_the_service = test_system.test_the_first_connection_starts_the_service
test_process_metrics_are_correct = test_system.test_process_metrics_are_correct
test_journal_entries_have_fields_and_no_key = test_system.test_journal_entries_have_fields_and_no_key
test_the_unit_is_sandboxed = test_system.test_the_unit_is_sandboxed
test_systemctl_controls_the_service = test_system.test_systemctl_controls_the_service
test_an_upgrade_with_errors_keeps_the_old_process = test_system.test_an_upgrade_with_errors_keeps_the_old_process
test_a_missing_file_keeps_the_protection = test_system.test_a_missing_file_keeps_the_protection
test_a_frozen_process_is_replaced = test_system.test_a_frozen_process_is_replaced
test_the_sandbox_denies = test_system.test_the_sandbox_denies
test_the_service_needs_no_journal = test_system.test_the_service_needs_no_journal
test_a_task_limit_reduces_the_workers = test_system.test_a_task_limit_reduces_the_workers
test_an_idle_service_exits_until_the_next_connection = test_system.test_an_idle_service_exits_until_the_next_connection
test_the_tls_drop_in_works = test_system.test_the_tls_drop_in_works
test_each_unit_gets_its_own_key = test_system.test_each_unit_gets_its_own_key


def test_the_machine_is_arm64(machine, figures):
    """the machine is a Debian 13 for arm64 with Debian's kernel and AES instructions, and systemd finds no error in the unit"""
    release, hardware = machine.run("uname -r").stdout.strip(), machine.run("uname -m; cat /proc/cpuinfo; cat /etc/os-release").stdout
    assert re.match(r"aarch64\n(.*\n)*Features\t: .*\baes pmull\b(.*\n)*VERSION_CODENAME=trixie\n", hardware), hardware
    done = machine.run("systemd-analyze verify --man=no key-service.service")
    expect(done.stdout + done.stderr, "", "output of systemd-analyze verify")
    figures(f"Linux {release}, {machine.run('systemctl --version').stdout.splitlines()[0]}")


def test_each_key_takes_one_system_call(machine, figures):
    """each key takes one call of getrandom(2), and a stream takes one for each of its chunks"""
    machine.write("/etc/key-service/config.toml", "max-size = 1048576\nworkers = 1\n")
    machine.run("systemctl restart key-service")
    event, total = f"{TRACING}/events/syscalls/sys_exit_getrandom/enable", 0
    machine.run(f"ls /proc/{machine.show('MainPID')}/task >{TRACING}/set_event_pid && echo 1 >{event}")

    def calls(method, path, repeated):
        urls = [word for _ in range(repeated) for word in (f"http://127.0.0.1:1123{path}", "-o", "/dev/null")]
        machine.curl(*(["-I"] if method == "HEAD" else []), "-f", *urls)
        text = machine.run(f"cat {TRACING}/trace; echo >{TRACING}/trace").stdout
        return re.findall(r"^ *worker-.* sys_getrandom -> (.*)$", text, re.M)  # not those of the watchdog

    calls("GET", "/key/32", 1)  # the first request of a thread may seed its hash maps
    for requests, repeated in [(system_calls.EXACT, system_calls.REPEATED), (system_calls.STREAMS, 1)]:
        for method, path, wanted in requests:
            found, expected = calls(method, path, repeated), wanted * repeated
            assert all(0 < int(length, 16) < 1 << 20 for length in found), f"{method} {path}: expected complete calls, found {found}"
            is_enough = len(found) == expected if requests is system_calls.EXACT else len(found) >= expected
            assert is_enough, f"{method} {path}: expected {expected} calls, found {len(found)}"
            total += len(found)
    machine.run(f"echo 0 >{event}; echo >{TRACING}/set_event_pid")
    machine.write("/etc/key-service/config.toml", "")
    machine.run("systemctl restart key-service")
    figures(f"{total} calls")


def aes_instructions(program):
    """The offsets of all AESE instructions in a program: encoding 0100 1110 0010 1000 0100 10 and two registers (Arm A-profile A64)."""
    words = struct.unpack(f"<{len(program) // 4}I", program[: len(program) // 4 * 4])
    return [4 * at for at, word in enumerate(words) if word & 0xFFFF_FC00 == 0x4E28_4800]


def executed(machine):
    """The offsets of the traced instructions that were executed since tracing began."""
    lines = map(str.split, machine.run(f"cat {TRACING}/uprobe_profile").stdout.splitlines())
    return {int(event.removeprefix("aese_"), 16) for _, event, hits, *_ in lines if int(hits)}


def request_keys(machine):
    """Requests keys that are expanded by AES."""
    for length in (129, 1024, 10_000):  # a traced instruction takes 1 ms
        status, key = machine.get(f"/key/{length}")
        expect((status, len(key)), (200, length), "status and length")


@contextlib.contextmanager
def traced(machine, offsets):
    """Counts the executions of these instructions of the daemon while the block runs."""
    events = "".join(f"p:aes/aese_{offset:x} /usr/bin/key-service:0x{offset:x}\n" for offset in offsets)
    machine.write("/root/events", events)
    machine.run(f"cat /root/events >{TRACING}/uprobe_events && echo 1 >{TRACING}/events/aes/enable", timeout=600)
    try:
        yield
    finally:
        machine.run(f"echo 0 >{TRACING}/events/aes/enable && echo >{TRACING}/uprobe_events && rm /root/events", timeout=600)


def test_every_aes_instruction_is_tested(machine, figures):
    """the self-test executes each AES instruction that generates keys, and fails if any of them is wrong; without such instructions the
    portable implementation passes it"""
    offsets = aes_instructions(machine.read("/usr/bin/key-service"))
    # Tracing is slow, so the daemon runs outside its unit, which limits the time of the start.
    machine.run("systemctl stop key-service.socket key-service")
    start = "systemd-run --unit=traced --service-type=notify -p TimeoutStartSec=600"
    daemon = "/usr/bin/key-service --max-size 10000 --metrics-port 0"
    with traced(machine, offsets):
        machine.run(f"{start} {AES_OFF} {daemon}", timeout=600)
        request_keys(machine)
        machine.run("systemctl stop traced")
        expect(executed(machine), set(), "AES instructions that were executed without AES")
        machine.run(f"{start} {daemon}", timeout=600)
        tested = executed(machine)
        assert tested, "the self-test executed no AES instruction"
        request_keys(machine)
        expect(executed(machine) - tested, set(), "AES instructions that generate keys and are not tested")
        machine.run("systemctl stop traced && systemctl start key-service.socket")
    # Each of these instructions is replaced by NOP.
    daemon = "timeout 30 ./mutant --host unix:/run/mutant.sock --metrics-port 0"
    script = (
        "for offset in $OFFSETS; do cp /usr/bin/key-service mutant; "
        f"printf '\\037\\040\\003\\325' | dd of=mutant bs=1 seek=$offset conv=notrunc status=none; {daemon} 2>log; status=$?; "
        "grep -q 'AES-256-CTR failed its known-answer test' log && [ $status = 1 ] || echo $offset: $status; done"
    )
    found = machine.run(f"cd /root && OFFSETS='{' '.join(map(str, tested))}' && {script}; rm mutant log", timeout=1700).stdout
    expect(found, "", "offsets of replaced instructions that the self-test did not notice")
    figures(f"{len(tested)} of {len(offsets)} AES instructions")


def test_the_generator_passes_its_tests(machine, rust_tests, figures):
    """the tests of the generator pass, with AES instructions and without"""
    counts = [run_tests(machine, f"{prefix} /root/tests-library keys::") for prefix in ("", AES_OFF)]
    expect(counts[0], counts[1], "tests with and without AES")
    figures(f"{counts[0]} tests")


def test_no_key_stays_in_memory(machine, rust_tests, figures):
    """tests/memory.rs finds no issued key in the memory of the package's daemon"""
    figures(f"{run_tests(machine, '/root/tests-memory')} tests")


test_purge_removes_everything = test_system.test_purge_removes_everything

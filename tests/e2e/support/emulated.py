"""Debian for arm64, booted with its own kernel on a processor that qemu-system-aarch64(1) emulates."""

import contextlib
import shlex
import subprocess
from pathlib import Path

from support import peers
from support.conditions import TIMEOUT, until
from support.machine import ENVIRONMENT, Machine

BINFMT = Path("/proc/sys/fs/binfmt_misc")
BOOT_TIMEOUT = 600  # seconds; about 60 on two free cores
PORTS = [22, 1123, 8000]
# The initial file system of the kernel's package contains only these drivers and what they need.
DRIVERS = ["virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net", "ext4"]
# What the machine has in addition to the root file system. The addresses are those of the user network of qemu.
FILES = {
    "/etc/systemd/network/machine.network": "[Match]\nType=ether\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\n",
    "/etc/systemd/system/shell.service": "[Service]\nExecStart=/usr/sbin/dropbear -F -E -R -s\nRestart=always\n",
}


class EmulatedMachine(Machine):
    """Commands run inside this machine by ssh(1). Clients run on the host, in a network namespace whose loopback ports are
    the machine's: a test of `Machine` that starts clients by `outside` works here, too."""

    packages, kind, compiler = "systemd,systemd-sysv,linux-image-cloud-arm64,dropbear-bin", "-arm64", "aarch64-linux-gnu-gcc"
    bootstrap = [
        "--architectures=arm64",
        '--essential-hook=mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"',
        '--essential-hook=echo MODULES=list >"$1/etc/initramfs-tools/conf.d/machine"',
        f'--essential-hook=printf "%s\\n" {" ".join(DRIVERS)} >"$1/usr/share/initramfs-tools/modules.d/machine"',
    ]

    def base(self):
        with arm64_programs():
            return super().base()

    def boot(self):
        key, image = self.directory / "key", self.directory / "disk"
        self.control = self.directory / "control"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        self.root = self.disk
        for path, text in FILES.items():
            super().write(path, text)
        super().install_file(f"{key}.pub", "/root/.ssh/authorized_keys")
        (self.disk / "root/.ssh").chmod(0o700)
        (self.disk / "etc/dropbear").mkdir(exist_ok=True)
        enabled = self.disk / "etc/systemd/system/multi-user.target.wants"
        enabled.mkdir(parents=True, exist_ok=True)
        (enabled / "shell.service").symlink_to("/etc/systemd/system/shell.service")
        (enabled / "systemd-networkd.service").symlink_to("/usr/lib/systemd/system/systemd-networkd.service")
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", self.disk, image, "3G"], check=True, stdout=subprocess.DEVNULL)
        [kernel], [initrd] = self.disk.glob("boot/vmlinuz-*"), self.disk.glob("boot/initrd.img-*")
        forwarded = ",".join(f"hostfwd=tcp:127.0.0.1:{port}-:{port}" for port in PORTS)
        # qemu is killed when this process ends, for whatever reason. Other programs come before it: emulation takes whole processors.
        begin = 'ip link set lo up && exec nice -n 10 "$@"'
        command = ["setpriv", "--pdeathsig", "KILL", "--", "unshare", "--net", "--", "sh", "-c", begin, "sh", "qemu-system-aarch64"]
        # Without pauth-impdef, signing pointers as a real processor does would take half of the time.
        command += ["-M", "virt", "-cpu", "max,pauth-impdef=on", "-smp", "2", "-m", "1G", "-accel", "tcg,thread=multi"]
        command += ["-kernel", kernel, "-initrd", initrd, "-append", "root=/dev/vda rw console=ttyAMA0 panic=-1", "-no-reboot"]
        command += ["-drive", f"file={image},format=raw,if=none,id=disk,cache=unsafe", "-device", "virtio-blk-device,drive=disk"]
        command += ["-netdev", f"user,id=net,{forwarded}", "-device", "virtio-net-device,netdev=net"]
        command += ["-device", "virtio-rng-device", "-display", "none", "-monitor", "none", "-serial", "stdio"]
        with open(self.directory / "console", "wb") as console:
            self.qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
        self.leader = str(self.qemu.pid)  # for its network namespace
        try:
            until("the shell", self.connect, BOOT_TIMEOUT, interval=1)
            until("the boot", self.is_up, BOOT_TIMEOUT, interval=1)
        except BaseException as error:
            self.stop()
            error.add_note((self.directory / "console").read_text(errors="replace")[-2000:])
            raise

    def connect(self):
        """Opens the connection that the commands share, and returns whether that worked. It ends with qemu at the latest."""
        assert self.qemu.poll() is None, (self.directory / "console").read_text(errors="replace")
        options = ["BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=10"]
        command = ["ssh", "-F", "none", "-f", "-N", "-M", "-S", self.control, "-i", self.directory / "key"]
        command += [f"-o{option}" for option in options]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.run(self.outside(*command, "root@127.0.0.1"), **streams).returncode == 0

    def inside(self, command):
        """Returns the command line that runs a shell command inside this system."""
        environment = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
        script = f"cd /; env -i {environment} /bin/sh -c {shlex.quote(command)}"
        return ["ssh", "-F", "none", "-S", str(self.control), "root@127.0.0.1", script]

    def read(self, path):
        return subprocess.run(self.inside(f"cat {path}"), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=True).stdout

    def write(self, path, text, mode="644"):
        """Writes a file as an editor does: a new file replaces the old one."""
        self.send(path, text.encode(), mode)

    def install_file(self, source, target):
        self.send(target, Path(source).read_bytes(), f"{Path(source).stat().st_mode & 0o777:o}")

    def send(self, path, content, mode):
        command = f"mkdir -p {Path(path).parent} && cat >{path}.new && chmod {mode} {path}.new && mv {path}.new {path}"
        subprocess.run(self.inside(command), input=content, check=True, timeout=TIMEOUT)

    def stop(self):
        """Ends the emulation, without a shutdown: nothing of the machine is kept."""
        peers.stop_peer(self.qemu, "qemu-system-aarch64")


@contextlib.contextmanager
def arm64_programs():
    """Lets the kernel start programs for arm64 through qemu-user-static, while this block runs. On most systems, the installation of
    that package does so; in a container without systemd it does not."""
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT], check=True)
    handler = BINFMT / "qemu-aarch64"
    if handler.exists():
        yield
        return
    (BINFMT / "register").write_bytes(Path("/usr/lib/binfmt.d/qemu-aarch64.conf").read_bytes())
    try:
        yield
    finally:
        handler.write_text("-1")

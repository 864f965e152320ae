"""The programs that the end-to-end tests run, and the Debian packages that contain them. Further programs come with the e2e group of
pyproject.toml.

python3 -m support.tools              prints the missing packages, for apt-get
python3 -m support.tools emulation    also those of the tests that are marked as `emulated`
"""

import shutil
import sys
from pathlib import Path

DJANGO = "/usr/lib/python3/dist-packages/django"
STREAM_MODULE = "/usr/lib/nginx/modules/ngx_stream_module.so"

# command or path: package
PACKAGES = {
    DJANGO: "python3-django",
    STREAM_MODULE: "libnginx-mod-stream",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
    "ansible-playbook": "ansible-core",
    "amtool": "prometheus-alertmanager",
    "apache2": "apache2-bin",
    "apt-ftparchive": "apt-utils",
    "buildah": "buildah",
    "c++": "g++",
    "caddy": "caddy",
    "cargo": "cargo-web",
    "chromium": "chromium",
    "chrt": "util-linux",
    "cryptsetup": "cryptsetup-bin",
    "curl": "curl",
    "dieharder": "dieharder",
    "dpkg-deb": "dpkg",
    "ent": "ent",
    "gcc": "gcc",
    "git": "git",
    "gpg": "gpg gpg-agent",
    "gpgv": "gpgv",
    "h2o": "h2o",
    "haproxy": "haproxy",
    "ip": "iproute2",
    "jq": "jq",
    "lintian": "lintian",
    "mandoc": "mandoc",
    "mmdebstrap": "mmdebstrap",
    "mount": "mount",
    "nginx": "nginx-light",
    "node": "nodejs",
    "npm": "npm",
    "nsenter": "util-linux",
    "openssl": "openssl",
    "pngquant": "pngquant",
    "podman": "podman",
    "prometheus": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "prometheus-node-exporter": "prometheus-node-exporter",
    "promtool": "prometheus",
    "qemu-aarch64-static": "qemu-user-static",
    "readelf": "binutils",
    "rngtest": "rng-tools5",
    "ruby": "ruby",
    "runc": "runc",
    "setpriv": "util-linux",
    "shellcheck": "shellcheck",
    "sqv": "sqv",
    "ss": "iproute2",
    "strace": "strace",
    "systemd-nspawn": "systemd-container",
    "taskset": "util-linux",
    "unshare": "util-linux",
    "systemd-socket-activate": "systemd",
    "valgrind": "valgrind",
    "wg": "wireguard-tools",
}

# Only for the tests that are marked as `emulated`.
EMULATION = {
    "arch-test": "arch-test",
    "mke2fs": "e2fsprogs",
    "qemu-system-aarch64": "qemu-system-arm",
    "ssh": "openssh-client",
}


def missing(commands=PACKAGES):
    """The Debian packages of those commands that are not installed."""
    packages = PACKAGES | EMULATION
    return sorted({packages[command] for command in commands if command in packages and is_absent(command)})


def missing_python(commands):
    """The commands that are not installed and that come from pyproject.toml, not from a Debian package."""
    return [command for command in commands if command not in PACKAGES | EMULATION and is_absent(command)]


def is_absent(command):
    return not shutil.which(command) and not Path("/", command).exists()


if __name__ == "__main__":
    print(*missing(PACKAGES | EMULATION if sys.argv[1:] == ["emulation"] else PACKAGES))

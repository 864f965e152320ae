"""The programs that end-to-end tests run, and the Debian packages that have them.

python3 -m support.tools    prints the packages that are missing, for apt-get
"""

import shutil

# command: package
PACKAGES = {
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
    "ansible-playbook": "ansible-core",
    "apache2": "apache2-bin",
    "buildah": "buildah",
    "c++": "g++",
    "caddy": "caddy",
    "cargo": "cargo-web",
    "chromium": "chromium",
    "cryptsetup": "cryptsetup-bin",
    "curl": "curl",
    "dieharder": "dieharder",
    "dpkg-deb": "dpkg",
    "ent": "ent",
    "gcc": "gcc",
    "git": "git",
    "haproxy": "haproxy",
    "ip": "iproute2",
    "lintian": "lintian",
    "mandoc": "mandoc",
    "mmdebstrap": "mmdebstrap",
    "mount": "mount",
    "nginx": "nginx-light",
    "node": "nodejs",
    "npm": "npm",
    "nsenter": "util-linux",
    "openssl": "openssl",
    "podman": "podman",
    "prometheus": "prometheus",
    "prometheus-node-exporter": "prometheus-node-exporter",
    "promtool": "prometheus",
    "qemu-aarch64-static": "qemu-user-static",
    "readelf": "binutils",
    "rngtest": "rng-tools5",
    "ruby": "ruby",
    "runc": "runc",
    "setpriv": "util-linux",
    "ss": "iproute2",
    "strace": "strace",
    "systemd-nspawn": "systemd-container",
    "taskset": "util-linux",
    "unshare": "util-linux",
    "valgrind": "valgrind",
    "wg": "wireguard-tools",
}


def missing(commands=PACKAGES):
    """The Debian packages of the commands that are not installed."""
    return sorted({PACKAGES[command] for command in commands if not shutil.which(command)})


if __name__ == "__main__":
    print(*missing())

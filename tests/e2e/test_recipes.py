#!/usr/bin/python3
"""Runs what docs/recipes.md and docs/proxies.md say, as it stands there, against real daemons.

    tests/recipes/run

Needs curl, ansible-core, wireguard-tools, cryptsetup-bin, ruby and python3-django of Debian, hence Debian's Python; nginx-light,
libnginx-mod-stream, haproxy, caddy, apache2-bin and openssl for the proxies; and kubernetes-validate from PyPI: on PATH, or in
/var/cache/key-service-tools/bin. The daemon is $KEY_SERVICE_BIN, else what is built in target/, else it is built.
"""
import base64
import http.client
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent

sys.path.insert(0, str(REPOSITORY / "tests/common"))
sys.dont_write_bytecode = True
import certificates  # noqa: E402
import pages  # noqa: E402
import proxies  # noqa: E402
from daemon import Daemon, PATIENCE  # noqa: E402

PAGE = REPOSITORY / "docs/recipes.md"
TOOLS = {"curl": "curl", "openssl": "openssl", "ansible-playbook": "ansible-core", "wg": "wireguard-tools", "cryptsetup": "cryptsetup-bin", "ruby": "ruby"}
MODULES = {"django": "python3-django", "yaml": "python3-yaml"}
VALIDATE = "kubernetes-validate"
INSTALL = f"python3 -m venv /var/cache/key-service-tools && /var/cache/key-service-tools/bin/pip install {VALIDATE}==1.37.0"

recipes = {}
# Recipes that another runner tries, and what of them has to stand in it.
elsewhere = {
    "systemd credentials": ("tests/system/run", "/run/key-service/credential.sock"),
    "Generated clients": ("tests/openapi/clients", "Generated clients"),
}


def recipe(title):
    def keep(function):
        recipes[title] = function
        return function
    return keep


def expect(found, expected, what):
    assert found == expected, f"{what}: expected {expected!r}, found {found!r}"


@recipe("Shell scripts")
def shell_scripts(folder, _):
    expect((folder / "session.key").stat().st_size, 32, "bytes")
    assert re.fullmatch("[0-9a-f]{64}\n", (folder / "session.hex").read_text())
    assert re.fullmatch("[2-9A-HJ-NP-Za-km-z]{24}\n", (folder / "password").read_text())
    passwords = (folder / "thirty-passwords").read_text().split()
    expect((len(set(passwords)), {len(one) for one in passwords}), (30, {12}), "passwords and their lengths")
    for path in folder.iterdir():
        expect(mode(path), 0o600, f"mode of {path.name}")


@recipe("Ansible")
def ansible(folder, first):
    assert "changed=1" in first, first
    key = (folder / "session.key").read_text()
    expect((len(base64.b64decode(key)), mode(folder / "session.key")), (32, 0o600), "the key and its mode")
    second = run(["ansible-playbook", "-i", "localhost,", "playbook.yml"], folder)
    assert "changed=0" in second and "failed=0" in second, second
    expect((folder / "session.key").read_text(), key, "the key after a second run")


@recipe("Kubernetes: an init container")
def init_container(folder, _):
    run([tool(VALIDATE), "--strict", "pod.yaml"], folder)
    pod = parse(folder / "pod.yaml")[0]
    container = pod["spec"]["initContainers"][0]
    expect(container["command"][-1], "/keys/session.key", "where the key goes")
    command = container["command"][:-1] + ["session.key"] + [url.replace("key-service:1123", folder.daemon) for url in container["args"]]
    run(command, folder)
    expect((folder / "session.key").stat().st_size, 32, "bytes")
    mounts = {mount["name"] for one in pod["spec"]["initContainers"] + pod["spec"]["containers"] for mount in one["volumeMounts"]}
    expect(mounts, {volume["name"] for volume in pod["spec"]["volumes"]}, "volumes")


@recipe("Kubernetes: External Secrets")
def external_secrets(folder, _):
    webhook, secret = parse(folder / "external-secret.yaml")
    with urllib.request.urlopen(webhook["spec"]["url"].replace("key-service:1123", folder.daemon), timeout=PATIENCE) as response:
        found = json.load(response)
    expect(webhook["spec"]["result"]["jsonPath"], "$", "the path of the object")
    expect(set(found), {"key", "encoding", "length"}, "entries of the Secret")
    reference = secret["spec"]["dataFrom"][0]["sourceRef"]["generatorRef"]
    expect(reference, {"apiVersion": webhook["apiVersion"], "kind": webhook["kind"], "name": webhook["metadata"]["name"]}, "the generator")


@recipe("WireGuard: pre-shared keys")
def wireguard(folder, _):
    key = (folder / "peer.psk").read_text()
    # It takes what `wg genpsk` prints and nothing else: 32 bytes in base64.
    assert run(["wg", "pubkey"], folder, given=key).strip()
    expect(subprocess.run(["wg", "pubkey"], input=key[1:], capture_output=True, text=True, check=False).returncode, 1, "a shorter one")
    expect(mode(folder / "peer.psk"), 0o600, "mode")


@recipe("LUKS: key files")
def luks(folder, _):
    expect(mode(folder / "disk.key"), 0o600, "mode")
    (folder / "other.key").write_bytes(b"\0" * 64)
    command = ["cryptsetup", "open", "--test-passphrase", "--key-file", "other.key", "disk.img"]
    expect(subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode, 2, "status with another key")


@recipe("Django and Rails")
def frameworks(folder, _):
    script = ("from django.conf import settings; from django.core import checks, signing; import django; django.setup(); "
              "assert signing.loads(signing.dumps('a')) == 'a'; "
              "from django.core.checks.security.base import check_secret_key; assert check_secret_key(None) == [], check_secret_key(None); "
              "print(len(settings.SECRET_KEY))")
    found = run([sys.executable, "-c", script], folder, {"DJANGO_SETTINGS_MODULE": "settings", "PYTHONPATH": str(folder)})
    expect(found.strip(), "64", "characters of the SECRET_KEY that Django has")
    assert re.fullmatch("[0-9a-f]{128}\n", (folder / "secret_key_base").read_text())
    run(["ruby", "-c", "production.rb"], folder)


def curl_over_tls(folder):
    """curl gets a key over TLS by each version of HTTP that it offers, none from an untrusted service, and none over plain HTTP."""
    def make(name):
        certificates.self_signed(folder / f"{name}.key", folder / f"{name}.pem", names="IP:127.0.0.1")
        (folder / f"{name}.pem").chmod(0o600)

    def curl(*options):
        return subprocess.run(["curl", "-sS", "-m", str(PATIENCE), *options], cwd=folder, capture_output=True, check=False)

    make("server")
    make("other")
    with Daemon(folder, f'tls-cert = "{folder}/server.pem"\ntls-key = "{folder}/server.key"\n') as daemon:
        url = f"https://{daemon.authority}/key/32"
        for version in ("--http1.0", "--http1.1", "--http2"):
            done = curl("-f", version, "--cacert", "server.pem", url)
            expect((done.returncode, len(done.stdout)), (0, 32), f"status and bytes of curl {version}")
        done = curl("--cacert", "other.pem", url)
        expect((done.returncode, done.stdout), (60, b""), "status of curl with another CA: certificate not verified")
        plain = curl(url.replace("https", "http"))
        expect(json.loads(plain.stdout)["detail"], "This port speaks TLS: use https://", "the answer to plain HTTP")


class Folder(type(Path())):
    """A folder that knows where the daemon is."""

    daemon = ""


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def parse(path):
    import yaml
    return list(yaml.safe_load_all(path.read_text()))


def tool(name):
    return shutil.which(name) or shutil.which(name, path="/var/cache/key-service-tools/bin")


def run(command, folder, more=None, given=None):
    environment = {**os.environ, "ANSIBLE_LOCALHOST_WARNING": "false", "PYTHONDONTWRITEBYTECODE": "1", **(more or {})}
    ran = subprocess.run(command, cwd=folder, env=environment, input=given, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ran.returncode == 0, f"{command} ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}"
    return ran.stdout


def follow(blocks, folder):
    """Does what the blocks say, in their order, and returns what the commands printed."""
    printed = ""
    for language, text in blocks:
        text = text.replace("localhost:1123", folder.daemon)
        name = pages.file_name(text)
        if name:
            (folder / name).write_text(text)
        elif language == "sh":
            printed += run(["sh", "-e"], folder, given=text)
    return printed


def missing():
    packages = [package for command, package in {**TOOLS, **proxies.TOOLS}.items() if not shutil.which(command)]
    packages += [] if os.path.exists(proxies.STREAM_MODULE) else ["libnginx-mod-stream"]
    packages += [package for module, package in MODULES.items() if not importlib.util.find_spec(module)]
    if packages:
        yield f"apt-get install --no-install-recommends {' '.join(packages)}"
    if not tool(VALIDATE):
        yield INSTALL


def main():
    passed, failed = 0, 0
    problems = list(missing())
    for problem in problems:
        print(f"FAIL a tool is missing: {problem}")
        failed += 1
    found = dict(pages.sections(PAGE))
    if set(found) != set(recipes) | set(elsewhere):
        print(f"FAIL recipes and tests are not the same: {sorted(set(found) ^ (set(recipes) | set(elsewhere)))}")
        failed += 1
    for title, (runner, mark) in elsewhere.items():
        if mark not in (REPOSITORY / runner).read_text():
            print(f"FAIL {title}: {runner} does not try it")
            failed += 1
    if not problems:
        with tempfile.TemporaryDirectory(prefix="key-service-recipes-") as root, Daemon(Path(root)) as daemon:
            Folder.daemon = daemon.authority
            steps = {title: lambda folder, title=title, blocks=blocks: recipes[title](folder, follow(blocks, folder))
                     for title, blocks in found.items() if title in recipes}
            steps["curl over TLS"] = curl_over_tls
            steps |= {f"proxies: {check.__name__}": lambda _, check=check: check() for check in proxies.checks}
            for number, (title, step) in enumerate(steps.items()):
                folder = Folder(root, str(number))
                folder.mkdir()
                try:
                    step(folder)
                    print(f"ok   {title}", flush=True)
                    passed += 1
                except (AssertionError, OSError, KeyError, ValueError, http.client.HTTPException, subprocess.SubprocessError) as problem:
                    print(f"FAIL {title}\n       {problem}", flush=True)
                    failed += 1
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()

"""Runs docs/recipes.md and docs/proxies.md verbatim against real daemons, and curl over TLS.

A block whose first line is a comment with a file name is the content of that file; other blocks are commands. A live daemon replaces
localhost:1123.
"""

import base64
import contextlib
import csv
import json
import math
import os
import re
import signal
import stat
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from cryptography.fernet import Fernet
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import OctKey
from support import certificates, pages, proxies
from support.conditions import TIMEOUT, expect
from support.daemon import REPOSITORY, Daemon, binary
from support.proxies import CLIENT, PROXY, STREAMED, Stage
from support.tools import DJANGO, STREAM_MODULE

SECTIONS = dict(pages.sections(REPOSITORY / "docs/recipes.md"))
SPOOFED = "203.0.113.9"
# Recipes that another file tests, and a text that this file must contain.
TESTED_ELSEWHERE = {
    "systemd credentials": ("tests/e2e/test_system.py", "/run/key-service/credential.sock"),
    "Generated clients": ("tests/e2e/test_openapi.py", "Generated clients"),
    "TLS: a throw-away certificate": ("tests/e2e/test_documents.py", "openssl req -x509"),
}
tested = set()


def recipe(title):
    """Runs a recipe in the test's tmp_path before the test; `printed` is the output of its commands."""
    tested.add(title)
    return pytest.mark.parametrize("printed", [title], indirect=True)


@pytest.fixture
def printed(request, daemon, tmp_path):
    """Writes the files and runs the commands of a recipe, in order; returns their output."""
    outputs = []
    for language, text in SECTIONS[request.param]:
        text = text.replace("localhost:1123", daemon.authority)
        if name := pages.file_name(text):
            (tmp_path / name).write_text(text)
        elif language == "sh":
            outputs.append(run(["sh", "-e"], tmp_path, given=text))
    return "".join(outputs)


def test_every_recipe_has_a_test():
    expect(set(SECTIONS), tested | set(TESTED_ELSEWHERE), "recipes")


@pytest.mark.parametrize("title", TESTED_ELSEWHERE)
def test_other_suites_test_their_recipes(title):
    file, mark = TESTED_ELSEWHERE[title]
    assert mark in (REPOSITORY / file).read_text(), f"{title}: expected {mark!r} in {file}"


@pytest.mark.tools("curl")
@recipe("Shell scripts")
def test_shell_scripts(tmp_path, printed):
    expect((tmp_path / "session.key").stat().st_size, 32, "bytes")
    assert re.fullmatch("[0-9a-f]{64}\n", (tmp_path / "session.hex").read_text())
    assert re.fullmatch("[2-9A-HJ-NP-Za-km-z]{24}\n", (tmp_path / "password").read_text())
    passwords = (tmp_path / "thirty-passwords").read_text().split()
    expect((len(set(passwords)), {len(one) for one in passwords}), (30, {12}), "passwords and their lengths")
    for path in tmp_path.iterdir():
        expect(mode(path), 0o600, f"mode of {path.name}")


@pytest.mark.tools("curl")
@recipe("API tokens as CSV")
def test_csv_tokens(tmp_path, printed):
    with (tmp_path / "tokens.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    expect(rows[0], ["client", "token"], "the header")
    expect([client for client, _ in rows[1:]], [f"client-{number:03}" for number in range(1, 101)], "clients")
    tokens = {token for _, token in rows[1:]}
    expect(len(tokens), 100, "number of different tokens")
    assert all(re.fullmatch("[0-9A-Za-z]{43}", token) for token in tokens), tokens
    assert 43 * math.log2(62) >= 256, "bits of entropy"
    expect(mode(tmp_path / "tokens.csv"), 0o600, "mode")


@pytest.mark.tools("curl")
@recipe("Fernet keys")
def test_fernet(tmp_path, daemon, printed):
    expect(printed, "a secret\n", "the output of encrypt.py")
    expect(mode(tmp_path / "fernet.key"), 0o600, "mode")
    command = next(text for language, text in SECTIONS["Fernet keys"] if language == "sh" and "curl" in text)
    many = replaced(command, "format=base64", "format=base64&count=1000").replace("localhost:1123", daemon.authority)
    for _ in range(2):
        run(["sh", "-e"], tmp_path, given=many)
        for key in (tmp_path / "fernet.key").read_text().split():
            # The alphabet of the specification; Python's decoder accepts more.
            assert re.fullmatch("[A-Za-z0-9_-]{43}=", key), key
            reader = Fernet(base64.b64encode(base64.b64decode(key, altchars=b"-_")))
            expect(reader.decrypt(Fernet(key).encrypt(b"a")), b"a", "the text that another reader of the key decrypts")
    keys = run(["curl", "-fsS", f"{daemon.address}/key/32?format=base64url&count=1000"], tmp_path).split()
    expect(len(keys), 1000, "keys in base64url")
    for key in keys:
        with pytest.raises(ValueError, match="Fernet key must be 32"):
            Fernet(key)


@pytest.mark.tools("curl", "jq")
@recipe("JWT signing keys")
def test_jwt(tmp_path, daemon, printed):
    expect(printed, "web\n", "the output of sign.py")
    expect(mode(tmp_path / "signing.jwk"), 0o600, "mode")
    found = json.loads((tmp_path / "signing.jwk").read_text())
    expect((set(found), found["alg"], found["use"]), ({"kty", "kid", "k", "alg", "use"}, "HS256", "sig"), "members of the key")
    key = OctKey.import_key(found)
    token = jwt.encode({"alg": "HS256"}, {"sub": "web"}, key)
    with pytest.raises(JoseError, match="designed for algorithm 'HS256'"):
        jwt.encode({"alg": "HS384"}, {"sub": "web"}, key, algorithms=["HS384"])
    other = OctKey.import_key({**found, "k": json.loads(daemon.get("/key/32?format=jwk")[2])["k"]})
    with pytest.raises(JoseError, match="bad_signature"):
        jwt.decode(token, other)


@pytest.mark.tools("ansible-playbook")
@recipe("Ansible")
def test_ansible(tmp_path, printed):
    assert "changed=1" in printed, printed
    key = (tmp_path / "session.key").read_text()
    expect((len(base64.b64decode(key)), mode(tmp_path / "session.key")), (32, 0o600), "size and mode of the key")
    second = run(["ansible-playbook", "-i", "localhost,", "playbook.yml"], tmp_path)
    assert "changed=0" in second and "failed=0" in second, second
    expect((tmp_path / "session.key").read_text(), key, "the key after a second run")


@pytest.mark.tools("curl", "kubernetes-validate")
@recipe("Kubernetes: an init container")
def test_init_container(tmp_path, daemon, printed):
    run(["kubernetes-validate", "--strict", "pod.yaml"], tmp_path)
    pod = list(yaml.safe_load_all((tmp_path / "pod.yaml").read_text()))[0]
    container = pod["spec"]["initContainers"][0]
    expect(container["command"][-1], "/keys/session.key", "the file for the key")
    command = container["command"][:-1] + ["session.key"] + [url.replace("key-service:1123", daemon.authority) for url in container["args"]]
    run(command, tmp_path)
    expect((tmp_path / "session.key").stat().st_size, 32, "bytes")
    mounts = {mount["name"] for one in pod["spec"]["initContainers"] + pod["spec"]["containers"] for mount in one["volumeMounts"]}
    expect(mounts, {volume["name"] for volume in pod["spec"]["volumes"]}, "volumes")


@pytest.mark.tools("kubernetes-validate")
@recipe("Kubernetes: an init container without the service")
def test_init_container_without_the_service(tmp_path, printed):
    run(["kubernetes-validate", "--strict", "pod.yaml"], tmp_path)
    spec = yaml.safe_load((tmp_path / "pod.yaml").read_text())["spec"]
    [generator], [reader] = spec["initContainers"], spec["containers"]
    # The file is for one user, and the kubelet would make it readable for a group.
    users = [one.get("securityContext", {}).get("runAsUser", spec["securityContext"]["runAsUser"]) for one in (generator, reader)]
    expect((len(set(users)), "fsGroup" in spec["securityContext"]), (1, False), "number of users, and whether there is an fsGroup")
    [mount], [volume] = generator["volumeMounts"], spec["volumes"]
    expect(reader["volumeMounts"], [{**mount, "readOnly": True}], "the reader's mount")
    expect((mount["name"], volume["emptyDir"]["medium"]), (volume["name"], "Memory"), "the volume")
    file = Path(generator["args"][generator["args"].index("--output") + 1])
    expect(str(file.parent), mount["mountPath"], "the directory of the file")
    command = [binary(), *(str(tmp_path / file.name) if argument == str(file) else argument for argument in generator["args"])]
    run(command, tmp_path)
    key = (tmp_path / file.name).read_bytes()
    run(command, tmp_path)
    expect(((tmp_path / file.name).read_bytes() == key, len(key), mode(tmp_path / file.name)), (True, 32, 0o600), "same key, size, mode")


@recipe("Kubernetes: External Secrets")
def test_external_secrets(tmp_path, daemon, printed):
    webhook, secret = list(yaml.safe_load_all((tmp_path / "external-secret.yaml").read_text()))
    with urllib.request.urlopen(webhook["spec"]["url"].replace("key-service:1123", daemon.authority), timeout=TIMEOUT) as response:
        found = json.load(response)
    expect(webhook["spec"]["result"]["jsonPath"], "$", "the path of the object")
    expect(set(found), {"key", "encoding", "length"}, "entries of the Secret")
    reference = secret["spec"]["dataFrom"][0]["sourceRef"]["generatorRef"]
    expect(reference, {"apiVersion": webhook["apiVersion"], "kind": webhook["kind"], "name": webhook["metadata"]["name"]}, "the generator")


@pytest.mark.tools("curl", "wg")
@recipe("WireGuard: pre-shared keys")
def test_wireguard(tmp_path, printed):
    key = (tmp_path / "peer.psk").read_text()
    # wg accepts only what `wg genpsk` prints: 32 bytes in base64.
    assert run(["wg", "pubkey"], tmp_path, given=key).strip()
    expect(
        subprocess.run(["wg", "pubkey"], input=key[1:], capture_output=True, text=True, check=False).returncode,
        1,
        "exit status of wg for a shorter key",
    )
    expect(mode(tmp_path / "peer.psk"), 0o600, "mode")


@pytest.mark.tools("curl", "cryptsetup")
@recipe("LUKS: key files")
def test_luks(tmp_path, printed):
    expect(mode(tmp_path / "disk.key"), 0o600, "mode")
    (tmp_path / "other.key").write_bytes(b"\0" * 64)
    command = ["cryptsetup", "open", "--test-passphrase", "--key-file", "other.key", "disk.img"]
    expect(subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode, 2, "exit status with another key")


@pytest.mark.tools("curl", "ruby", DJANGO)
@recipe("Django and Rails")
def test_frameworks(tmp_path, printed):
    script = (
        "from django.conf import settings; from django.core import checks, signing; import django; django.setup(); "
        "assert signing.loads(signing.dumps('a')) == 'a'; "
        "from django.core.checks.security.base import check_secret_key; assert check_secret_key(None) == [], check_secret_key(None); "
        "print(len(settings.SECRET_KEY))"
    )
    found = run(["/usr/bin/python3", "-c", script], tmp_path, {"DJANGO_SETTINGS_MODULE": "settings", "PYTHONPATH": str(tmp_path)})
    expect(found.strip(), "64", "characters of the SECRET_KEY that Django reads")
    assert re.fullmatch("[0-9a-f]{128}\n", (tmp_path / "secret_key_base").read_text())
    run(["ruby", "-c", "production.rb"], tmp_path)


@pytest.mark.tools("curl", "openssl")
def test_curl_over_tls(tmp_path):
    """curl gets a key over TLS with each HTTP version that it offers, but not from an untrusted service and not over plain HTTP."""

    def make(name):
        certificates.self_signed(tmp_path / f"{name}.key", tmp_path / f"{name}.pem", names="IP:127.0.0.1")
        (tmp_path / f"{name}.pem").chmod(0o600)

    def curl(*options):
        return subprocess.run(["curl", "-sS", "-m", str(TIMEOUT), *options], cwd=tmp_path, capture_output=True, check=False)

    make("server")
    make("other")
    with Daemon(tmp_path, f'tls-cert = "{tmp_path}/server.pem"\ntls-key = "{tmp_path}/server.key"\n') as daemon:
        url = f"https://{daemon.authority}/key/32"
        for version in ("--http1.0", "--http1.1", "--http2"):
            done = curl("-f", version, "--cacert", "server.pem", url)
            expect((done.returncode, len(done.stdout)), (0, 32), f"exit status and number of bytes of curl {version}")
        done = curl("--cacert", "other.pem", url)
        expect((done.returncode, done.stdout), (60, b""), "exit status and output of curl with another CA")
        plain = curl(url.replace("https", "http"))
        expect(json.loads(plain.stdout)["detail"], "This port speaks TLS: use https://", "the response to plain HTTP")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def run(command, directory, more=None, given=None):
    environment = {**os.environ, "ANSIBLE_LOCALHOST_WARNING": "false", "PYTHONDONTWRITEBYTECODE": "1", **(more or {})}
    ran = subprocess.run(command, cwd=directory, env=environment, input=given, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert ran.returncode == 0, f"{command} ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}"
    return ran.stdout


PROXIES = ["nginx", "haproxy", "caddy", "apache"]
proxy = pytest.mark.parametrize("name", PROXIES)
needs_proxies = pytest.mark.tools("nginx", "haproxy", "caddy", "apache2", "openssl", "setpriv")


@needs_proxies
@proxy
def test_proxy_serves_keys(name):
    """Each proxy of docs/proxies.md serves keys over HTTP and sends no request to a daemon that is stopping."""
    with Stage(name, config="drain-delay = 60\n") as stage:
        stage.until("a key", lambda: stage.get("/key/32")[0] == 200)
        check_serving(stage)
        check_failover(stage, has_checks=name != "nginx")


@needs_proxies
@proxy
def test_proxy_serves_keys_over_tls(name):
    """Each proxy does the same with TLS to the daemons, over connections that it reuses."""
    with Stage(name, upstream_tls=True, config="drain-delay = 60\n") as stage:
        stage.until("a key", lambda: stage.get("/key/32")[0] == 200)
        before, started = sum(node.metric("tls_handshakes_total") for node in stage.nodes), time.monotonic()
        check_serving(stage)
        handshakes = sum(node.metric("tls_handshakes_total") for node in stage.nodes) - before
        by_checks = 2 + time.monotonic() - started  # health checks make one handshake per daemon every two seconds
        assert handshakes < 17 + by_checks, f"{handshakes:.0f} TLS handshakes for 34 requests"
        if name != "nginx":
            check_failover(stage, has_checks=True)


@needs_proxies
@proxy
def test_proxy_verifies_its_daemons(name):
    """A proxy that trusts another CA serves no keys."""
    with Stage(name, upstream_tls=True, trusted="other") as stage:
        found = {stage.first, *(stage.get("/key/32")[0] for _ in range(5))}
        assert found <= {500, 502, 503}, f"expected only errors from a proxy that trusts another CA, found {found}"


@needs_proxies
@pytest.mark.tools(STREAM_MODULE)
@pytest.mark.parametrize("name", ["nginx", "haproxy"])
def test_tcp_load_balancer_serves_keys(name):
    """Each TCP load balancer of docs/proxies.md reports its clients in PROXY headers."""
    with Stage(name, is_tcp=True, config="proxy-protocol = true\ndrain-delay = 60\n") as stage:
        stage.until("a key", lambda: stage.get("/key/32")[0] == 200)
        check_serving(stage)
        if name != "nginx":
            check_failover(stage, has_checks=True)


def check_serving(stage):
    """Keys are served; audit records name the client even if it spoofs headers; connections to the daemons are reused."""
    for headers in ({}, {"X-Forwarded-For": SPOOFED}, {"X-Forwarded-For": f"{SPOOFED}, {PROXY}"}, {"Forwarded": f"for={SPOOFED}"}):
        status, response, key = stage.get("/key/32", headers)
        assert (status, len(key)) == (200, 32), (status, key)
        record = stage.record(response)
        # With a PROXY header the connection counts as the client's own, so the record names no proxy.
        assert (record["address"], record.get("proxy")) == (CLIENT, None if stage.is_tcp else PROXY), f"{headers}: {record}"
    if stage.is_tcp:
        return
    kept = 0
    for _ in range(30):
        before = stage.connections()
        status, _, key = stage.get("/key/32")
        assert (status, len(key)) == (200, 32), (status, key)
        kept += bool(before & stage.connections())
    assert kept > 15, f"{kept} of 30 requests left a connection to the daemons open"
    # Each of these clients used its own connection to the proxy. Health checks may have one connection each now.
    idle = sum(node.metric("http_connections") for node in stage.nodes)
    assert 1 <= idle <= 8, f"after 34 requests {idle:.0f} connections are open"


def check_failover(stage, has_checks):
    """A stopping daemon gets no requests and no request fails; after a restart it gets requests again."""
    a, b = stage.nodes
    stage.until("both daemons to serve", lambda: serve_some(stage, b))
    b.process.send_signal(signal.SIGTERM)  # during drain-delay it is unready and still serves
    if has_checks:
        # Caddy chooses at random: ten requests miss one of two ready daemons with a probability of 2^-10, thirty with 2^-30.
        stage.until("no requests to a daemon that is not ready", lambda: not any(serve_some(stage, b) for _ in range(3)))
        assert b.process.poll() is None, "expected the daemon to run still, so that only its health removed it"
    b.process.send_signal(signal.SIGINT)  # a second signal ends the drain; SIGINT, because a second SIGTERM could merge with the first
    while b.process.poll() is None:
        serve_some(stage, a)
    assert serve_some(stage, a) == 10, "expected the other daemon to serve all requests"
    stage.start(1)
    stage.until("requests to the restarted daemon", lambda: serve_some(stage, stage.nodes[1]))


def serve_some(stage, node):
    """Sends ten requests, which must all succeed; returns how many of them `node` served."""
    before = node.metric("key_length_bytes_count")
    for _ in range(10):
        status, _, key = stage.get("/key/32")
        assert (status, len(key)) == (200, 32), (status, key)
    return node.metric("key_length_bytes_count") - before


APPENDED = "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"


@needs_proxies
@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        pytest.param(APPENDED, "", "'address': '127.0.0.1'", id="the client's address is missing"),
        pytest.param(
            APPENDED, APPENDED.replace("proxy_add_x", "http_x"), "'address': '127.0.0.1'", id="the client's own header is passed on"
        ),
        pytest.param("keepalive 32;", "", "0 of 30 requests left a connection", id="no connection is reused"),
        pytest.param('proxy_set_header Connection "";', "", "0 of 30 requests left a connection", id="a connection serves one request"),
    ],
)
def test_wrong_proxy_configuration_is_detected(old, new, error):
    """Each of the checks above can fail."""
    with Stage("nginx", edit=lambda text: replaced(text, old, new)) as stage, pytest.raises(AssertionError, match=error):
        check_serving(stage)


@needs_proxies
def test_missing_verification_is_detected():
    """The check that a proxy verifies its daemons can fail."""
    with Stage("nginx", upstream_tls=True, trusted="other", edit=lambda text: replaced(text, "proxy_ssl_verify on;", "")) as stage:
        expect(stage.first, 200, "status from nginx, which does not verify by default")


def replaced(text, old, new):
    assert old in text, f"{old} is not in the configuration"
    return text.replace(old, new)


@needs_proxies
def test_nginx_spools_no_streamed_key():
    """nginx with buffering on passes a streamed key through memory and writes none of it to disk."""
    ignored = "proxy_ignore_headers X-Accel-Buffering;"
    # If nginx ignores the header, it spools the key. This proves that the check can fail.
    with Stage("nginx", edit=lambda text: replaced(text, "proxy_pass ", f"{ignored}\nproxy_pass ")) as stage:
        started = time.monotonic()
        with contextlib.closing(stage.connection()) as connection:
            connection.request("GET", f"/key/{STREAMED}")
            response = connection.getresponse()
            response.read(1024)
            stage.until("nginx to spool", lambda: spooled(stage) > STREAMED // 2)
        needed = time.monotonic() - started
    with Stage("nginx") as stage, contextlib.closing(stage.connection()) as connection:
        connection.request("GET", f"/key/{STREAMED}")
        response = connection.getresponse()
        assert response.status == 200
        # The client first reads nothing, for longer than spooling took above, and then reads slowly. The pause is shorter than
        # write-timeout, after which the daemon would reset the connection.
        deadline, left = time.monotonic() + min(2 * needed, 8), STREAMED
        while left:
            if time.monotonic() > deadline:
                left -= len(response.read(min(left, STREAMED // 64)))
            assert spooled(stage) == 0, f"expected no spooled bytes, found {spooled(stage)}, with {left} bytes unread"
            time.sleep(0.01)


def spooled(stage):
    """The number of bytes in files below proxy_temp, including deleted files that nginx still has open."""
    directory = stage.directory / "proxy_temp"
    total = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    children = Path(f"/proc/{stage.process.pid}/task/{stage.process.pid}/children").read_text().split()
    assert children, "expected nginx to have a worker"
    for number in children:
        for link in Path(f"/proc/{number}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed in the meantime
                if os.readlink(link).startswith(str(directory)):
                    total += os.stat(link).st_size
    return total


@pytest.mark.tools("kubernetes-validate")
def test_kubernetes_ingress_is_valid(tmp_path):
    """The Ingress in docs/proxies.md is valid. No controller runs here; tests/e2e/test_chart.py renders the values."""
    blocks = {pages.file_name(text): text for _, text in dict(pages.sections(proxies.PAGE))["Kubernetes"]}
    (tmp_path / "ingress.yaml").write_text(blocks["ingress.yaml"])
    run(["kubernetes-validate", "--strict", "ingress.yaml"], tmp_path)

#!/usr/bin/env python3
"""Generates clients from /openapi.json, as docs/recipes.md says, and uses every format against a real daemon.

    tests/openapi/clients

Needs openapi-python-client: on PATH, or in /var/cache/key-service-tools/bin; nodejs and npm. What comes from npm is installed
once, in $KEY_SERVICE_CLIENT_TOOLS (default: /var/cache/key-service-tools/clients). The daemon is $KEY_SERVICE_BIN, else what is
built in target/, else it is built.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent

sys.path.insert(0, str(REPOSITORY / "tests/common"))
sys.dont_write_bytecode = True
import pages  # noqa: E402
from daemon import Daemon, PATIENCE, binary  # noqa: E402

PYTHON = Path("/var/cache/key-service-tools/bin")
GENERATOR = "openapi-python-client==0.29.1"
NPM = ["openapi-typescript@7.13.0", "openapi-fetch@0.17.0", "typescript@5.9.3", "@types/node@20.19.30"]
VERSION = hashlib.sha256(" ".join(NPM).encode()).hexdigest()[:12]
PACKAGES = Path(os.environ.get("KEY_SERVICE_CLIENT_TOOLS", "/var/cache/key-service-tools/clients")) / VERSION
TYPES = ["tsc", "--strict", "--target", "es2022", "--module", "nodenext", "--types", "node"]

checks = []


def check(function):
    checks.append(function)
    return function


@check
def the_recipe_runs_as_it_stands(folder, daemon):
    blocks = dict(pages.sections(REPOSITORY / "docs/recipes.md"))["Generated clients"]
    files = {pages.file_name(text) for _, text in blocks}
    assert files == {"issue.py", "issue.mts", None}, files
    for language, text in blocks:
        text = text.replace("localhost:1123", daemon.authority)
        if name := pages.file_name(text):
            (folder / name).write_text(text + SHOWN[name])
        else:
            assert language == "sh", language
            printed = run(["sh", "-e"], folder, text)
            assert printed.splitlines()[-1] == "32 64 3 32 43 24", printed


# What the recipe got, as the lengths of: raw, text, keys, one, jwk and password.
SHOWN = {
    "issue.py": '\nprint(len(raw), len(text), len(keys), one.length, len(jwk["k"]), len(password))\n',
    "issue.mts": "\nif (!Array.isArray(keys.data)) throw new Error('no batch');\n"
                 "console.log(bytes.length, text?.length, keys.data.length, keys.data[0]?.length, k.length, (password.data?.trim().length ?? 0) - 8);\n",
}


@check
def python_gets_every_format(folder, daemon):
    generate_python(folder, daemon)
    run(["python3", HERE / "client.py", daemon.address], folder)


@check
def typescript_gets_every_format(folder, daemon):
    generate_typescript(folder, daemon)
    shutil.copy(HERE / "client.mts", folder)
    run([*TYPES, "client.mts"], folder)
    run(["node", "client.mjs", daemon.address], folder)


@check
def typescript_knows_the_parameters(folder, daemon):
    """A check that the types are no `any`: each of these lines is an error."""
    generate_typescript(folder, daemon)
    for wrong in ('path: { length: "32" }', 'path: { length: 32 }, query: { format: "pem" }', 'path: { length: 32 }, query: { size: 1 }', ""):
        (folder / "wrong.mts").write_text(
            'import createClient from "openapi-fetch";\nimport type { paths } from "./key-service.js";\n'
            f'await createClient<paths>({{ baseUrl: "" }}).GET("/key/{{length}}", {{ params: {{ {wrong} }} }});\n')
        ran = attempt([*TYPES, "--noEmit", "wrong.mts"], folder)
        assert ran.returncode != 0 and "wrong.mts(3," in ran.stdout, f"{wrong}: {ran.stdout}"


@check
def tokens_are_in_the_clients(folder, _):
    new = subprocess.run([binary(), "token", "new", "--name", "client"], capture_output=True, text=True, check=True).stdout
    token, line = new.split("\n", 1)
    (folder / "tokens").write_text(line)
    (folder / "tokens").chmod(0o600)
    with Daemon(folder, f'tokens-file = "{folder}/tokens"\n') as daemon:
        generate_python(folder, daemon)
        (folder / "tokens.py").write_text(
            "import sys\nfrom inspect import signature\nfrom key_service import AuthenticatedClient, Client\n"
            "from key_service.api.keys import get_key\nfrom key_service.api.state import get_readyz\n"
            "def key(token): return get_key.sync(16, client=AuthenticatedClient(sys.argv[1], token=token))\n"
            "assert len(key(sys.argv[2])) == 16\n"
            "assert key('ks_no').status == 401\n"
            "assert signature(get_key.sync).parameters['client'].annotation is AuthenticatedClient\n"
            "assert get_readyz.sync(client=Client(sys.argv[1])) == 'OK'\n")
        run(["python3", "tokens.py", daemon.address, token], folder)


def generate_python(folder, daemon):
    printed = run(["openapi-python-client", "generate", "--url", f"{daemon.address}/openapi.json", "--meta", "none", "--output-path", "key_service"], folder)
    assert "warning" not in printed.lower(), printed


def generate_typescript(folder, daemon):
    run(["openapi-typescript", f"{daemon.address}/openapi.json", "--output", "key-service.d.ts"], folder)


def attempt(command, folder, given=None):
    path = f"{PYTHON}:{PACKAGES}/node_modules/.bin:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, input=given, capture_output=True, text=True, timeout=PATIENCE, check=False)


def run(command, folder, given=None):
    ran = attempt(command, folder, given)
    assert ran.returncode == 0, f"{command} ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}"
    return ran.stdout


def install():
    """What is missing, as a sentence; the packages of npm are installed."""
    found = shutil.which("openapi-python-client", path=f"{PYTHON}:{os.environ['PATH']}")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout if found else "none"
    if GENERATOR.partition("==")[2] not in version:
        return f"expected {GENERATOR}, found {version.strip()}; install it: python3 -m venv {PYTHON.parent} && {PYTHON}/pip install {GENERATOR}"
    if missing := [tool for tool in ("node", "npm") if not shutil.which(tool)]:
        return f"{missing} not found: apt-get install nodejs npm"
    if not (PACKAGES / "complete").exists():
        print(f"installing the packages of npm in {PACKAGES}", flush=True)
        shutil.rmtree(PACKAGES, ignore_errors=True)
        PACKAGES.mkdir(parents=True)
        (PACKAGES / "package.json").write_text('{"private": true}\n')
        options = ["--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(["npm", "install", *options, *NPM], cwd=PACKAGES, check=True)
        (PACKAGES / "complete").touch()
    return ""


def main():
    passed = failed = 0
    if problem := install():
        print(f"FAIL tools: {problem}")
        failed = 1
    else:
        with tempfile.TemporaryDirectory(prefix="key-service-clients-") as root, Daemon(Path(root), "max-size = 100000\n") as daemon:
            for function in checks:
                folder = Path(root, function.__name__)
                folder.mkdir()
                (folder / "node_modules").symlink_to(PACKAGES / "node_modules")
                try:
                    function(folder, daemon)
                    print(f"ok   {function.__name__}", flush=True)
                    passed += 1
                except (AssertionError, OSError, KeyError, subprocess.SubprocessError) as problem:
                    print(f"FAIL {function.__name__}\n       {problem}", flush=True)
                    failed += 1
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()

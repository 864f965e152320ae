"""/openapi.json, held to a live daemon by schemathesis (every status, header and body as it is described), and generated clients."""

import json
import os
import re
import shutil
import subprocess
import urllib.request

import pytest
from support import npm, pages
from support.conditions import TIMEOUT, expect
from support.daemon import REPOSITORY, Daemon, binary, environment
from support.machine import SUPPORT

HERE = SUPPORT / "openapi"
CASES_MIN = 500  # of schemathesis, for each bound
# Only the first of these seconds are needed, except on a machine that is too busy for so many cases.
SECONDS = (15, 60, 240)

NPM = ["openapi-typescript@7.13.0", "openapi-fetch@0.17.0", "typescript@5.9.3", "@types/node@20.19.30"]
TYPES = ["tsc", "--strict", "--target", "es2022", "--module", "nodenext", "--types", "node"]


@pytest.mark.tools("schemathesis")
@pytest.mark.parametrize("max_size", [100_000, 50])
def test_every_answer_is_described(max_size, tmp_path, figures):
    """Requests by the document get no answer that it does not describe, and the daemon runs on."""
    # Large keys, so that streamed ones are met too; small ones, so that the bound of a password is max-size.
    with Daemon(tmp_path, f"max-size = {max_size}\n") as daemon:
        for seconds in SECONDS:
            ran = schemathesis(daemon, seconds, f"{daemon.address}/openapi.json")
            assert ran.returncode == 0, f"{(ran.stdout + ran.stderr)[-6000:]}\nexit status {ran.returncode}"
            cases = re.search(r"(\d+) generated", ran.stdout)
            if cases and int(cases[1]) >= CASES_MIN:
                break
        else:
            raise AssertionError(f"expected {CASES_MIN} cases or more, found:\n{ran.stdout}")
        expect(daemon.process.poll(), None, "exit status of the daemon")
    figures(f"{cases[1]} cases in {seconds} s")


def larger(document):
    document["paths"]["/key/{length}"]["parameters"][0]["schema"]["maximum"] = 60


def without_413(document):
    del document["paths"]["/key/{length}"]["get"]["responses"]["413"]


def another_field(document):
    document["components"]["schemas"]["Problem"]["required"].append("type")


def unknown_format(document):
    document["paths"]["/key/{length}"]["get"]["parameters"][0]["schema"]["enum"].append("pem")


def another_header(document):
    document["paths"]["/password/{length}"]["get"]["responses"]["200"]["headers"]["Entropy"] = {
        "required": True,
        "schema": {"type": "number"},
    }


MUTANTS = [
    pytest.param(larger, "for a valid request, found 413", id="a bound that is too large"),
    pytest.param(without_413, "Undocumented status code", id="a status missing"),
    pytest.param(another_field, "Response violates schema", id="a field of problems that is not there"),
    pytest.param(unknown_format, "expected 200 for a valid request, found 400", id="a format that is not known"),
    pytest.param(another_header, "Missing required response headers", id="a header that is not there"),
]


@pytest.mark.tools("schemathesis")
@pytest.mark.parametrize(("change", "found"), MUTANTS)
def test_a_wrong_document_is_noticed(change, found, tmp_path):
    """A service that does not do what the document says is noticed by the same requests."""
    with Daemon(tmp_path, "max-size = 50\n") as daemon:
        with urllib.request.urlopen(f"{daemon.address}/openapi.json", timeout=TIMEOUT) as response:
            document = json.load(response)
        change(document)
        (tmp_path / "mutant.json").write_text(json.dumps(document))
        # The first failure ends it, after seconds; a slow machine must not end it before.
        ran = schemathesis(daemon, SECONDS[-1], tmp_path / "mutant.json", "--max-failures", "1")
    assert ran.returncode != 0 and found in ran.stdout + ran.stderr, f"expected {found!r}, found:\n{ran.stdout}{ran.stderr}"


def schemathesis(daemon, seconds, document, *options):
    """Asks what a document describes, for so long."""
    command = [
        *("schemathesis", "--config-file", HERE / "schemathesis.toml"),
        *("run", document, "--url", daemon.address, "--phases", "coverage,fuzzing"),
        *("--checks", "all", "--exclude-checks", "positive_data_acceptance"),  # ours is stricter: see checks.py
        *("--max-time", str(seconds), "--max-examples", "500", "--request-timeout", "10"),
        *("--workers", "1", "--no-color", "--generation-deterministic", *options),
    ]
    hooks = {"SCHEMATHESIS_HOOKS": "checks", "PYTHONPATH": str(HERE), "BATCH_MAX": str(batch_max())}
    return attempt(command, daemon.directory, more=hooks, timeout=seconds + TIMEOUT)


def batch_max():
    """The bound of a batch, as the source has it."""
    source = (REPOSITORY / "src/keys/generator.rs").read_text()
    factors = re.search(r"pub const CHUNK: usize = ([0-9]+) \* ([0-9]+);", source).groups()
    return int(factors[0]) * int(factors[1])


needs_generators = pytest.mark.tools("node", "npm", "openapi-python-client")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """A daemon whose keys can be large enough to be streamed."""
    with Daemon(tmp_path_factory.mktemp("daemon"), "max-size = 100000\n") as daemon:
        yield daemon


@pytest.fixture
def folder(tmp_path):
    """A folder with the packages of npm, which are installed once."""
    (tmp_path / "node_modules").symlink_to(packages())
    return tmp_path


@needs_generators
def test_the_recipe_runs_as_it_stands(folder, daemon):
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
    "issue.mts": """
if (!Array.isArray(keys.data)) throw new Error('no batch');
const password_length = (password.data?.trim().length ?? 0) - 8;
console.log(bytes.length, text?.length, keys.data.length, keys.data[0]?.length, k.length, password_length);
""",
}


@needs_generators
def test_python_gets_every_format(folder, daemon):
    generate_python(folder, daemon)
    run(["python3", HERE / "client.py", daemon.address], folder)


@needs_generators
def test_typescript_gets_every_format(folder, daemon):
    generate_typescript(folder, daemon)
    shutil.copy(HERE / "client.mts", folder)
    run([*TYPES, "client.mts"], folder)
    run(["node", "client.mjs", daemon.address], folder)


@needs_generators
def test_typescript_knows_the_parameters(folder, daemon):
    """A check that the types are no `any`: each of these files has an error in its third line."""
    generate_typescript(folder, daemon)
    wrong = ['path: { length: "32" }', 'path: { length: 32 }, query: { format: "pem" }', "path: { length: 32 }, query: { size: 1 }", ""]
    for number, parameters in enumerate(wrong):
        (folder / f"wrong{number}.mts").write_text(
            'import createClient from "openapi-fetch";\nimport type { paths } from "./key-service.js";\n'
            f'await createClient<paths>({{ baseUrl: "" }}).GET("/key/{{length}}", {{ params: {{ {parameters} }} }});\n'
        )
    ran = attempt([*TYPES, "--noEmit", *(f"wrong{number}.mts" for number in range(len(wrong)))], folder)
    assert ran.returncode != 0
    for number, parameters in enumerate(wrong):
        assert f"wrong{number}.mts(3," in ran.stdout, f"{parameters}: {ran.stdout}"


@needs_generators
def test_tokens_are_in_the_clients(folder):
    new = subprocess.run([binary(), "token", "new", "--name", "client"], env=environment(), capture_output=True, text=True, check=True)
    token, line = new.stdout.split("\n", 1)
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
            "assert get_readyz.sync(client=Client(sys.argv[1])) == 'OK'\n"
        )
        run(["python3", "tokens.py", daemon.address, token], folder)


def packages():
    return npm.installed("clients", "KEY_SERVICE_CLIENT_TOOLS", NPM)


def generate_python(folder, daemon):
    command = ["openapi-python-client", "generate", "--url", f"{daemon.address}/openapi.json", "--meta", "none"]
    printed = run([*command, "--output-path", "key_service"], folder)
    assert "warning" not in printed.lower(), printed


def generate_typescript(folder, daemon):
    run(["openapi-typescript", f"{daemon.address}/openapi.json", "--output", "key-service.d.ts"], folder)


def run(command, folder, given=None):
    ran = attempt(command, folder, given)
    assert ran.returncode == 0, f"{command} ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}"
    return ran.stdout


def attempt(command, folder, given=None, more=None, timeout=2 * TIMEOUT):
    """Runs a command with the packages of npm, and with the client in `folder`."""
    path = f"{packages()}/.bin:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", **(more or {})}
    return subprocess.run(command, cwd=folder, env=environment, input=given, capture_output=True, text=True, timeout=timeout, check=False)

"""/openapi.json: schemathesis checks a live daemon against it (every status, header and body), and clients are generated from it."""

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
CASES_MIN = 500  # of schemathesis, for each max-size
# Time limits of successive attempts, in seconds. The first is enough, unless the machine is too busy to run CASES_MIN cases in it.
SECONDS = (15, 60, 240)

NPM = ["openapi-typescript@7.13.0", "openapi-fetch@0.17.0", "typescript@5.9.3", "@types/node@20.19.30"]
TYPES = ["tsc", "--strict", "--target", "es2022", "--module", "nodenext", "--types", "node"]


@pytest.mark.tools("schemathesis")
@pytest.mark.parametrize("max_size", [100_000, 50])
def test_every_response_is_described(max_size, tmp_path, figures):
    """Requests generated from the document get only responses that it describes, and the daemon keeps running."""
    # A large max-size covers streamed keys; a small one makes max-size the limit for passwords.
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


def too_large_maximum(document):
    document["paths"]["/key/{length}"]["parameters"][0]["schema"]["maximum"] = 60


def missing_413(document):
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
    pytest.param(too_large_maximum, "for a valid request, found 413", id="a maximum that is too large"),
    pytest.param(missing_413, "Undocumented status code", id="a missing status"),
    pytest.param(another_field, "Response violates schema", id="an unknown field of problem details"),
    pytest.param(unknown_format, "expected 200 for a valid request, found 400", id="an unknown format"),
    pytest.param(another_header, "Missing required response headers", id="a missing header"),
]


@pytest.mark.tools("schemathesis")
@pytest.mark.parametrize(("change", "found"), MUTANTS)
def test_wrong_document_is_detected(change, found, tmp_path):
    """The same requests detect a service that does not match its document."""
    with Daemon(tmp_path, "max-size = 50\n") as daemon:
        with urllib.request.urlopen(f"{daemon.address}/openapi.json", timeout=TIMEOUT) as response:
            document = json.load(response)
        change(document)
        (tmp_path / "mutant.json").write_text(json.dumps(document))
        # The run stops at the first failure, after a few seconds. The longest time limit leaves enough time on a slow machine.
        ran = schemathesis(daemon, SECONDS[-1], tmp_path / "mutant.json", "--max-failures", "1")
    assert ran.returncode != 0 and found in ran.stdout + ran.stderr, f"expected {found!r}, found:\n{ran.stdout}{ran.stderr}"


def schemathesis(daemon, seconds, document, *options):
    """Sends the requests that a document describes, for at most this many seconds."""
    command = [
        *("schemathesis", "--config-file", HERE / "schemathesis.toml"),
        *("run", document, "--url", daemon.address, "--phases", "coverage,fuzzing"),
        *("--checks", "all", "--exclude-checks", "positive_data_acceptance"),  # checks.py has a stricter check
        *("--max-time", str(seconds), "--max-examples", "500", "--request-timeout", "10"),
        *("--workers", "1", "--no-color", "--generation-deterministic", *options),
    ]
    hooks = {"SCHEMATHESIS_HOOKS": "checks", "PYTHONPATH": str(HERE), "BATCH_MAX": str(batch_max())}
    return attempt(command, daemon.directory, more=hooks, timeout=seconds + TIMEOUT)


def batch_max():
    """The size limit of a batch, read from the source."""
    source = (REPOSITORY / "src/keys/generator.rs").read_text()
    factors = re.search(r"pub const CHUNK_SIZE: usize = ([0-9]+) \* ([0-9]+);", source).groups()
    return int(factors[0]) * int(factors[1])


needs_generators = pytest.mark.tools("node", "npm", "openapi-python-client")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """A daemon that allows keys large enough to be streamed."""
    with Daemon(tmp_path_factory.mktemp("daemon"), "max-size = 100000\n") as daemon:
        yield daemon


@pytest.fixture
def directory(tmp_path):
    """A directory with the npm packages, which are installed once."""
    (tmp_path / "node_modules").symlink_to(packages())
    return tmp_path


@needs_generators
def test_recipe_runs_verbatim(directory, daemon):
    blocks = dict(pages.sections(REPOSITORY / "docs/recipes.md"))["Generated clients"]
    files = {pages.file_name(text) for _, text in blocks}
    assert files == {"issue.py", "issue.mts", None}, files
    for language, text in blocks:
        text = text.replace("localhost:1123", daemon.authority)
        if name := pages.file_name(text):
            (directory / name).write_text(text + SHOWN[name])
        else:
            assert language == "sh", language
            printed = run(["sh", "-e"], directory, text)
            assert printed.splitlines()[-1] == "32 64 3 32 43 24", printed


# Code that prints the lengths of what the recipe got: raw, text, keys, one, jwk and password.
SHOWN = {
    "issue.py": '\nprint(len(raw), len(text), len(keys), one.length, len(jwk["k"]), len(password))\n',
    "issue.mts": """
if (!Array.isArray(keys.data)) throw new Error('no batch');
const password_length = (password.data?.trim().length ?? 0) - 8;
console.log(bytes.length, text?.length, keys.data.length, keys.data[0]?.length, k.length, password_length);
""",
}


@needs_generators
def test_python_gets_every_format(directory, daemon):
    generate_python(directory, daemon)
    run(["python3", HERE / "client.py", daemon.address], directory)


@needs_generators
def test_typescript_gets_every_format(directory, daemon):
    generate_typescript(directory, daemon)
    shutil.copy(HERE / "client.mts", directory)
    run([*TYPES, "client.mts"], directory)
    run(["node", "client.mjs", daemon.address], directory)


@needs_generators
def test_typescript_knows_the_parameters(directory, daemon):
    """The generated types are not `any`: each of these files has a type error in its third line."""
    generate_typescript(directory, daemon)
    wrong = ['path: { length: "32" }', 'path: { length: 32 }, query: { format: "pem" }', "path: { length: 32 }, query: { size: 1 }", ""]
    for number, parameters in enumerate(wrong):
        (directory / f"wrong{number}.mts").write_text(
            'import createClient from "openapi-fetch";\nimport type { paths } from "./key-service.js";\n'
            f'await createClient<paths>({{ baseUrl: "" }}).GET("/key/{{length}}", {{ params: {{ {parameters} }} }});\n'
        )
    ran = attempt([*TYPES, "--noEmit", *(f"wrong{number}.mts" for number in range(len(wrong)))], directory)
    assert ran.returncode != 0
    for number, parameters in enumerate(wrong):
        assert f"wrong{number}.mts(3," in ran.stdout, f"{parameters}: {ran.stdout}"


@needs_generators
def test_generated_clients_send_tokens(directory):
    new = subprocess.run([binary(), "token", "new", "--name", "client"], env=environment(), capture_output=True, text=True, check=True)
    token, line = new.stdout.split("\n", 1)
    (directory / "tokens").write_text(line)
    (directory / "tokens").chmod(0o600)
    with Daemon(directory, f'tokens-file = "{directory}/tokens"\n') as daemon:
        generate_python(directory, daemon)
        (directory / "tokens.py").write_text(
            "import sys\nfrom inspect import signature\nfrom key_service import AuthenticatedClient, Client\n"
            "from key_service.api.keys import get_key\nfrom key_service.api.state import get_readyz\n"
            "def key(token): return get_key.sync(16, client=AuthenticatedClient(sys.argv[1], token=token))\n"
            "assert len(key(sys.argv[2])) == 16\n"
            "assert key('ks_no').status == 401\n"
            "assert signature(get_key.sync).parameters['client'].annotation is AuthenticatedClient\n"
            "assert get_readyz.sync(client=Client(sys.argv[1])) == 'OK'\n"
        )
        run(["python3", "tokens.py", daemon.address, token], directory)


def packages():
    return npm.installed("clients", "KEY_SERVICE_CLIENT_TOOLS", NPM)


def generate_python(directory, daemon):
    command = ["openapi-python-client", "generate", "--url", f"{daemon.address}/openapi.json", "--meta", "none"]
    printed = run([*command, "--output-path", "key_service"], directory)
    assert "warning" not in printed.lower(), printed


def generate_typescript(directory, daemon):
    run(["openapi-typescript", f"{daemon.address}/openapi.json", "--output", "key-service.d.ts"], directory)


def run(command, directory, given=None):
    ran = attempt(command, directory, given)
    assert ran.returncode == 0, f"{command} ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}"
    return ran.stdout


def attempt(command, directory, given=None, more=None, timeout=2 * TIMEOUT):
    """Runs a command with the npm packages and the generated client in `directory`."""
    path = f"{packages()}/.bin:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1", **(more or {})}
    return subprocess.run(
        command, cwd=directory, env=environment, input=given, capture_output=True, text=True, timeout=timeout, check=False
    )

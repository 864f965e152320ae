"""The commands in the documents: each is run by a test that reads it from the page, or is listed below with the reason why not.

Commands that need a booted Debian are run by test_operations.py, test_system.py and test_containers.py; others by the suite of their
subject. This file runs the commands that need only a daemon, and checks the links between documents.
"""

import ast
import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest
from support import certificates
from support.conditions import TIMEOUT, expect
from support.daemon import REPOSITORY, Daemon, binary, environment
from support.pages import all_commands, commands

PAGES = [
    *(f"{name}.md" for name in ("README", "CONTRIBUTING", "RELEASING", "SECURITY", "CHANGELOG")),
    *sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").glob("*.md")),
    "helm-chart/README.md",
]
TESTS = sorted((REPOSITORY / "tests/e2e").glob("test_*.py"))

# (page, beginning of a block): another suite runs every block of the page that begins like this.
READ_WHOLE = {
    ("docs/recipes.md", ""),  # test_recipes.py
    ("docs/runbooks.md", ""),  # test_operations.py
    ("docs/monitoring.md", ""),  # test_monitoring.py
    ("helm-chart/README.md", "helm "),  # test_chart.py
}

SUITE = "it runs this suite"
DOCKER = "Docker is not available: test_image.py builds the Dockerfile with buildah and runs the image the same way with podman"
CLUSTER = "Kubernetes is not available"
HOURS = "it takes hours of CPU time; .ci/jobs runs the fuzz targets on their corpus"
REGISTRY = "the test machine has neither Rust nor an image registry: it uses the image that test_image.py builds from the Dockerfile"
# (page, first words of a block): why no test runs it.
NOT_RUN = {
    ("CONTRIBUTING.md", "python3 -m venv"): SUITE,
    ("README.md", "docker build"): DOCKER,
    ("docs/adversity.md", "just e2e"): SUITE,
    ("docs/adversity.md", "just soak"): "it takes an hour; test_soak.py runs a minute of it",
    ("docs/benchmarks.md", "cargo bench"): "its results are for human readers; cargo test and Clippy compile it",
    ("docs/benchmarks.md", "apt-get install"): "it takes minutes on two otherwise idle cores",
    ("docs/benchmarks.md", "benches/compare/run --costs"): "it takes minutes on two otherwise idle cores",
    ("docs/benchmarks.md", "benches/compare/run --growth"): "it takes minutes on two otherwise idle cores",
    ("docs/benchmarks.md", "benches/compare/run --gate"): "it is a job in .ci/jobs, with the binary that is built there",
    ("docs/containers.md", "docker compose"): "Docker is not available: test_containers.py runs docker-compose instead",
    ("docs/containers.md", "sudo podman build -t localhost/key-service "): REGISTRY,
    ("docs/containers.md", "podman build"): REGISTRY,
    ("docs/fuzzing.md", "apt-get install"): "it is a job in .ci/jobs",
    ("docs/fuzzing.md", "cd fuzz"): HOURS,
    ("docs/randomness.md", "just e2e tests"): SUITE,
    ("docs/randomness.md", "just e2e --full"): SUITE,
    ("helm-chart/README.md", "kubectl create"): CLUSTER,
    ("RELEASING.md", "sha256sum"): "it downloads the released files from GitHub",
}


def run_by_tests():
    """(page, first words) of the blocks that tests read, found by their calls of support.pages.commands."""
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "commands":
                assert all(isinstance(argument, ast.Constant) for argument in node.args), f"{path.name}:{node.lineno}: expected literals"
                yield tuple(argument.value for argument in node.args)


def problems(texts, run, not_run):
    """Blocks that no test runs and that have no reason, and reasons that do not match exactly one block."""
    blocks = [(page, line, block) for page, text in texts.items() for line, block in all_commands(text)]

    def matched(keys):
        return {key: {block for page, _, block in blocks if page == key[0] and block.startswith(key[1])} for key in keys}

    are_run = set().union(*matched(run).values())  # a block that is on two pages is run once
    excused = {key: found - are_run for key, found in matched(not_run).items()}
    unknown = [
        f"{page}:{line}: no test runs {block.splitlines()[0]!r}"
        for page, line, block in blocks
        if block not in are_run.union(*excused.values())
    ]
    return unknown + [
        f"{page}: expected one block that begins with {begin!r}, for its reason, found {len(found)}"
        for (page, begin), found in excused.items()
        if len(found) != 1
    ]


@pytest.fixture(scope="module")
def texts():
    return {page: (REPOSITORY / page).read_text() for page in PAGES}


def test_every_command_is_run_or_has_a_reason(texts, figures):
    blocks = sum(len(all_commands(text)) for text in texts.values())
    assert blocks > 100, f"expected all pages, found {blocks} blocks"
    assert not (errors := problems(texts, {*run_by_tests(), *READ_WHOLE}, NOT_RUN)), "\n".join(errors)
    figures(f"{blocks} blocks, {len(NOT_RUN)} not run by a test")


def test_ci_and_readme_run_the_same_tests():
    jobs = runpy.run_path(str(REPOSITORY / ".ci/jobs"))["JOBS"]
    assert jobs["test"][0] == commands("README.md", "cargo test").strip()


@pytest.mark.parametrize("page", sorted({page for page, _ in READ_WHOLE}))
def test_pages_read_whole_have_a_reader(page):
    readers = [path for path in (REPOSITORY / "tests").rglob("*.py") if path != Path(__file__) and page in path.read_text()]
    # The chart's README is named in the module that writes its table.
    assert readers, f"{page}: no test reads it"


@pytest.mark.parametrize(
    ("page", "block", "error"),
    [
        pytest.param("docs/api.md", "curl http://localhost:1123/new", "no test runs 'curl http://localhost:1123/new'", id="new"),
        pytest.param("docs/tls.md", "  ls", "no test runs 'ls'", id="indented"),
        pytest.param("docs/tls.md", "true", None, id="on another page"),
    ],
)
def test_commands_without_a_test_are_detected(texts, page, block, error):
    indent = " " * (len(block) - len(block.lstrip()))
    changed = {
        **texts,
        page: f"{texts[page]}\n{indent}```sh\n{block}\n{indent}```\n",
        "README.md": f"{texts['README.md']}\n```sh\ntrue\n```\n",
    }
    found = problems(changed, {*run_by_tests(), *READ_WHOLE, ("README.md", "true")}, NOT_RUN)
    assert [error in each for each in found] == [True] if error else not found, found


def test_needless_reasons_are_detected(texts):
    for needless in [("README.md", "cargo test"), ("README.md", "gone")]:
        found = problems(texts, {*run_by_tests(), *READ_WHOLE}, {**NOT_RUN, needless: "none"})
        assert [needless[1] in each for each in found] == [True], found


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def links(texts):
    """A message for each link to a missing file or heading."""
    for page, text in texts.items():
        text = re.sub(r"^( *)```.*?^ *```$", "", text, flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target or target.startswith("mailto:"):
                continue
            path, _, anchor = target.partition("#")
            file = (REPOSITORY / page).parent / path if path else REPOSITORY / page
            if not file.exists():
                yield f"{page}: {target}: the file does not exist"
            elif anchor and file.suffix == ".md":
                name = str(file.resolve().relative_to(REPOSITORY))
                linked = texts.get(name) or file.read_text()
                if anchor not in map(slug, re.findall(r"^#+ (.*)$", linked, re.M)):
                    yield f"{page}: {target}: the heading does not exist"


def test_links_between_documents_work(texts):
    assert not (errors := list(links(texts))), "\n".join(errors)


@pytest.mark.parametrize("wrong", ["docs/gone.md", "docs/tls.md#gone", "#gone"])
def test_broken_links_are_detected(texts, wrong):
    assert list(links({"README.md": f"[a]({wrong}) [b](docs/tls.md#renewal) [c](#d)\n# D\n", "docs/tls.md": texts["docs/tls.md"]}))
    assert len(list(links({"README.md": f"[a]({wrong})\n"}))) == 1


def missing_tasks(texts):
    """A message for each `just` recipe or suite that a page names and that does not exist."""
    recipes = re.findall(r"^([a-z][\w-]*)(?: [^:\n]*)?:(?!=)", (REPOSITORY / "justfile").read_text(), re.M)
    for page, text in texts.items():
        for code in [*re.findall(r"`([^`\n]+)`", text), *(line for _, block in all_commands(text) for line in block.splitlines())]:
            if (called := re.match(r"just ([a-z][\w-]*)", code)) and called[1] not in recipes:
                yield f"{page}: {code}: the recipe does not exist"
            for path in re.findall(r"tests/e2e/test_\w+\.py", code):
                if not (REPOSITORY / path).exists():
                    yield f"{page}: {code}: the suite does not exist"


def test_named_tasks_exist(texts):
    assert not (errors := list(missing_tasks(texts))), "\n".join(errors)


def test_contributing_lists_every_suite(texts):
    rows = re.findall(r"^\| `(test_\w+\.py)` \|", texts["CONTRIBUTING.md"], re.M)
    assert not (missing := {path.name for path in TESTS} - set(rows)), f"CONTRIBUTING.md: no row for {missing}"


def test_missing_tasks_are_detected():
    assert len(list(missing_tasks({"a": "`just gone` `just e2e -k b` `just e2e tests/e2e/test_gone.py`\n```sh\njust none\n```\n"}))) == 3


# The commands that need only a daemon.


def run(script, daemon, directory, **environment):
    """The output of commands in which a live daemon replaces localhost."""
    script = script.replace("localhost:1123", daemon.authority).replace("localhost:8000", daemon.metrics)
    ran = subprocess.run(
        ["sh", "-e"],
        input=script.encode(),
        cwd=directory,
        env={**os.environ, "PATH": f"{Path(binary()).parent}:{os.environ['PATH']}", **environment},
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert ran.returncode == 0, f"{script}: status {ran.returncode}\n{ran.stdout}{ran.stderr}"
    return ran.stdout.decode()


@pytest.mark.tools("curl")
def test_quick_start_requests_work(daemon, tmp_path):
    """README.md: 32 bytes, as hexadecimal digits and raw, a password, health and metrics"""
    install, keys = commands("README.md", "sudo apt install curl").split("\n", 1)
    expect(install, "sudo apt install curl", "the first command, for which pytest.mark.tools stands in")
    printed = run(keys + commands("README.md", "curl http://localhost:1123/password"), daemon, tmp_path)
    expected = r"[0-9a-f]{64}\n((?: [0-9a-f]{2}){16}\n){2}[0-9A-Za-z]{24}\nOK# HELP (.|\n)*\nhttp_responses_total"
    assert re.match(expected, printed), printed


@pytest.mark.tools("curl")
def test_token_commands_work(tmp_path):
    """docs/access.md: a token is created, its hash is stored, and curl gets a key with the header from a file"""
    with Daemon(tmp_path) as daemon:
        token, line = run(commands("docs/access.md", "key-service token new"), daemon, tmp_path).splitlines()
    assert re.fullmatch(r"backup-host sha256:[0-9a-f]{64} max-size=64 rate-requests=10", line), line
    (tmp_path / "token.txt").write_text(f"{token}\n")
    (tmp_path / "tokens").write_text(f"{line}\n")
    (tmp_path / "tokens").chmod(0o600)
    with Daemon(tmp_path, f'tokens-file = "{tmp_path}/tokens"\n') as daemon:
        expect(daemon.status("/key/32"), 401, "status without the token")
        run(commands("docs/access.md", "umask 077"), daemon, tmp_path)
    found = {
        path.name: (path.stat().st_size, path.stat().st_mode & 0o777) for path in (tmp_path / "session.key", tmp_path / "token.header")
    }
    expect(found["session.key"], (32, 0o600), "size and mode of the key")
    expect(found["token.header"][1], 0o600, "mode of the header")


@pytest.mark.tools("curl", "openssl")
def test_tls_command_works(tmp_path):
    """docs/tls.md: curl verifies the CA and the host name"""
    certificates.self_signed(tmp_path / "tls.key", tmp_path / "ca.pem", names="DNS:keys.example.org")
    (tmp_path / "ca.pem").chmod(0o600)
    with Daemon(tmp_path, f'tls-cert = "{tmp_path}/ca.pem"\ntls-key = "{tmp_path}/tls.key"\n') as daemon:
        # Replaces DNS.
        (tmp_path / ".curlrc").write_text(f'connect-to = "keys.example.org:1123:{daemon.authority}"\n')
        printed = run(commands("docs/tls.md", "curl --cacert ca.pem"), daemon, tmp_path, CURL_HOME=str(tmp_path))
    assert re.fullmatch("[0-9a-f]{64}\n", printed), printed


def in_network_of_its_own(script, directory):
    """Runs a script where all ports are free, and returns its output. The commands of a document find the daemon in PATH."""
    namespace = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    ran = subprocess.run(
        [*namespace, "sh", "-ec", f"ip link set lo up\n{script}"],
        cwd=directory,
        env={**environment(), "PATH": f"{Path(binary()).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    log = (directory / "log").read_text()
    assert ran.returncode == 0, f"{ran.stdout}{ran.stderr}{log}"
    return ran.stdout, log


@pytest.mark.root
@pytest.mark.tools("openssl", "curl", "unshare", "setpriv", "ip")
def test_tls_trial_works(tmp_path):
    """docs/tls.md: a throw-away certificate is good for curl and for the health check, by all of its names, and for two weeks"""
    create = commands("docs/tls.md", "umask 077\nopenssl req -x509")
    requests = commands("docs/tls.md", "curl --cacert trial.pem")
    printed, log = in_network_of_its_own(
        f"""
        {create.rstrip()} 2>log &
        until curl -fsS -o output http://localhost:8000/readyz 2>error; do kill -0 $!; sleep 0.1; done
        {requests}
        for name in 127.0.0.1 '[::1]'; do curl -fsS --cacert trial.pem https://$name:1123/livez; done
        stat -c '\n%a %n' trial.key trial.pem
        openssl x509 -in trial.pem -noout -checkend $((13 * 86400))
        ! openssl x509 -in trial.pem -noout -checkend $((15 * 86400))
        kill $!
        wait $!
        {commands("docs/tls.md", "rm trial")}
        ls
        """,
        tmp_path,
    )
    expected = (
        r"[0-9a-f]{64}\nOK\nOKOK\n600 trial.key\n+600 trial.pem\nCertificate will not expire\nCertificate will expire\nerror\nlog\noutput\n"
    )
    assert re.fullmatch(expected, printed), f"{printed}\n{log}"


@pytest.mark.root
@pytest.mark.tools("systemd-socket-activate", "curl", "unshare", "setpriv", "ip")
def test_socket_activation_works_without_a_unit(tmp_path):
    """docs/debian.md: systemd-socket-activate starts the daemon at the first request"""
    (tmp_path / "target/release").mkdir(parents=True)
    (tmp_path / "target/release/key-service").symlink_to(binary())
    command = commands("docs/debian.md", "systemd-socket-activate").strip()
    script = f"""
        {command} 2>log &
        until curl -fsS -o key http://127.0.0.1:1123/key/32 2>error; do kill -0 $!; sleep 0.1; done
    """
    _, log = in_network_of_its_own(script, tmp_path)
    expect((tmp_path / "key").stat().st_size, 32, "bytes of the key")
    assert "Communication attempt on fd 3" in log, f"the request did not start the daemon: {log}"

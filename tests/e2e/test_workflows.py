"""The workflows in .github: two linters find no errors in them, and do find errors that are made deliberately."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from support.daemon import REPOSITORY

pytestmark = pytest.mark.tools("shellcheck")

SCRIPTS = Path(sysconfig.get_path("scripts"))
WORKFLOWS = [".github/workflows/ci.yml", ".github/workflows/release.yml"]
LINTERS = {
    # actionlint's checks, checks of permissions and pins, and shellcheck for each `run`.
    "jactionlint": [SCRIPTS / "jactionlint", *WORKFLOWS, ".github/dependabot.yml"],
    "zizmor": [SCRIPTS / "zizmor", "--offline", "--quiet", "--persona=pedantic", "--strict-collection", "."],
}
FOUND = {"jactionlint": [1], "zizmor": [11, 12, 13, 14]}  # exit statuses of a linter with findings; zizmor's depends on the severity
BROKEN = {
    "key": ("jactionlint", "ci.yml", "runs-on: ", "runs-onn: "),
    "needed-job": ("jactionlint", "release.yml", "needs: build", "needs: biuld"),
    "expression": ("jactionlint", "ci.yml", "github.event_name", "github.event_nam"),
    "step-output": ("jactionlint", "release.yml", "steps.images.outputs", "steps.image.outputs"),
    "shell": ("jactionlint", "release.yml", '"$IMAGE:$version"\n', "$IMAGE:$version\n"),
    "input": ("jactionlint", "ci.yml", "persist-credentials", "persist-credential"),
    "cron": ("jactionlint", "ci.yml", "23 4 * * 1", "23 4 * * 9"),
    "ecosystem": ("jactionlint", "../dependabot.yml", "package-ecosystem: cargo", "package-ecosystem: crates"),
    "pin": ("zizmor", "release.yml", re.compile("attest@[0-9a-f]{40}"), "attest@v4"),
    "permissions": ("zizmor", "ci.yml", "permissions: {}", "permissions: write-all"),
    "credentials": ("zizmor", "ci.yml", "          persist-credentials: false\n", "          fetch-depth: 1\n"),
    "trigger": ("zizmor", "ci.yml", "  pull_request:\n", "  pull_request_target:\n"),
    "injection": ("zizmor", "ci.yml", "run: just lint", "run: just lint ${{ github.head_ref }}"),
}


def lint(linter, directory):
    return subprocess.run(LINTERS[linter], cwd=directory, capture_output=True, text=True)


@pytest.mark.parametrize("linter", LINTERS)
def test_linters_find_nothing(linter):
    """each linter accepts the workflows"""
    done = lint(linter, REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("linter", "name", "old", "new"), BROKEN.values(), ids=BROKEN)
def test_broken_workflows_are_detected(tmp_path, linter, name, old, new):
    """a copy with one error is rejected by the linter that is responsible for it"""
    shutil.copytree(REPOSITORY / ".github", tmp_path / ".github")
    file = tmp_path / ".github/workflows" / name
    text = file.read_text()
    broken = old.sub(new, text, count=1) if isinstance(old, re.Pattern) else text.replace(old, new, 1)
    assert broken != text, f"{name}: expected {old!r}"
    file.write_text(broken)
    done = lint(linter, tmp_path)
    assert done.returncode in FOUND[linter], done.stdout + done.stderr


def test_actions_are_pinned_with_their_version():
    """every action is pinned to a commit, with its version in a comment for readers and Dependabot"""
    uses = [line.strip() for name in WORKFLOWS for line in (REPOSITORY / name).read_text().splitlines() if "uses:" in line]
    assert uses
    for line in uses:
        assert re.fullmatch(r"(- )?uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_workflows_use_the_rust_of_the_image():
    """workflows and Dockerfile use the same Rust version, and the oldest tested version is that of Cargo.toml"""
    image = re.search(r"^ARG RUST_IMAGE=\S+/rust:([\d.]+)-", (REPOSITORY / "Dockerfile").read_text(), re.M)[1]
    oldest = re.search(r'^rust-version = "([\d.]+)"', (REPOSITORY / "Cargo.toml").read_text(), re.M)[1]
    text = "".join((REPOSITORY / name).read_text() for name in WORKFLOWS)
    found = set(re.findall(r'(?:RUST: "?|rust: \["|, "|rust:)(\d+\.\d+\.\d+)', text))
    assert found == {image, f"{oldest}.0"}, found

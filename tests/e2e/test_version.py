"""`key-service --version` names the commit that the binary was built from: build.rs with real repositories.

A small crate stands in for the daemon, so that a build takes a second: build.rs and what it reads are the same.
"""

import os
import re
import shutil
import subprocess

import pytest
from support.conditions import expect
from support.daemon import REPOSITORY, binary

pytestmark = [pytest.mark.tools("cargo", "git"), pytest.mark.timeout(600)]

MANIFEST = '[package]\nname = "key-service"\nversion = "1.2.3"\nedition = "2024"\n\n[workspace]\n'
MAIN = 'fn main() {\n    print!("{}|{}", env!("KEY_SERVICE_VERSION"), env!("KEY_SERVICE_VERSION_COMMIT"));\n}\n'
# 2026-11-30 in UTC, the day before in Chicago.
DATE = "2026-11-30T01:00:00+00:00"
DAY = "2026-11-30"
# Git reads no configuration of this machine.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "KEY_SERVICE_COMMIT", "CARGO_TARGET"))},
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "GIT_AUTHOR_DATE": DATE,
    "GIT_COMMITTER_DATE": DATE,
    "TZ": "America/Chicago",
}


def run(*command, cwd, **more):
    done = subprocess.run(command, cwd=cwd, env={**ENVIRONMENT, **more}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def git(directory, *arguments):
    return run("git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments, cwd=directory).strip()


def commit(directory):
    git(directory, "add", "--all")
    git(directory, "commit", "--quiet", "--message=a", "--allow-empty")
    return git(directory, "rev-parse", "HEAD")[:7]


def crate(directory):
    (directory / "src").mkdir(parents=True)
    (directory / "Cargo.toml").write_text(MANIFEST)
    (directory / "src/main.rs").write_text(MAIN)
    (directory / ".gitignore").write_text("target/\n")
    shutil.copy(REPOSITORY / "build.rs", directory)
    run("cargo", "generate-lockfile", "--offline", cwd=directory)
    return directory


@pytest.fixture
def checkout(tmp_path):
    directory = crate(tmp_path / "checkout")
    git(directory, "init", "--quiet", "--initial-branch=main")
    commit(directory)
    return directory


def version(directory, **more):
    """The version and the commit in a build, whose only effect is on the target directory."""
    run("cargo", "build", "--quiet", "--offline", "--locked", cwd=directory, **more)
    text, found = run(directory / "target/debug/key-service", cwd=directory).split("|")
    assert found in text, f"{text} has another commit than {found}"
    return text


def head(directory):
    return git(directory, "rev-parse", "HEAD")[:7]


def is_rebuilt(directory):
    return "Compiling" in run("cargo", "build", "--offline", "--locked", cwd=directory)


def test_commit_and_its_date_in_utc_are_shown(checkout):
    expect(version(checkout), f"1.2.3 ({head(checkout)}, {DAY})", "version")


def test_each_commit_is_noticed_and_nothing_else_is_rebuilt(checkout):
    """a build follows commits, branches, packed refs and a detached HEAD; without a change it compiles nothing"""
    before = version(checkout)
    expect(is_rebuilt(checkout), False, "whether a second build compiles")
    (checkout / "notes.md").write_text("a")  # not a source of the binary
    expect(is_rebuilt(checkout), False, "whether a build after a change of a document compiles")
    os.utime(checkout / "src/main.rs")
    expect(version(checkout), before, "version with a changed document")
    new = commit(checkout)
    expect(version(checkout), f"1.2.3 ({new}, {DAY})", "version after a commit")
    git(checkout, "pack-refs", "--all")
    version(checkout)
    packed = commit(checkout)
    expect(version(checkout), f"1.2.3 ({packed}, {DAY})", "version after a commit on a packed branch")
    git(checkout, "checkout", "--quiet", "--detach", "HEAD~2")
    expect(version(checkout), before, "version at a detached HEAD")


def test_changed_sources_are_marked(checkout):
    clean = version(checkout)
    dirty = clean.replace(",", "-dirty,")
    (checkout / "src/main.rs").write_text(MAIN + "// changed\n")
    expect(version(checkout), dirty, "version with a changed file")
    expect(is_rebuilt(checkout), False, "whether a second build of changed sources compiles")
    git(checkout, "checkout", "--quiet", "src")
    expect(version(checkout), clean, "version with the file restored")
    (checkout / "src/new.rs").write_text("")
    expect(version(checkout), dirty, "version with a new file")


def test_linked_worktree_has_its_own_commit(checkout, tmp_path):
    linked = tmp_path / "linked"
    git(checkout, "worktree", "add", "--quiet", "-b", "other", linked)
    version(linked)
    new = commit(linked)
    expect(version(linked), f"1.2.3 ({new}, {DAY})", "version in the worktree")
    expect(version(checkout), f"1.2.3 ({head(checkout)}, {DAY})", "version in the main worktree")


def test_clone_shows_the_same_version(checkout, tmp_path):
    """the version is the same in a clone in another directory, so a build can be reproduced"""
    clone = tmp_path / "another/clone"
    git(checkout, "clone", "--quiet", "--shared", checkout, clone)
    expect(version(clone), version(checkout), "version in the clone")


def test_installed_binary_shows_the_commit(checkout, tmp_path):
    """cargo install --git builds in a checkout of its own"""
    run(
        "cargo",
        "install",
        "--quiet",
        "--git",
        checkout.as_uri(),
        "--root",
        tmp_path / "root",
        cwd=tmp_path,
        CARGO_HOME=str(tmp_path / "home"),
    )
    found = run(tmp_path / "root/bin/key-service", cwd=tmp_path)
    expect(found, f"1.2.3 ({head(checkout)}, {DAY})|{head(checkout)}", "version and commit")


@pytest.mark.parametrize("place", ["alone", "in another repository"])
def test_copy_without_its_repository_shows_the_number(tmp_path, place):
    """a tarball has no commit, and neither has a vendored copy: the commit of the repository around it is not shown"""
    directory = crate(tmp_path / "project/vendor/key-service")
    if place != "alone":
        git(tmp_path / "project", "init", "--quiet")
        commit(tmp_path / "project")
    expect(version(directory), "1.2.3", "version")


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}, id="owned by another user"),
        pytest.param({"PATH": "no-git"}, id="not installed"),
    ],
)
def test_build_works_where_git_does_not(checkout, tmp_path, environment):
    if "PATH" in environment:
        tools = tmp_path / "tools"
        tools.mkdir()
        for name in ("cargo", "rustc", "cc", "ld"):
            if found := shutil.which(name):
                (tools / name).symlink_to(found)
        environment = {"PATH": str(tools)}
    expect(version(checkout, **environment), "1.2.3", "version")


def test_variables_take_the_place_of_git(checkout):
    """an image is built from the sources alone: its commit and date come from variables"""
    full = {"KEY_SERVICE_COMMIT": "0123456789abcdef0123456789abcdef01234567", "KEY_SERVICE_COMMIT_DATE": "2025-01-02"}
    expect(version(checkout, **full), "1.2.3 (0123456, 2025-01-02)", "version with both variables")
    expect(version(checkout, KEY_SERVICE_COMMIT="abcdef0"), "1.2.3 (abcdef0)", "version without a date")
    expect(version(checkout), f"1.2.3 ({head(checkout)}, {DAY})", "version without variables")
    with pytest.raises(AssertionError, match="KEY_SERVICE_COMMIT: expected printable ASCII characters without spaces"):
        version(checkout, KEY_SERVICE_COMMIT="a\nb")


def test_daemon_prints_version_and_commit(figures):
    """`key-service --version` and `-V` print one line with the number, and the commit if the daemon was built from a repository"""
    lines = {option: run(binary(), option, cwd=REPOSITORY) for option in ("--version", "-V")}
    expect(lines["-V"], lines["--version"], "output of -V")
    assert re.fullmatch(r"key-service \d+\.\d+\.\d+( \([0-9a-f]{7}(-dirty)?, \d{4}-\d\d-\d\d\))?\n", lines["-V"]), lines
    figures(lines["-V"].strip())

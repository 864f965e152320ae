"""Fixtures of the end-to-end tests. Each is made once for those that share it, and what it started is stopped by process id."""

import os
import sys
from pathlib import Path

import pytest
from support import images, tools
from support.browser import Browser
from support.daemon import REPOSITORY, Daemon

# What pyproject.toml's group installs is beside the Python that runs this, whether its environment is active or not.
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run what takes hours, too")
    parser.addoption("--plot", action="store_true", help="draw docs/dashboard.svg, from a run that is longer for it")


# Of these a test or a group takes minutes. They begin first, so that with -n no process is left with one of them at the end.
SLOWEST = [f"test_{name}.py" for name in ("quick_start", "image", "containers", "package", "system", "operations")]


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))
    if not config.getoption("--full"):
        hours = [item for item in items if item.get_closest_marker("hours")]
        items[:] = [item for item in items if item not in hours]
        config.hook.pytest_deselected(items=hours)


@pytest.fixture
def figures(record_property):
    """Keeps a sentence with what a test measured, for the summary and the JUnit report."""
    return lambda sentence: record_property("figures", sentence)


@pytest.fixture(scope="session")
def packages():
    """The Debian package of each architecture, as packaging/build-deb made it."""
    found = {path.stem.rsplit("_", 1)[1]: path for path in (REPOSITORY / "target/debian").glob("key-service_*.deb")}
    assert found.keys() >= {"amd64", "arm64"}, f"expected packages for amd64 and arm64 in target/debian, found {found}: just deb"
    return found


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """The name of the container image for amd64, which is built here."""
    images.storage(tmp_path_factory.mktemp("storage"))
    images.base()
    images.build(REPOSITORY, "amd64", images.IMAGES["amd64"], "--layers")
    yield images.IMAGES["amd64"]
    images.run("podman", "image", "prune", "--force", ok=None)


@pytest.fixture(scope="session")
def image_arm64(image):
    """The name of the container image for arm64, which is built here."""
    images.build(REPOSITORY, "arm64", images.IMAGES["arm64"])
    return images.IMAGES["arm64"]


@pytest.fixture(scope="session")
def daemon(tmp_path_factory):
    """A daemon with nothing configured, for tests that leave it as it is."""
    with Daemon(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium; each test opens pages of its own."""
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What a machine logged last belongs to the report of a test that failed on it."""
    report = yield
    if report.failed and (machine := getattr(item, "funcargs", {}).get("machine")):
        report.sections.append(("journal", machine.run("journalctl -n 40 --no-pager", ok=None).stdout))
    return report


def pytest_runtest_setup(item):
    """A test that can't run here fails, and says what it needs: a skipped suite would pass."""
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.fail("expected to be root: run it by sudo", pytrace=False)
    # With -n, one process runs a group's tests, which xdist knows by their ids; with a pytest that it does not fit, it loses them silently.
    if item.get_closest_marker("xdist_group") and item.config.getoption("loadgroup", False) and "@" not in item.nodeid:
        pytest.fail("expected the group in the test's id, which pytest and pytest-xdist of pyproject.toml have: just setup", pytrace=False)
    commands = [command for marker in item.iter_markers("tools") for command in marker.args]
    if packages := tools.missing(commands):
        pytest.fail(f"expected programs that are not installed: apt-get install {' '.join(packages)}", pytrace=False)
    if programs := tools.missing_python(commands):
        pytest.fail(f"expected programs of pyproject.toml that are not installed, {', '.join(programs)}: just setup", pytrace=False)


def pytest_terminal_summary(terminalreporter):
    """The figures, each beside its test."""
    lines = [
        f"{report.nodeid}: {sentence} [{report.duration:.1f} s]"
        for report in terminalreporter.stats.get("passed", [])
        for name, sentence in report.user_properties
        if name == "figures"
    ]
    if lines:
        terminalreporter.section("figures")
        for line in sorted(lines):
            terminalreporter.write_line(line)

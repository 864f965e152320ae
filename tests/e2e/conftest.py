"""Fixtures of the end-to-end tests. Each is created once for the tests that share it, and stops its processes by process id."""

import os
import sys
from pathlib import Path

import pytest
from support import images, tools
from support.browser import Browser
from support.daemon import REPOSITORY, Daemon

# The programs that pyproject.toml's group installs are beside this Python, even if its virtual environment is not active.
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run tests that take hours")
    parser.addoption("--emulated", action="store_true", help="also run tests that emulate another processor")
    parser.addoption("--plot", action="store_true", help="draw docs/dashboard.svg, which makes its test run longer")


# A test or a group of these files takes minutes. They run first, so that with -n no process has to run one of them at the end.
SLOWEST = [f"test_{name}.py" for name in ("quick_start", "image", "containers", "package", "system", "apt_repository", "operations")]


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))
    for option, marker in [("--full", "hours"), ("--emulated", "emulated")]:
        if not config.getoption(option):
            deselected = [item for item in items if item.get_closest_marker(marker)]
            items[:] = [item for item in items if item not in deselected]
            config.hook.pytest_deselected(items=deselected)


@pytest.fixture
def figures(record_property):
    """Records a sentence with the measurements of a test, for the summary and the JUnit report."""
    return lambda sentence: record_property("figures", sentence)


@pytest.fixture(scope="session")
def packages():
    """The Debian package for each architecture, as built by packaging/build-deb."""
    found = {path.stem.rsplit("_", 1)[1]: path for path in (REPOSITORY / "target/debian").glob("key-service_*.deb")}
    assert found.keys() >= {"amd64", "arm64"}, f"expected packages for amd64 and arm64 in target/debian, found {found}: just deb"
    return found


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """Builds the container image for amd64; the fixture is its name."""
    images.storage(tmp_path_factory.mktemp("storage"))
    images.base()
    images.build(REPOSITORY, "amd64", images.IMAGES["amd64"], "--layers")
    yield images.IMAGES["amd64"]
    images.run("podman", "image", "prune", "--force", ok=None)


@pytest.fixture(scope="session")
def image_arm64(image):
    """Builds the container image for arm64; the fixture is its name."""
    images.build(REPOSITORY, "arm64", images.IMAGES["arm64"])
    return images.IMAGES["arm64"]


@pytest.fixture(scope="session")
def daemon(tmp_path_factory):
    """A daemon with the default configuration, for tests that do not change its state."""
    with Daemon(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless Chromium; each test opens its own pages."""
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Adds the state of the service and the last log lines of a test's machine to the report if the test fails."""
    report = yield
    if report.failed and (machine := getattr(item, "funcargs", {}).get("machine")):
        report.sections.append(("journal", machine.run("journalctl -n 40 --no-pager", ok=None).stdout))
        # After the journal, because it is short: the processes of the service, and whether it failed or waits for one of them.
        report.sections.append(("service", machine.run("systemctl status --no-pager --lines=0 key-service.service", ok=None).stdout))
    return report


def pytest_runtest_setup(item):
    """A test that cannot run on this machine fails and names what it needs; if it were skipped, the suite would pass."""
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.fail("expected to run as root: use sudo", pytrace=False)
    # With -n, one process runs all tests of a group. xdist marks groups in the test ids; an incompatible pytest silently drops the marks.
    if item.get_closest_marker("xdist_group") and item.config.getoption("loadgroup", False) and "@" not in item.nodeid:
        pytest.fail(
            "expected the group in the test's id, as with the versions of pytest and pytest-xdist in pyproject.toml: just setup",
            pytrace=False,
        )
    commands = [command for marker in item.iter_markers("tools") for command in marker.args]
    if packages := tools.missing(commands):
        pytest.fail(f"expected programs that are not installed: apt-get install {' '.join(packages)}", pytrace=False)
    if programs := tools.missing_python(commands):
        pytest.fail(f"expected programs of pyproject.toml, which are not installed: {', '.join(programs)}; run just setup", pytrace=False)


def pytest_terminal_summary(terminalreporter):
    """Prints the figures, each with its test."""
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

"""Tests the rules, the runbooks and the dashboard with real tools and real data.

promtool checks the rules and runs their cases, then runs the cases again with broken alerts. Three daemons, one of them under load,
node_exporter and a Prometheus with these rules run on loopback. Every query of the dashboard must return data, and alerts must
fire, and end, when clients are refused and when the second daemon is put through failures. The rules of that run have no "for:"
and require no history. Another test follows docs/monitoring.md with Debian's packages, in separate namespaces. The dashboard is
checked against Grafana's schema.

With --plot the run is longer, and the dashboard is drawn into docs/dashboard.svg.
"""

import contextlib
import os
import re
import subprocess
import sys
import time

import pytest
from support import peers
from support.conditions import expect
from support.daemon import REPOSITORY
from support.monitoring import grafana, live, picture, rules

RUNBOOKS = REPOSITORY / "docs/runbooks.md"
GUIDE = REPOSITORY / "docs/monitoring.md"
PICTURE = REPOSITORY / "docs/dashboard.svg"
RUNBOOK_URL = "https://github.com/key-service/key-service/blob/main/docs/runbooks.md#"

# When this process ends, every process that it started ends, too.
UNSHARE = [
    *("setpriv", "--pdeathsig", "KILL", "unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])),
    *("--net", "--mount", "--pid", "--fork", "--kill-child=KILL"),
    *("sh", "-ec", 'ip link set lo up && mount -t proc proc /proc && exec "$@"', "sh"),
]

ALERTS = rules.alerts()
each_alert = pytest.mark.parametrize("alert", ALERTS)


def grouped(group, *tools):
    """Runs tests that share an expensive fixture in one process."""
    return lambda test: pytest.mark.xdist_group(f"monitoring-{group}")(pytest.mark.tools(*tools)(test))


# The rules, checked by promtool.


@pytest.mark.tools("promtool")
def test_promtool_accepts_the_rules():
    """promtool check rules"""
    status, output = rules.promtool("check", "rules", rules.RULES / "recording.yml", rules.RULES / "alerts.yml")
    assert status == 0, output


@pytest.mark.tools("promtool")
@pytest.mark.parametrize("cases", rules.CASES, ids=lambda path: path.name.removesuffix(".test.yml"))
def test_the_rules_pass_their_cases(cases):
    """promtool test rules"""
    status, output = rules.promtool("test", "rules", cases)
    assert status == 0, output


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    """Alerts that never fire, and alerts that always fire."""
    directory = tmp_path_factory.mktemp("mutants")
    return {name: rules.Mutant(expression, directory / name) for name, expression in rules.MUTANTS.items()}


def firing(mutants):
    """The failures of the run in which alerts never fire, at moments when an alert should fire."""
    return [failed for failed in mutants["never"].failed if failed[3]]


def silent(mutants):
    """The failures of the run in which alerts always fire, at moments when an alert should not fire."""
    return [failed for failed in mutants["always"].failed if not failed[3]]


@grouped("mutants", "promtool")
@each_alert
def test_every_alert_has_a_case_in_which_it_fires(alert, mutants):
    """every alert has a case in which it fires"""
    found = {name for name, *_ in firing(mutants)}
    assert alert in found, f"{alert}: no case detects that it never fires\n{'' if found else mutants['never'].output[:2000]}"


@grouped("mutants", "promtool")
@each_alert
def test_every_alert_has_a_case_in_which_it_does_not_fire(alert, mutants):
    """every alert has a case in which it does not fire"""
    found = {name for name, *_ in silent(mutants)}
    assert alert in found, f"{alert}: no case detects that it always fires\n{'' if found else mutants['always'].output[:2000]}"


@grouped("mutants", "promtool")
@each_alert
def test_every_alert_has_a_case_in_which_it_ends(alert, mutants):
    """every alert has a case in which it fires and later ends, which an alert that never ends would fail"""
    began = [(case, at) for name, case, at, _ in firing(mutants) if name == alert]
    ended = [(case, at) for name, case, at, _ in silent(mutants) if name == alert]
    is_detected = any(case == other and first < at for case, at in ended for other, first in began)
    assert is_detected, f"{alert}: no case detects that it never ends"


# The documents. They form one group because the first test takes minutes, and xdist starts with the largest groups.


of_the_guide = grouped("guide")
on_debian = grouped(
    "guide",
    *("prometheus", "promtool", "prometheus-node-exporter", "prometheus-alertmanager", "amtool", "unshare", "ip", "mount", "setpriv"),
)


@on_debian
@pytest.mark.timeout(3600)  # debian.py has its own deadlines
def test_the_guide_works_on_debian(tmp_path):
    """the commands of docs/monitoring.md work on Debian, up to the mail of an alert"""
    log = tmp_path / "log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*UNSHARE, sys.executable, "-m", "support.monitoring.debian"],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY / "tests/e2e")},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    with peers.killed_after(process, "debian.py"):
        status = process.wait()
    assert status == 0, f"status {status}\n{log.read_text()}"


def anchors():
    """The anchors of the runbooks' sections, as GitHub generates them."""
    titles = re.findall(r"^#+ (.+)$", RUNBOOKS.read_text(), re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@of_the_guide
@each_alert
def test_every_alert_has_a_runbook(alert):
    """every alert has a severity, a summary, a description and a runbook"""
    labels, notes = ALERTS[alert]["labels"], ALERTS[alert]["annotations"]
    assert labels.get("severity") in ("critical", "warning", "info"), f"{alert}: expected critical, warning or info, found {labels}"
    for note in ("summary", "description"):
        assert notes.get(note), f"{alert}: no {note}"
    expect(notes.get("runbook_url"), RUNBOOK_URL + alert.lower(), f"{alert}: runbook_url")
    assert alert.lower() in anchors(), f"{alert}: no section «## {alert}» in {RUNBOOKS.relative_to(REPOSITORY)}"


@of_the_guide
def test_every_runbook_belongs_to_an_alert():
    """docs/runbooks.md has no section without an alert, and no section twice"""
    names = {alert.lower() for alert in ALERTS}
    expect([anchor for anchor in anchors() if anchor.startswith("keyservice") and anchor not in names], [], "sections without an alert")
    expect({anchor for anchor in anchors() if anchors().count(anchor) > 1}, set(), "sections that occur twice")


def rows():
    """The severity of each alert, from the table in docs/monitoring.md."""
    return dict(re.findall(r"^\| \[(\w+)\]\(runbooks\.md#\w+\) \| (\w+) \| .+ \|$", GUIDE.read_text(), re.M))


@of_the_guide
@each_alert
def test_the_guide_has_every_alert(alert):
    """docs/monitoring.md lists every alert with its severity"""
    expect(rows().get(alert), ALERTS[alert]["labels"].get("severity"), f"{alert}: severity in its row")


@of_the_guide
def test_the_guide_has_no_other_alert():
    """docs/monitoring.md has no row without an alert"""
    expect(rows().keys() - ALERTS, set(), "rows without an alert")


@of_the_guide
def test_the_guide_has_every_recording_rule():
    """docs/monitoring.md lists every recording rule; one row may stand for all windows of a rule"""
    named = set(re.findall(r"`([\w:]+?)(?:\d+[mhd])?`", GUIDE.read_text()))
    found = [name for name in rules.records() if re.sub(r"\d+[mhd]$", "", name) not in named]
    expect(found, [], "rules that are not in the table of recording rules")


# The dashboard, checked against Grafana's schema.


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The TypeScript compiler's errors for the dashboard and for each mutant."""
    documents = {f"wrong{number}": grafana.mutant(*mutant) for number, mutant in enumerate(grafana.MUTANTS)}
    return grafana.compiled({"dashboard": grafana.dashboard(), **documents}, tmp_path_factory.mktemp("grafana"))


@grouped("grafana", "node", "npm")
def test_the_dashboard_matches_grafanas_schema(compiled):
    """the dashboard matches Grafana's schema"""
    expect((compiled["dashboard"], compiled[""]), ([], []), "errors in the dashboard, and elsewhere")


@grouped("grafana", "node", "npm")
@pytest.mark.parametrize("number", range(len(grafana.MUTANTS)), ids=[".".join(map(str, path)) for path, _ in grafana.MUTANTS])
def test_a_wrong_dashboard_is_detected(number, compiled):
    """a dashboard with a single error does not match Grafana's schema"""
    assert compiled[f"wrong{number}"], f"{grafana.MUTANTS[number]}: expected an error, found none"


def test_panels_do_not_overlap():
    """every panel has a unique id and overlaps no other panel, which the schema can't express"""
    expect(grafana.misplaced(grafana.dashboard()["panels"]), [], "panels")


def test_queries_use_only_defined_variables():
    """queries use only defined variables, which the schema can't express"""
    expect(grafana.unknown_variables(grafana.dashboard()), [], "variables")


# Real data. These tests run in the order of the scenario: each advances it as far as it needs.

on_real_data = grouped("prometheus", "promtool", "prometheus", "prometheus-node-exporter", "openssl", "setpriv")


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory, request):
    """A Prometheus that scrapes three daemons, and the scenario that they are put through."""
    with contextlib.ExitStack() as stack:
        yield live.Prometheus(tmp_path_factory.mktemp("prometheus"), stack, request.config.getoption("--plot"))


@on_real_data
def test_invalid_requests_are_refused(prometheus):
    """invalid requests are refused"""
    prometheus.reach("invalid requests were sent")
    expect(prometheus.invalid, {"/key/32": 200, "/key/0": 400, "/nothing": 404, "/key/2048": 413, "no Host": 400}, "statuses")


@pytest.fixture
def exported(prometheus):
    """The metrics of the daemon after the load."""
    prometheus.reach("the load is over")
    return prometheus.daemon.metrics_text()


@on_real_data
def test_promtool_accepts_the_metrics(exported):
    """promtool check metrics"""
    status, output = rules.promtool("check", "metrics", given=exported)
    assert status == 0, output


@on_real_data
def test_every_metric_is_used(exported):
    """every metric is used in a rule or a panel, or docs/monitoring.md explains why not"""
    files = [rules.RULES / "recording.yml", rules.RULES / "alerts.yml", grafana.DASHBOARD, GUIDE]
    readers = "".join(path.read_text() for path in files)
    names = re.findall(r"^# TYPE (\w+)", exported, re.M)
    assert names, f"expected metrics, found\n{exported}"
    expect([name for name in names if not re.search(rf"\b{name}(_|\b)", readers)], [], "metrics in no rule, panel or guide")


@on_real_data
def test_connections_above_the_limit_get_503(prometheus):
    """connections above the limit get a 503"""
    prometheus.reach("all connections are in use")
    expect(set(prometheus.turned_away), {503}, "statuses")


@on_real_data
@pytest.mark.parametrize("moment", live.MOMENTS)
def test_on_real_data(moment, prometheus):
    """alerts fire, and end, when clients are refused and when a daemon is put through failures"""
    prometheus.reach(moment)


@on_real_data
def test_no_rule_fails_on_real_data(prometheus):
    """no rule fails on real data"""
    prometheus.reach("all rules have data")
    found = [rule for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    expect({rule["name"] for rule in found}, {*ALERTS, *rules.records()}, "rules")
    expect([f"{rule['name']}: {rule['health']} {rule.get('lastError', '')}" for rule in found if rule["health"] != "ok"], [], "failures")


PANELS = live.panels()


@on_real_data
@pytest.mark.parametrize("title", PANELS)
def test_every_panel_has_data(title, prometheus):
    """every query of every panel returns data"""
    prometheus.reach("all rules have data")
    queries = live.queries(PANELS[title])
    assert queries, f"{title}: no query"
    expect([missing for query in dict.fromkeys(queries) if (missing := prometheus.missing_data(query))], [], title)


@on_real_data
def test_the_dashboard_is_drawn(prometheus, request, tmp_path, figures):
    """the dashboard can be drawn; --plot writes it to docs/dashboard.svg"""
    prometheus.reach("all rules have data")
    drawn = picture.draw(grafana.dashboard(), prometheus.found, prometheus.start_time, time.time())
    (PICTURE if request.config.getoption("--plot") else tmp_path / PICTURE.name).write_text(drawn)
    figures(f"{sum(len(live.queries(panel)) for panel in PANELS.values())} queries of {len(PANELS)} panels were run")


@on_real_data
def test_the_daemon_is_still_running(prometheus):
    """the daemon is still running"""
    prometheus.reach("all rules have data")
    expect(prometheus.daemon.process.poll(), None, "exit status of the daemon")


@on_real_data
@pytest.mark.parametrize("moment", live.LAST_MOMENTS)
def test_on_real_data_at_the_end(moment, prometheus):
    """alerts fire when a namespace disappears and when the daemons stop"""
    prometheus.reach(moment)

"""The Helm chart, rendered by real Helm and checked against the Kubernetes schemas and against rules of our own, without a cluster.
Broken charts, releases and values prove that each check can fail."""

import copy
import difflib
import functools
import json
import re
import shlex
import shutil
import ssl
import subprocess
import tomllib
import urllib.request
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from support import certificates, pages
from support.chart import kube, scaling, tools, write
from support.chart.helm import (
    BOTH,
    CASES,
    CHART,
    NAME,
    NAMESPACE,
    baseline_release,
    helm,
    only,
    parse,
    rendered,
    template,
    template_text,
    text_of,
)
from support.chart.mutants import MUTANTS
from support.chart.tools import HELM, HELM_3
from support.chart.values import PROBES, SCHEMA, SCHEMA_FILE, VALUES, at, has_null, is_ours, leaves, parent_and_key, resolve
from support.chart.words import EVERYTHING, WORDS, not_text, values_with, words_that_are_not_text
from support.conditions import TIMEOUT, expect, retry_if_stalled
from support.daemon import REPOSITORY, Daemon, environment
from support.daemon import binary as daemon

pytestmark = pytest.mark.tools("node", "npm", "openssl", "promtool", "setpriv")

# Values for which null means none instead of the default, as values.yaml documents.
NULL_MEANS_NONE = ("autoscaling.targetCPUUtilizationPercentage", "resources.limits", "resources.requests")

# (setting, path in values, the range in the chart if it differs from the daemon's)
NUMBERS = [
    ("srv-port", "server.port", (1, 65535)),  # 0 means any free port, which a Service cannot target
    ("metrics-port", "metrics.port", (1, 65535)),
    ("max-size", "server.maxSize", None),
    ("workers", "server.workers", None),
    ("max-connections", "server.maxConnections", None),
    ("max-connections-per-client", "server.maxConnectionsPerClient", None),
    ("head-timeout", "server.headTimeout", None),
    ("idle-timeout", "server.idleTimeout", None),
    ("write-timeout", "server.writeTimeout", None),
    ("drain-delay", "server.drainDelay", None),
    ("drain-timeout", "server.drainTimeout", None),
    ("rate-requests", "rates.requests", None),
    ("rate-bytes", "rates.bytes", None),
    ("rate-burst", "rates.burst", None),
]

# (setting, path in values) of settings that are not numbers.
OTHER_SETTINGS = [
    ("host", "server.host"),
    ("log-level", "server.logLevel"),
    ("audit", "audit"),
    ("trusted-proxies", "trustedProxies"),
    ("forwarded-header", "forwardedHeader"),
    ("proxy-protocol", "proxyProtocol"),
    ("tls-min-version", "tls.minVersion"),
]


def rows(file):
    """The rows of a tab-separated file in support/chart, without comments."""
    lines = Path(kube.__file__).with_name(file).read_text().splitlines()
    return [line.split("\t") for line in lines if line and not line.startswith("#")]


def short_id(arguments):
    """A test's id: the arguments of Helm, shortened."""
    return arguments.removeprefix("--set ")[:100]


REJECTED = [tuple(row) for row in rows("rejected.tsv")]
ACCEPTED = [arguments for [arguments] in rows("accepted.txt")]

every_case = pytest.mark.parametrize("case", CASES)
# The tests of each group run in one process, because they share cached results: Helm's errors, and findings in broken releases.
rejections, mutants = pytest.mark.xdist_group("rejections"), pytest.mark.xdist_group("mutants")


@pytest.fixture(scope="module", autouse=True)
def chart():
    """Starts the models of custom resources and installs Helm; nearly every test needs both."""
    tools.install()
    with kube.MODELS:
        yield


@pytest.fixture
def chart_copy(tmp_path):
    """A copy of the chart that a test may break."""
    return Path(shutil.copytree(CHART, tmp_path / "key-service"))


@every_case
def test_every_rule_holds(case):
    """the rendered release violates no rule of kube.py"""
    found = [f"[{rule}] {sentence}" for rule, _, sentence in rendered(case).findings()]
    assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def engine():
    """Helm 4's engine as a library, with the chart loaded."""
    import helm_python  # imported here so that only processes with these tests load the Go runtime

    with helm_python.Chart.load(str(CHART)) as chart:
        yield chart


@every_case
def test_helm_library_renders_like_helm(case, engine):
    """the helm binary and Helm's engine as a library render the same resources"""
    files = engine.render(yaml.safe_load(CASES[case].read_text()), name=NAME, namespace=NAMESPACE)
    notes = files.pop("key-service/templates/NOTES.txt")
    assert f"key-service.{NAMESPACE}.svc" in notes or f"keys.{NAMESPACE}.svc" in notes, notes
    assert "<no value>" not in notes and "nil" not in notes, notes
    by_name = {kube.name(r): r for text in files.values() for r in parse(text)}
    expect(by_name, {kube.name(r): r for r in rendered(case)}, "resources")


# Texts that the notes must contain if a setting is on.
NOTES = {
    "tls-cert": ("https://", "--cacert ca.crt"),
    "tls-client-ca": ("--cert client.crt",),
    "tokens-file": ("-H @token.header",),
    "proxy-protocol": ("must begin with a PROXY",),
}


@every_case
def test_notes_follow_the_values(case):
    """the notes mention HTTPS, client certificates, tokens and PROXY headers if and only if the values require them"""
    notes = helm("install", NAME, CHART, "--dry-run=client", "--values", CASES[case]).stdout.partition("\nNOTES:\n")[2]
    settings = kube.settings_of(rendered(case), only(rendered(case), "Deployment"))
    for setting, sentences in NOTES.items():
        for sentence in sentences:
            expect(sentence in notes, bool(settings.get(setting)), f"{sentence!r} in the notes")


@every_case
def test_helm_3_renders_like_helm_4(case):
    """Helm 3 and Helm 4 render the same resources"""
    expect(rendered(case, HELM_3), rendered(case), "resources")


@every_case
def test_lint_passes(case):
    """helm lint --strict passes with both versions of Helm"""
    for binary in BOTH:
        helm("lint", "--strict", CHART, "--values", CASES[case], binary=binary)


# (setting, the values that set it)
SECRETS = {
    "tls-cert": ("tls.existingSecret", "tls.certificate.enabled"),
    "tls-client-ca": ("tls.clientCA.existingSecret", "tls.clientCA.existingConfigMap"),
    "tokens-file": ("tokens.existingSecret",),
}


@every_case
def test_daemon_accepts_its_configuration(case, tmp_path, secrets):
    """the daemon accepts the rendered file and reads the settings that the values specify"""
    values = yaml.safe_load(CASES[case].read_text()) or {}
    settings = daemon_reads(write_mounted_files(rendered(case), tmp_path, secrets), tmp_path)
    for setting, path in [number[:2] for number in NUMBERS] + OTHER_SETTINGS:
        given = at(values, path)
        if setting in settings:
            expect(settings[setting], at(VALUES, path) if given is None else given, setting)
        else:
            assert setting == "tls-min-version" and "tls-cert" not in settings, f"{setting} is missing"
    named = {setting for setting in ("tls-cert", "tls-client-ca", "tokens-file") if settings.get(setting)}
    expected = {setting for setting, paths in SECRETS.items() if any(at(values, path) for path in paths)}
    expect(named, expected, "settings with files")


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    """The text of each file that is write_mounted_files from a Secret or ConfigMap."""
    directory = tmp_path_factory.mktemp("secrets")
    key, certificate = directory / "key", directory / "certificate"
    certificates.self_signed(key, certificate, names="DNS:keys")
    made = subprocess.run([daemon(), "token", "new", "--name", "client"], check=True, text=True, capture_output=True)
    token = made.stdout.splitlines()[1] + "\n"
    return {"tls.crt": certificate.read_text(), "tls.key": key.read_text(), "ca.crt": certificate.read_text(), "tokens": token}


def write_mounted_files(release, directory, secrets):
    """The text of the daemon's configuration file. The volumes whose files it names are written below `directory`."""
    spec = only(release, "Deployment")["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume.get("secret") or volume.get("configMap") for volume in spec["volumes"]}
    for mount in spec["containers"][0]["volumeMounts"]:
        if mount["mountPath"].startswith("/run/key-service/"):
            mount_point = directory / mount["mountPath"][1:]
            mount_point.mkdir(parents=True)
            for item in volumes[mount["name"]]["items"]:
                (mount_point / item["path"]).write_text(secrets[item["path"]])
                (mount_point / item["path"]).chmod(volumes[mount["name"]].get("defaultMode", 0o644))
    text = next(r for r in release.of("ConfigMap") if "config.toml" in r["data"])["data"]["config.toml"]
    return text.replace('"/run/', f'"{directory}/run/')


def check_deployed_daemon(release, directory, secrets):
    """Starts the daemon with the file and the volumes of a release, sends the probes as a kubelet does, and runs `helm test`."""
    config = write_mounted_files(release, directory, secrets).replace("drain-delay = ", "drain-delay = 0 # ")
    # A kubelet's address may be in a network of trusted proxies.
    config = re.sub(r"^trusted-proxies = \[.+\]$", 'trusted-proxies = ["127.0.0.0/8"]', config, flags=re.MULTILINE)
    with Daemon(directory, config) as running:
        spec = only(release, "Deployment")["spec"]["template"]["spec"]
        for kind in PROBES:
            probe = spec["containers"][0].get(kind, {}).get("httpGet")
            if probe:
                authority = {"http": running.authority, "metrics": running.metrics}[probe["port"]]
                url = f"{probe.get('scheme', 'HTTP').lower()}://{authority}{probe['path']}"
                with urllib.request.urlopen(url, timeout=TIMEOUT, context=ssl._create_unverified_context()) as response:
                    expect(response.status, 200, kind)
        container = only(release, "Pod")["spec"]["containers"][0]
        command, flag, url = container["args"]
        scheme, _, service = url.partition("://")
        authority = running.metrics if "-metrics:" in service else running.authority
        variables = {v["name"]: v["value"].replace("/run/", f"{directory}/run/") for v in container.get("env", [])}
        health = [daemon(), command, flag, f"{scheme}://{authority}"]
        retry_if_stalled(lambda: check_health(health, {**environment(), **variables}))


def check_health(command, variables):
    ran = subprocess.run(command, text=True, capture_output=True, env=variables)
    assert ran.returncode == 0, f"helm test: {ran.stderr.strip()}"


@every_case
def test_probes_and_helm_test_succeed(case, tmp_path, secrets):
    """a daemon with the rendered file and volumes passes its probes and `helm test`"""
    check_deployed_daemon(rendered(case), tmp_path, secrets)


# Errors that a release had once or could have.
BROKEN = {
    "probes in plain HTTP": (
        "cert-manager",
        lambda spec: spec["containers"][0]["livenessProbe"]["httpGet"].update(port="http"),
    ),
    "probes without a client certificate": (
        "tls",
        lambda spec: spec["containers"][0]["livenessProbe"]["httpGet"].update(port="http", scheme="HTTPS"),
    ),
    "probes without a PROXY header": (
        "balancer",
        lambda spec: spec["containers"][0]["readinessProbe"]["httpGet"].update(port="http", scheme="HTTPS"),
    ),
    "a private key that others can read": (
        "cert-manager",
        lambda spec: spec["volumes"][1]["secret"].pop("defaultMode"),
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_deployments_fail(what, tmp_path, secrets):
    """a daemon that is deployed with one of these errors fails its probes, or does not start"""
    case, change = BROKEN[what]
    release = rendered(case)
    change(only(release, "Deployment")["spec"]["template"]["spec"])
    with pytest.raises((OSError, AssertionError)):
        check_deployed_daemon(release, tmp_path, secrets)


def daemon_checks(text, directory):
    """The result of the daemon's --check of a configuration file with this text."""
    file = directory / "config.toml"
    file.write_text(text)
    return subprocess.run([daemon(), "--check", "--config", file], text=True, capture_output=True, env={})


def daemon_reads(text, directory):
    """The settings that the daemon reads from a file with this text."""
    ran = daemon_checks(text, directory)
    assert ran.returncode == 0, ran.stderr
    return tomllib.loads(ran.stdout)


def test_oldest_kubernetes_knows_the_fields():
    """the oldest Kubernetes that Chart.yaml allows knows every field of four of the cases"""
    oldest = re.search(r">=([0-9]+\.[0-9]+)", yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"])[1]
    version = next(v for v in kubernetes_validate.utils.all_versions() if v.startswith(f"{oldest}."))
    for case in ("default", "minimal", "autoscaling", "extras"):
        found = list(kube.schema_findings(rendered(case).of(*kube.BUILT_IN_KINDS), version))
        assert not found, "\n".join(found)


def test_install_command_of_first_version_works():
    """helm install key-service ./helm-chart --set server.port=1123 --set server.maxSize=1024"""
    command = "install key-service ./helm-chart --set server.port=1123 --set server.maxSize=1024 --dry-run=client"
    ran = subprocess.run([HELM, *command.split()], cwd=REPOSITORY, text=True, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    assert "http://key-service.default.svc:1123/key/{length}, up to 1024 bytes" in ran.stdout, ran.stdout[-800:]
    assert "\nsrv-port = 1123\n" in re.sub(r"^ +", "", ran.stdout, flags=re.MULTILINE)


@functools.cache
def rejection(binary, *arguments, name=NAME, values=None):
    """Helm's error for values that it rejects."""
    ran = helm("template", name, CHART, *arguments, values=values, ok=False, binary=binary)
    assert ran.returncode != 0, f"{binary.name}: the values were accepted"
    return ran.stderr


@rejections
@pytest.mark.parametrize(("arguments", "name"), REJECTED, ids=[short_id(arguments) for arguments, _ in REJECTED])
def test_bad_values_are_rejected(arguments, name):
    """both versions of Helm reject bad values and name the field"""
    # Helm 3 separates field names with dots, and does not quote unknown ones.
    older = name[1:].replace("~1", "\0").replace("/", ".").replace("\0", "/") if name.startswith("/") else name.strip("'")
    for binary, field in ((HELM, name), (HELM_3, older)):
        error = rejection(binary, *shlex.split(arguments))
        assert field in error, f"{binary.name}: expected {field!r} in: {error.strip()}"


@pytest.mark.parametrize("arguments", ACCEPTED, ids=short_id)
def test_good_values_are_accepted(arguments):
    """both versions of Helm accept values that are close to rejected ones, and the result has no findings"""
    for binary in BOTH:
        findings = template(*shlex.split(arguments), binary=binary).findings()
        found = [sentence for rule, _, sentence in findings if rule != "resources" or "limits=null" not in arguments]
        assert not found, "\n".join(found)


ANNOTATIONS = ["commonAnnotations", "ingress.annotations", "metrics.serviceMonitor.annotations"]


def large_annotation(path):
    """Values with an annotation of more than 200000 bytes."""
    return json.dumps(functools.reduce(lambda inner, key: {key: inner}, reversed(path.split(".")), {"a": "x" * 200_000}))


@rejections
@pytest.mark.parametrize("path", ANNOTATIONS)
def test_large_annotations_are_rejected(path):
    """annotations of more than 200000 bytes are rejected, because the API server allows 256 KiB in all"""
    for binary in BOTH:
        error = rejection(binary, values=large_annotation(path))
        assert f"{path}: expected at most 200000 bytes" in error, f"{binary.name}: {error.strip()}"


DOTTED = ["a.b", "key-service.prod", "1.5"]


@rejections
@pytest.mark.parametrize("name", DOTTED)
def test_release_names_with_a_dot_are_rejected(name):
    """a release name with a dot is rejected, the error names the value to set, and that value works"""
    for binary in BOTH:
        error = rejection(binary, name=name)
        assert "fullnameOverride: expected a name for all resources" in error, f"{binary.name}: {error.strip()}"
        found = list(template("--set", "fullnameOverride=keys", name=name, binary=binary).findings())
        assert not found, found


@rejections
def test_every_validation_message_is_produced():
    """every message of _validate.tpl is produced by one of the bad values"""
    messages = re.findall(r'fail \(?(?:printf )?"([^"]*)"', (CHART / "templates/_validate.tpl").read_text())
    assert messages, "_validate.tpl has no messages"
    # The schema rejects the other values before the template can.
    errors = [rejection(HELM, *shlex.split(arguments)) for arguments, name in REJECTED if not name.startswith(("/", "'"))]
    errors += [rejection(HELM, values=large_annotation(path)) for path in ANNOTATIONS] + [rejection(HELM, name=name) for name in DOTTED]
    for message in messages:
        pattern = re.escape(message).replace("%s", r"[^ ]+").replace("%v", r"[^ ]+").replace("%d", "[0-9]+")
        assert any(re.search(f": {pattern}$", error, re.MULTILINE) for error in errors), message


@pytest.mark.parametrize(("setting", "path", "own"), NUMBERS, ids=[path for _, path, _ in NUMBERS])
def test_ranges_match_the_daemon(setting, path, own, tmp_path):
    """the chart accepts the same range as the daemon"""
    node = SCHEMA
    for key in path.split("."):
        node = resolve(node["properties"][key])
    low, high = node["minimum"], node["maximum"]
    for value, fits in ((low, True), (high, True), (low - 1, own is not None and low - 1 == 0), (high + 1, False)):
        ran = daemon_checks(f"{setting} = {value}\n", tmp_path)
        expect(ran.returncode, 0 if fits else 78, f"the daemon's exit status for {value}")
    if own:
        expect((low, high), own, "range")


def test_log_levels_match_the_daemon(tmp_path):
    """server.logLevel accepts the same levels as the daemon"""
    levels = re.search(r"expected one of (.*), found", daemon_checks('log-level = "?"\n', tmp_path).stderr)[1].split(", ")
    expect(SCHEMA["properties"]["server"]["properties"]["logLevel"]["enum"], [*levels, None], "levels")


def test_defaults_match_the_daemon(tmp_path):
    """the chart has the daemon's defaults, except the drain delay that load balancers need"""
    settings = daemon_reads("", tmp_path)
    own = {"drain-delay": 5}
    for setting, path in [number[:2] for number in NUMBERS] + OTHER_SETTINGS:
        # Without TLS, --check does not print the TLS version.
        expect(at(VALUES, path), own.get(setting, settings.get(setting, "1.3")), path)


def test_chart_versions_match_the_crate():
    """Chart.yaml has the crate's version, which is also the default image tag"""
    crate = tomllib.loads((REPOSITORY / "Cargo.toml").read_text())["package"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    expect((chart["version"], chart["appVersion"]), (crate, crate), "version, appVersion")
    deployment = only(rendered("default"), "Deployment")
    expect(deployment["spec"]["template"]["spec"]["containers"][0]["image"], f"key-service:{crate}", "image")


def test_configuration_change_replaces_pods(tmp_path):
    """a changed setting replaces the pods, through the checksum only; a new chart version alone does not"""
    before, after = (only(template(*arguments), "Deployment")["spec"]["template"] for arguments in ([], ["--set", "server.maxSize=2048"]))
    helm("package", CHART, "--version", "99.0.0", "--destination", tmp_path)
    again = only(template(chart=tmp_path / "key-service-99.0.0.tgz"), "Deployment")["spec"]["template"]
    expect(again, before, "the template of chart 99.0.0")
    sums = [pod["metadata"]["annotations"].pop("checksum/config") for pod in (before, after)]
    assert sums[0] != sums[1], "the checksum did not change"
    expect(before, after, "the rest of the template")


def test_selectors_never_change():
    """the Deployment's selector is immutable, so it depends only on the names of the release and the chart"""
    found = {case: only(rendered(case), "Deployment")["spec"]["selector"] for case in CASES if case != "tuned"}
    expect(len({json.dumps(selector, sort_keys=True) for selector in found.values()}), 1, f"selectors of {found}")


def test_package_renders_like_the_directory(tmp_path):
    """the packaged chart renders like the directory, and does not contain the files for tests"""
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    helm("package", CHART, "--destination", tmp_path)
    package = tmp_path / f"key-service-{version}.tgz"
    for case in CASES:
        expect(template("--values", CASES[case], chart=package), rendered(case), f"resources of {case}")
    files = subprocess.run(["tar", "tzf", package], text=True, capture_output=True, check=True).stdout.split()
    assert not [file for file in files if "/ci/" in file], files
    for needed in ("values.schema.json", "README.md", *(f"files/{path.name}" for path in (CHART / "files").iterdir())):
        assert f"key-service/{needed}" in files, f"{needed} is not in the package"


def test_chart_works_as_a_subchart(tmp_path):
    """the chart works as a subchart, with `condition` and `global`"""
    shutil.copytree(CHART, tmp_path / "charts/key-service")
    dependency = {"name": "key-service", "version": "*", "condition": "key-service.enabled"}
    parent = {"apiVersion": "v2", "name": "parent", "version": "1.0.0", "dependencies": [dependency]}
    (tmp_path / "Chart.yaml").write_text(yaml.safe_dump(parent))
    values = {"global": {"region": "north"}, "key-service": {"server": {"maxSize": 64}}}
    part = template("--set", "key-service.enabled=true", name="big", chart=tmp_path, values=values)
    assert "max-size = 64\n" in only(part, "ConfigMap")["data"]["config.toml"]
    assert not list(part.findings()), list(part.findings())
    none = template("--set", "key-service.enabled=false", name="big", chart=tmp_path, values=values)
    assert not none, "the chart was rendered although it is disabled"


NAMES = ["a", "key-service", "release-of-key-service", "1key-service", *("x" * length for length in range(42, 54)), "2" * 53]


@pytest.mark.parametrize("name", NAMES)
def test_resource_names_are_legal(name):
    """a release with any legal name has resources with legal names"""
    found = list(template(name=name).findings())
    assert not found, found


def test_words_reach_every_kind_of_value():
    """the words reach every kind of value: names, labels, lists, variables, containers, Secrets"""
    reached = values_with("on", False)
    for path in (
        "priorityClassName",
        "commonLabels.on",
        "ingress.className",
        "ingress.hosts",
        "fullnameOverride",
        "extraEnv",
        "extraContainers",
        "tls.existingSecret",
        "tokens.key",
    ):
        assert "on" in json.dumps(at(reached, path)), f"{path} does not contain the word: {reached}"


@pytest.mark.parametrize("word", WORDS)
def test_strings_stay_strings(word):
    """the release, the namespace and every text value stay text, whatever they look like: 123, 1e3, on, null, 12:30:00"""
    found = list(words_that_are_not_text(words=[word]))
    assert not found, "\n".join(found)


# (template, the beginning of one of its lines that end in `| quote }}`)
QUOTED = [
    ("deployment.yaml", "priorityClassName: {{ . "),
    ("deployment.yaml", 'serviceAccountName: {{ include "key-service.serviceAccountName" . '),
    ("ingress.yaml", "ingressClassName: {{ . "),
    ("ingress.yaml", "host: {{ .host "),
    ("_helpers.tpl", "app.kubernetes.io/instance: {{ .Release.Name "),
    ("_helpers.tpl", "namespace: {{ .root.Release.Namespace "),
    ("servicemonitor.yaml", "- {{ $.Release.Namespace "),
]


@pytest.mark.parametrize(("file", "start"), QUOTED, ids=[f"{file} {start.partition(' {{')[0]}" for file, start in QUOTED])
def test_missing_quotes_are_detected_in_output(file, start, chart_copy):
    """template mutants: a missing `| quote` is detected in the rendered output"""
    template_file = chart_copy / "templates" / file
    assert f"{start}| quote" in template_file.read_text(), f"{file} has no {start}| quote"
    template_file.write_text(template_file.read_text().replace(f"{start}| quote", start))
    assert any(words_that_are_not_text(chart_copy, ["on", "123"], [HELM])), "nothing was found"


def unquoted(text):
    """Lines of a template that write a value that may be text and neither quote it nor use toYaml."""
    for line in text.splitlines():
        if not re.match(r"\s*(- +)?([\w./-]+: |- |\{\{ ).*\{\{|\s*- +\{\{", line):
            continue
        for before, expression, after in re.findall(r"(\S*)\s*\{\{-? *(.*?) *-?\}\}(\S*)", line):
            safe = re.search(r"\| (quote|int64|nindent [0-9]+)$|^(int64|toYaml) [^|]*$", expression)
            if not safe or not re.fullmatch(r"([\w./-]+:|-|.*[,\[])?", before) or not re.fullmatch(r"[,\]]?", after):
                yield line.strip()


def template_files():
    return [path for path in sorted((CHART / "templates").rglob("*")) if path.suffix in (".yaml", ".tpl")]


def test_templates_quote_every_string():
    """every value that a template writes is quoted, is a number, or is written by toYaml"""
    found = [f"{path.name}: {line}" for path in template_files() for line in unquoted(path.read_text())]
    assert not found, "\n".join(found)


def test_missing_quotes_are_detected_in_templates():
    """template mutants: each missing `| quote` is detected in the text of the template"""
    tried = 0
    for path in template_files():
        text = path.read_text()
        for match in re.finditer(r"^[^=\n]*(: |- ).*( \| quote) \}\}", text, re.MULTILINE):
            tried += 1
            assert list(unquoted(text[: match.start(2)] + text[match.end(2) :])), f"{path.name}: {match[0].strip()}"
    assert tried > 30, f"expected more than 30 quoted values, found {tried}"


@functools.cache
def render_with_defaults(values):
    """The output for values given as JSON, if no value is missing."""
    return template_text(values=values)


def render_without(paths, null, chart, **options):
    """The output if Helm reads the values.yaml of an older chart, without some values. With `null`, these values are set to null."""
    older, given = copy.deepcopy(VALUES), copy.deepcopy(EVERYTHING)
    for path in paths:
        parent, last = parent_and_key(older, path)
        del parent[last]
        if null:
            *parents, last = path.split(".")
            functools.reduce(lambda inner, key: inner.setdefault(key, {}), parents, given)[last] = None
    (chart / "values.yaml").write_text(yaml.safe_dump(older))
    return template_text(chart=chart, values=given, **options)


def missing_values():
    """Paths of values to omit together: several at once, but never all values of a group, which is a separate case."""
    values = [path for path, _ in leaves(VALUES) if at(EVERYTHING, path) is None and path not in NULL_MEANS_NONE]
    groups = {path.rpartition(".")[0] for path in values} - {""}
    outer = {path for path in groups if "." not in path and path not in EVERYTHING}
    inner = {path for path in groups if "." in path and at(EVERYTHING, path) is None and path.partition(".")[0] not in outer}
    for start in range(7):
        yield pytest.param(values[start::7], id=f"values {start + 1} of 7")
    yield pytest.param(sorted(outer), id="groups")
    yield pytest.param(sorted(inner), id="groups of groups")


@pytest.mark.parametrize("null", [False, True], ids=["missing", "null"])
@pytest.mark.parametrize("paths", [*missing_values()])
def test_missing_values_get_defaults(paths, null, chart_copy):
    """values and groups that an older chart did not have get their defaults (helm upgrade --reuse-values)"""
    for binary in BOTH:
        found = render_without(paths, null, chart_copy, binary=binary)
        expect(found, render_with_defaults(json.dumps(EVERYTHING)), f"{binary.name}: without {', '.join(paths)}")


@pytest.mark.parametrize("path", NULL_MEANS_NONE)
def test_null_can_mean_none(path, chart_copy):
    """a value for which null means none does not get its default if it is null"""
    # Helm renders nothing if it rejects null.
    assert render_without([path], True, chart_copy, ok=False) != render_with_defaults(json.dumps(EVERYTHING)), (
        f"{path}: null was replaced by the default"
    )


@pytest.mark.parametrize("values", [{**EVERYTHING, "autoscaling": {}}, {}], ids=["everything but autoscaling", "nothing"])
def test_all_values_may_be_missing(values, chart_copy):
    """if all values are missing, the output is the same as with the defaults"""
    given = json.dumps(values)
    (chart_copy / "values.yaml").write_text("{}")
    for binary in BOTH:
        expect(template_text(chart=chart_copy, values=given, binary=binary), render_with_defaults(given), f"{binary.name}: no values.yaml")


def test_every_template_sets_defaults(chart_copy):
    """every template begins by setting the defaults, because any of them may be rendered first; without them, rendering fails"""
    for path in [*(CHART / "templates").rglob("*.yaml"), CHART / "templates/NOTES.txt"]:
        begin = '{{- include "key-service.defaults" . }}\n'
        assert path.read_text().startswith(begin), f"{path.name}: expected the first line to include the defaults"
    (chart_copy / "values.yaml").write_text("{}")
    for path in (chart_copy / "templates").rglob("*.*"):
        path.write_text(path.read_text().replace('{{- include "key-service.defaults" . }}\n', ""))
    assert helm("template", NAME, chart_copy, ok=False).returncode != 0, "the chart was rendered without defaults"


# (version of Kubernetes, result for PreferClose and PreferSameZone, result for PreferSameNode)
DISTRIBUTIONS = [
    ("1.29.0", None, None),
    ("1.30.0", "PreferClose", "PreferClose"),
    ("1.33.9", "PreferClose", "PreferClose"),
    ("v1.34.0-gke.1", "PreferSameZone", "PreferSameNode"),
    ("1.36.0", "PreferSameZone", "PreferSameNode"),
    ("1.37.0", "PreferSameZone", "PreferSameNode"),
]


@pytest.mark.parametrize(("version", "near", "node"), DISTRIBUTIONS, ids=[version for version, _, _ in DISTRIBUTIONS])
def test_traffic_distribution_fits_the_cluster(version, near, node):
    """service.trafficDistribution is rendered as a value that this version of Kubernetes knows"""
    for value, expected in (("PreferClose", near), ("PreferSameZone", near), ("PreferSameNode", node)):
        text = helm("template", NAME, CHART, "--kube-version", version, "--set", f"service.trafficDistribution={value}").stdout
        expect(only(parse(text), "Service", "-key-service")["spec"].get("trafficDistribution"), expected, value)


def test_values_copy_is_identical():
    """files/values.yaml is identical to values.yaml"""
    assert write.COPY.read_bytes() == write.VALUES_FILE.read_bytes(), f"files/values.yaml differs; {write.COMMAND}"


def test_rules_and_dashboard_are_unchanged():
    """the rules and the dashboard are rendered exactly as in files/, including Prometheus templates"""
    release = rendered("monitoring")
    groups = [g for file in ("recording.yml", "alerts.yml") for g in yaml.safe_load((CHART / "files" / file).read_text())["groups"]]
    expect(only(release, "PrometheusRule")["spec"]["groups"][:-1], groups, "groups")
    dashboard = only(release, "ConfigMap", "-dashboard")["data"]["key-service.json"]
    expect(json.loads(dashboard), json.loads((CHART / "files/dashboard.json").read_text()), "dashboard")
    jobs = set(re.findall(r'job="([^"]*)"', json.dumps(groups).replace('\\"', '"')))
    # The rule kube.monitors requires the job key-service; "node" is the job of node_exporter, which the chart does not create.
    expect(jobs - {"node"}, {"key-service"}, "the jobs that the rules select")


def test_cases_cover_every_value():
    """every value differs from its default in at least one case, and every template renders something"""
    cases = [yaml.safe_load(path.read_text()) or {} for path in CASES.values()]
    tried = [path for path, default in leaves(VALUES) if any(at(case, path) not in (None, default) for case in cases)]
    nulled = [path for path, default in leaves(VALUES) if any(has_null(case, path) for case in cases)]
    untried = [path for path, _ in leaves(VALUES) if path not in tried + nulled]
    # The cases switch these probes off by an explicit false; true is the only other value.
    expect([path for path in untried if path not in ("livenessProbe.enabled", "readinessProbe.enabled")], [], "values that no case covers")
    used = {line for case in CASES for line in re.findall(r"# Source: key-service/(\S+)", text_of(case))}
    templates = {f"templates/{p.relative_to(CHART / 'templates')}" for p in (CHART / "templates").rglob("*.yaml")}
    expect(sorted(templates - used), [], "unused templates")


@every_case
def test_every_value_has_an_effect(case, engine):
    """every value that a case sets changes the output"""
    whole = yaml.safe_load(CASES[case].read_text()) or {}
    text = engine_renders(engine, whole)
    for leaf, default in leaves(VALUES):
        value = at(whole, leaf)
        if value in (None, default):
            continue
        less = copy.deepcopy(whole)
        parent, last = parent_and_key(less, leaf)
        del parent[last]
        # If Helm rejects the values without it, that is an effect too.
        assert engine_renders(engine, less) != text, f"{case}: {leaf} changes nothing"


def engine_renders(engine, values):
    """What `helm template` would print (test_helm_library_renders_like_helm checks that). None if the values are rejected."""
    from helm_python import HelmRenderError, HelmValuesError

    try:
        files = engine.render(values, name=NAME, namespace=NAMESPACE)
    except (HelmValuesError, HelmRenderError):
        return None
    return {name: text for name, text in files.items() if text.strip() and not name.endswith("/NOTES.txt")}


def test_schema_covers_every_value():
    """the schema and values.yaml have the same names, and the schema rejects all other names"""

    def compare(values, node, path):
        if not is_ours(node):
            return
        node = resolve(node)
        optional = {"global", "enabled"} if not path else {"initialDelaySeconds", "successThreshold"}
        names = set(node["properties"])
        assert set(values) <= names, f"{path}: not in the schema: {set(values) - names}"
        assert names - set(values) <= optional, f"{path}: not in values.yaml: {names - set(values)}"
        for key, value in values.items():
            if isinstance(value, dict) and "properties" in resolve(node["properties"][key]):
                compare(value, node["properties"][key], f"{path}.{key}")

    compare(VALUES, SCHEMA, "")

    def closed(node, path):
        if "object" in node.get("type", []) and "properties" in node and not path.startswith("/definitions/labels"):
            assert "additionalProperties" in node or "items" in path, f"{path} accepts any name"
        for key, inner in node.get("properties", {}).items():
            if isinstance(inner, dict):
                closed(inner, f"{path}/{key}")

    closed(SCHEMA, "")


def test_schema_has_kubernetes_definitions():
    """the schema contains the current Kubernetes definitions, so that a typo in a Kubernetes structure is rejected"""
    assert SCHEMA_FILE.read_text() == write.schema(), write.COMMAND


def test_readme_table_matches_the_values():
    """the table in helm-chart/README.md matches values.yaml"""
    found = write.README.read_text()
    expected = write.with_table(found)
    difference = "\n".join(difflib.unified_diff(found.splitlines(), expected.splitlines(), "README.md", "values.yaml", n=0, lineterm=""))
    assert found == expected, f"{write.COMMAND}\n{difference}"


def test_readme_commands_render():
    """every helm command and values block in helm-chart/README.md, and the command in docs/monitoring.md, renders without findings"""
    text = write.README.read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    blocks.append(pages.commands("docs/monitoring.md", "helm upgrade"))
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("helm ")]
    assert any(command.startswith("helm install") for command in commands), "no helm install in the README"
    for command in commands:
        verb, *arguments = shlex.split(command)[1:]
        if verb in ("install", "upgrade"):
            arguments = [a for a in arguments if a not in ("--wait", "--install", "--reset-then-reuse-values")]
            assert arguments[1] == "./helm-chart", command
            release = parse(helm("template", arguments[0], CHART, *arguments[2:]).stdout, "default")
            found = list(release.findings())
            assert not found, f"{command}: {found}"
        else:
            others = ("helm test key-service", "helm test key-service --logs", "helm uninstall key-service")
            assert command in others, f"no test runs: {command}"
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        found = list(template(values=block).findings())
        assert not found, f"{block}: {found}"
    for word in re.findall(r"`([a-z][A-Za-z]*\.[A-Za-z.]+)`", text):
        is_value = at(VALUES, word) is not None or any(leaf == word for leaf, _ in leaves(VALUES))
        assert is_value or "/" in word or word.endswith((".yaml", ".json", ".toml", ".crt")), (
            f"README.md: {word} is not a value of the chart"
        )


def test_proxies_page_values_render():
    """the values block in docs/proxies.md renders, and the daemon trusts the proxies that it lists"""
    block = re.search(r"```yaml\n# values.yaml\n(.*?)```", (REPOSITORY / "docs/proxies.md").read_text(), re.DOTALL)[1]
    release = template(values=block)
    expect(
        kube.settings_of(release, only(release, "Deployment"))["trusted-proxies"],
        yaml.safe_load(block)["trustedProxies"],
        "trusted-proxies",
    )


def test_baseline_release_has_no_findings():
    """the release from which the mutants are made has every kind of resource and no findings"""
    expect({r["kind"] for r in baseline_release()}, set(kube.BUILT_IN_KINDS + kube.CUSTOM_KINDS), "kinds")
    found = list(baseline_release().findings())
    assert not found, found


def probe_time_errors(pod):
    """Errors in a pod's probe times: until a frozen daemon gets no requests, until it is replaced, and how long a busy daemon may take."""
    live, ready = (pod["containers"][0][kind] for kind in ("livenessProbe", "readinessProbe"))
    # If a probe times out after its period is over, the next probe follows immediately.
    failures = {
        kind: (probe["failureThreshold"] - 1) * max(probe["periodSeconds"], probe["timeoutSeconds"]) + probe["timeoutSeconds"]
        for kind, probe in (("live", live), ("ready", ready))
    }
    grace = live.get("terminationGracePeriodSeconds", pod["terminationGracePeriodSeconds"])
    times = {
        "time until a frozen pod gets no requests": (ready["periodSeconds"] + failures["ready"], 0, 5),
        "time until a frozen pod is replaced": (live["periodSeconds"] + failures["live"] + grace, 0, 30),
        "time that a busy pod has to answer": (failures["live"], 10, 30),
    }
    return [
        f"{what}: expected {least} to {most} s, found {found}" for what, (found, least, most) in times.items() if not least <= found <= most
    ]


def test_frozen_pods_are_replaced_and_busy_ones_are_not():
    """by default, a frozen pod gets no requests after 5 s and is replaced within 30 s, and a busy pod has 10 s to answer"""
    pod = only(rendered("default"), "Deployment")["spec"]["template"]["spec"]
    expect(probe_time_errors(pod), [], "the defaults")
    for kind, field, value in (
        ("readinessProbe", "periodSeconds", 5),
        ("livenessProbe", "terminationGracePeriodSeconds", 30),
        ("livenessProbe", "periodSeconds", 10),
        ("livenessProbe", "failureThreshold", 1),
    ):
        broken = copy.deepcopy(pod)
        broken["containers"][0][kind][field] = value
        expect(len(probe_time_errors(broken)), 1, f"number of errors with {kind}.{field} = {value}")


# `helm template` does not print NOTES.txt, so this manifest contains what the notes use.
NOTE = {
    "extraManifests": [
        '{apiVersion: v1, kind: ConfigMap, metadata: {name: note}, data: {text: {{ include "key-service.keptReplicas" . | quote }}}}'
    ]
}


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
    """The Helm option that selects the cluster of each live Deployment."""
    with pytest.MonkeyPatch.context() as patch, scaling.clusters() as clusters:
        patch.setenv("KUBECACHEDIR", str(tmp_path_factory.mktemp("cache")))  # otherwise the responses are cached in ~/.kube
        yield clusters


def scaling_error(case, clusters, chart, binary):
    """The error in what `chart` renders in a case of scaling.CASES; None if there is none."""
    live, values, *numbers = case
    options = ["--dry-run=server", "--is-upgrade", "--disable-openapi-validation", clusters[live]]
    release = template(*options, "--set", values, values=NOTE, chart=chart, binary=binary)
    deployment = only(release, "Deployment")
    found = deployment["spec"].get("replicas"), deployment["metadata"].get("annotations", {}).get("key-service/replicas")
    expected = numbers[-1 if binary == HELM_3 else 0]
    if found != expected:
        return f"replicas and annotation: expected {expected}, found {found}"
    count = re.fullmatch("replicaCount=([0-9]+)", values)
    keeps_more = count is not None and found[0] > int(count[1])
    note = only(release, "ConfigMap", "note")["data"]["text"]
    if note != (str(found[0]) if keeps_more else ""):
        return f"expected {'a' if keeps_more else 'no'} note, found {note!r}"
    return None


@pytest.mark.parametrize("case", scaling.CASES, ids=[f"{live}: {values}" for live, values, *_ in scaling.CASES])
def test_upgrades_never_remove_pods(case, clusters):
    """both versions of Helm render the expected replicas for a live Deployment"""
    for binary in BOTH:
        expect(scaling_error(case, clusters, CHART, binary), None, binary.name)


@pytest.mark.parametrize(("what", "text", "broken", "found_by", "binary"), scaling.MUTANTS, ids=[what for what, *_ in scaling.MUTANTS])
def test_broken_replicas_are_detected(what, text, broken, found_by, binary, clusters, chart_copy):
    """a chart with wrong spec.replicas is detected by the case listed for it"""
    file = chart_copy / "templates/_replicas.tpl"
    assert file.read_text().count(text) == 1, f"expected {text!r} once in {file.name}"
    file.write_text(file.read_text().replace(text, broken))
    [case] = [case for case in scaling.CASES if case[:2] == found_by]
    assert scaling_error(case, clusters, chart_copy, binary), f"{found_by} did not detect it"


@functools.cache
def findings_of_mutant(number):
    rule, _, change = MUTANTS[number]
    release = copy.deepcopy(baseline_release())
    change(release)
    assert list(release) != list(baseline_release()), "the mutant changed nothing"
    return list(release.findings(only=rule))


@mutants
@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=[f"{rule}: {what}" for rule, what, _ in MUTANTS])
def test_mutants_are_detected(number):
    """a broken release is detected by the rule that it is listed under"""
    assert findings_of_mutant(number), f"the rule {MUTANTS[number][0]} found nothing"


@mutants
def test_every_assertion_has_a_mutant():
    """every line of kube.py that can report a finding is reached by a mutant"""
    reached = {line for number in range(len(MUTANTS)) for _, line, _ in findings_of_mutant(number)}
    missed = {line: function for line, function in kube.assertions().items() if line not in reached}
    assert not missed, "\n".join(f"kube.py:{line}: {function}" for line, function in sorted(missed.items()))


def test_yaml_patterns_recognise_the_words():
    """each word is not text in some version of YAML if it is unquoted, and is text if it is quoted"""
    for word in WORDS:
        assert word == "=" or not_text(f"a: {word}"), f"{word} is text"
        assert not not_text(f"a: {json.dumps(word)}"), f"{word} is not text although it is quoted"
    assert not_text("on: a"), "keys are not checked"


def test_duplicate_yaml_keys_are_rejected():
    """a YAML mapping with a duplicate key is rejected"""
    with pytest.raises(kube.DuplicateKey):
        parse("a: 1\nb: 2\na: 3\n")

"""Runs Helm and parses what it renders."""

import functools
import json
import os
import re
import shlex
import subprocess

import yaml

from support.chart import kube
from support.chart.tools import HELM, HELM_3
from support.daemon import REPOSITORY

CHART = REPOSITORY / "helm-chart"
NAME, NAMESPACE = "demo", "prod"
# The default Kubernetes version differs between the versions of Helm, and some resources depend on it.
KUBERNETES = "1.36.0"
CASES = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
BOTH = (HELM, HELM_3)
# A Helm process runs for a tenth of a second; without this it would spend a quarter of that on garbage collection.
ENVIRONMENT = {**os.environ, "GOGC": "off"}


def helm(*arguments, values=None, ok=True, binary=HELM):
    """Runs Helm. `values` are passed as a file; they may be YAML text, or a structure that is serialised."""
    command = [binary, *map(str, arguments)]
    if values is not None:
        command += ["--values", "-"]
        values = values if isinstance(values, str) else json.dumps(values)
    ran = subprocess.run(command, input=values or "", text=True, capture_output=True, env=ENVIRONMENT)
    if ok:
        assert ran.returncode == 0, f"helm {shlex.join(map(str, arguments))}: {ran.stderr.strip()}"
    return ran


def parse(text, namespace=NAMESPACE):
    """The resources in the output of `helm template`."""
    resources, extra = [], set()
    for document in re.split(r"^---$", text, flags=re.MULTILINE):
        resource = yaml.load(document, Loader=kube.StrictLoader)
        if resource:
            resources.append(resource)
            if "# Source: key-service/templates/extra-manifests.yaml" in document:
                extra.add(kube.name(resource))
    return kube.Release(resources, namespace, extra)


def template_text(*arguments, name=NAME, chart=CHART, namespace=NAMESPACE, **options):
    """The output of `helm template`; `options` are those of helm()."""
    return helm("template", name, chart, "--namespace", namespace, "--kube-version", KUBERNETES, *arguments, **options).stdout


def template(*arguments, **options):
    """The resources that `helm template` renders."""
    return parse(template_text(*arguments, **options))


@functools.cache
def text_of(case, binary=HELM):
    """The output for a case; rendered only once."""
    return template_text("--values", CASES[case], binary=binary)


def rendered(case, binary=HELM):
    """The resources of a case."""
    return parse(text_of(case, binary))


@functools.cache
def baseline_release():
    """The release from which the mutants are made: it has every kind of resource."""
    files = [
        argument for case in ("exposed", "monitoring", "autoscaling", "extras", "cert-manager") for argument in ("--values", CASES[case])
    ]
    return template(*files, "--set", "podDisruptionBudget.maxUnavailable=null,commonAnnotations.a=b")


def only(release, kind, end=""):
    """The only resource of a kind whose name ends with `end`."""
    found = [r for r in release.of(kind) if r["metadata"]["name"].endswith(end)]
    assert len(found) == 1, f"expected one {kind}, found {len(found)}"
    return found[0]

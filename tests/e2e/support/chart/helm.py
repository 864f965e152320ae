"""Helm, and what it renders."""

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
# Helm's own version of Kubernetes differs between the Helms, and the chart's resources with it.
KUBERNETES = "1.36.0"
CASES = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
BOTH = (HELM, HELM_3)
# A process of Helm lives for a tenth of a second, a quarter of which would go to collecting garbage.
ENVIRONMENT = {**os.environ, "GOGC": "off"}


def helm(*arguments, values=None, ok=True, binary=HELM):
    """Runs Helm. `values` are given as a file, whether they are text or not yet."""
    command = [binary, *map(str, arguments)]
    if values is not None:
        command += ["--values", "-"]
        values = values if isinstance(values, str) else json.dumps(values)
    ran = subprocess.run(command, input=values or "", text=True, capture_output=True, env=ENVIRONMENT)
    if ok:
        assert ran.returncode == 0, f"helm {shlex.join(map(str, arguments))}: {ran.stderr.strip()}"
    return ran


def parse(text, namespace=NAMESPACE):
    """The resources of what `helm template` prints."""
    resources, extra = [], set()
    for document in re.split(r"^---$", text, flags=re.MULTILINE):
        resource = yaml.load(document, Loader=kube.StrictLoader)
        if resource:
            resources.append(resource)
            if "# Source: key-service/templates/extra-manifests.yaml" in document:
                extra.add(kube.name(resource))
    return kube.Release(resources, namespace, extra)


def template_text(*arguments, name=NAME, chart=CHART, namespace=NAMESPACE, **options):
    """What `helm template` prints; `options` are those of helm()."""
    return helm("template", name, chart, "--namespace", namespace, "--kube-version", KUBERNETES, *arguments, **options).stdout


def template(*arguments, **options):
    """The resources of what `helm template` prints."""
    return parse(template_text(*arguments, **options))


@functools.cache
def text_of(case, binary=HELM):
    """What is printed for a case: rendered once."""
    return template_text("--values", CASES[case], binary=binary)


def rendered(case, binary=HELM):
    """The resources of a case."""
    return parse(text_of(case, binary))


@functools.cache
def sound():
    """What the mutants are made of: a release with every kind of resource in it."""
    files = [
        argument for case in ("exposed", "monitoring", "autoscaling", "extras", "cert-manager") for argument in ("--values", CASES[case])
    ]
    return template(*files, "--set", "podDisruptionBudget.maxUnavailable=null,commonAnnotations.a=b")


def only(release, kind, end=""):
    found = [r for r in release.of(kind) if r["metadata"]["name"].endswith(end)]
    assert len(found) == 1, f"expected one {kind}, found {len(found)}"
    return found[0]

"""Holds the dashboard to the schema that Grafana publishes as TypeScript, with the packages of npm that it takes.

They are installed once beside the system, pinned; KEY_SERVICE_GRAFANA_TOOLS says where (default: /var/cache/key-service-tools/grafana).
"""
import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

SCHEMA = Path(__file__).resolve().parent / "schema.mts"
NPM = ["@grafana/schema@13.2.3", "@grafana/grafana-foundation-sdk@0.0.21", "typescript@5.9.3"]
VERSION = hashlib.sha256(" ".join(NPM).encode()).hexdigest()[:12]
PACKAGES = Path(os.environ.get("KEY_SERVICE_GRAFANA_TOOLS", "/var/cache/key-service-tools/grafana")) / VERSION
TIMEOUT = 300  # seconds
WIDTH = 24  # columns of Grafana's grid


def problems(dashboard, folder):
    """What is wrong with a dashboard, as sentences."""
    install()
    (folder / "node_modules").symlink_to(PACKAGES / "node_modules")
    shutil.copy(SCHEMA, folder)
    documents = {"dashboard": dashboard} | {f"wrong{number}": wrong for number, wrong in enumerate(mutants(dashboard))}
    for name, document in documents.items():
        (folder / f"{name}.mts").write_text(
            f'import type {{ Dashboard }} from "./schema.mjs";\nexport const dashboard: Dashboard = {json.dumps(document, indent=1)};\n')
    # The declarations of the packages are not this check's: they may name what is not installed.
    ran = subprocess.run(["node_modules/.bin/tsc", "--strict", "--noEmit", "--skipLibCheck", "--target", "es2022", "--module", "nodenext",
                          *(f"{name}.mts" for name in documents)], cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)
    errors = re.findall(r"^(\w+)\.mts\(\d+,\d+\): (.*)$", ran.stdout, re.M)
    found = [error for name, error in errors if name == "dashboard"]
    found += [error for name, error in errors if name not in documents] + ([ran.stdout + ran.stderr] if not errors else [])
    noticed = {name for name, _ in errors}
    return found + [f"{name}: expected an error, found none" for name in documents if name.startswith("wrong") and name not in noticed] + layout(dashboard)


def layout(dashboard):
    """What the schema can't say: every panel has an id and a place of its own, and a query names only variables that are there."""
    panels = dashboard["panels"]
    found = [f"two panels have the id {panel['id']}" for panel in panels if sum(other["id"] == panel["id"] for other in panels) > 1]
    taken = {}
    for panel in panels:
        place = panel["gridPos"]
        if place["x"] + place["w"] > WIDTH:
            found.append(f"{panel['title']}: expected at most {WIDTH} columns, found {place}")
        for cell in ((x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])):
            if taken.setdefault(cell, panel) is not panel:
                found.append(f"{panel['title']} lies on {taken[cell]['title']}")
                break
    variables = {variable["name"] for variable in dashboard["templating"]["list"]} | {"__rate_interval", "__all"}
    found += [f"expected one of {sorted(variables)}, found ${name}"
              for name in re.findall(r"\$\{?(\w+)", json.dumps(dashboard)) if name not in variables]
    return found


def mutants(dashboard):
    """Dashboards that are wrong in one place each: were the types `any`, nobody would notice."""
    small = {**dashboard, "panels": [next(panel for panel in dashboard["panels"] if panel["type"] == kind)
                                     for kind in ("row", "stat", "timeseries", "heatmap", "table")]}

    def change(*path, value):
        wrong = copy.deepcopy(small)
        part = wrong
        for key in path[:-1]:
            part = part[key]
        if value is None:
            part.pop(path[-1], None)
        else:
            part[path[-1]] = value
        return wrong

    stat, lines, heat, table = (("panels", number) for number in (1, 2, 3, 4))
    yield change("titel", value="key-service")
    yield change("schemaVersion", value="39")
    yield change("graphTooltip", value=3)
    yield change("templating", "list", 1, "type", value="queries")
    yield change("annotations", "list", 1, "enable", value="yes")
    yield change(*stat, "type", value="singlestat")
    yield change(*stat, "gridPos", "w", value=None)
    yield change(*stat, "options", "colorMode", value="values")
    yield change(*stat, "options", "colourMode", value="value")
    yield change(*stat, "fieldConfig", "defaults", "thresholds", "steps", 0, "value", value="0")
    yield change(*lines, "fieldConfig", "defaults", "custom", "drawStyle", value="lines")
    yield change(*lines, "fieldConfig", "defaults", "custom", "lineWith", value=1)
    yield change(*lines, "targets", 0, "expr", value=None)
    yield change(*lines, "targets", 0, "query", value="up")
    yield change(*heat, "options", "color", "scale", value="log")
    yield change(*table, "options", "frameIndex", value=None)


def install():
    if (PACKAGES / "complete").exists():
        return
    print(f"installing the packages of npm in {PACKAGES}", flush=True)
    shutil.rmtree(PACKAGES, ignore_errors=True)
    PACKAGES.mkdir(parents=True)
    (PACKAGES / "package.json").write_text('{"private": true}\n')
    options = ["--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run(["npm", "install", *options, *NPM], cwd=PACKAGES, check=True)
    (PACKAGES / "complete").touch()

"""Holds the dashboard to the schema that Grafana publishes as TypeScript, with the packages of npm that it takes.

They are installed once beside the system, pinned; KEY_SERVICE_GRAFANA_TOOLS says where (default: /var/cache/key-service-tools/grafana).
"""

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path

from support import npm
from support.daemon import REPOSITORY

DASHBOARD = REPOSITORY / "helm-chart/files/dashboard.json"
SCHEMA = Path(__file__).resolve().parent / "schema.mts"
NPM = ["@grafana/schema@13.2.3", "@grafana/grafana-foundation-sdk@0.0.21", "typescript@5.9.3"]
TSC_TIMEOUT = 300  # seconds
WIDTH = 24  # columns of Grafana's grid

# Where a dashboard is wrong, and what stands there; None is nothing. Were the types `any`, nobody would notice. Of the panels these
# have one of each kind.
KINDS = ("row", "stat", "timeseries", "heatmap", "table")
MUTANTS = [
    (("titel",), "key-service"),
    (("schemaVersion",), "39"),
    (("graphTooltip",), 3),
    (("templating", "list", 1, "type"), "queries"),
    (("annotations", "list", 1, "enable"), "yes"),
    (("panels", "stat", "type"), "singlestat"),
    (("panels", "stat", "gridPos", "w"), None),
    (("panels", "stat", "options", "colorMode"), "values"),
    (("panels", "stat", "options", "colourMode"), "value"),
    (("panels", "stat", "fieldConfig", "defaults", "thresholds", "steps", 0, "value"), "0"),
    (("panels", "timeseries", "fieldConfig", "defaults", "custom", "drawStyle"), "lines"),
    (("panels", "timeseries", "fieldConfig", "defaults", "custom", "lineWith"), 1),
    (("panels", "timeseries", "targets", 0, "expr"), None),
    (("panels", "timeseries", "targets", 0, "query"), "up"),
    (("panels", "heatmap", "options", "color", "scale"), "log"),
    (("panels", "table", "options", "frameIndex"), None),
]


def dashboard():
    return json.loads(DASHBOARD.read_text())


def panels(found):
    """All panels, and those in rows that are folded."""
    for panel in found:
        yield panel
        yield from panels(panel.get("panels", []))


def mutant(path, value):
    """A dashboard that is wrong in one place."""
    wrong = copy.deepcopy(dashboard())
    wrong["panels"] = [next(panel for panel in wrong["panels"] if panel["type"] == kind) for kind in KINDS]
    part = wrong
    for key in path[:-1]:
        part = part[KINDS.index(key) if key in KINDS else key]
    if value is None:
        part.pop(path[-1], None)
    else:
        part[path[-1]] = value
    return wrong


def compiled(documents, folder):
    """The errors of each dashboard, as the TypeScript compiler finds them; under "" those of what is no dashboard, and its output
    where it has none."""
    (folder / "node_modules").symlink_to(npm.installed("grafana", "KEY_SERVICE_GRAFANA_TOOLS", NPM))
    shutil.copy(SCHEMA, folder)
    for name, document in documents.items():
        (folder / f"{name}.mts").write_text(
            f'import type {{ Dashboard }} from "./schema.mjs";\nexport const dashboard: Dashboard = {json.dumps(document, indent=1)};\n'
        )
    # The declarations of the packages are not this check's: they may name what is not installed.
    options = ["--strict", "--noEmit", "--skipLibCheck", "--target", "es2022", "--module", "nodenext"]
    ran = subprocess.run(
        ["node_modules/.bin/tsc", *options, *(f"{name}.mts" for name in documents)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TSC_TIMEOUT,
    )
    errors = re.findall(r"^(\w+)\.mts\(\d+,\d+\): (.*)$", ran.stdout, re.M)
    found = {name: [error for each, error in errors if each == name] for name in documents}
    found[""] = [error for name, error in errors if name not in documents] + ([ran.stdout + ran.stderr] if not errors else [])
    return found


def misplaced(panels):
    """Panels that have no id or no place of their own."""
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
    return found


def unknown_variables(dashboard):
    """Variables that are named and not there."""
    variables = {variable["name"] for variable in dashboard["templating"]["list"]} | {"__rate_interval", "__all"}
    return [
        f"expected one of {sorted(variables)}, found ${name}"
        for name in re.findall(r"\$\{?(\w+)", json.dumps(dashboard))
        if name not in variables
    ]

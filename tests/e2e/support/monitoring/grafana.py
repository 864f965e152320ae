"""Checks the dashboard against the schema that Grafana publishes as TypeScript.

The npm packages that this takes are pinned and installed once, outside the system directories: in KEY_SERVICE_GRAFANA_TOOLS
(default: /var/cache/key-service-tools/grafana).
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

# The path of an error in a dashboard, and the wrong value; None removes the field. They show that the types are not just `any`,
# which accepts everything. A mutant has one panel of each kind.
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
    """All panels, including those in collapsed rows."""
    for panel in found:
        yield panel
        yield from panels(panel.get("panels", []))


def mutant(path, value):
    """A dashboard with a single error."""
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


def compiled(documents, directory):
    """The TypeScript compiler's errors for each dashboard. The key "" has its errors for other files, or its whole output if it
    reported no error."""
    (directory / "node_modules").symlink_to(npm.installed("grafana", "KEY_SERVICE_GRAFANA_TOOLS", NPM))
    shutil.copy(SCHEMA, directory)
    for name, document in documents.items():
        (directory / f"{name}.mts").write_text(
            f'import type {{ Dashboard }} from "./schema.mjs";\nexport const dashboard: Dashboard = {json.dumps(document, indent=1)};\n'
        )
    # --skipLibCheck: the packages' own declarations may refer to packages that are not installed.
    options = ["--strict", "--noEmit", "--skipLibCheck", "--target", "es2022", "--module", "nodenext"]
    ran = subprocess.run(
        ["node_modules/.bin/tsc", *options, *(f"{name}.mts" for name in documents)],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=TSC_TIMEOUT,
    )
    errors = re.findall(r"^(\w+)\.mts\(\d+,\d+\): (.*)$", ran.stdout, re.M)
    found = {name: [error for each, error in errors if each == name] for name in documents}
    found[""] = [error for name, error in errors if name not in documents] + ([ran.stdout + ran.stderr] if not errors else [])
    return found


def misplaced(panels):
    """Errors for panels with a duplicate id, outside the grid, or on top of another panel."""
    found = [f"two panels have the id {panel['id']}" for panel in panels if sum(other["id"] == panel["id"] for other in panels) > 1]
    taken = {}
    for panel in panels:
        place = panel["gridPos"]
        if place["x"] + place["w"] > WIDTH:
            found.append(f"{panel['title']}: expected at most {WIDTH} columns, found {place}")
        for cell in ((x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])):
            if taken.setdefault(cell, panel) is not panel:
                found.append(f"{panel['title']} overlaps {taken[cell]['title']}")
                break
    return found


def unknown_variables(dashboard):
    """Errors for variables that are used but not defined."""
    variables = {variable["name"] for variable in dashboard["templating"]["list"]} | {"__rate_interval", "__all"}
    return [
        f"expected one of {sorted(variables)}, found ${name}"
        for name in re.findall(r"\$\{?(\w+)", json.dumps(dashboard))
        if name not in variables
    ]

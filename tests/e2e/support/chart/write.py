"""What the chart has that is made of something else: the values table of its README, Kubernetes' definitions in its schema, and a copy.

PYTHONPATH=tests/e2e python3 -m support.chart.write    makes them anew
"""

import json
import re
import shutil

from support.chart import definitions
from support.chart.helm import CHART
from support.chart.values import PROBES, SCHEMA, SCHEMA_FILE, VALUES, leaves

COMMAND = "PYTHONPATH=tests/e2e python3 -m support.chart.write"
README = CHART / "README.md"
MARKS = ("<!-- values: made by `python3 -m support.chart.write` -->", "<!-- /values -->")
# Templates can read files/, but not values.yaml.
VALUES_FILE, COPY = CHART / "values.yaml", CHART / "files/values.yaml"


def table():
    """The values table, from values.yaml: what stands above a name, its path, its default."""
    rows, path, words, described = [], [], [], {}
    for line in VALUES_FILE.read_text().splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip().startswith("#"):
            words.append(line.strip("# "))
        elif match := re.match(r" *([A-Za-z]+):", line):
            path[indent // 2 :] = [match[1]]
            described[".".join(path)] = " ".join(words)
            words = []
        else:
            words = []
    for leaf, default in leaves(VALUES):
        words = described.get(leaf, "")
        for parent in PROBES:  # described as a whole
            if leaf.startswith(f"{parent}."):
                words = described[parent] if leaf == f"{parent}.enabled" else "as of a Kubernetes probe"
        assert words, f"values.yaml: {leaf} is not described"
        rows.append(f"| `{leaf}` | `{json.dumps(default)}` | {words} |")
    return "\n".join(["| value | default | |", "|---|---|---|", *rows])


def with_table(text):
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{table()}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def schema():
    return definitions.text(definitions.with_kubernetes(SCHEMA))


def main():
    README.write_text(with_table(README.read_text()))
    SCHEMA_FILE.write_text(schema())
    shutil.copy(VALUES_FILE, COPY)


if __name__ == "__main__":
    main()

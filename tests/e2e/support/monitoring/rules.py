"""Runs promtool on the alerts, the recording rules and their cases."""

import functools
import json
import os
import re
import subprocess
from pathlib import Path

import yaml

from support.daemon import REPOSITORY

RULES = REPOSITORY / "helm-chart/files"
CASES = sorted(Path(__file__).parent.glob("*.test.yml"))
PROMTOOL_TIMEOUT = 300  # seconds

# By default Go's garbage collector takes a fifth of promtool's time. This setting avoids that, for 210 MiB of memory instead of 110.
ENVIRONMENT = {**os.environ, "GOGC": "400"}

# Expressions that make every alert never fire, and always fire.
MUTANTS = {"never": "vector(1) == 0", "always": "vector(1)"}


@functools.cache
def groups():
    return [group for name in ("recording.yml", "alerts.yml") for group in yaml.safe_load((RULES / name).read_text())["groups"]]


def alerts():
    """Each alert by its name, as in alerts.yml."""
    return {rule["alert"]: rule for group in groups() for rule in group["rules"] if "alert" in rule}


def records():
    return sorted({rule["record"] for group in groups() for rule in group["rules"] if "record" in rule})


def promtool(*arguments, given=None):
    """Runs promtool. Returns its exit status and its output."""
    ran = subprocess.run(
        ["promtool", *map(str, arguments)],
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PROMTOOL_TIMEOUT,
        env=ENVIRONMENT,
    )
    return ran.returncode, ran.stdout


class Mutant:
    """All alerts with a broken expression, and the cases that detect it.

    failed: all failures, each as (alert, (file, case), seconds, whether the alert was expected to fire then)

    The broken expressions need no history, so one evaluation an hour is enough, which takes a sixth of the time."""

    def __init__(self, expression, directory):
        directory.mkdir()
        # JSON is valid YAML. These alerts read no series, so the recording rules, which take most of the time, are left out.
        (directory / "alerts.yml").write_text(json.dumps({"groups": [broken(group, expression) for group in groups()]}))
        for path in CASES:
            text = re.sub(r"^rule_files:\n(  - .*\n)+", "rule_files: [alerts.yml]\n", path.read_text(), flags=re.M)
            (directory / path.name).write_text(re.sub(r"^evaluation_interval: .*$", "evaluation_interval: 1h", text, flags=re.M))
        _, self.output = promtool("test", "rules", *(directory / path.name for path in CASES))
        self.failed, file = [], ""
        for path, case, alert, at, expected in re.findall(
            r"^Unit Testing: +(\S+)$|^    name: (.*?),\n    alertname: ?(\w+), time: (\w+),\s+exp:\[(.*?)\],?\s", self.output, re.S | re.M
        ):
            file = Path(path).name or file
            if alert:
                self.failed.append((alert, (file, case), seconds(at), bool(expected.strip())))


def broken(group, expression):
    """A group with the same alerts, and another expression."""
    rules = [{"alert": rule["alert"], "expr": expression, "labels": rule["labels"]} for rule in group["rules"] if "alert" in rule]
    return {"name": group["name"], "rules": rules}


def seconds(duration):
    """Converts a duration in Prometheus' notation, such as 1h2m, to seconds."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([dhms])", duration))

"""The chart's values and their schema."""

import json

import yaml

from support.chart import definitions
from support.chart.helm import CHART

SCHEMA_FILE = CHART / "values.schema.json"
SCHEMA = json.loads(SCHEMA_FILE.read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


def leaves(values, path=()):
    """(path, value) of each leaf: a value whose schema defines no further names of ours."""
    for key, value in values.items():
        if isinstance(value, dict) and value and value_is_ours((*path, key)):
            yield from leaves(value, (*path, key))
        else:
            yield ".".join((*path, key)), value


def value_is_ours(path):
    node = SCHEMA
    for key in path:
        node = resolve(node)["properties"][key]
    return is_ours(node)


def is_ours(node):
    """Whether our schema defines which keys a value may have; otherwise it is a free map, or a structure that Kubernetes defines."""
    if node.get("$ref", "").startswith(definitions.PREFIX):
        return False
    return resolve(node).get("additionalProperties") is False and "patternProperties" not in resolve(node)


def resolve(node):
    return SCHEMA["definitions"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def parent_and_key(values, path):
    """The map that contains the last key of a path, and that key."""
    parent, _, last = path.rpartition(".")
    return (at(values, parent) if parent else values), last


def at(values, path):
    for key in path.split("."):
        if not isinstance(values, dict) or key not in values:
            return None
        values = values[key]
    return values


def has_null(values, path):
    parent, last = parent_and_key(values, path)
    return isinstance(parent, dict) and last in parent and parent[last] is None


def merged(one, other):
    if isinstance(one, dict) and isinstance(other, dict):
        both = {**one, **other}
        return {key: merged(one[key], other[key]) if key in one and key in other else value for key, value in both.items()}
    return other

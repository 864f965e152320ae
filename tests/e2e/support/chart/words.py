"""Words that some version of YAML does not read as text, set in every value that accepts text."""

import functools
import re
from collections import Counter

import jsonschema
import yaml

from support.chart.helm import BOTH, CHART, HELM_3, NAME, NAMESPACE, template_text
from support.chart.values import SCHEMA, merged, resolve

WORDS = ["123", "1e3", "0x1f", "0o7", "0b1", "1_000", "12:30:00", "2024-01-01", ".5", "on", "no", "true", "null", "y", "N", "~", "="]
HARMLESS = "word"
FIELDS = ("release and namespace", "values")
# Plain scalars that are not text, by the types of YAML 1.1 (yaml.org/type) and by the core schema of YAML 1.2.2 (10.3.2). Go's
# parsers, which Helm and Kubernetes use, add the numbers of 1.1 to the core schema, and read "=" and "<<" as text.
NOT_TEXT = {
    "YAML 1.1": r"~|null|Null|NULL|y|Y|yes|Yes|YES|n|N|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"
    r"|[-+]?0b[01_]+|[-+]?0x[0-9a-fA-F_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])*(\.[0-9_]*)?|[-+]?([0-9][0-9_]*)?\.[0-9.]*([eE][-+][0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?",
    "YAML 1.2": r"~|null|Null|NULL|true|True|TRUE|false|False|FALSE|[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
    r"|[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
# Values that enable every resource, with only what each requires.
EVERYTHING = {
    "service": {"type": "LoadBalancer"},
    "autoscaling": {"enabled": True},
    "podDisruptionBudget": {"enabled": True},
    "networkPolicy": {"enabled": True, "httpFrom": [{"podSelector": {}}]},
    "metrics": {"serviceMonitor": {"enabled": True}, "prometheusRule": {"enabled": True}, "dashboard": {"enabled": True}},
    "ingress": {"enabled": True, "hosts": [{"host": "a.example", "paths": [{"path": "/key", "pathType": "Prefix"}]}]},
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}], "backendTLS": {"caCertificateRefs": [{"name": "ca"}]}},
}
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)


def not_text(rendered_text):
    """A Counter of (version of YAML, scalar) for each scalar, including keys, that is not text in that version."""
    found, nodes = Counter(), list(yaml.compose_all(rendered_text, Loader=yaml.CSafeLoader))
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.ScalarNode):
            if not node.style:
                found.update((reading, node.value) for reading, pattern in NOT_TEXT.items() if re.fullmatch(pattern, node.value))
        elif node is not None:
            nodes += [inner for item in node.value for inner in (item if isinstance(node, yaml.MappingNode) else [item])]
    return found


def filled(node, word):
    """A value with the word in every place where the schema accepts text; None if there is no such place."""
    if "$ref" in node:
        return filled_definition(node["$ref"], word)

    def accepts(value):
        return VALIDATOR.evolve(schema=node).is_valid(value)

    if accepts(word) and accepts(HARMLESS):
        return word
    if "array" in node.get("type", []):
        item = filled(node.get("items", {}), word)
        return None if item is None else [item]
    if "object" not in node.get("type", []) and not node.get("allOf") and not node.get("properties"):
        return None
    whole = [*map(resolve, node.get("allOf", [])), node]
    parts = {key: child for part in whole for key, child in part.get("properties", {}).items()}
    required = {key for part in whole for key in part.get("required", [])}
    value = {key: inner for key, child in parts.items() if child and (inner := filled(child, word)) is not None}
    for key in sorted(required - set(value)):
        value[key] = needed(resolve(parts.get(key, {})), word)
    if (node.get("additionalProperties") is not False or "patternProperties" in node) and (
        accepts({word: word, **value}) and accepts({HARMLESS: word, **value})
    ):
        value[word] = word
    for key in reversed(list(value)):  # keep only one of mutually exclusive fields
        if not accepts(value) and key not in required:
            del value[key]
    return value if value and accepts(value) else None


@functools.cache
def filled_definition(reference, word):
    return filled(resolve({"$ref": reference}), word)


def needed(node, word):
    """A valid value for a required field that does not accept the word itself."""
    if "enum" in node:
        return node["enum"][0]
    if "integer" in node.get("type", []):
        return node.get("minimum", 1)
    if "array" in node.get("type", []):
        return [needed(resolve(node["items"]), word)]
    if "object" in node.get("type", []):
        return {key: needed(resolve(node["properties"][key]), word) for key in node.get("required", [])}
    return f"/{word}" if "pattern" in node else word


@functools.cache
def filled_values(word):
    # Text in extraManifests is the user's own YAML.
    node = {**SCHEMA, "properties": {key: child for key, child in SCHEMA["properties"].items() if key not in ("extraManifests", "global")}}
    # A CPU target would need requests of the containers, which are quantities.
    return merged(merged(EVERYTHING, filled(node, word)), {"autoscaling": {"targetCPUUtilizationPercentage": None}})


def values_with(word, second):
    """All values that accept the word. Mutually exclusive ones are split over two sets: `second` selects the set."""
    certificate = {"existingSecret": None, "certificate": {"enabled": True}, "clientCA": {"existingSecret": None}}
    values = merged(filled_values(word), {"tls": certificate if second else {"clientCA": {"existingConfigMap": None}}})
    renamed = "extraContainers" if second else "extraInitContainers"
    return {**values, renamed: [{**container, "name": "another"} for container in values.get(renamed, [])]}


@functools.cache
def count_with(word, field, binary, chart):
    """The scalars that are not text if the word is the release's name and namespace, or is in every value that accepts it."""
    release, namespace, values = NAME, NAMESPACE, EVERYTHING
    if field == "release and namespace":
        release = namespace = word
    else:
        values = values_with(word, binary == HELM_3)
    return not_text(template_text(name=release, namespace=namespace, values=values, chart=chart, binary=binary))


def words_that_are_not_text(chart=CHART, words=WORDS, binaries=BOTH):
    """A message for each word that did not stay text."""
    for field in FIELDS:
        for word in words:
            if field == "release and namespace" and not re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", word):
                continue
            for binary in binaries:
                difference = count_with(word, field, binary, chart) - count_with(HARMLESS, field, binary, chart)
                for (reading, scalar), count in difference.items():
                    yield f"{field} {word!r}, {binary.name}: {scalar} is not text in {reading}, {count} times"

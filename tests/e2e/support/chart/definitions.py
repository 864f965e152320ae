"""The Kubernetes definitions in the schema of the values, so that a typo in a Kubernetes structure is rejected.

The API server is stricter than the definitions: some fields that they define as strings accept only a few words. NARROWED has these.
"""

import json
import re

import kubernetes_validate

PREFIX = "#/definitions/io.k8s."
PROFILE = {"type": {"enum": ["Localhost", "RuntimeDefault", "Unconfined"]}}
USER = {"minimum": 0, "maximum": 2147483647}
LABEL_OPERATORS = {"operator": {"enum": ["In", "NotIn", "Exists", "DoesNotExist"]}}
NARROWED = {
    "api.core.v1.SeccompProfile": PROFILE,
    "api.core.v1.AppArmorProfile": PROFILE,
    "api.core.v1.SecurityContext": {"runAsUser": USER, "runAsGroup": USER, "procMount": {"enum": ["Default", "Unmasked", None]}},
    "api.core.v1.PodSecurityContext": {
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": {"enum": ["Always", "OnRootMismatch", None]},
    },
    "api.core.v1.VolumeMount": {"mountPropagation": {"enum": ["Bidirectional", "HostToContainer", "None", None]}},
    "api.core.v1.NodeSelectorRequirement": {"operator": {"enum": ["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]}},
    "apimachinery.pkg.apis.meta.v1.LabelSelectorRequirement": LABEL_OPERATORS,
    "apimachinery.pkg.apis.meta.v1.LabelSelector": {"matchLabels": {"$ref": "#/definitions/selector"}},
    "api.autoscaling.v2.HPAScalingRules": {
        "stabilizationWindowSeconds": {"minimum": 0, "maximum": 3600},
        "selectPolicy": {"enum": ["Max", "Min", "Disabled", None]},
    },
    "api.autoscaling.v2.HPAScalingPolicy": {
        "type": {"enum": ["Pods", "Percent"]},
        "value": {"minimum": 1},
        "periodSeconds": {"minimum": 1, "maximum": 1800},
    },
}


def with_kubernetes(schema):
    """The schema with all Kubernetes definitions that it references, without their descriptions."""
    version = kubernetes_validate.latest_version()
    known = kubernetes_validate.utils.schema_contents(f"kubernetes-json-schema/v{version}-local-strict/_definitions.json", version)["$defs"]
    made = {**schema, "definitions": {name: node for name, node in schema["definitions"].items() if not name.startswith("io.k8s.")}}
    while names := set(re.findall(r'"#/definitions/(io\.k8s\.[^"]+)"', json.dumps(made))) - set(made["definitions"]):
        for name in sorted(names):
            node = plain(json.loads(re.sub(r'"(_definitions\.json)?#/\$defs/', '"#/definitions/', json.dumps(known[name]))))
            for field, narrower in NARROWED.get(name.removeprefix("io.k8s."), {}).items():
                # Beside a $ref no other keyword is allowed. The definition of a string that becomes an enum is replaced as a whole.
                node["properties"][field] = {**node["properties"][field], **narrower} if "minimum" in narrower else narrower
            made["definitions"][name] = schema["definitions"]["quantity"] if name.endswith(".Quantity") else node
    return made


def text(schema):
    """The text of the schema file: our own part is indented, and each Kubernetes definition is on one line."""
    lines = {name: json.dumps(node) for name, node in schema["definitions"].items() if name.startswith("io.k8s.")}
    spread = json.dumps(
        {**schema, "definitions": {**schema["definitions"], **{name: name for name in lines}}}, indent=2, ensure_ascii=False
    )
    for name, line in lines.items():
        spread = spread.replace(f'"{name}": "{name}"', f'"{name}": {line}')
    return f"{spread}\n"


def plain(node):
    if isinstance(node, dict):
        return {
            key: plain(inner)
            for key, inner in node.items()
            if not key.startswith("x-") and not (key == "description" and isinstance(inner, str))
        }
    return [plain(inner) for inner in node] if isinstance(node, list) else node

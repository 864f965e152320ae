"""Finds errors in a set of Kubernetes resources without a cluster.

A rule is a function over all resources of a release that yields a message for each error. The API server rejects some of these
errors, most of which the schemas accept; it accepts the others, and the release then does not work. mutants.py proves each rule.
"""

import ast
import functools
import inspect
import ipaddress
import json
import re
import subprocess
import tomllib
from decimal import Decimal
from pathlib import Path

import jsonschema
import kubernetes_validate
import referencing
import yaml

from support import peers
from support.chart import tools

RULES = {}

POD_KINDS = ("Deployment", "Pod")
CUSTOM_KINDS = ("BackendTLSPolicy", "Certificate", "HTTPRoute", "PrometheusRule", "ServiceMonitor")
BUILT_IN_KINDS = (
    "ConfigMap",
    "Deployment",
    "HorizontalPodAutoscaler",
    "Ingress",
    "NetworkPolicy",
    "Pod",
    "PodDisruptionBudget",
    "Service",
    "ServiceAccount",
)

LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123
SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1035
SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
PORT_NAME = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?")  # RFC 6335 IANA_SVC_NAME
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
VARIABLE = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
PERCENTAGE = re.compile(r"[0-9]+%")
QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(n|u|m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][-+]?[0-9]+)?")
SUFFIXES = {
    "": 1,
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("0.001"),
    **{s: 1000**n for n, s in enumerate("kMGTPE", 1)},
    **{f"{s}i": 1024**n for n, s in enumerate("KMGTPE", 1)},
}
RECOMMENDED = (
    "helm.sh/chart",
    "app.kubernetes.io/name",
    "app.kubernetes.io/instance",
    "app.kubernetes.io/version",
    "app.kubernetes.io/component",
    "app.kubernetes.io/managed-by",
)
RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def rule(function):
    RULES[function.__name__] = function
    return function


class Release(list):
    """The resources of a release; `extra` holds the names of the resources that come from extraManifests."""

    def __init__(self, resources, namespace, extra=frozenset()):
        super().__init__(resources)
        self.namespace = namespace
        self.extra = extra

    def of(self, *kinds):
        return [resource for resource in self if resource["kind"] in kinds]

    def pods(self):
        """Every pod or pod template: (resource, metadata, spec)."""
        for resource in self.of("Pod"):
            yield resource, resource["metadata"], resource["spec"]
        for resource in self.of("Deployment"):
            template = resource["spec"]["template"]
            yield resource, template["metadata"], template["spec"]

    def containers(self):
        for resource, _, spec in self.pods():
            for container in spec.get("initContainers", []) + spec["containers"]:
                yield resource, spec, container

    def selected(self, selector):
        return [pod for pod in self.pods() if matches(selector, pod[1].get("labels", {}))]

    def findings(self, only=None):
        """(rule, line of the yield, message) of every error."""
        for rule_name, function in RULES.items():
            if only not in (None, rule_name):
                continue
            generator = function(self)
            for message in generator:
                inner = generator
                while inspect.isgenerator(inner.gi_yieldfrom):
                    inner = inner.gi_yieldfrom
                yield rule_name, inner.gi_frame.f_lineno, message


def assertions():
    """The lines of this file that can report a finding; the mutants must reach all of them."""
    inner_ones = ("findings", "pods", "containers", "maps", "unknown", "wrong")
    lines = {}
    for function in ast.walk(ast.parse(Path(__file__).read_text())):
        if isinstance(function, ast.FunctionDef) and function.name not in inner_ones:
            own = [node for node in ast.walk(function) if isinstance(node, ast.Yield)]
            nested = [
                node
                for inner in ast.walk(function)
                if isinstance(inner, ast.FunctionDef) and inner is not function
                for node in ast.walk(inner)
            ]
            lines.update({node.lineno: function.name for node in own if node not in nested})
    return lines


class DuplicateKey(ValueError):
    pass


class StrictLoader(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):
    """A YAML loader that raises an error for a duplicate key, where the API server silently uses the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        duplicates = {key for key in keys if keys.count(key) > 1}
        if duplicates:
            raise DuplicateKey(f"line {node.start_mark.line + 1}: expected each key once, found {', '.join(map(str, duplicates))} twice")
        return super().construct_mapping(node, deep)


def name(resource):
    return f"{resource['kind']}/{resource['metadata'].get('name')}"


def configuration_maps(release, deployment):
    """The mounted ConfigMaps with the daemon's configuration file: exactly one in a valid release."""
    mounted = [
        volume["configMap"]["name"]
        for volume in deployment["spec"]["template"]["spec"]["volumes"]
        if volume["name"] == "config" and "configMap" in volume
    ]
    return [resource for resource in release.of("ConfigMap") if resource["metadata"]["name"] in mounted]


def settings_of(release, deployment):
    """The daemon's settings; empty if they cannot be read. Errors in the file are found by the rule `configuration`."""
    try:
        return tomllib.loads(configuration_maps(release, deployment)[0]["data"]["config.toml"])
    except (IndexError, KeyError, tomllib.TOMLDecodeError):
        return {}


def services_to(release, port):
    """The Services that target a named port of the pods."""
    return [service for service in release.of("Service") if service["spec"]["ports"][0].get("targetPort") == port]


def matches(selector, labels):
    selector = selector or {}
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    assert not selector.get("matchExpressions"), "matchExpressions are not supported here: the chart does not use them"
    return True


def quantity(text):
    match = QUANTITY.fullmatch(str(text))
    if not match:
        return None
    suffix = match[2] or ""
    factor = SUFFIXES[suffix] if suffix in SUFFIXES else Decimal(10) ** int(suffix[1:])
    return Decimal(match[1]) * factor


def is_pod_count(value):
    """Whether a value is an IntOrString that counts pods: a number or a percentage."""
    return (isinstance(value, int) and value >= 0) or (isinstance(value, str) and bool(PERCENTAGE.fullmatch(value)))


def is_zero(value):
    return str(value) in ("0", "0%")


@functools.cache
def validator(version, kind, api_version):
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    directory = f"kubernetes-json-schema/v{version}-local-strict"
    schema = kubernetes_validate.utils.schema_contents(f"{directory}/{kind.lower()}-{group}.json", version)
    definitions = kubernetes_validate.utils.schema_contents(f"{directory}/_definitions.json", version)
    registry = referencing.Resource.from_contents(definitions) @ (referencing.Resource.from_contents(schema) @ referencing.Registry())
    return jsonschema.Draft202012Validator(schema, registry=registry)


def schema_findings(resources, version):
    for resource in resources:
        for error in validator(version, resource["kind"], resource["apiVersion"]).iter_errors(resource):
            yield f"{name(resource)}: {'.'.join(map(str, error.path))}: {error.message} (Kubernetes {version})"


@rule
def schema(release):
    """Types, required fields and unknown fields, by the strict Kubernetes schemas."""
    yield from schema_findings(release.of(*BUILT_IN_KINDS), kubernetes_validate.latest_version())


# Fields that are strings in the schemas, but for which the API server accepts only a few words.
CHOICES = {
    "externalTrafficPolicy": {"Cluster", "Local"},
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "ipFamilies": {"IPv4", "IPv6"},
    "ipFamilyPolicy": {"SingleStack", "PreferDualStack", "RequireDualStack"},
    "pathType": {"Exact", "Prefix", "ImplementationSpecific"},
    "policyTypes": {"Ingress", "Egress"},
    "protocol": {"TCP", "UDP", "SCTP"},
    "restartPolicy": {"Always", "OnFailure", "Never"},
    "trafficDistribution": {"PreferClose", "PreferSameZone", "PreferSameNode"},
    "unhealthyPodEvictionPolicy": {"IfHealthyBudget", "AlwaysAllow"},
    "whenUnsatisfiable": {"DoNotSchedule", "ScheduleAnyway"},
}


@rule
def choices(release):
    """Fields that accept only a few words contain one of them."""

    def wrong(value, key):
        if isinstance(value, dict):
            for inner_key, inner in value.items():
                yield from wrong(inner, inner_key)
        elif isinstance(value, list):
            for inner in value:
                yield from wrong(inner, key)
        elif key in CHOICES and value not in CHOICES[key]:
            yield key, value

    for resource in release.of(*BUILT_IN_KINDS):
        for key, value in wrong(resource.get("spec", {}), ""):
            yield f"{name(resource)}: {key}: expected one of {', '.join(sorted(CHOICES[key]))}, found {value!r}"


@rule
def kinds(release):
    """Every resource has a kind that this file checks."""
    for resource in release:
        if resource["kind"] not in BUILT_IN_KINDS + CUSTOM_KINDS:
            yield f"{name(resource)}: expected one of the kinds that are checked"


@rule
def custom_models(release):
    """Custom resources are valid by the models of their CRDs."""
    found = release.of(*CUSTOM_KINDS)
    for resource, error in zip(found, MODELS.errors(found), strict=True):
        if error:
            yield f"{name(resource)}: {error}"


class Models:
    """The models of the CRDs, in a child process that runs while this context manager is entered."""

    def __enter__(self):
        command = ["setpriv", "--pdeathsig", "KILL", "--", "node", Path(__file__).with_name("models.mjs"), tools.PACKAGES]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def errors(self, resources):
        print(json.dumps(resources), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def __exit__(self, *_):
        with self.process:  # closes both pipes, which makes the process exit
            peers.kill(self.process, "node")


MODELS = Models()


RELABEL = {"sourceLabels": 0, "separator": 0, "targetLabel": 0, "regex": 0, "modulus": 0, "replacement": 0, "action": 0}
CUSTOM_FIELDS = {
    "BackendTLSPolicy": {
        "spec": {
            "targetRefs": {"group": 0, "kind": 0, "name": 0, "sectionName": 0},
            "validation": {"hostname": 0, "caCertificateRefs": {"group": 0, "kind": 0, "name": 0}, "wellKnownCACertificates": 0},
        }
    },
    "Certificate": {
        "spec": {
            "secretName": 0,
            "issuerRef": {"name": 0, "kind": 0, "group": 0},
            "dnsNames": 0,
            "duration": 0,
            "renewBefore": 0,
            "privateKey": {"algorithm": 0, "size": 0, "rotationPolicy": 0},
            "usages": 0,
        }
    },
    "ServiceMonitor": {
        "spec": {
            "namespaceSelector": {"matchNames": 0},
            "selector": {"matchLabels": None},
            "endpoints": {
                "port": 0,
                "path": 0,
                "interval": 0,
                "scrapeTimeout": 0,
                "honorLabels": 0,
                "relabelings": RELABEL,
                "metricRelabelings": RELABEL,
            },
        }
    },
    "PrometheusRule": {
        "spec": {
            "groups": {
                "name": 0,
                "interval": 0,
                "limit": 0,
                "rules": {"alert": 0, "record": 0, "expr": 0, "for": 0, "keep_firing_for": 0, "labels": None, "annotations": None},
            }
        }
    },
    "HTTPRoute": {
        "spec": {
            "parentRefs": {"name": 0, "namespace": 0, "sectionName": 0, "port": 0, "group": 0, "kind": 0},
            "hostnames": 0,
            "rules": {
                "matches": {"path": {"type": 0, "value": 0}, "method": 0, "headers": None, "queryParams": None},
                "filters": None,
                "backendRefs": {"name": 0, "port": 0},
            },
        }
    },
}


@rule
def custom_fields(release):
    """Custom resources have no unknown fields: the API server drops or rejects such fields."""

    def unknown(value, fields, path):
        if isinstance(value, list):
            for item in value:
                yield from unknown(item, fields, path)
        elif isinstance(value, dict) and fields is not None:
            for key, inner in value.items():
                if not isinstance(fields, dict) or key not in fields:
                    yield f"{path}.{key}"
                else:
                    yield from unknown(inner, fields[key], f"{path}.{key}")

    for resource in release.of(*CUSTOM_KINDS):
        fields = {
            "apiVersion": 0,
            "kind": 0,
            "metadata": {"name": 0, "namespace": 0, "labels": None, "annotations": None},
            **CUSTOM_FIELDS[resource["kind"]],
        }
        for path in unknown(resource, fields, ""):
            yield f"{name(resource)}: unknown field {path[1:]}"


@rule
def names(release):
    """Names of resources, containers and volumes are legal and unique."""
    seen = set()
    for resource in release:
        form = SERVICE_NAME if resource["kind"] == "Service" else SUBDOMAIN
        if not form.fullmatch(str(resource["metadata"].get("name"))):
            yield f"{name(resource)}: expected a DNS name"
        if name(resource) in seen:
            yield f"{name(resource)}: expected a unique name"
        seen.add(name(resource))
    for resource, _, spec in release.pods():
        for what in ("containers", "volumes"):
            found = [item["name"] for item in spec.get(what, []) + (spec.get("initContainers", []) if what == "containers" else [])]
            for item in found:
                if not LABEL.fullmatch(item):
                    yield f"{name(resource)}: {what}: expected a DNS label, found {item!r}"
                if found.count(item) > 1:
                    yield f"{name(resource)}: {what}: expected unique names, found {item} twice"


@rule
def namespaces(release):
    """All resources are in the release's namespace."""
    for resource in release:
        if resource["metadata"].get("namespace") != release.namespace:
            yield f"{name(resource)}: expected namespace {release.namespace}, found {resource['metadata'].get('namespace')}"


@rule
def labels(release):
    """Names and values of labels and annotations are legal, including in node selectors."""

    def maps():
        for resource in release:
            yield resource, "labels", resource["metadata"].get("labels", {})
            yield resource, "annotations", resource["metadata"].get("annotations", {})
        for resource, metadata, spec in release.pods():
            yield resource, "labels", metadata.get("labels", {})
            yield resource, "annotations", metadata.get("annotations", {})
            yield resource, "labels", spec.get("nodeSelector", {})

    for resource, what, pairs in maps():
        for key, value in pairs.items():
            prefix, _, last = key.rpartition("/")
            if not LABEL_VALUE.fullmatch(last) or not last or (prefix and not SUBDOMAIN.fullmatch(prefix)) or (key.startswith("/")):
                yield f"{name(resource)}: {what}: {key!r} is not a legal name"
            if not isinstance(value, str) or (what == "labels" and not LABEL_VALUE.fullmatch(value)):
                yield f"{name(resource)}: {what}: {key}: {value!r} is not a legal value"


@rule
def recommended_labels(release):
    """Every resource has the recommended labels, except resources from extraManifests."""
    for resource in release:
        missing = [label for label in RECOMMENDED if label not in resource["metadata"].get("labels", {})]
        if missing and name(resource) not in release.extra:
            yield f"{name(resource)}: expected the labels {', '.join(missing)}"


@rule
def ports(release):
    """Ports of pods and Services have unique, legal names and numbers, and Services target ports of their pods."""
    for resource, _, spec in release.pods():
        found = [port for container in spec["containers"] for port in container.get("ports", [])]
        yield from named_ports(resource, found, "containerPort")
        for port in found:
            if "hostPort" in port:
                yield f"{name(resource)}: expected no hostPort"
    for service in release.of("Service"):
        yield from named_ports(service, service["spec"]["ports"], "port")
        for _, _, spec in release.selected({"matchLabels": service["spec"].get("selector")}):
            known = [value for port in container_ports(spec) for value in port]
            for port in service["spec"]["ports"]:
                if port.get("targetPort", port["port"]) not in known:
                    yield f"{name(service)}: expected a targetPort that the pods have, found {port.get('targetPort')}"


def named_ports(resource, found, number):
    for port in found:
        if not PORT_NAME.fullmatch(str(port.get("name"))):
            yield f"{name(resource)}: expected a port's name (15 of a-z, 0-9, -), found {port.get('name')!r}"
        if not 1 <= port[number] <= 65535:
            yield f"{name(resource)}: expected a port from 1 to 65535, found {port[number]}"
        if not 30000 <= port.get("nodePort", 30000) <= 32767:
            yield f"{name(resource)}: expected a nodePort from 30000 to 32767, found {port['nodePort']}"
    for key in ("name", number):
        values = [port.get(key) for port in found]
        if len(set(values)) < len(values):
            yield f"{name(resource)}: expected each port's {key} once, found {values}"


def container_ports(spec):
    return [(port.get("name"), port["containerPort"]) for container in spec["containers"] for port in container.get("ports", [])]


@rule
def probes(release):
    """Probes use a port of their container, and periods that the API server accepts."""
    least = {
        "periodSeconds": 1,
        "timeoutSeconds": 1,
        "failureThreshold": 1,
        "successThreshold": 1,
        "initialDelaySeconds": 0,
        "terminationGracePeriodSeconds": 1,
    }
    for resource, _, container in release.containers():
        own = [value for port in container.get("ports", []) for value in (port.get("name"), port["containerPort"])]
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container.get(kind)
            if probe is None:
                continue
            prefix = f"{name(resource)}: {container['name']}.{kind}"
            handler = probe.get("httpGet", {})
            if handler.get("port") not in own:
                yield f"{prefix}: expected a port of the container, found {handler.get('port')!r}"
            if not str(handler.get("path")).startswith("/"):
                yield f"{prefix}: expected a path, found {handler.get('path')!r}"
            for field, minimum in least.items():
                if probe.get(field, minimum) < minimum:
                    yield f"{prefix}: expected {field} of {minimum} or more, found {probe[field]}"
            if kind != "readinessProbe" and probe.get("successThreshold", 1) != 1:
                yield f"{prefix}: expected a successThreshold of 1"
            if kind == "readinessProbe" and "terminationGracePeriodSeconds" in probe:
                yield f"{prefix}: expected no terminationGracePeriodSeconds, because its failure does not stop the container"


@rule
def probed(release):
    """The daemon's container has a liveness and a readiness probe."""
    for deployment in release.of("Deployment"):
        container = deployment["spec"]["template"]["spec"]["containers"][0]
        for kind, path in (("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
            if container.get(kind, {}).get("httpGet", {}).get("path") != path:
                yield f"{name(deployment)}: expected a {kind} of {path}"


@rule
def mounted_secrets(release):
    """Every file that the configuration names is mounted from a whole volume, so that it is updated; others cannot read it."""
    for deployment in release.of("Deployment"):
        spec = deployment["spec"]["template"]["spec"]
        settings = settings_of(release, deployment)
        by_name = {volume["name"]: volume for volume in spec["volumes"]}
        for setting in ("tls-cert", "tls-key", "tls-client-ca", "tokens-file"):
            directory, _, file = settings.get(setting, "").rpartition("/")
            mounts = [mount for mount in spec["containers"][0]["volumeMounts"] if mount["mountPath"] == directory]
            if not file:
                continue
            if len(mounts) != 1:
                yield f"{name(deployment)}: {setting}: expected a mount at {directory}"
                continue
            if "subPath" in mounts[0]:
                yield f"{name(deployment)}: {setting}: expected a whole volume, because a subPath is never updated"
            volume = by_name.get(mounts[0]["name"], {})
            source = volume.get("secret") or volume.get("configMap") or {}
            if file not in [item["path"] for item in source.get("items", [])]:
                yield f"{name(deployment)}: {setting}: volume {mounts[0]['name']} has no file {file}"
            if source.get("defaultMode", 0o644) & 0o037:
                yield f"{name(deployment)}: {setting}: expected the mode 0440, found {source.get('defaultMode', 0o644):04o}"
            if not spec.get("securityContext", {}).get("fsGroup"):
                yield f"{name(deployment)}: {setting}: expected an fsGroup, through which the daemon reads it"


@rule
def transport(release):
    """Clients of the key port use TLS if the pods do. Clients without a required certificate or PROXY header use the metrics port."""
    for deployment in release.of("Deployment"):
        template = deployment["spec"]["template"]
        settings = settings_of(release, deployment)
        tls = "tls-cert" in settings
        restricted = "tls-client-ca" in settings or settings.get("proxy-protocol", False)
        if settings.get("proxy-protocol") and not settings.get("trusted-proxies"):
            yield f"{name(deployment)}: expected trusted-proxies, because only those may send PROXY headers"
        probes = [template["spec"]["containers"][0].get(kind) for kind in ("startupProbe", "livenessProbe", "readinessProbe")]
        for probe in [probe["httpGet"] for probe in probes if probe]:
            if probe["port"] != "metrics" or probe.get("scheme", "HTTP") != "HTTP":
                reason = "the key port can be flooded, and can require certificates or PROXY headers"
                yield f"{name(deployment)}: expected probes of the port metrics over plain HTTP, because {reason}"
        keys = services_to(release, "http")
        for service in keys:
            expected = None if settings.get("proxy-protocol") else "https" if tls else "http"
            if service["spec"]["ports"][0].get("appProtocol") != expected:
                yield f"{name(service)}: expected the appProtocol {expected}"
        for ingress in release.of("Ingress"):
            texts = {**ingress["metadata"].get("annotations", {}), **keys[0]["metadata"].get("annotations", {})}
            if any((texts.get(key) == value) != tls for key, value in BACKEND_ANNOTATIONS.items()):
                yield f"{name(ingress)}: expected the controllers' annotations for a backend with{'' if tls else 'out'} TLS, found {texts}"
        policies = release.of("BackendTLSPolicy")
        if len(policies) != (1 if tls and release.of("HTTPRoute") else 0):
            yield f"{name(deployment)}: expected a BackendTLSPolicy exactly if there are TLS and an HTTPRoute, found {len(policies)}"
        for resource in policies:
            targets = [(target["kind"], target["name"], target.get("sectionName")) for target in resource["spec"]["targetRefs"]]
            if targets != [("Service", service["metadata"]["name"], "http") for service in keys]:
                yield f"{name(resource)}: expected the Service for keys as the target, found {targets}"
            if ("caCertificateRefs" in resource["spec"]["validation"]) == ("wellKnownCACertificates" in resource["spec"]["validation"]):
                yield f"{name(resource)}: expected one of caCertificateRefs and wellKnownCACertificates"
        for pod in release.of("Pod"):
            url = str(pod["spec"]["containers"][0].get("args", [None])[-1])
            expected = "http://" if restricted or not tls else "https://"
            port = "metrics" if restricted else "http"
            if not url.startswith(expected):
                yield f"{name(pod)}: expected {expected}, found {url}"
            if url.rpartition(":")[2] != str(services_to(release, port)[0]["spec"]["ports"][0]["port"]):
                yield f"{name(pod)}: expected the Service for {port}, found {url}"
            for resource in release.of("NetworkPolicy"):
                for entry in resource["spec"]["ingress"]:
                    if (
                        [p["port"] for p in entry.get("ports", [])] == [port]
                        and entry.get("from")
                        and not any(
                            matches(peer["podSelector"], pod["metadata"]["labels"]) for peer in entry["from"] if peer.get("podSelector")
                        )
                    ):
                        yield f"{name(resource)}: expected to allow the pod of `helm test` to connect to {port}"


BACKEND_ANNOTATIONS = {
    "nginx.ingress.kubernetes.io/backend-protocol": "HTTPS",
    "haproxy-ingress.github.io/backend-protocol": "h1-ssl",
    "alb.ingress.kubernetes.io/backend-protocol": "HTTPS",
    "traefik.ingress.kubernetes.io/service.serversscheme": "https",
    "projectcontour.io/upstream-protocol.tls": "http",
    "cloud.google.com/app-protocols": '{"http":"HTTPS"}',
}


@rule
def certificates(release):
    """cert-manager writes the Secret that the pods mount, for the names of the Service for keys."""
    for certificate in release.of("Certificate"):
        mounted = [
            volume["secret"]["secretName"] for _, _, spec in release.pods() for volume in spec.get("volumes", []) if "secret" in volume
        ]
        if certificate["spec"]["secretName"] not in mounted:
            yield f"{name(certificate)}: expected the Secret that the pods mount, found {certificate['spec']['secretName']}"
        service = services_to(release, "http")[0]["metadata"]["name"]
        names = [
            f"{service}{end}"
            for end in ("", f".{release.namespace}", f".{release.namespace}.svc", f".{release.namespace}.svc.cluster.local")
        ]
        if not set(names) <= set(certificate["spec"]["dnsNames"]):
            yield f"{name(certificate)}: expected the names {names}, found {certificate['spec']['dnsNames']}"


@rule
def mount_points(release):
    """No mount is below a read-only mount, where the container runtime cannot create the mount point."""
    for resource, _, container in release.containers():
        mounts = container.get("volumeMounts", [])
        for outer in mounts:
            for inner in mounts:
                if outer.get("readOnly") and inner["mountPath"].startswith(f"{outer['mountPath'].rstrip('/')}/"):
                    yield f"{name(resource)}: {container['name']}: {inner['mountPath']} is below {outer['mountPath']}, which is read-only"


@rule
def volumes(release):
    """Every mount has a volume and a unique path; every volume is mounted, and its source exists."""
    maps = {resource["metadata"]["name"] for resource in release.of("ConfigMap")}
    for resource, _, spec in release.pods():
        known = {volume["name"]: volume for volume in spec.get("volumes", [])}
        mounted = set()
        for container in spec.get("initContainers", []) + spec["containers"]:
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
            if len(set(paths)) < len(paths):
                yield f"{name(resource)}: {container['name']}: expected unique mountPaths, found {paths}"
            for mount in container.get("volumeMounts", []):
                mounted.add(mount["name"])
                if mount["name"] not in known:
                    yield f"{name(resource)}: {container['name']}: there is no volume {mount['name']}"
                if not mount["mountPath"].startswith("/") or ":" in mount["mountPath"]:
                    yield f"{name(resource)}: {container['name']}: expected an absolute mountPath, found {mount['mountPath']!r}"
        for volume in known.values():
            if volume["name"] not in mounted:
                yield f"{name(resource)}: volume {volume['name']} is not mounted"
            source = volume.get("configMap") if volume["name"] != "key-service-client-ca" else None  # the user's own ConfigMap
            if source and not source.get("optional") and source.get("name") not in maps:
                yield f"{name(resource)}: volume {volume['name']}: there is no ConfigMap {source.get('name')}"


@rule
def variables(release):
    """Environment variables have legal, unique names, and one source each."""
    for resource, _, container in release.containers():
        found = [variable["name"] for variable in container.get("env", [])]
        for variable in container.get("env", []):
            if not VARIABLE.fullmatch(variable["name"]):
                yield f"{name(resource)}: {container['name']}: {variable['name']!r} is not a legal name of a variable"
            if "value" in variable and "valueFrom" in variable:
                yield f"{name(resource)}: {container['name']}: {variable['name']}: expected value or valueFrom, found both"
        if len(set(found)) < len(found):
            yield f"{name(resource)}: {container['name']}: expected unique variables, found {found}"


@rule
def resources(release):
    """Every container has legal requests and limits for CPU and memory, and no request exceeds its limit."""
    for resource, _, container in release.containers():
        found = container.get("resources", {})
        for what in ("cpu", "memory"):
            prefix = f"{name(resource)}: {container['name']}: {what}"
            amounts = {}
            for bound in ("requests", "limits"):
                text = found.get(bound, {}).get(what)
                amounts[bound] = quantity(text)
                if amounts[bound] is None:
                    yield f"{prefix}: expected a quantity in {bound}, found {text!r}"
            if None not in amounts.values() and amounts["requests"] > amounts["limits"]:
                yield f"{prefix}: expected a request of at most the limit"


@rule
def further_limits(release):
    """No request for a resource other than CPU and memory exceeds its limit."""
    for resource, _, container in release.containers():
        found = container.get("resources", {})
        for what, text in found.get("requests", {}).items():
            limit = quantity(found.get("limits", {}).get(what))
            if what not in ("cpu", "memory") and limit is not None and quantity(text) > limit:
                yield f"{name(resource)}: {container['name']}: {what}: expected a request of at most the limit"


@rule
def rollout(release):
    """A rolling update has legal bounds and can start."""
    for deployment in release.of("Deployment"):
        bounds = deployment["spec"].get("strategy", {}).get("rollingUpdate", {})
        for field in ("maxSurge", "maxUnavailable"):
            if not is_pod_count(bounds.get(field)):
                yield f"{name(deployment)}: expected a number or a percentage as {field}, found {bounds.get(field)!r}"
        if is_zero(bounds.get("maxSurge")) and is_zero(bounds.get("maxUnavailable")):
            yield f"{name(deployment)}: expected maxSurge or maxUnavailable above 0"


@rule
def disruption(release):
    """A disruption budget has exactly one bound."""
    for budget in release.of("PodDisruptionBudget"):
        found = {field: budget["spec"][field] for field in ("minAvailable", "maxUnavailable") if field in budget["spec"]}
        if len(found) != 1:
            yield f"{name(budget)}: expected minAvailable or maxUnavailable, found {found}"
        for field, value in found.items():
            if not is_pod_count(value):
                yield f"{name(budget)}: expected a number or a percentage as {field}, found {value!r}"


@rule
def evictions(release):
    """A disruption budget allows at least one eviction, even with the minimum number of pods; percentages are rounded up."""
    for budget in release.of("PodDisruptionBudget"):
        counts = [scaler["spec"].get("minReplicas", 1) for scaler in release.of("HorizontalPodAutoscaler")]
        counts = counts or [deployment["spec"].get("replicas", 1) for deployment in release.of("Deployment")]
        for pods in counts:
            try:
                evicted = rounded(budget["spec"].get("maxUnavailable", 1), pods)
                remaining = rounded(budget["spec"].get("minAvailable", pods - evicted), pods)
            except ValueError:
                continue  # found by the rule `disruption`
            if remaining >= pods > 0:
                yield f"{name(budget)}: expected to allow the eviction of one of {pods} pods"


def rounded(value, pods):
    return -(-int(value[:-1]) * pods // 100) if isinstance(value, str) else value


@rule
def spreads(release):
    """Topology spread constraints have unique pairs of topologyKey and whenUnsatisfiable."""
    for resource, _, spec in release.pods():
        found = [(c["topologyKey"], c["whenUnsatisfiable"]) for c in spec.get("topologySpreadConstraints", [])]
        if len(set(found)) < len(found):
            yield f"{name(resource)}: topologySpreadConstraints: expected unique pairs of topologyKey and whenUnsatisfiable, found {found}"


@rule
def networks(release):
    """Networks are in CIDR notation, and contain their exceptions."""

    def network(text):
        try:
            return ipaddress.ip_network(text, strict=False)
        except ValueError:
            return None

    for service in release.of("Service"):
        for text in service["spec"].get("loadBalancerSourceRanges", []):
            if network(text) is None:
                yield f"{name(service)}: expected a network, found {text}"
    for resource in release.of("NetworkPolicy"):
        for entry in resource["spec"].get("ingress", []) + resource["spec"].get("egress", []):
            for block in [peer["ipBlock"] for peer in entry.get("from", []) + entry.get("to", []) if "ipBlock" in peer]:
                outer = network(block["cidr"])
                for text in [block["cidr"], *block.get("except", [])]:
                    inner = network(text)
                    if inner is None:
                        yield f"{name(resource)}: expected a network, found {text}"
                    elif text != block["cidr"] and (
                        outer is None or outer.version != inner.version or not inner.subnet_of(outer) or inner == outer
                    ):
                        yield f"{name(resource)}: expected an exception within {block['cidr']}, found {text}"


@rule
def autoscaler(release):
    """An autoscaler has valid bounds, metrics and an existing target, and the target does not set the number of replicas."""
    for scaler in release.of("HorizontalPodAutoscaler"):
        spec = scaler["spec"]
        if not 1 <= spec.get("minReplicas", 1) <= spec["maxReplicas"]:
            yield f"{name(scaler)}: expected 1 <= minReplicas <= maxReplicas, found {spec.get('minReplicas')} and {spec['maxReplicas']}"
        if not spec.get("metrics"):
            yield f"{name(scaler)}: expected a metric"
        targets = [d for d in release.of("Deployment") if d["metadata"]["name"] == spec["scaleTargetRef"]["name"]]
        if len(targets) != 1 or (spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["apiVersion"]) != ("Deployment", "apps/v1"):
            yield f"{name(scaler)}: there is no {spec['scaleTargetRef']}"
        for target in targets:
            if "replicas" in target["spec"]:
                yield f"{name(target)}: expected no replicas together with an autoscaler"
            for metric in spec.get("metrics", []):
                wanted = metric.get("resource", {})
                if wanted.get("target", {}).get("averageUtilization", 1) < 1:
                    yield f"{name(scaler)}: expected a utilization above 0"
                for container in target["spec"]["template"]["spec"]["containers"]:
                    if wanted and wanted["name"] not in container.get("resources", {}).get("requests", {}):
                        yield f"{name(scaler)}: {container['name']}: expected a request for {wanted['name']} to measure utilization"


@rule
def selectors(release):
    """Every selector selects the pods of the Deployment, and not the pod of `helm test`."""
    for deployment in release.of("Deployment"):
        if not matches(deployment["spec"]["selector"], deployment["spec"]["template"]["metadata"].get("labels", {})):
            yield f"{name(deployment)}: its selector does not match its pods"
        for constraint in deployment["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
            if not constraint.get("labelSelector") or deployment not in [pod[0] for pod in release.selected(constraint["labelSelector"])]:
                yield f"{name(deployment)}: the spread over {constraint['topologyKey']} does not select its pods"
    selecting = [(service, {"matchLabels": service["spec"].get("selector")}) for service in release.of("Service")]
    selecting += [(budget, budget["spec"].get("selector")) for budget in release.of("PodDisruptionBudget")]
    selecting += [(policy, policy["spec"].get("podSelector")) for policy in release.of("NetworkPolicy")]
    for resource, selector in selecting:
        kinds = [pod[0]["kind"] for pod in release.selected(selector)] if selector and selector.get("matchLabels") else None
        if kinds != ["Deployment"]:
            yield f"{name(resource)}: expected to select the pods of the Deployment, found {kinds}"


@rule
def monitors(release):
    """A ServiceMonitor selects one Service and an existing port of it, and sets the job that the rules select."""
    for monitor in release.of("ServiceMonitor"):
        found = [s for s in release.of("Service") if matches(monitor["spec"]["selector"], s["metadata"].get("labels", {}))]
        if len(found) != 1 or not monitor["spec"]["selector"].get("matchLabels"):
            yield f"{name(monitor)}: expected to select one Service, found {[name(service) for service in found]}"
        if monitor["spec"].get("namespaceSelector", {}).get("matchNames") != [release.namespace]:
            yield f"{name(monitor)}: expected the namespace {release.namespace}"
        for service in found:
            for endpoint in monitor["spec"]["endpoints"]:
                if {"targetLabel": "job", "replacement": "key-service"} not in endpoint.get("relabelings", []):
                    yield f"{name(monitor)}: expected the job key-service"
                if endpoint.get("honorLabels") is not True:
                    yield f"{name(monitor)}: expected honorLabels, so that the daemon's label endpoint overrides the operator's"
                if endpoint["port"] not in [port["name"] for port in service["spec"]["ports"]]:
                    yield f"{name(monitor)}: {name(service)} has no port {endpoint['port']}"


@rule
def prometheus_rules(release):
    """Prometheus accepts the rules (checked by promtool), and groups have unique names."""
    for resource in release.of("PrometheusRule"):
        groups = [group["name"] for group in resource["spec"]["groups"]]
        if len(set(groups)) < len(groups):
            yield f"{name(resource)}: expected unique groups, found {groups}"
        error = promtool(json.dumps(resource["spec"]))
        if error:
            yield f"{name(resource)}: {error}"


@functools.cache
def promtool(rules):
    """promtool's error for rules that it rejects; 0 if it accepts them."""
    ran = subprocess.run(["promtool", "check", "rules", "/dev/stdin"], input=rules, text=True, capture_output=True)
    return ran.returncode and (ran.stdout + ran.stderr).strip()


@rule
def backends(release):
    """The backends of Ingress and HTTPRoute are existing ports of Services; paths and host names are legal."""

    def has(service_name, key, value):
        return any(
            port.get(key) == value
            for service in release.of("Service")
            if service["metadata"]["name"] == service_name
            for port in service["spec"]["ports"]
        )

    for ingress in release.of("Ingress"):
        for entry in ingress["spec"]["rules"]:
            for path in entry["http"]["paths"]:
                service = path["backend"]["service"]
                if not has(service["name"], "name", service["port"].get("name")):
                    yield f"{name(ingress)}: there is no Service {service}"
                if not path["path"].startswith("/"):
                    yield f"{name(ingress)}: expected a path, found {path['path']!r}"
            if not SUBDOMAIN.fullmatch(entry["host"].removeprefix("*.")):
                yield f"{name(ingress)}: expected a host name, found {entry['host']!r}"
    for route in release.of("HTTPRoute"):
        for entry in route["spec"]["rules"]:
            for backend in entry["backendRefs"]:
                if not has(backend["name"], "port", backend["port"]):
                    yield f"{name(route)}: there is no Service {backend}"


@rule
def policy(release):
    """A network policy restricts ingress and egress, and allows ingress only to the named ports of the pods."""
    for resource in release.of("NetworkPolicy"):
        if sorted(resource["spec"].get("policyTypes", [])) != ["Egress", "Ingress"]:
            yield f"{name(resource)}: expected the policy types Ingress and Egress"
        known = {port for _, _, spec in release.selected(resource["spec"]["podSelector"]) for port, _ in container_ports(spec)}
        allowed = {port["port"] for entry in resource["spec"].get("ingress", []) for port in entry.get("ports", [{"port": None}])}
        if not allowed <= known or not {"http", "metrics"} <= allowed:
            yield f"{name(resource)}: expected to allow ingress to http and metrics of {sorted(known)}, found {allowed}"
        if any(not entry.get("ports") for entry in resource["spec"].get("egress", [])):
            yield f"{name(resource)}: expected egress to named ports only"


@rule
def configuration(release):
    """The mounted file is TOML; its ports and drain times match the pod; changing it replaces the pods."""
    for deployment in release.of("Deployment"):
        template = deployment["spec"]["template"]
        found = configuration_maps(release, deployment)
        if len(found) != 1:
            yield f"{name(deployment)}: expected one ConfigMap with the daemon's configuration file"
            continue
        try:
            settings = tomllib.loads(found[0]["data"]["config.toml"])
        except (tomllib.TOMLDecodeError, KeyError) as error:
            yield f"{name(found[0])}: config.toml: {error}"
            continue
        by_name = dict(container_ports(template["spec"]))
        for setting, port in (("srv-port", "http"), ("metrics-port", "metrics")):
            if settings.get(setting) != by_name.get(port):
                yield f"{name(deployment)}: expected {setting} to be the port {port}, found {settings.get(setting)} and {by_name.get(port)}"
        drain = settings.get("drain-delay", 0) + settings.get("drain-timeout", 20)
        if template["spec"].get("terminationGracePeriodSeconds", 30) <= drain:
            yield f"{name(deployment)}: expected a terminationGracePeriodSeconds above {drain}"
        if not re.fullmatch("[0-9a-f]{64}", template["metadata"].get("annotations", {}).get("checksum/config", "")):
            yield f"{name(deployment)}: expected the annotation checksum/config"


@rule
def accounts(release):
    """Pods run as a service account that exists, without a token."""
    made = {resource["metadata"]["name"]: resource for resource in release.of("ServiceAccount")}
    for resource, _, spec in release.pods():
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{name(resource)}: expected automountServiceAccountToken: false"
        if spec.get("serviceAccountName") not in {**made, "default": None}:
            yield f"{name(resource)}: there is no service account {spec.get('serviceAccountName')}"
        if spec.get("enableServiceLinks") is not False:
            yield f"{name(resource)}: expected enableServiceLinks: false"
    for account in made.values():
        if account.get("automountServiceAccountToken") is not False:
            yield f"{name(account)}: expected automountServiceAccountToken: false"


@rule
def restricted(release):
    """Pods meet the Pod Security Standard `restricted` and have a read-only root file system."""
    for resource, _, spec in release.pods():
        prefix = name(resource)
        pod = spec.get("securityContext", {})
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(field):
                yield f"{prefix}: expected no {field}"
        if pod.get("sysctls"):
            yield f"{prefix}: expected no sysctls"
        for volume in spec.get("volumes", []):
            kinds = set(volume) - {"name"}
            if not kinds <= RESTRICTED_VOLUMES:
                yield f"{prefix}: expected no volume of type {kinds}"
        for container in spec.get("initContainers", []) + spec.get("ephemeralContainers", []) + spec["containers"]:
            own = container.get("securityContext", {})
            prefix = f"{name(resource)}: {container['name']}"
            either = {**pod, **own}
            if either.get("runAsNonRoot") is not True:
                yield f"{prefix}: expected runAsNonRoot: true"
            if not either.get("runAsUser"):
                yield f"{prefix}: expected a runAsUser that is not root"
            if either.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
                yield f"{prefix}: expected the seccomp profile RuntimeDefault or Localhost"
            if own.get("allowPrivilegeEscalation") is not False:
                yield f"{prefix}: expected allowPrivilegeEscalation: false"
            if own.get("privileged"):
                yield f"{prefix}: expected no privileged container"
            if own.get("capabilities", {}).get("drop") != ["ALL"] or set(own["capabilities"].get("add", [])) - {"NET_BIND_SERVICE"}:
                yield f"{prefix}: expected to drop ALL capabilities and to add none but NET_BIND_SERVICE"
            if own.get("procMount", "Default") != "Default":
                yield f"{prefix}: expected the default procMount"
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{prefix}: expected a read-only root file system"
            for context in (pod, own):
                if context.get("seLinuxOptions", {}).get("type", "") not in (
                    "",
                    "container_t",
                    "container_init_t",
                    "container_kvm_t",
                    "container_engine_t",
                ) or {"user", "role"} & set(context.get("seLinuxOptions", {})):
                    yield f"{prefix}: expected no SELinux options"
                if context.get("appArmorProfile", {}).get("type", "RuntimeDefault") == "Unconfined":
                    yield f"{prefix}: expected an AppArmor profile other than Unconfined"
                if context.get("windowsOptions", {}).get("hostProcess"):
                    yield f"{prefix}: expected no host process"


@rule
def images(release):
    """Images are pinned: by a digest or a tag that is not `latest`."""
    for resource, _, container in release.containers():
        image = container["image"]
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@sha256:" not in image and tag in ("", "latest"):
            yield f"{name(resource)}: {container['name']}: expected a digest or a tag, found {image}"


@rule
def services(release):
    """A Service has only fields that its type allows."""
    for service in release.of("Service"):
        spec = service["spec"]
        kind = spec.get("type", "ClusterIP")
        misplaced = [field for field in ("loadBalancerClass", "loadBalancerSourceRanges") if field in spec and kind != "LoadBalancer"]
        misplaced += [field for field in ("externalTrafficPolicy",) if field in spec and kind == "ClusterIP"]
        misplaced += [field for field in ("clusterIP",) if spec.get(field) == "None" and kind != "ClusterIP"]
        misplaced += ["nodePort" for port in spec["ports"] if "nodePort" in port and kind == "ClusterIP"]
        if misplaced:
            yield f"{name(service)}: expected no {', '.join(misplaced)} with type {kind}"


@rule
def families(release):
    """IP families fit the policy of a Service; a headless Service has the port of the pods; no deprecated value is used."""
    for service in release.of("Service"):
        spec = service["spec"]
        if spec.get("ipFamilyPolicy") == "SingleStack" and len(spec.get("ipFamilies", [])) > 1:
            yield f"{name(service)}: expected one family, found {spec['ipFamilies']}"
        for _, _, pod in release.selected({"matchLabels": spec.get("selector")}) if spec.get("clusterIP") == "None" else []:
            for port in spec["ports"]:
                if port["port"] != dict(container_ports(pod)).get(port.get("targetPort"), port.get("targetPort")):
                    yield f"{name(service)}: port {port['port']} reaches no pod, because a headless Service does not translate ports"
        if spec.get("trafficDistribution") == "PreferClose":
            yield f"{name(service)}: PreferClose is deprecated"


@rule
def sizes(release):
    """A ConfigMap is smaller than 1 MiB, and its JSON files are valid."""
    for resource in release.of("ConfigMap"):
        if sum(len(text.encode()) for text in resource.get("data", {}).values()) >= 1 << 20:
            yield f"{name(resource)}: expected less than 1 MiB"
        for file, text in resource.get("data", {}).items():
            if file.endswith(".json"):
                try:
                    json.loads(text)
                except ValueError as error:
                    yield f"{name(resource)}: {file}: {error}"


@rule
def hooks(release):
    """Helm deletes hooks after they succeed or fail, because `helm uninstall` does not delete hooks."""
    for resource in release:
        annotations = resource["metadata"].get("annotations", {})
        policies = set(annotations.get("helm.sh/hook-delete-policy", "").split(","))
        if "helm.sh/hook" in annotations and policies != {"before-hook-creation", "hook-succeeded", "hook-failed"}:
            yield f"{name(resource)}: expected to be deleted before every test and after success or failure, found {policies}"


@rule
def tests(release):
    """`helm test` has one pod, which runs once, with the release's own image."""
    own = {c["image"] for d in release.of("Deployment") for c in d["spec"]["template"]["spec"]["containers"][:1]}
    pods = release.of("Pod")
    if len(pods) != 1:
        yield f"expected one pod of `helm test`, found {len(pods)}"
    for pod in pods:
        if pod["metadata"].get("annotations", {}).get("helm.sh/hook") != "test" or pod["spec"].get("restartPolicy") != "Never":
            yield f"{name(pod)}: expected the hook `test` and restartPolicy: Never"
        for container in pod["spec"]["containers"]:
            command, flag, url = (container.get("args", []) + [None] * 3)[:3]
            host, _, port = str(url).rpartition("/")[2].partition(":")
            known = [
                s for s in release.of("Service") if s["metadata"]["name"] == host and port in [str(p["port"]) for p in s["spec"]["ports"]]
            ]
            if container["image"] not in own or (command, flag) != ("health", "--url") or not known:
                found = f"{container['image']} {container.get('args')}"
                yield f"{name(pod)}: expected to check a Service of the release with the release's own image, found {found}"

"""Broken releases. Each is a sound one with a single change, and must be found by the rule that it is listed under.

kube.assertions() lists the lines that can report something; the runner counts those that no mutant has reached.
"""

MUTANTS = []


def mutant(rule, what):
    def keep(change):
        MUTANTS.append((rule, what, change))
        return change

    return keep


def the(release, kind, end=""):
    return next(r for r in release if r["kind"] == kind and r["metadata"]["name"].endswith(end))


def change(rule, what, kind, *path, to=None, end="", drop=False):
    """A mutant that sets (or drops) one field."""

    def apply(release):
        place = the(release, kind, end)
        for step in path[:-1]:
            place = place.setdefault(step, {}) if isinstance(place, dict) else place[step]
        if drop:
            del place[path[-1]]
        elif isinstance(place, list) and path[-1] == "+":
            place.append(to)
        else:
            place[path[-1]] = to

    MUTANTS.append((rule, what, apply))


TEMPLATE = ("spec", "template", "spec")
DAEMON = (*TEMPLATE, "containers", 0)
HPA, PDB = "HorizontalPodAutoscaler", "PodDisruptionBudget"

change("schema", "an unknown field", "Deployment", *DAEMON, "imagePullPolice", to="Always")
change("schema", "a count that is text", "Deployment", "spec", "revisionHistoryLimit", to="three")
change("schema", "a required field is missing", "Deployment", "spec", "selector", drop=True)
change("choices", "a policy that there isn't", PDB, "spec", "unhealthyPodEvictionPolicy", to="Always")
change("choices", "a protocol in lower case", "Service", "spec", "ports", 0, "protocol", to="tcp")
change("choices", "a policy's type that there isn't", "NetworkPolicy", "spec", "policyTypes", to=["Ingress", "egress"])
change("kinds", "a kind that nobody looks at", "ConfigMap", "kind", to="Secret", end="-object")

change("custom_models", "a time that is none", "ServiceMonitor", "spec", "endpoints", 0, "interval", to="often")
change("custom_models", "no selector", "ServiceMonitor", "spec", "selector", drop=True)
change("custom_models", "a path's type that there isn't", "HTTPRoute", "spec", "rules", 0, "matches", 0, "path", "type", to="Prefix")
change("custom_models", "a group without a name", "PrometheusRule", "spec", "groups", 0, "name", drop=True)
change("custom_fields", "a ServiceMonitor's typo", "ServiceMonitor", "spec", "endpoints", 0, "scrapeTimout", to="5s")
change("custom_fields", "an HTTPRoute's typo", "HTTPRoute", "spec", "hostname", to="keys.example.org")
change("custom_fields", "a rule's typo", "PrometheusRule", "spec", "groups", 0, "rules", 0, "label", to={})

change("names", "an upper-case name", "ConfigMap", "metadata", "name", to="Keys", end="-object")
change("names", "a Service's name that begins with a digit", "Service", "metadata", "name", to="1key", end="-metrics")
change("names", "a container's name with an underscore", "Deployment", *DAEMON, "name", to="key_service")
change("names", "two volumes of a name", "Deployment", *TEMPLATE, "volumes", "+", to={"name": "config", "emptyDir": {}})


@mutant("names", "a resource twice")
def _(release):
    release.append(the(release, "Service"))


change("namespaces", "another namespace", "Service", "metadata", "namespace", to="default")
change("labels", "a label's value with a blank", "Deployment", "metadata", "labels", "team", to="key service")
change("labels", "a label's value that is a number", "Deployment", "spec", "template", "metadata", "labels", "team", to=1)
change("labels", "a label's name with two slashes", "Deployment", "metadata", "labels", "a/b/c", to="x")
change("labels", "an annotation's name with a blank", "Deployment", "metadata", "annotations", "a b", to="x")
change("labels", "an annotation that is a boolean", "Ingress", "metadata", "annotations", "example.org/x", to=True)
change("recommended_labels", "no component", "Ingress", "metadata", "labels", "app.kubernetes.io/component", drop=True)

change("ports", "a port's name in upper case", "Deployment", *DAEMON, "ports", 0, "name", to="HTTP")
change("ports", "a port's name of 16 characters", "Deployment", *DAEMON, "ports", 0, "name", to="http-of-the-keys")
change("ports", "two ports of a name", "Deployment", *DAEMON, "ports", 1, "name", to="http")
change(
    "ports", "two ports of a number", "Service", "spec", "ports", "+", to={"name": "other", "port": 80, "targetPort": "http"}, end="keys"
)
change("ports", "port 70000", "Deployment", *DAEMON, "ports", 0, "containerPort", to=70000)
change("ports", "nodePort 80", "Service", "spec", "ports", 0, "nodePort", to=80, end="keys")
change("ports", "a port of the host", "Deployment", *DAEMON, "ports", 0, "hostPort", to=1123)
change("ports", "a targetPort that the pods don't have", "Service", "spec", "ports", 0, "targetPort", to="https", end="keys")

change("probes", "a probe of a missing port", "Deployment", *DAEMON, "livenessProbe", "httpGet", "port", to="https")
change("probes", "a probe of another container's port", "Deployment", *DAEMON, "livenessProbe", "httpGet", "port", to="proxy")
change("probes", "a probe without a path", "Deployment", *DAEMON, "livenessProbe", "httpGet", "path", to="livez")
change("probes", "a negative period", "Deployment", *DAEMON, "readinessProbe", "periodSeconds", to=-1)
change("probes", "a negative delay", "Deployment", *DAEMON, "readinessProbe", "initialDelaySeconds", to=-1)
change("probes", "no time at all", "Deployment", *DAEMON, "livenessProbe", "timeoutSeconds", to=0)
change("probes", "liveness by two successes", "Deployment", *DAEMON, "livenessProbe", "successThreshold", to=2)
change("probes", "a grace period of readiness", "Deployment", *DAEMON, "readinessProbe", "terminationGracePeriodSeconds", to=5)
change("probed", "readiness by /livez", "Deployment", *DAEMON, "readinessProbe", "httpGet", "path", to="/livez")
change("probed", "liveness by /readyz", "Deployment", *DAEMON, "livenessProbe", "httpGet", "path", to="/readyz")
change("probed", "no liveness probe", "Deployment", *DAEMON, "livenessProbe", drop=True)

SECRETS = (*TEMPLATE, "volumes", 1)
change("mounted_secrets", "a certificate that is mounted elsewhere", "Deployment", *DAEMON, "volumeMounts", 1, "mountPath", to="/run/tls")
change("mounted_secrets", "a Secret's default mode", "Deployment", *SECRETS, "secret", "defaultMode", drop=True)
change("mounted_secrets", "a key that others may read", "Deployment", *SECRETS, "secret", "defaultMode", to=0o444)
change("mounted_secrets", "a single file of the volume", "Deployment", *DAEMON, "volumeMounts", 1, "subPath", to="tls.crt")
change("mounted_secrets", "a file of another name", "Deployment", *SECRETS, "secret", "items", 0, "path", to="cert.pem")
change("mounted_secrets", "no fsGroup", "Deployment", *TEMPLATE, "securityContext", "fsGroup", drop=True)
change("transport", "liveness by the key port", "Deployment", *DAEMON, "livenessProbe", "httpGet", "port", to="http")
change("transport", "readiness by the key port", "Deployment", *DAEMON, "readinessProbe", "httpGet", "port", to="http")
change("transport", "HTTPS probes of the metrics port", "Deployment", *DAEMON, "readinessProbe", "httpGet", "scheme", to="HTTPS")
change("transport", "a Service that says http", "Service", "spec", "ports", 0, "appProtocol", to="http", end="keys")
change(
    "transport",
    "an Ingress that speaks plain HTTP",
    "Ingress",
    "metadata",
    "annotations",
    "nginx.ingress.kubernetes.io/backend-protocol",
    to="HTTP",
)
change(
    "transport",
    "a Service that Traefik speaks plain HTTP to",
    "Service",
    "metadata",
    "annotations",
    "traefik.ingress.kubernetes.io/service.serversscheme",
    drop=True,
    end="keys",
)
change("transport", "a Gateway's policy for another Service", "BackendTLSPolicy", "spec", "targetRefs", 0, "name", to="other")
change("transport", "a Gateway's policy without CAs", "BackendTLSPolicy", "spec", "validation", "caCertificateRefs", drop=True)
change("transport", "a test over plain HTTP", "Pod", "spec", "containers", 0, "args", 2, to="http://keys:80")
change("transport", "a test of the wrong Service", "Pod", "spec", "containers", 0, "args", 2, to="https://keys-metrics:9100")
change(
    "transport",
    "a policy that keeps the test out",
    "NetworkPolicy",
    "spec",
    "ingress",
    0,
    "from",
    1,
    "podSelector",
    "matchLabels",
    "app.kubernetes.io/component",
    to="x",
)
change("certificates", "a Secret that nobody mounts", "Certificate", "spec", "secretName", to="other")
change("certificates", "a certificate without the Service's name", "Certificate", "spec", "dnsNames", 2, to="other")


@mutant("transport", "no policy for the Gateway")
def _(release):
    release.remove(the(release, "BackendTLSPolicy"))


def with_setting(line):
    """Adds a line to the daemon's file."""

    def apply(release):
        the(release, "ConfigMap", "keys")["data"]["config.toml"] += line

    return apply


MUTANTS.append(("transport", "probes without a certificate", with_setting('\ntls-client-ca = "/run/key-service/tls/tls.crt"\n')))


@mutant("transport", "PROXY headers of nobody")
def _(release):
    data = the(release, "ConfigMap", "keys")["data"]
    data["config.toml"] = data["config.toml"].replace("proxy-protocol = false", "proxy-protocol = true")


change("volumes", "a mount without its volume", "Deployment", *DAEMON, "volumeMounts", "+", to={"name": "gone", "mountPath": "/gone"})
change(
    "volumes", "two mounts at a place", "Deployment", *DAEMON, "volumeMounts", "+", to={"name": "shared", "mountPath": "/etc/key-service"}
)
change("volumes", "a mount at a relative path", "Deployment", *DAEMON, "volumeMounts", 0, "mountPath", to="etc")
change("volumes", "a volume that is mounted nowhere", "Deployment", *TEMPLATE, "volumes", "+", to={"name": "idle", "emptyDir": {}})
change("volumes", "a ConfigMap that isn't there", "Deployment", *TEMPLATE, "volumes", 0, "configMap", "name", to="gone")
change(
    "mount_points",
    "a file below the configuration",
    "Deployment",
    *DAEMON,
    "volumeMounts",
    "+",
    to={"name": "shared", "mountPath": "/etc/key-service/tokens", "subPath": "a"},
)
change("variables", "a variable's name with a blank", "Deployment", *DAEMON, "env", 0, "name", to="NODE NAME")
change("variables", "a variable twice", "Deployment", *DAEMON, "env", "+", to={"name": "NODE_NAME", "value": "x"})
change("variables", "a variable of two sources", "Deployment", *DAEMON, "env", 1, "value", to="x")

change("resources", "a quantity that is none", "Deployment", *DAEMON, "resources", "limits", "memory", to="256MB")
change("resources", "a request above its limit", "Deployment", *DAEMON, "resources", "requests", "memory", to="1Gi")
change("resources", "a CPU request above its limit", "Deployment", *DAEMON, "resources", "requests", "cpu", to="2001m")
change("resources", "no limit", "Pod", "spec", "containers", 0, "resources", "limits", drop=True)
change(
    "further_limits",
    "a request of storage above its limit",
    "Deployment",
    *DAEMON,
    "resources",
    to={"requests": {"ephemeral-storage": "1Gi"}, "limits": {"ephemeral-storage": "1G"}},
)
change("rollout", "both bounds are 0", "Deployment", "spec", "strategy", "rollingUpdate", to={"maxSurge": 0, "maxUnavailable": "0%"})
change("rollout", "a bound that is no number", "Deployment", "spec", "strategy", "rollingUpdate", "maxSurge", to="some")
change("disruption", "both bounds", PDB, "spec", "maxUnavailable", to=1)
change("disruption", "no bound", PDB, "spec", "minAvailable", drop=True)
change("disruption", "a bound that is no number", PDB, "spec", "minAvailable", to="half")

change("evictions", "as many as there are", PDB, "spec", "minAvailable", to=3)
change("evictions", "a percentage that is rounded up to all", PDB, "spec", "minAvailable", to="67%")
change("evictions", "nobody may go", PDB, "spec", to={"maxUnavailable": "0%"})
change("spreads", "a topology twice", "Deployment", *TEMPLATE, "topologySpreadConstraints", 1, "topologyKey", to="kubernetes.io/hostname")
PEERS = ("spec", "ingress", 0, "from", "+")
change("networks", "a network of no length", "NetworkPolicy", *PEERS, to={"ipBlock": {"cidr": "192.0.2.256/24"}})
change(
    "networks",
    "an exception outside of its network",
    "NetworkPolicy",
    *PEERS,
    to={"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}},
)
change("networks", "an exception of all", "NetworkPolicy", *PEERS, to={"ipBlock": {"cidr": "2001:db8::/32", "except": ["2001:db8:0::/32"]}})
change("networks", "a balancer's network that is none", "Service", "spec", "loadBalancerSourceRanges", to=["192.0.2.0/33"], end="keys")

change("autoscaler", "min above max", HPA, "spec", "minReplicas", to=31)
change("autoscaler", "min 0", HPA, "spec", "minReplicas", to=0)
change("autoscaler", "no metric", HPA, "spec", "metrics", to=[])
change("autoscaler", "a Deployment that isn't there", HPA, "spec", "scaleTargetRef", "name", to="gone")
change("autoscaler", "a target of another kind", HPA, "spec", "scaleTargetRef", "kind", to="StatefulSet")
change("autoscaler", "replicas beside it", "Deployment", "spec", "replicas", to=2)
change("autoscaler", "a utilization of 0", HPA, "spec", "metrics", 0, "resource", "target", "averageUtilization", to=0)
change("autoscaler", "utilization of what nobody requests", "Deployment", *DAEMON, "resources", "requests", "cpu", drop=True)

change("selectors", "a Deployment that does not select its pods", "Deployment", "spec", "selector", "matchLabels", "tier", to="x")
change(
    "selectors",
    "a spread over nothing",
    "Deployment",
    *TEMPLATE,
    "topologySpreadConstraints",
    0,
    "labelSelector",
    "matchLabels",
    "tier",
    to="x",
)
change("selectors", "a Service that selects nothing", "Service", "spec", "selector", "app.kubernetes.io/name", to="x", end="keys")
change(
    "selectors", "a Service that selects the test too", "Service", "spec", "selector", "app.kubernetes.io/component", drop=True, end="keys"
)
change("selectors", "a budget that selects everything", PDB, "spec", "selector", to={})
change("selectors", "a policy that selects nothing", "NetworkPolicy", "spec", "podSelector", "matchLabels", "tier", to="x")
change("monitors", "it selects nothing", "ServiceMonitor", "spec", "selector", "matchLabels", "tier", to="x")
change(
    "monitors", "it selects both Services", "ServiceMonitor", "spec", "selector", "matchLabels", "app.kubernetes.io/component", drop=True
)
change("monitors", "a port that isn't there", "ServiceMonitor", "spec", "endpoints", 0, "port", to="http")
change("monitors", "another job", "ServiceMonitor", "spec", "endpoints", 0, "relabelings", 0, "replacement", to="keys")
change("monitors", "the route's label loses", "ServiceMonitor", "spec", "endpoints", 0, "honorLabels", to=False)
change("monitors", "another namespace", "ServiceMonitor", "spec", "namespaceSelector", "matchNames", 0, to="default")
change("prometheus_rules", "an expression that does not parse", "PrometheusRule", "spec", "groups", 0, "rules", 0, "expr", to="rate(x[5m)")


@mutant("prometheus_rules", "a group twice")
def _(release):
    groups = the(release, "PrometheusRule")["spec"]["groups"]
    groups.append(groups[0])


INGRESS_PATH = ("spec", "rules", 0, "http", "paths", 0)
change("backends", "an Ingress to nowhere", "Ingress", *INGRESS_PATH, "backend", "service", "port", "name", to="https")
change("backends", "an Ingress of a relative path", "Ingress", *INGRESS_PATH, "path", to="key")
change("backends", "an Ingress of a host with a port", "Ingress", "spec", "rules", 0, "host", to="keys.example.org:80")
change("backends", "a route to nowhere", "HTTPRoute", "spec", "rules", 0, "backendRefs", 0, "port", to=1124)
change("policy", "egress is not governed", "NetworkPolicy", "spec", "policyTypes", to=["Ingress"])
change("policy", "a port that isn't there", "NetworkPolicy", "spec", "ingress", 0, "ports", 0, "port", to="https")
change("policy", "all ports", "NetworkPolicy", "spec", "ingress", 0, "ports", drop=True)
change("policy", "everything may go out", "NetworkPolicy", "spec", "egress", to=[{}])

change("configuration", "another ConfigMap is mounted", "Deployment", *TEMPLATE, "volumes", 0, "name", to="files")
change("configuration", "the file is no TOML", "ConfigMap", "data", "config.toml", to="port: 1123", end="keys")
change("configuration", "the daemon listens elsewhere", "Deployment", *DAEMON, "ports", 0, "containerPort", to=1124)
change("configuration", "it is killed while it drains", "Deployment", *TEMPLATE, "terminationGracePeriodSeconds", to=25)
change("configuration", "nothing rolls the pods", "Deployment", "spec", "template", "metadata", "annotations", "checksum/config", drop=True)
change("accounts", "a pod with a token", "Deployment", *TEMPLATE, "automountServiceAccountToken", to=True)
change("accounts", "an account with a token", "ServiceAccount", "automountServiceAccountToken", drop=True)
change("accounts", "an account that isn't there", "Pod", "spec", "serviceAccountName", to="gone")
change("accounts", "variables of every Service", "Deployment", *TEMPLATE, "enableServiceLinks", drop=True)

for field in ("hostNetwork", "hostPID", "hostIPC"):
    change("restricted", field, "Deployment", *TEMPLATE, field, to=True)
POD_CONTEXT, CONTEXT = (*TEMPLATE, "securityContext"), (*DAEMON, "securityContext")
change("restricted", "sysctls", "Deployment", *POD_CONTEXT, "sysctls", to=[{"name": "kernel.msgmax", "value": "1"}])
change("restricted", "a folder of the host", "Deployment", *TEMPLATE, "volumes", 0, to={"name": "config", "hostPath": {"path": "/"}})
change("restricted", "it may be root", "Deployment", *POD_CONTEXT, "runAsNonRoot", drop=True)
change("restricted", "it is root", "Deployment", *CONTEXT, "runAsUser", to=0)
change("restricted", "no seccomp profile", "Deployment", *POD_CONTEXT, "seccompProfile", "type", to="Unconfined")
change("restricted", "privileges may grow", "Pod", "spec", "containers", 0, "securityContext", "allowPrivilegeEscalation", drop=True)
change("restricted", "privileged", "Deployment", *CONTEXT, "privileged", to=True)
change("restricted", "capabilities are kept", "Deployment", *CONTEXT, "capabilities", "drop", to=["NET_RAW"])
change("restricted", "a capability is added", "Deployment", *CONTEXT, "capabilities", "add", to=["SYS_TIME"])
change("restricted", "an unmasked /proc", "Deployment", *CONTEXT, "procMount", to="Unmasked")
change(
    "restricted", "a root to write to", "Deployment", *TEMPLATE, "initContainers", 0, "securityContext", "readOnlyRootFilesystem", to=False
)
change("restricted", "SELinux options", "Deployment", *POD_CONTEXT, "seLinuxOptions", to={"type": "spc_t"})
change("restricted", "AppArmor is off", "Deployment", *CONTEXT, "appArmorProfile", to={"type": "Unconfined"})
change("restricted", "a host process", "Deployment", *POD_CONTEXT, "windowsOptions", to={"hostProcess": True})
change("images", "the latest image", "Deployment", *DAEMON, "image", to="registry.example.org:5000/key-service:latest")
change("images", "an image without a tag", "Deployment", *DAEMON, "image", to="registry.example.org:5000/key-service")
change("services", "a balancer's class without a balancer", "Service", "spec", "type", to="NodePort", end="keys")
change("services", "a node's port without nodes", "Service", "spec", "type", to="ClusterIP", end="keys")
change("services", "headless on every node", "Service", "spec", "clusterIP", to="None", end="keys")
change("families", "two families in a single stack", "Service", "spec", "ipFamilyPolicy", to="SingleStack", end="keys")
change("families", "a headless Service of another port", "Service", "spec", "clusterIP", to="None", end="keys")
change("families", "a deprecated word", "Service", "spec", "trafficDistribution", to="PreferClose", end="keys")
change("sizes", "a ConfigMap of 1 MiB", "ConfigMap", "data", "config.toml", to="#" * (1 << 20), end="keys")
change("sizes", "a dashboard that is no JSON", "ConfigMap", "data", "key-service.json", to="{", end="-dashboard")
change(
    "hooks",
    "a test pod that stays when it has failed",
    "Pod",
    "metadata",
    "annotations",
    "helm.sh/hook-delete-policy",
    to="before-hook-creation,hook-succeeded",
)
change("hooks", "a test pod that stays", "Pod", "metadata", "annotations", "helm.sh/hook-delete-policy", drop=True)
change("tests", "another command", "Pod", "spec", "containers", 0, "args", 0, to="--check")
change("tests", "another port", "Pod", "spec", "containers", 0, "args", 2, to="http://keys:1123")
change("tests", "another image", "Pod", "spec", "containers", 0, "image", to="busybox:1.36")
change("tests", "it is no hook", "Pod", "metadata", "annotations", "helm.sh/hook", drop=True)


@mutant("tests", "no pod")
def _(release):
    release.remove(the(release, "Pod"))

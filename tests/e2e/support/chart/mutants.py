"""Broken releases. Each is the baseline release with one change, which must be detected by the rule that it is listed under.

kube.assertions() lists the lines that can report a finding; test_every_assertion_has_a_mutant fails if no mutant reaches a line.
"""

MUTANTS = []


def mutant(rule, what):
    def keep(change):
        MUTANTS.append((rule, what, change))
        return change

    return keep


def the(release, kind, end=""):
    """The first resource of a kind whose name ends with `end`."""
    return next(r for r in release if r["kind"] == kind and r["metadata"]["name"].endswith(end))


def change(rule, what, kind, *path, to=None, end="", drop=False):
    """A mutant that sets (or drops) one field."""

    def apply(release):
        parent = the(release, kind, end)
        for step in path[:-1]:
            parent = parent.setdefault(step, {}) if isinstance(parent, dict) else parent[step]
        if drop:
            del parent[path[-1]]
        elif isinstance(parent, list) and path[-1] == "+":
            parent.append(to)
        else:
            parent[path[-1]] = to

    MUTANTS.append((rule, what, apply))


TEMPLATE = ("spec", "template", "spec")
DAEMON = (*TEMPLATE, "containers", 0)
HPA, PDB = "HorizontalPodAutoscaler", "PodDisruptionBudget"

change("schema", "an unknown field", "Deployment", *DAEMON, "imagePullPolice", to="Always")
change("schema", "a number that is text", "Deployment", "spec", "revisionHistoryLimit", to="three")
change("schema", "a required field is missing", "Deployment", "spec", "selector", drop=True)
change("choices", "an unknown policy", PDB, "spec", "unhealthyPodEvictionPolicy", to="Always")
change("choices", "a protocol in lower case", "Service", "spec", "ports", 0, "protocol", to="tcp")
change("choices", "an unknown policy type", "NetworkPolicy", "spec", "policyTypes", to=["Ingress", "egress"])
change("kinds", "a kind that is not checked", "ConfigMap", "kind", to="Secret", end="-object")

change("custom_models", "an invalid duration", "ServiceMonitor", "spec", "endpoints", 0, "interval", to="often")
change("custom_models", "no selector", "ServiceMonitor", "spec", "selector", drop=True)
change("custom_models", "an unknown path type", "HTTPRoute", "spec", "rules", 0, "matches", 0, "path", "type", to="Prefix")
change("custom_models", "a group without a name", "PrometheusRule", "spec", "groups", 0, "name", drop=True)
change("custom_fields", "a typo in a ServiceMonitor", "ServiceMonitor", "spec", "endpoints", 0, "scrapeTimout", to="5s")
change("custom_fields", "a typo in an HTTPRoute", "HTTPRoute", "spec", "hostname", to="keys.example.org")
change("custom_fields", "a typo in a rule", "PrometheusRule", "spec", "groups", 0, "rules", 0, "label", to={})

change("names", "an upper-case name", "ConfigMap", "metadata", "name", to="Keys", end="-object")
change("names", "a Service's name that begins with a digit", "Service", "metadata", "name", to="1key", end="-metrics")
change("names", "a container's name with an underscore", "Deployment", *DAEMON, "name", to="key_service")
change("names", "two volumes with the same name", "Deployment", *TEMPLATE, "volumes", "+", to={"name": "config", "emptyDir": {}})


@mutant("names", "a duplicate resource")
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
change("ports", "two ports with the same name", "Deployment", *DAEMON, "ports", 1, "name", to="http")
change(
    "ports",
    "two ports with the same number",
    "Service",
    "spec",
    "ports",
    "+",
    to={"name": "other", "port": 80, "targetPort": "http"},
    end="keys",
)
change("ports", "port 70000", "Deployment", *DAEMON, "ports", 0, "containerPort", to=70000)
change("ports", "nodePort 80", "Service", "spec", "ports", 0, "nodePort", to=80, end="keys")
change("ports", "a host port", "Deployment", *DAEMON, "ports", 0, "hostPort", to=1123)
change("ports", "a targetPort that the pods don't have", "Service", "spec", "ports", 0, "targetPort", to="https", end="keys")

change("probes", "a probe of a missing port", "Deployment", *DAEMON, "livenessProbe", "httpGet", "port", to="https")
change("probes", "a probe of another container's port", "Deployment", *DAEMON, "livenessProbe", "httpGet", "port", to="proxy")
change("probes", "a probe without a path", "Deployment", *DAEMON, "livenessProbe", "httpGet", "path", to="livez")
change("probes", "a negative period", "Deployment", *DAEMON, "readinessProbe", "periodSeconds", to=-1)
change("probes", "a negative delay", "Deployment", *DAEMON, "readinessProbe", "initialDelaySeconds", to=-1)
change("probes", "a timeout of 0", "Deployment", *DAEMON, "livenessProbe", "timeoutSeconds", to=0)
change("probes", "liveness by two successes", "Deployment", *DAEMON, "livenessProbe", "successThreshold", to=2)
change("probes", "a grace period for readiness", "Deployment", *DAEMON, "readinessProbe", "terminationGracePeriodSeconds", to=5)
change("probed", "readiness probed at /livez", "Deployment", *DAEMON, "readinessProbe", "httpGet", "path", to="/livez")
change("probed", "liveness probed at /readyz", "Deployment", *DAEMON, "livenessProbe", "httpGet", "path", to="/readyz")
change("probed", "no liveness probe", "Deployment", *DAEMON, "livenessProbe", drop=True)

SECRETS = (*TEMPLATE, "volumes", 1)
change("mounted_secrets", "a certificate that is mounted elsewhere", "Deployment", *DAEMON, "volumeMounts", 1, "mountPath", to="/run/tls")
change("mounted_secrets", "a Secret's default mode", "Deployment", *SECRETS, "secret", "defaultMode", drop=True)
change("mounted_secrets", "a private key that others can read", "Deployment", *SECRETS, "secret", "defaultMode", to=0o444)
change("mounted_secrets", "a single file of the volume", "Deployment", *DAEMON, "volumeMounts", 1, "subPath", to="tls.crt")
change("mounted_secrets", "a file with another name", "Deployment", *SECRETS, "secret", "items", 0, "path", to="cert.pem")
change("mounted_secrets", "no fsGroup", "Deployment", *TEMPLATE, "securityContext", "fsGroup", drop=True)
change("transport", "liveness probed on the key port", "Deployment", *DAEMON, "livenessProbe", "httpGet", "port", to="http")
change("transport", "readiness probed on the key port", "Deployment", *DAEMON, "readinessProbe", "httpGet", "port", to="http")
change("transport", "HTTPS probes on the metrics port", "Deployment", *DAEMON, "readinessProbe", "httpGet", "scheme", to="HTTPS")
change("transport", "a Service with appProtocol http", "Service", "spec", "ports", 0, "appProtocol", to="http", end="keys")
change(
    "transport",
    "an Ingress that uses plain HTTP",
    "Ingress",
    "metadata",
    "annotations",
    "nginx.ingress.kubernetes.io/backend-protocol",
    to="HTTP",
)
change(
    "transport",
    "a Service that Traefik reaches over plain HTTP",
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
change("certificates", "a Secret that is not mounted", "Certificate", "spec", "secretName", to="other")
change("certificates", "a certificate without the Service's name", "Certificate", "spec", "dnsNames", 2, to="other")


@mutant("transport", "no BackendTLSPolicy for the Gateway")
def _(release):
    release.remove(the(release, "BackendTLSPolicy"))


def with_setting(line):
    """A change that adds a line to the daemon's configuration file."""

    def apply(release):
        the(release, "ConfigMap", "keys")["data"]["config.toml"] += line

    return apply


MUTANTS.append(("transport", "probes without a certificate", with_setting('\ntls-client-ca = "/run/key-service/tls/tls.crt"\n')))


@mutant("transport", "PROXY headers without trusted proxies")
def _(release):
    data = the(release, "ConfigMap", "keys")["data"]
    data["config.toml"] = data["config.toml"].replace("proxy-protocol = false", "proxy-protocol = true")


change("volumes", "a mount without its volume", "Deployment", *DAEMON, "volumeMounts", "+", to={"name": "gone", "mountPath": "/gone"})
change(
    "volumes",
    "two mounts at the same path",
    "Deployment",
    *DAEMON,
    "volumeMounts",
    "+",
    to={"name": "shared", "mountPath": "/etc/key-service"},
)
change("volumes", "a mount at a relative path", "Deployment", *DAEMON, "volumeMounts", 0, "mountPath", to="etc")
change("volumes", "a volume that is not mounted", "Deployment", *TEMPLATE, "volumes", "+", to={"name": "idle", "emptyDir": {}})
change("volumes", "a missing ConfigMap", "Deployment", *TEMPLATE, "volumes", 0, "configMap", "name", to="gone")
change(
    "mount_points",
    "a mount below the configuration directory",
    "Deployment",
    *DAEMON,
    "volumeMounts",
    "+",
    to={"name": "shared", "mountPath": "/etc/key-service/tokens", "subPath": "a"},
)
change("variables", "a variable's name with a blank", "Deployment", *DAEMON, "env", 0, "name", to="NODE NAME")
change("variables", "a duplicate variable", "Deployment", *DAEMON, "env", "+", to={"name": "NODE_NAME", "value": "x"})
change("variables", "a variable with two sources", "Deployment", *DAEMON, "env", 1, "value", to="x")

change("resources", "an invalid quantity", "Deployment", *DAEMON, "resources", "limits", "memory", to="256MB")
change("resources", "a request above its limit", "Deployment", *DAEMON, "resources", "requests", "memory", to="1Gi")
change("resources", "a CPU request above its limit", "Deployment", *DAEMON, "resources", "requests", "cpu", to="2001m")
change("resources", "no limit", "Pod", "spec", "containers", 0, "resources", "limits", drop=True)
change(
    "further_limits",
    "a storage request above its limit",
    "Deployment",
    *DAEMON,
    "resources",
    to={"requests": {"ephemeral-storage": "1Gi"}, "limits": {"ephemeral-storage": "1G"}},
)
change("rollout", "both bounds are 0", "Deployment", "spec", "strategy", "rollingUpdate", to={"maxSurge": 0, "maxUnavailable": "0%"})
change("rollout", "an invalid bound", "Deployment", "spec", "strategy", "rollingUpdate", "maxSurge", to="some")
change("disruption", "both bounds", PDB, "spec", "maxUnavailable", to=1)
change("disruption", "no bound", PDB, "spec", "minAvailable", drop=True)
change("disruption", "an invalid bound", PDB, "spec", "minAvailable", to="half")

change("evictions", "as many as there are pods", PDB, "spec", "minAvailable", to=3)
change("evictions", "a percentage that is rounded up to all", PDB, "spec", "minAvailable", to="67%")
change("evictions", "no eviction allowed", PDB, "spec", to={"maxUnavailable": "0%"})
change(
    "spreads", "a duplicate topology", "Deployment", *TEMPLATE, "topologySpreadConstraints", 1, "topologyKey", to="kubernetes.io/hostname"
)
PEERS = ("spec", "ingress", 0, "from", "+")
change("networks", "an invalid address", "NetworkPolicy", *PEERS, to={"ipBlock": {"cidr": "192.0.2.256/24"}})
change(
    "networks",
    "an exception outside of its network",
    "NetworkPolicy",
    *PEERS,
    to={"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}},
)
change(
    "networks",
    "an exception of the whole network",
    "NetworkPolicy",
    *PEERS,
    to={"ipBlock": {"cidr": "2001:db8::/32", "except": ["2001:db8:0::/32"]}},
)
change("networks", "an invalid network of a load balancer", "Service", "spec", "loadBalancerSourceRanges", to=["192.0.2.0/33"], end="keys")

change("autoscaler", "min above max", HPA, "spec", "minReplicas", to=31)
change("autoscaler", "min 0", HPA, "spec", "minReplicas", to=0)
change("autoscaler", "no metric", HPA, "spec", "metrics", to=[])
change("autoscaler", "a missing Deployment", HPA, "spec", "scaleTargetRef", "name", to="gone")
change("autoscaler", "a target of another kind", HPA, "spec", "scaleTargetRef", "kind", to="StatefulSet")
change("autoscaler", "replicas set in the Deployment", "Deployment", "spec", "replicas", to=2)
change("autoscaler", "a utilization of 0", HPA, "spec", "metrics", 0, "resource", "target", "averageUtilization", to=0)
change("autoscaler", "utilization of a resource without a request", "Deployment", *DAEMON, "resources", "requests", "cpu", drop=True)

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
change("monitors", "a monitor that selects nothing", "ServiceMonitor", "spec", "selector", "matchLabels", "tier", to="x")
change(
    "monitors",
    "a monitor that selects both Services",
    "ServiceMonitor",
    "spec",
    "selector",
    "matchLabels",
    "app.kubernetes.io/component",
    drop=True,
)
change("monitors", "a missing port", "ServiceMonitor", "spec", "endpoints", 0, "port", to="http")
change("monitors", "a different job", "ServiceMonitor", "spec", "endpoints", 0, "relabelings", 0, "replacement", to="keys")
change("monitors", "the operator's label endpoint takes precedence", "ServiceMonitor", "spec", "endpoints", 0, "honorLabels", to=False)
change("monitors", "a different namespace", "ServiceMonitor", "spec", "namespaceSelector", "matchNames", 0, to="default")
change("prometheus_rules", "an expression that does not parse", "PrometheusRule", "spec", "groups", 0, "rules", 0, "expr", to="rate(x[5m)")


@mutant("prometheus_rules", "a duplicate group")
def _(release):
    groups = the(release, "PrometheusRule")["spec"]["groups"]
    groups.append(groups[0])


INGRESS_PATH = ("spec", "rules", 0, "http", "paths", 0)
change("backends", "an Ingress to a missing port", "Ingress", *INGRESS_PATH, "backend", "service", "port", "name", to="https")
change("backends", "an Ingress with a relative path", "Ingress", *INGRESS_PATH, "path", to="key")
change("backends", "an Ingress host with a port", "Ingress", "spec", "rules", 0, "host", to="keys.example.org:80")
change("backends", "a route to a missing port", "HTTPRoute", "spec", "rules", 0, "backendRefs", 0, "port", to=1124)
change("policy", "egress is not restricted", "NetworkPolicy", "spec", "policyTypes", to=["Ingress"])
change("policy", "a missing port", "NetworkPolicy", "spec", "ingress", 0, "ports", 0, "port", to="https")
change("policy", "all ports", "NetworkPolicy", "spec", "ingress", 0, "ports", drop=True)
change("policy", "all egress allowed", "NetworkPolicy", "spec", "egress", to=[{}])

change("configuration", "another ConfigMap is mounted", "Deployment", *TEMPLATE, "volumes", 0, "name", to="files")
change("configuration", "a file that is not TOML", "ConfigMap", "data", "config.toml", to="port: 1123", end="keys")
change("configuration", "the daemon listens on another port", "Deployment", *DAEMON, "ports", 0, "containerPort", to=1124)
change("configuration", "the pod is killed while it drains", "Deployment", *TEMPLATE, "terminationGracePeriodSeconds", to=25)
change(
    "configuration",
    "no checksum to replace the pods",
    "Deployment",
    "spec",
    "template",
    "metadata",
    "annotations",
    "checksum/config",
    drop=True,
)
change("accounts", "a pod with a token", "Deployment", *TEMPLATE, "automountServiceAccountToken", to=True)
change("accounts", "an account with a token", "ServiceAccount", "automountServiceAccountToken", drop=True)
change("accounts", "a missing account", "Pod", "spec", "serviceAccountName", to="gone")
change("accounts", "variables of every Service", "Deployment", *TEMPLATE, "enableServiceLinks", drop=True)

for field in ("hostNetwork", "hostPID", "hostIPC"):
    change("restricted", field, "Deployment", *TEMPLATE, field, to=True)
POD_CONTEXT, CONTEXT = (*TEMPLATE, "securityContext"), (*DAEMON, "securityContext")
change("restricted", "sysctls", "Deployment", *POD_CONTEXT, "sysctls", to=[{"name": "kernel.msgmax", "value": "1"}])
change("restricted", "a directory of the host", "Deployment", *TEMPLATE, "volumes", 0, to={"name": "config", "hostPath": {"path": "/"}})
change("restricted", "root is allowed", "Deployment", *POD_CONTEXT, "runAsNonRoot", drop=True)
change("restricted", "runs as root", "Deployment", *CONTEXT, "runAsUser", to=0)
change("restricted", "no seccomp profile", "Deployment", *POD_CONTEXT, "seccompProfile", "type", to="Unconfined")
change(
    "restricted", "privilege escalation allowed", "Pod", "spec", "containers", 0, "securityContext", "allowPrivilegeEscalation", drop=True
)
change("restricted", "privileged", "Deployment", *CONTEXT, "privileged", to=True)
change("restricted", "capabilities are kept", "Deployment", *CONTEXT, "capabilities", "drop", to=["NET_RAW"])
change("restricted", "a capability is added", "Deployment", *CONTEXT, "capabilities", "add", to=["SYS_TIME"])
change("restricted", "an unmasked /proc", "Deployment", *CONTEXT, "procMount", to="Unmasked")
change(
    "restricted",
    "a writable root file system",
    "Deployment",
    *TEMPLATE,
    "initContainers",
    0,
    "securityContext",
    "readOnlyRootFilesystem",
    to=False,
)
change("restricted", "SELinux options", "Deployment", *POD_CONTEXT, "seLinuxOptions", to={"type": "spc_t"})
change("restricted", "AppArmor is off", "Deployment", *CONTEXT, "appArmorProfile", to={"type": "Unconfined"})
change("restricted", "a host process", "Deployment", *POD_CONTEXT, "windowsOptions", to={"hostProcess": True})
change("images", "the latest image", "Deployment", *DAEMON, "image", to="registry.example.org:5000/key-service:latest")
change("images", "an image without a tag", "Deployment", *DAEMON, "image", to="registry.example.org:5000/key-service")
change("services", "a load balancer class without a load balancer", "Service", "spec", "type", to="NodePort", end="keys")
change("services", "a node port with type ClusterIP", "Service", "spec", "type", to="ClusterIP", end="keys")
change("services", "headless with type LoadBalancer", "Service", "spec", "clusterIP", to="None", end="keys")
change("families", "two IP families with SingleStack", "Service", "spec", "ipFamilyPolicy", to="SingleStack", end="keys")
change("families", "a headless Service with another port", "Service", "spec", "clusterIP", to="None", end="keys")
change("families", "a deprecated value", "Service", "spec", "trafficDistribution", to="PreferClose", end="keys")
change("sizes", "a ConfigMap of 1 MiB", "ConfigMap", "data", "config.toml", to="#" * (1 << 20), end="keys")
change("sizes", "a dashboard that is not JSON", "ConfigMap", "data", "key-service.json", to="{", end="-dashboard")
change(
    "hooks",
    "a test pod that is kept after failure",
    "Pod",
    "metadata",
    "annotations",
    "helm.sh/hook-delete-policy",
    to="before-hook-creation,hook-succeeded",
)
change("hooks", "a test pod that is kept", "Pod", "metadata", "annotations", "helm.sh/hook-delete-policy", drop=True)
change("tests", "another command", "Pod", "spec", "containers", 0, "args", 0, to="--check")
change("tests", "another port", "Pod", "spec", "containers", 0, "args", 2, to="http://keys:1123")
change("tests", "another image", "Pod", "spec", "containers", 0, "image", to="busybox:1.36")
change("tests", "not a hook", "Pod", "metadata", "annotations", "helm.sh/hook", drop=True)


@mutant("tests", "no pod")
def _(release):
    release.remove(the(release, "Pod"))

"""The spec.replicas that the chart renders for a live Deployment, and broken charts that get it wrong.

`lookup` needs an API server. A stub returns one of the Deployments in deployments.json. A real API server (Kubernetes 1.36.2) returned
them after the steps in their names, done by Helm 3.17.3 and 4.1.4; fields that the chart does not read were removed. On the real
cluster, each of CASES was run as an upgrade while spec.replicas was watched: it never fell below the previous number. With an older
chart (`always dropped` below) it fell to 1.
"""

import contextlib
import http.server
import json
import threading
from pathlib import Path

from support.chart.tools import HELM, HELM_3

LIVE = json.loads((Path(__file__).resolve().parent / "deployments.json").read_text())
ON, OFF = "autoscaling.enabled=true", "replicaCount=2"

# (live Deployment, values, (replicas, annotation) with Helm 4, the same with Helm 3 if it differs)
CASES = [
    (None, ON, (None, "autoscaler")),
    (None, OFF, (2, None)),
    ("helm 3, 4 pods", OFF, (2, None)),
    ("helm 3, 4 pods", ON, (4, "4")),
    ("helm 3, 4 pods", f"{ON},autoscaling.minReplicas=5", (5, "5")),
    ("helm 3, switched on, scaled to 6", ON, (6, "6")),
    ("helm 3, switched on, scaled to 6", OFF, (6, None)),
    ("helm 3, switched on, scaled to 6", "replicaCount=8", (8, None)),
    ("helm 3, installed with autoscaling, scaled to 5", ON, (None, "autoscaler")),
    ("helm 3, installed with autoscaling, scaled to 5", OFF, (5, None)),
    ("helm 4, 4 pods", OFF, (2, None)),
    ("helm 4, 4 pods", ON, (4, "4")),
    ("helm 4, switched on, scaled to 6", ON, (None, "autoscaler"), (6, "6")),
    ("helm 4, switched on, scaled to 6", OFF, (6, None)),
    ("helm 4, installed with autoscaling, scaled to 5", ON, (None, "autoscaler")),
    ("helm 4, switched on, scaled to 6, switched off", ON, (None, "autoscaler"), (6, "6")),
    ("helm 4, switched on, scaled to 6, switched off", OFF, (2, None)),
    ("helm 4, switched on by helm 3, scaled to 6", ON, (6, "6")),
    ("helm 4, chart 0.1.0 with autoscaling, scaled to 5", ON, (None, "autoscaler"), (5, "5")),
]

# (the error, text of _replicas.tpl, its replacement, the case that detects it, the Helm binary that detects it)
MUTANTS = [
    ("always dropped", "(empty $live)", "true", ("helm 3, 4 pods", ON), HELM_3),
    ("dropped if only Helm owns it", '(ne (join " " $owners) "helm")', "true", ("helm 4, 4 pods", ON), HELM),
    ("dropped with Helm 3", '| ternary "" "Update"', '| ternary "" ""', ("helm 4, switched on, scaled to 6", ON), HELM_3),
    ("dropped after Helm 3", '(not (has "Update" $operations))', "true", ("helm 4, switched on by helm 3, scaled to 6", ON), HELM),
    ("never dropped if others own it", '(has "Apply" $operations)', "false", ("helm 4, switched on, scaled to 6", ON), HELM),
    (
        "never dropped after a new release",
        '(eq $annotation "autoscaler")',
        "false",
        ("helm 3, installed with autoscaling, scaled to 5", ON),
        HELM,
    ),
    (
        "below minReplicas",
        "max .Values.autoscaling.minReplicas $running",
        "$running",
        ("helm 3, 4 pods", f"{ON},autoscaling.minReplicas=5"),
        HELM,
    ),
    (
        "a live number below minReplicas is lost",
        "max .Values.autoscaling.minReplicas $running",
        "int64 .Values.autoscaling.minReplicas",
        ("helm 3, switched on, scaled to 6", ON),
        HELM,
    ),
    ("replicaCount applied at once", "(empty $annotation | ternary 0 $running)", "0", ("helm 3, switched on, scaled to 6", OFF), HELM),
    ("replicaCount never applied", "(empty $annotation | ternary 0 $running)", "$running", ("helm 3, 4 pods", OFF), HELM),
    ("no note", "(ne $replicas (.Values.replicaCount | int64 | toString))", "false", ("helm 4, switched on, scaled to 6", OFF), HELM_3),
    ("a note in every case", "(ne $replicas (.Values.replicaCount | int64 | toString))", "true", (None, OFF), HELM),
]


# The kinds that the chart renders by default, for Helm's discovery.
KINDS = {
    "v1": ["ConfigMap", "Pod", "Service", "ServiceAccount"],
    "apps/v1": ["Deployment"],
    "autoscaling/v2": ["HorizontalPodAutoscaler"],
    "networking.k8s.io/v1": ["NetworkPolicy"],
    "policy/v1": ["PodDisruptionBudget"],
}


def discovery():
    """(path, response) of each discovery path of an API server with KINDS."""
    groups = [dict(zip(("name", "version"), group.split("/"), strict=True), groupVersion=group) for group in KINDS if "/" in group]
    yield "/version", {"major": "1", "minor": "36", "gitVersion": "v1.36.2"}
    yield "/api", {"kind": "APIVersions", "versions": ["v1"]}
    yield "/apis", {"kind": "APIGroupList", "groups": [{"name": group["name"], "versions": [group]} for group in groups]}
    for group, kinds in KINDS.items():
        resources = [{"name": f"{kind.lower()}s", "namespaced": True, "kind": kind, "verbs": ["get"]} for kind in kinds]
        yield (
            f"/apis/{group}" if "/" in group else f"/api/{group}",
            {"kind": "APIResourceList", "groupVersion": group, "resources": resources},
        )


# Each live Deployment has its own cluster, under its own path.
CLUSTERS = {state: f"/cluster-{number}" for number, state in enumerate([None, *LIVE])}
DEPLOYMENT = "/apis/apps/v1/namespaces/prod/deployments/demo-key-service"


class Stub(http.server.BaseHTTPRequestHandler):
    found = {f"{cluster}{path}": found for cluster in CLUSTERS.values() for path, found in discovery()}
    found |= {f"{CLUSTERS[state]}{DEPLOYMENT}": deployment for state, deployment in LIVE.items()}

    def do_GET(self):
        found = self.found.get(self.path.partition("?")[0])
        body = json.dumps(found or {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def clusters():
    """Serves all clusters; yields the Helm option that selects each of them."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        try:
            yield {state: f"--kube-apiserver=http://127.0.0.1:{server.server_port}{path}" for state, path in CLUSTERS.items()}
        finally:
            server.shutdown()

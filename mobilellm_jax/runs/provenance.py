"""Provenance of a run: commit, library versions, devices."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def device() -> dict[str, Any]:
    """Platform, kind and number of the devices of all processes, and the CPU cores of this process."""
    import jax  # here, as the commit of a sweep is asked for without it

    first = jax.devices()[0]
    kind = _cpu() if first.platform == "cpu" else first.device_kind
    cores = len(os.sched_getaffinity(0))
    return {"platform": first.platform, "kind": kind, "count": jax.device_count(), "cores": cores}


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git_commit() -> str | None:
    """Commit of the repository that contains this package, with "-dirty" if Python files are modified.

    None if git does not track the package, for example in a virtual environment inside another checkout.
    """

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = git("rev-parse", "HEAD")
        # Python files only: records that a sweep writes into the repository do not change the code.
        return commit + ("-dirty" if git("status", "--porcelain", "--", ":(top)*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, of the libraries that results depend on, and of `more` libraries, by name."""
    found = {"python": platform.python_version()}
    for library in ("jax", "jaxlib", "flax", "optax", "numpy", *more):
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found

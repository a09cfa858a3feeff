"""Where figures come from: the package's commit, the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import autossl
from autossl.version import __version__

CHANGED = "+changes"
"""After a commit: modules of the package differ from it."""
MODULES = (":(top)*.py", ":(top,exclude)tests", ":(top,exclude)benchmarks", ":(top,exclude)docs")


def package_commit(folder: Path | None = None) -> str:
    """Commit of the checkout that the package runs from, "+changes" where modules differ from it; else the version.

    Args:
        folder: Where the package lies; None finds it.
    """
    package = folder or Path(next(iter(autossl.__path__)))
    # an installed package may lie in somebody's checkout without being part of it
    if _git(package, "ls-files", "--error-unmatch", "version.py") is None:
        return f"version {__version__}"
    commit = _git(package, "rev-parse", "--short=10", "HEAD")
    if commit is None:
        return f"version {__version__}"
    return commit + (CHANGED if _git(package, "status", "--porcelain", "--", *MODULES) else "")


def machine(device: str) -> str:
    """In words, without names."""
    import torch

    cores = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    return f"{cores}{gpu}, torch {torch.__version__}"


def _git(folder: Path, *words: str) -> str | None:
    """What git says; None where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None

"""Where results come from: the package's commit, and the entry "written" that a file of results carries."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict

import autossl
from autossl.version import __version__

CHANGED = "+changes"
"""After a commit: modules of the package differ from it."""
MODULES = (":(top)*.py", ":(top,exclude)tests", ":(top,exclude)benchmarks", ":(top,exclude)docs")
LIBRARIES = ("torch", "numpy")


class Written(BaseModel):
    """When a file was written and by what; the entry "written" of files of results."""

    model_config = ConfigDict(extra="allow", frozen=True)

    date: str
    """UTC, ISO 8601."""
    commit: str
    """See `package_commit`."""
    versions: dict[str, str]

    @classmethod
    def now(cls) -> Written:
        """By this package, at this moment."""
        versions = {"autossl": __version__, "python": platform.python_version()}
        for name in LIBRARIES:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                continue
        return cls(
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"), commit=package_commit(), versions=versions
        )


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


def _git(folder: Path, *words: str) -> str | None:
    """What git says; None where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None

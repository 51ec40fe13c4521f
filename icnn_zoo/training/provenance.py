"""Which software made a checkpoint."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from icnn_zoo._version import __version__

_PACKAGES = ("torch", "torchvision", "timm", "lightning", "albumentations", "numpy")


@cache
def find_provenance() -> dict[str, Any]:
    """Versions of the packages that decide a run's numbers, and the commit of this package.

    Returns:
        "packages", versions by name, and "commit": the hash, with "+changes" if files were changed since; None where
        the package is not in a repository.
    """
    versions = {"python": platform.python_version(), "icnn_zoo": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"packages": versions, "commit": _commit(Path(__file__).parents[1])}


def _commit(package: Path) -> str | None:
    # Only a repository that holds this package as a file: an installed copy may lie inside of another project's.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    return None if commit is None else commit + ("+changes" if _git(package, "status", "--porcelain", ".") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

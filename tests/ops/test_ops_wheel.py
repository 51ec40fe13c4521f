"""Kernels that wheels bring: which one is taken, and that no compiler is needed."""

import os
import platform
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

import icnn_zoo
from icnn_zoo.ops import backends
from icnn_zoo.ops.native_backend import build, wheel

ROOT = Path(__file__).parents[2]

if sys.platform != "linux" or shutil.which("cc") is None:
    pytest.skip("no Linux, or no C compiler", allow_module_level=True)


def test_setup_makes_the_kernels_that_the_package_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    monkeypatch.chdir(ROOT)
    setup = runpy.run_path("setup.py")
    assert {Path(source).name for source in setup["SOURCES"]} == {source.name for source in build.SOURCES}
    kinds = setup["KINDS"]
    assert {machine: set(names) for machine, names in kinds.items()} == {
        machine: set(names) for machine, names in wheel.KINDS.items()
    }


@pytest.mark.parametrize(
    ("flags", "kind"),
    [(wheel._V4 | {"sse"}, "x86-64-v4"), (wheel._V4 - {"avx512bw"}, "x86-64-v3"), (wheel._V3 - {"fma"}, None)],
)
def test_the_best_kernel_that_the_processor_can_run_is_taken(
    flags: set[str], kind: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(wheel, "FOLDER", tmp_path)
    monkeypatch.setattr(wheel, "processor_flags", lambda: flags)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert wheel.find_kind() is None  # none is there
    for name in wheel.KINDS["x86_64"]:
        for real in wheel.REALS.values():
            wheel._path(real, name).touch()
    assert wheel.find_kind() == kind


def test_a_kernel_of_a_wheel_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    libraries, reason = build.load()
    assert reason is None  # compiled, as from source
    for dtype, real in wheel.REALS.items():
        shutil.copy(libraries[dtype]._name, tmp_path / f"kernel-{real}-here.so")
    monkeypatch.setattr(wheel, "FOLDER", tmp_path)
    monkeypatch.setattr(wheel, "KINDS", {platform.machine(): {"here": set()}})
    monkeypatch.setattr(build, "load", build.load.__wrapped__)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert backends.choose_backend("auto", torch.device("cpu"), torch.float32) == "native"
    input, weight, positions = torch.ones(1, 2, 4, 5), torch.ones(3, 2, 1, 1), torch.zeros(2, 1, 2)
    assert torch.equal(icnn_zoo.irregular_conv2d(input, weight, positions), torch.full((1, 3, 4, 5), 2.0))


@pytest.mark.slow
def test_a_built_wheel_runs_where_there_is_no_compiler(tmp_path: Path) -> None:
    source = tmp_path / "source"
    parts = ("icnn_zoo", "setup.py", "pyproject.toml", "README.md", "LICENSE", "icnn_zoo_programs.py")
    for part in parts:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / part, source / part)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, env={**os.environ, "ICNN_ZOO_KERNELS": "1"}, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("icnn_zoo-*-py3-none-*.whl"))) as archive:
        archive.extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    check = [sys.executable, "-W", "error", str(ROOT / ".ci" / "check_kernel.py"), "--wheel"]
    subprocess.run(check, env=environment, check=True, cwd=tmp_path)
    assert not (tmp_path / "cache").exists()

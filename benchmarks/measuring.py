"""What the benchmarks measure with: seconds, memory, how far results are off, and on what machine."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import icnn_zoo
from icnn_zoo.ops import backends

SEED = 0
LINUX = sys.platform == "linux"
MEASUREMENT_S = 0.05  # a quick call is repeated for about this long
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # largest difference / largest value


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value; NaN where there is one."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()


def counter(file: str, field: str) -> int:
    """A Linux counter in bytes."""
    lines = Path("/proc", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def timed(call: Callable[[], Any], device: str, calls: int = 1) -> float:
    """Seconds per call."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize()
    return (time.perf_counter() - start) / calls


def measured(call: Callable[[], Any], device: str) -> tuple[float, float | None]:
    """Seconds and peak extra MiB (None where it cannot be measured) of one call."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return timed(call, device), (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that stays resident would hide an allocation
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux with glibc, or not allowed
        return timed(call, device), None
    before = counter("self/status", "VmRSS")
    return timed(call, device), (counter("self/status", "VmHWM") - before) / 2**20


def environment(
    args: argparse.Namespace, packages: Sequence[str] = ("torch", "torchvision", "timm", "DCLS")
) -> dict[str, Any]:
    """Machine, versions, date, seed and settings."""
    versions = {"python": platform.python_version(), "icnn_zoo": icnn_zoo.__version__}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    backend = backends.choose_backend("auto", device, dtype)
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        versions["git"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    info = Path("/proc/cpuinfo").read_text().splitlines() if LINUX else []
    cpu = next((line.partition(": ")[2] for line in info if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    return {
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu},
        "versions": versions,
        "backend": backend,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": SEED,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
    }

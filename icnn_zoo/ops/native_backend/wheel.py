"""The C kernels that wheels bring, compiled for kinds of processors, so that no compiler is needed.

They lie beside this file, named after the type of their numbers and the kind of processor (``setup.py`` makes them),
and are trusted as the Python code around them is.
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import torch

REALS = {torch.float32: "float", torch.float64: "double"}
FOLDER = Path(__file__).parent
# Best first, with the flags of /proc/cpuinfo that say that a processor is of the kind.
_V3 = {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
KINDS: dict[str, dict[str, set[str]]] = {
    "x86_64": {"x86-64-v4": _V4, "x86-64-v3": _V3},
    "aarch64": {"armv8-a": set()},
    "arm64": {"armv8-a": set()},
}

Libraries = dict[torch.dtype, ctypes.CDLL]


def load() -> Libraries | None:
    """The libraries of the best kind that this processor is of; None where the package has none, as from source.

    Raises:
        OSError: One cannot be loaded.
    """
    kind = find_kind()
    return None if kind is None else {dtype: open_library(_path(real, kind)) for dtype, real in REALS.items()}


def find_kind() -> str | None:
    """The best kind of processor that this one is of and that the package has kernels for."""
    flags = processor_flags()
    for kind, needed in KINDS.get(platform.machine(), {}).items():
        if needed <= flags and all(_path(real, kind).is_file() for real in REALS.values()):
            return kind
    return None


def open_library(path: Path) -> ctypes.CDLL:
    """Loads a kernel.

    Raises:
        OSError: It cannot be loaded.
    """
    library = ctypes.CDLL(str(path))
    lengths = ("workspace_length", "moments_length", "planes_workspace_length", "cells_workspace_length")
    for name in (*lengths, "picks_workspace_length"):
        getattr(library, name).restype = ctypes.c_int64  # library[name] would be another object each time
    return library


def processor_lines() -> set[str]:
    """What Linux says of its processors' names and abilities; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    wanted = ("model name", "flags", "Features", "CPU part")
    return {line for line in info.read_text().splitlines() if line.startswith(wanted)} if info.is_file() else set()


def processor_flags() -> set[str]:
    """The abilities of this processor by Linux's names; empty elsewhere."""
    flags = {line.partition(":")[2] for line in processor_lines() if line.startswith(("flags", "Features"))}
    return set(" ".join(flags).split())


def _path(real: str, kind: str) -> Path:
    return FOLDER / f"kernel-{real}-{kind}.so"

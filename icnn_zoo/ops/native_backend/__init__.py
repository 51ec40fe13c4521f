"""The irregular convolution on CPUs by a small C kernel, compiled on first use where a C compiler is found.

The C code (``native/``) makes columns where the matrix product wants them, in the cache, and walks depthwise layers and
the full version as stencils of at most four cells a tap, so that no cost depends on how far positions moved. It runs on
PyTorch's own threads (``torch.set_num_threads``). Without a compiler the torch backend does the same, slower.

The compiled library is kept in ``$XDG_CACHE_HOME/icnn_zoo`` (``~/.cache/icnn_zoo``), named after its source, flags,
compiler and processor. ``$CC`` chooses the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry, memory_format

_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared")
_REAL = {torch.float32: "float", torch.float64: "double"}


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on a device, or None; the first call for a CPU compiles the kernel."""
    if device.type != "cpu":
        return f"it needs a CPU; the input is on {device}"
    return _load()[1]


def supports(dtype: torch.dtype) -> bool:
    """Whether this backend computes in a dtype: in all floating ones, half precision by float32."""
    return dtype.is_floating_point


@functools.cache
def _load() -> tuple[dict[torch.dtype, ctypes.CDLL], str | None]:
    """The kernel's libraries by dtype, and why there are none."""
    if sys.platform != "linux":
        return {}, f"it was made for Linux; this is {sys.platform}"
    compiler = os.environ.get("CC") or next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        return {}, "it needs a C compiler on the first use (cc, gcc or clang on the PATH, or $CC)"
    if _find_parallel() is None:
        return {}, "PyTorch's OpenMP library offers no GOMP_parallel"
    try:
        libraries = {dtype: ctypes.CDLL(str(_compile(compiler, real))) for dtype, real in _REAL.items()}
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        output = getattr(error, "stderr", None) or str(error)
        lines = output.strip().splitlines() or ["no message"]
        return (
            {},
            f"compiling it with {compiler!r} failed: {next((line for line in lines if 'error' in line), lines[0])}",
        )
    for library in libraries.values():
        library.workspace_length.restype = ctypes.c_int64
    return libraries, None


@functools.cache
def _find_parallel() -> int | None:
    """Address of what starts work on the threads of PyTorch's pool."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    try:
        return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None


def _compile(compiler: str, real: str) -> Path:
    folder = Path(__file__).with_name("csrc")
    sources = [folder / name for name in ("plane.h", "columns.c", "stencil.c")]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = "\0".join([*(source.read_text() for source in sources), real, *_FLAGS, version, _processor()])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "icnn_zoo"
    target = cache / f"native-{real}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    # Under a name of its own, then moved: several processes may do the same at once.
    handle, partial = tempfile.mkstemp(suffix=".so", dir=cache)
    os.close(handle)
    try:
        command = [compiler, *_FLAGS, f"-DREAL={real}", *map(str, sources[1:]), "-o", partial]
        subprocess.run(command, capture_output=True, text=True, check=True)
        os.replace(partial, target)
    finally:
        Path(partial).unlink(missing_ok=True)
    return target


def _processor() -> str:
    """What ``-march=native`` depends on: a cache may be shared by several machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    wanted = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))


def _integers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


class _Sizes(ctypes.Structure):
    """``sizes_t`` of native/plane.h."""

    _fields_ = [
        *_integers("height", "width", "out_height", "out_width", "stride_row", "stride_col"),
        *_integers("origin_row", "origin_col"),
    ]


class _Columns(ctypes.Structure):
    """``columns_t`` of native/columns.c."""

    _fields_ = [
        ("sizes", _Sizes),
        *_integers("images", "channels", "outputs", "groups", "taps"),
        *_pointers("input", "weight", "positions", "bias", "output"),
        *_pointers("grad_output", "grad_input", "grad_weight", "grad_shift", "workspace"),
    ]


class _Stencil(ctypes.Structure):
    """``stencil_t`` of native/stencil.c."""

    _fields_ = [
        ("sizes", _Sizes),
        *_integers("images", "channels", "outputs", "groups", "taps"),
        ("per_kernel", ctypes.c_int),
        *_pointers("input", "weight", "positions", "bias", "output"),
        *_pointers("grad_output", "grad_input", "grad_weight", "grad_shift"),
    ]


def forward(input: Tensor, weight: Tensor, positions: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Computes the irregular convolution of checked arguments.

    Args:
        input: Images [B, C, H, W] on a CPU.
        weight: Weights [N, C / G, T].
        positions: Absolute positions in pixels [C, T, 2], or [N, C / G, T, 2] for the full version.
        bias: Bias [N] or None.
        geometry: Sizes of the call.

    Returns:
        Output [B, N, Ho, Wo] in the memory format of ``input``.
    """
    call = _Call(input, weight, positions, geometry)
    output = torch.empty(input.shape[0], weight.shape[0], *geometry.output_size, dtype=call.dtype)
    if output.numel() > 0:
        call.run("forward", bias=None if bias is None else bias.to(call.dtype), output=output)
    return output.to(input.dtype).contiguous(memory_format=memory_format(input))


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Computes the gradients of :func:`forward` for input, weight and positions, None where not in ``needs``."""
    call = _Call(input, weight, positions, geometry)
    grad_input = torch.zeros(input.shape, dtype=call.dtype) if needs[0] else None
    # A stencil's shifts belong to the outputs: those of a channel are summed below.
    needs_weight, needs_shift = needs[1] or (call.is_stencil and needs[2]), needs[2] or (call.is_stencil and needs[1])
    grad_weight = torch.zeros(weight.shape, dtype=call.dtype) if needs_weight else None
    shapes = weight.shape if call.is_stencil else positions.shape[:2]
    grad_shift = torch.zeros(*shapes, 2, dtype=torch.float64) if needs_shift else None
    if grad_output.numel() > 0:
        call.run(
            "backward",
            grad_output=grad_output.to(call.dtype).contiguous(),
            grad_input=grad_input,
            grad_weight=grad_weight,
            grad_shift=grad_shift,
        )
    by_input = by_weight = by_positions = None
    if grad_input is not None:
        by_input = grad_input.to(input.dtype).contiguous(memory_format=memory_format(input))
    if needs[1] and grad_weight is not None:
        by_weight = grad_weight.to(weight.dtype)
    if needs[2] and grad_shift is not None:
        if call.is_stencil and positions.dim() == 3:
            grad_shift = grad_shift.unflatten(0, (geometry.groups, -1)).sum(1)
        unknown = positions * 0  # a position that is no number may have met no pixel
        by_positions = grad_shift.reshape(positions.shape).to(positions.dtype) + unknown
    return by_input, by_weight, by_positions


class _Call:
    """The arguments that forward and backward share; holds what C only points to.

    Layers whose outputs share no columns (depthwise, the full version) are stencils.
    """

    def __init__(self, input: Tensor, weight: Tensor, positions: Tensor, geometry: Geometry) -> None:
        self.geometry = geometry
        self.is_stencil = positions.dim() == 4 or weight.shape[1] == 1
        # Half precision is computed in float32 and rounded once.
        self.dtype = torch.promote_types(input.dtype, torch.float32)
        self.input, self.weight = input.to(self.dtype).contiguous(), weight.to(self.dtype).contiguous()
        self.positions = positions.double().contiguous()
        self.task = (_Stencil if self.is_stencil else _Columns)(
            sizes=_Sizes(*geometry.input_size, *geometry.output_size, *geometry.stride, *geometry.origin),
            images=input.shape[0],
            channels=input.shape[1],
            outputs=weight.shape[0],
            groups=geometry.groups,
            taps=weight.shape[2],
            input=self.input.data_ptr(),
            weight=self.weight.data_ptr(),
            positions=self.positions.data_ptr(),
        )
        if self.is_stencil:
            self.task.per_kernel = positions.dim() == 4

    def run(self, direction: str, **tensors: Tensor | None) -> None:
        for field, tensor in tensors.items():
            setattr(self.task, field, None if tensor is None else tensor.data_ptr())
        library, task = _load()[0][self.dtype], ctypes.byref(self.task)
        if not self.is_stencil:
            length = library.workspace_length(task, int(direction == "backward"))
            workspace = torch.empty(length, dtype=self.dtype)
            self.task.workspace = workspace.data_ptr()
        function: Callable[..., int] = getattr(library, f"{'stencil' if self.is_stencil else 'columns'}_{direction}")
        threads = ctypes.c_uint(torch.get_num_threads())
        if function(ctypes.c_void_p(_find_parallel()), threads, task):
            raise MemoryError("`irregular_conv2d` found no memory for a thread's buffer.")

"""The irregular convolution on CPUs by a small C kernel, compiled on first use where a C compiler is found.

``native.c`` makes columns and their adjoint in one pass each, an order of magnitude faster than a chain of operators
can, and walks depthwise layers and the full version as stencils of at most four cells a tap, so that no cost depends on
how far positions moved. Matrix products stay PyTorch's. The kernel runs on PyTorch's own threads
(``torch.set_num_threads``). Without a compiler the torch backend does the same, slower.

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
from typing import Any

import torch
from torch import Tensor

from icnn_zoo.ops import columns
from icnn_zoo.ops.columns import Block, Gradients
from icnn_zoo.ops.geometry import Geometry, memory_format
from icnn_zoo.ops.windows import shifts

_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared")
_REAL = {torch.float32: "float", torch.float64: "double"}


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on a device, or None; the first call for a CPU compiles the kernel."""
    if device.type != "cpu":
        return f"it needs a CPU; the input is on {device}"
    return _load()[1]


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
        return {dtype: ctypes.CDLL(str(_compile(compiler, real))) for dtype, real in _REAL.items()}, None
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return {}, f"compiling it with {compiler!r} failed: {output.strip().splitlines()[0]}"


@functools.cache
def _find_parallel() -> int | None:
    """Address of what starts work on the threads of PyTorch's pool."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    try:
        return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
    except AttributeError:
        return None


def _compile(compiler: str, real: str) -> Path:
    source = Path(__file__).with_name("native.c")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = "\0".join([source.read_text(), real, *_FLAGS, version, _processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "icnn_zoo"
    target = folder / f"native-{real}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # Under a name of its own, then moved: several processes may do the same at once.
    handle, partial = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        command = [compiler, *_FLAGS, f"-DREAL={real}", str(source), "-o", partial]
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


class _Sizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("height", "width", "out_height", "out_width", "stride_row", "stride_col")
    ]

    @staticmethod
    def of(geometry: Geometry) -> _Sizes:
        return _Sizes(*geometry.input_size, *geometry.output_size, *geometry.stride)


def _integers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


class _Columns(ctypes.Structure):
    """``columns_t`` of native.c."""

    _fields_ = [
        ("sizes", _Sizes),
        *_integers("images", "channels", "taps"),
        *_pointers("input"),
        *_integers("input_image"),
        *_pointers("shift", "fraction", "columns", "grad_columns", "grad_input"),
        *_integers("grad_image"),
        *_pointers("grad_shift"),
    ]


class _Stencil(ctypes.Structure):
    """``stencil_t`` of native.c."""

    _fields_ = [
        ("sizes", _Sizes),
        *_integers("images", "channels", "outputs", "groups", "taps"),
        ("per_kernel", ctypes.c_int),
        *_pointers("input", "weight", "shift", "fraction", "bias", "output"),
        *_pointers("grad_output", "grad_input", "grad_weight", "grad_shift"),
        *_integers("top", "bottom", "left", "right"),
    ]


def _run(name: str, dtype: torch.dtype, task: ctypes.Structure) -> None:
    function: Callable[..., int] = getattr(_load()[0][dtype], name)
    threads = ctypes.c_uint(torch.get_num_threads())
    if function(ctypes.c_void_p(_find_parallel()), threads, ctypes.byref(task)):
        raise MemoryError("`irregular_conv2d` found no memory for a thread's buffer.")


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
    if not _is_stencil(weight, positions):
        return columns.forward(_NativeColumns(input, positions, geometry), input, weight, bias, geometry)
    call = _StencilCall(input, weight, positions, geometry)
    output = torch.empty(input.shape[0], weight.shape[0], *geometry.output_size, dtype=call.dtype)
    bias = None if bias is None else bias.to(call.dtype)
    call.run("stencil", bias=bias, output=output)
    return output.to(input.dtype).contiguous(memory_format=memory_format(input))


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Computes the gradients of :func:`forward` for input, weight and positions, None where not in ``needs``."""
    if not _is_stencil(weight, positions):
        maker = _NativeColumns(input, positions, geometry)
        return columns.backward(maker, grad_output, input, weight, positions, geometry, needs)
    call = _StencilCall(input, weight, positions, geometry)
    grad_input = torch.empty(input.shape, dtype=call.dtype) if needs[0] else None
    grad_weight = torch.empty(weight.shape, dtype=call.dtype) if needs[1] or needs[2] else None
    grad_shift = torch.empty(*weight.shape, 2, dtype=torch.float64) if needs[1] or needs[2] else None
    grad_output = grad_output.to(call.dtype).contiguous()
    call.run(
        "stencil_gradients",
        grad_output=grad_output,
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
        if positions.dim() == 3:  # the outputs of a channel share its shape
            grad_shift = grad_shift.unflatten(0, (geometry.groups, -1)).sum(1)
        by_positions = grad_shift.reshape(positions.shape).to(positions.dtype)
    return by_input, by_weight, by_positions


def _is_stencil(weight: Tensor, positions: Tensor) -> bool:
    """Whether no two outputs could share a column."""
    return positions.dim() == 4 or weight.shape[1] == 1


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _StencilCall:
    """The arguments that forward and backward of a stencil share; holds what C only points to."""

    def __init__(self, input: Tensor, weight: Tensor, positions: Tensor, geometry: Geometry) -> None:
        self.dtype = _compute_dtype(input.dtype)
        self.input, self.weight = input.to(self.dtype).contiguous(), weight.to(self.dtype).contiguous()
        shift = shifts(positions, geometry, self.dtype)
        self.shift = torch.stack([shift.row, shift.col], dim=-1)
        self.fraction = torch.cat([shift.row_fraction, shift.col_fraction], dim=1)
        margins = []
        for axis in range(2):
            reach = (geometry.output_size[axis] - 1) * geometry.stride[axis]
            last = geometry.input_size[axis] - 1
            low, high = (int(value) for value in self.shift[:, axis].aminmax())
            margins += [-min(max(low, -reach), last), min(max(high + 1, -reach), last) + reach - last]
        top, bottom, left, right = (max(margin, 0) for margin in margins)
        self.task = _Stencil(
            sizes=_Sizes.of(geometry),
            images=input.shape[0],
            channels=input.shape[1],
            outputs=weight.shape[0],
            groups=geometry.groups,
            taps=weight.shape[2],
            per_kernel=positions.dim() == 4,
            input=self.input.data_ptr(),
            weight=self.weight.data_ptr(),
            shift=self.shift.data_ptr(),
            fraction=self.fraction.data_ptr(),
            top=top,
            bottom=bottom,
            left=left,
            right=right,
        )

    def run(self, name: str, **tensors: Tensor | None) -> None:
        for field, tensor in tensors.items():
            setattr(self.task, field, None if tensor is None else tensor.data_ptr())
        _run(name, self.dtype, self.task)


class _NativeColumns:
    """Makes columns in C; a :class:`~icnn_zoo.ops.columns.ColumnMaker`."""

    def __init__(self, input: Tensor, positions: Tensor, geometry: Geometry) -> None:
        self.geometry = geometry
        self.taps = positions.shape[-2]
        self.dtype = _compute_dtype(input.dtype)
        self.input = input.to(self.dtype).contiguous()
        self.rows, self.pitch = geometry.output_size
        shift = shifts(positions, geometry, self.dtype)
        self.shift = torch.stack([shift.row, shift.col], dim=-1)
        self.fraction = torch.cat([shift.row_fraction, shift.col_fraction], dim=1)

    def columns(self, block: Block) -> Tensor:
        task = self._task(block)
        columns = torch.empty(task.channels * self.taps, task.images * self.rows * self.pitch, dtype=self.dtype)
        task.columns = columns.data_ptr()
        _run("columns", self.dtype, task)
        return columns

    def gradients(
        self, block: Block, grad_columns: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        needs_input, needs_columns, needs_positions = needs
        task = self._task(block)
        size = (task.images, task.channels, *self.geometry.input_size)
        planes = torch.empty(size, dtype=self.dtype) if needs_input else None
        by_shift = torch.empty(task.channels * self.taps, 2, dtype=torch.float64) if needs_positions else None
        grad_columns = grad_columns.contiguous()
        task.grad_columns = grad_columns.data_ptr()
        if planes is not None:
            task.grad_input, task.grad_image = planes.data_ptr(), planes.stride(0)
        if by_shift is not None:
            task.grad_shift = by_shift.data_ptr()
        _run("gradients", self.dtype, task)
        if by_shift is not None:  # a position that is no number may have met no pixel
            unknown = self.fraction[block.planes.start * self.taps : block.planes.stop * self.taps] * 0
            by_shift = by_shift.to(self.dtype) + unknown
        return (
            None if planes is None else planes.transpose(0, 1),
            self.columns(block) if needs_columns else None,
            by_shift,
        )

    def _task(self, block: Block) -> Any:
        first = block.planes.start * self.taps
        planes = self.input[block.images, block.planes]
        return _Columns(
            sizes=_Sizes.of(self.geometry),
            images=planes.shape[0],
            channels=planes.shape[1],
            taps=self.taps,
            input=planes.data_ptr(),
            input_image=self.input.stride(0),
            shift=self.shift[first:].data_ptr(),
            fraction=self.fraction[first:].data_ptr(),
        )

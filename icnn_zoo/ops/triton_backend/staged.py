"""Columns and their adjoint by kernels in CUDA C++ that hold planes in shared memory (``staged.cu``).

They read the input and write its gradient in whatever layout these have, and one of them makes the gradients of input
and positions together. They take strides of 1 and maps that fit: in half precision on an H100 up to 76 x 76 pixels for
columns and 100 x 100 for gradients. Triton's kernels do the rest. An infinite pixel makes the gradient of all positions
of its channel NaN.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.triton_backend import nvrtc
from icnn_zoo.ops.triton_backend.call import Numbers
from icnn_zoo.ops.triton_backend.launching import num_blocks
from icnn_zoo.ops.triton_backend.products import round_up

SOURCE = Path(__file__).with_name("staged.cu")
SCALARS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
POSITIONS = {torch.float32: "float", torch.float64: "double"}

_MOST_ROWS = 16  # of a band; more need too many registers
_MOST_THREADS = 704  # likewise
_COLUMNS_THREADS = 256
# Channels of a block: more read whole sectors of channels_last images, fewer leave memory for more blocks.
_COLUMNS_CHANNELS, _GRADIENT_CHANNELS = 4, 8
_FEWEST_BLOCKS = 256


class Images(ctypes.Structure):
    """``Images`` in ``staged.cu``."""

    _fields_ = (
        ("first", ctypes.c_void_p),
        *((name, ctypes.c_longlong) for name in ("image", "channel", "row", "col", "vectors")),
    )


class Task(ctypes.Structure):
    """``Task`` in ``staged.cu``."""

    _fields_ = (
        ("input", Images),
        ("grad_input", Images),
        *((name, ctypes.c_void_p) for name in ("positions", "columns", "partials")),
        ("column_pitch", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("channels", "taps", "blocks", "height", "width")),
        *((name, ctypes.c_int) for name in ("out_height", "out_width", "origin_row", "origin_col")),
        *((name, ctypes.c_int) for name in ("bound_row", "bound_col")),
    )


@dataclass(frozen=True)
class Sizes:
    """What a kernel is compiled for and told."""

    geometry: Geometry
    images: int
    channels: int
    taps: int
    dtype: torch.dtype
    positions: torch.dtype
    device: int

    def channels_of_block(self, most: int) -> int:
        """Half as many where there are few images, down to one."""
        while most > 1 and self.images * num_blocks(self.channels, most) < _FEWEST_BLOCKS:
            most //= 2
        return most

    def constants(self, channels: int, rows: int, threads: int) -> dict[str, object]:
        """What both kernels are compiled for."""
        return {
            "SCALAR": SCALARS[self.dtype],
            "POSITION": POSITIONS[self.positions],
            "CHANNELS": channels,
            "ROWS": rows,
            "THREADS": threads,
        }


@dataclass(frozen=True)
class Launch:
    """A kernel for some sizes, and what all its launches are told."""

    kernel: nvrtc.Kernel
    channels: int
    """Channels of a block."""
    blocks: int
    task: bytes

    @staticmethod
    def of(sizes: Sizes, name: str, channels: int, rows: int, threads: int, memory: int, **more: int) -> Launch:
        """Loads the kernel."""
        geometry, blocks = sizes.geometry, num_blocks(sizes.channels, channels)
        task = Task(channels=sizes.channels, taps=sizes.taps, blocks=blocks)
        task.height, task.width = geometry.input_size
        task.out_height, task.out_width = geometry.output_size
        task.origin_row, task.origin_col = geometry.origin
        task.bound_row, task.bound_col = Numbers.of(geometry).bounds
        constants = sizes.constants(channels, rows, threads)
        kernel = nvrtc.load(SOURCE, name, sizes.device, threads, memory, **constants, **more)
        return Launch(kernel, channels, sizes.images * blocks, bytes(task))

    def begin(self, input: Tensor, positions: Tensor, columns: Tensor) -> Task:
        """A task that lacks what is the kernel's own."""
        task = Task.from_buffer_copy(self.task)
        self.put(task.input, input)
        task.positions, task.columns = positions.data_ptr(), columns.data_ptr()
        task.column_pitch = columns.shape[-1]
        return task

    def put(self, images: Images, tensor: Tensor) -> None:
        """Says where images [B, C, H, W] are."""
        address, (image, channel, row, col) = tensor.data_ptr(), tensor.stride()
        images.first, images.image, images.channel, images.row, images.col = address, image, channel, row, col
        many, bytes_ = self.channels, self.channels * tensor.element_size()
        aligned = not (address % bytes_ or image % many or row % many or col % many or tensor.shape[1] % many)
        images.vectors = aligned and channel == 1


@functools.lru_cache(1024)
def columns_launch(sizes: Sizes) -> Launch | None:
    """The kernel that makes columns, or None where it cannot be used."""
    return _try(_find_columns, sizes)


@functools.lru_cache(1024)
def gradient_launch(sizes: Sizes) -> Launch | None:
    """The kernel that gathers gradients, or None where it cannot be used."""
    return _try(_find_gradient, sizes)


def _find_columns(sizes: Sizes) -> Launch | None:
    (height, width), (out_height, out_width) = sizes.geometry.input_size, sizes.geometry.output_size
    channels, vector = sizes.channels_of_block(_COLUMNS_CHANNELS), 16 // sizes.dtype.itemsize
    bands = num_blocks(out_height, _MOST_ROWS)
    rows, pitch = num_blocks(out_height, bands), round_up(width + 4, 2)
    while True:
        planes = round_up((channels * (height + rows + 1) + rows + 1) * pitch + 4, vector)
        gathered = round_up(vector + num_blocks(out_height, rows) * rows * out_width, vector)
        memory = (planes + _COLUMNS_THREADS // 32 * gathered) * sizes.dtype.itemsize
        if _fits(memory, sizes.device):
            return Launch.of(sizes, "make_columns", channels, rows, _COLUMNS_THREADS, memory)
        if channels == 1:
            return None
        channels //= 2


def _find_gradient(sizes: Sizes) -> Launch | None:
    (height, width), (out_height, out_width) = sizes.geometry.input_size, sizes.geometry.output_size
    channels, vector = sizes.channels_of_block(_GRADIENT_CHANNELS), 16 // sizes.dtype.itemsize
    channels = min(channels, vector)  # of a pixel, read at once
    rows = num_blocks(height, num_blocks(height, _MOST_ROWS))
    bands, pixels = num_blocks(height, rows), out_height * out_width
    threads = round_up(bands * width, 32)
    columns = 2 * (2 * round_up((rows + 1) * out_width, vector) + round_up(vector + pixels, vector))
    while threads <= _MOST_THREADS:
        planes = round_up(channels * bands * rows * width, vector)
        memory = (planes + columns) * sizes.dtype.itemsize + (16 + threads // 32 * 8) * channels * sizes.taps
        if _fits(memory, sizes.device):
            constants = {"GRADIENT": 1, "WIDTH": width, "OUT_WIDTH": out_width, "OUT_PIXELS": pixels}
            return Launch.of(sizes, "gather_gradient", channels, rows, threads, memory, **constants)
        if channels == 1:
            return None
        channels //= 2
    return None


def _fits(memory: int, device: int) -> bool:
    """Whether two blocks find room, with what each reserves: one alone would wait for memory."""
    return 2 * memory + 1024 <= nvrtc.shared_memory(device)


def _try(find: Callable[[Sizes], Launch | None], sizes: Sizes) -> Launch | None:
    """What is found; None, and a warning the first time, where a device cannot have such kernels."""
    if sizes.device in _failed:
        return None
    try:
        return find(sizes)
    except (ImportError, RuntimeError) as error:
        _failed.add(sizes.device)
        warnings.warn(
            f"The backend 'triton' computes dense layers without its kernels in CUDA C++, slower: {error}.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


_failed: set[int] = set()


def make_columns(launch: Launch, input: Tensor, positions: Tensor, columns: Tensor) -> None:
    """Fills columns [.., C * T, L] of images [B, C, H, W], of any strides; L is a multiple of 16."""
    launch.kernel.launch(launch.blocks, launch.begin(input, positions, columns))


def gather_gradient(
    launch: Launch,
    columns: Tensor,
    input: Tensor,
    positions: Tensor,
    grad_input: Tensor | None,
    by_position: bool,
) -> Tensor | None:
    """Fills the input's gradient, if there is one, from the columns'; returns the positions' [C, T, 2] if asked for."""
    task = launch.begin(input, positions, columns)
    if grad_input is not None:
        launch.put(task.grad_input, grad_input)
    partials = None
    if by_position:
        partials = positions.new_empty((input.shape[0], *positions.shape), dtype=torch.float32)
        task.partials = partials.data_ptr()
    launch.kernel.launch(launch.blocks, task)
    return None if partials is None else partials.sum(0)

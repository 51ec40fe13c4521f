"""One call on CUDA: the numbers its kernels are told, its planes, and in which chunks it is worked off."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry, memory_format
from icnn_zoo.ops.triton_backend.launching import block_size, launch, num_blocks
from icnn_zoo.ops.triton_backend.limits import Limits
from icnn_zoo.ops.triton_backend.planes_kernels import planes_kernel, transpose_kernel
from icnn_zoo.ops.triton_backend.products import ALIGNMENT, round_up

# Zero columns after each row of a plane. A shift of up to that many columns needs no test for the plane's left and
# right border; a larger one takes a slower branch.
GAP = 16

MAX_INT = 2**31 - 1


@dataclass
class Gradients:
    """The gradients that are asked for: memory of the input's in its final form, and of the others in float32.

    A form fills them, or puts its own in the place of the others.
    """

    input: Tensor | None
    weight: Tensor | None
    positions: Tensor | None


def new_empty(like: Tensor, shape: Sequence[int], layout: torch.memory_format) -> Tensor:
    """Memory of a shape [B, C, H, W], with exactly the strides of a layout (``torch.empty`` takes longer)."""
    if layout == torch.channels_last and 0 not in shape:
        _, channels, height, width = shape
        return like.new_empty_strided(shape, (channels * height * width, 1, channels * width, channels))
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def empty_like(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """Memory of a tensor's shape, with exactly the strides of a layout (``torch.empty_like`` may keep others)."""
    return new_empty(tensor, tensor.shape, layout)


def take(tensor: Tensor, part: slice, axis: int = 0) -> Tensor:
    """Part of a tensor along an axis; all of it is the tensor itself, as a view takes a while to make."""
    if part.start == 0 and part.stop == tensor.shape[axis]:
        return tensor
    return tensor.narrow(axis, part.start, part.stop - part.start)


def empty_output(input: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Memory for an output in the input's memory format; in channels_last products may write a few pixels past it."""
    batch, outputs, height, width = shape
    pixels = batch * height * width
    layout = memory_format(input)
    if layout == torch.contiguous_format or pixels % ALIGNMENT == 0:
        return new_empty(input, shape, layout)
    memory = input.new_empty(round_up(pixels), outputs).untyped_storage()
    strides = (outputs * height * width, 1, outputs * width, outputs)
    return input.new_empty(0).set_(memory, 0, shape, strides)  # not a view, which in-place operators would refuse


def copy_planes(planes: Tensor, target: Tensor) -> None:
    """Copies contiguous images [S, C, H, W] to others of their shape, in tiles where those are in channels_last."""
    num_images, channels, height, width = target.shape
    if target.stride(1) != 1 or target.stride(2) != width * target.stride(3):
        target.copy_(planes)
        return
    channel_block, pixel_block = 32, 64
    launch(
        transpose_kernel,
        num_images * num_blocks(channels, channel_block) * num_blocks(height * width, pixel_block),
        planes,
        target,
        channels,
        height * width,
        target.stride(0),
        target.stride(3),
        BLOCK_CHANNELS=channel_block,
        BLOCK_PIXELS=pixel_block,
        num_warps=4,
    )


@dataclass(frozen=True)
class Numbers:
    """What a geometry is to the kernels."""

    pitch: int
    """Columns of a plane with its gap."""
    plane_size: int
    bounds: tuple[int, int]
    """Rows and columns past which every read is outside the input wherever the origin is."""
    last_free_shift: int
    """Largest shift by columns that leaves all reads within the plane's own gap."""
    largest: int
    """No number that a kernel computes within an image is larger."""
    gathering: tuple[int, ...]
    """What kernels are told, in the order of the list of the same name in ``sampling``."""

    @staticmethod
    @functools.lru_cache(1024)
    def of(geometry: Geometry, gap: int = GAP) -> Numbers:
        """Derives them, for planes with a gap of at least 2."""
        (height, width), out_width = geometry.input_size, geometry.output_size[1]
        reach = [(size - 1) * stride for size, stride in zip(geometry.output_size, geometry.stride, strict=True)]
        gap = min(gap, reach[1] + 2)
        pitch = width + gap
        row_bound, col_bound = (
            extent + size + abs(origin) + 2
            for extent, size, origin in zip(reach, geometry.input_size, geometry.origin, strict=True)
        )
        largest = (reach[0] + height + row_bound + abs(geometry.origin[0]) + 2) * (
            max(pitch, out_width) + col_bound + abs(geometry.origin[1])
        )
        plane_size, bounds = (height + 2) * pitch + 4, (row_bound, col_bound)
        gathering = (*geometry.input_size, *geometry.output_size, *geometry.origin, *bounds)
        return Numbers(pitch, plane_size, bounds, width + gap - 2 - reach[1], largest, gathering)


class Call:
    """The arguments of one call and the numbers that kernels need to know of them."""

    def __init__(
        self, input: Tensor, weight: Tensor, positions: Tensor, geometry: Geometry, limits: Limits, gap: int = GAP
    ) -> None:
        self.input, self.weight, self.positions = input, weight, positions
        self.geometry, self.limits = geometry, limits
        self.groups = geometry.groups
        self.num_outputs, self.group_channels, self.taps = weight.shape
        self.group_outputs = self.num_outputs // self.groups
        self.per_kernel = positions.dim() == 4
        self.out_pixels = geometry.output_size[0] * geometry.output_size[1]
        self.numbers = Numbers.of(geometry, gap)
        # In the order of the lists of the same names in `sampling`.
        self.gathering = self.numbers.gathering
        numbers = self.numbers
        self.sampling = (*self.gathering, numbers.pitch, numbers.plane_size, numbers.last_free_shift)
        self.grouping = (self.group_outputs, self.group_channels, self.taps)
        self.strides = {"STRIDE_ROW": geometry.stride[0], "STRIDE_COL": geometry.stride[1]}
        self._planes: Tensor | None = None

    def planes(self, images: slice) -> Tensor:
        """Planes [S, C, plane_size] of some images; those of all are made at once where they fit in a chunk."""
        if self._planes is None and self._plane_bytes() * self.input.shape[0] <= self.limits.chunk_bytes:
            self._planes = self.make_planes(self.input)
        return self.make_planes(self.input[images]) if self._planes is None else take(self._planes, images)

    def make_planes(self, source: Tensor) -> Tensor:
        """Copies images [S, C, H, W] of any strides to planes [S, C, plane_size]."""
        num_images, num_channels, height, width = source.shape
        pitch, plane_size = self.numbers.pitch, self.numbers.plane_size
        planes = source.new_empty(num_images, num_channels, plane_size)
        channels_last = source.stride(1) == 1 and num_channels > 1
        channel_block, pixel_block = (32, 64) if channels_last else (1, block_size(plane_size, 1024))
        launch(
            planes_kernel,
            num_images * num_blocks(num_channels, channel_block) * num_blocks(plane_size, pixel_block),
            source,
            planes,
            num_channels,
            height,
            width,
            *source.stride(),
            pitch,
            plane_size,
            BLOCK_CHANNELS=channel_block,
            BLOCK_PIXELS=pixel_block,
        )
        return planes

    def _plane_bytes(self) -> int:
        """Memory for the planes of an image."""
        return self.input.shape[1] * self.numbers.plane_size * self.input.element_size()

    def image_chunks(self, column_bytes: int = 0) -> tuple[slice, ...]:
        """Slices of the images, as many at a time as keep what one launch reads or writes within a chunk, evenly.

        This also makes 32 bits enough for the pixels' numbers and for where all but the first image start.
        """
        images = self.input.shape[0]
        output_bytes = self.num_outputs * self.out_pixels * self.input.element_size()
        fitting = max(1, self.limits.chunk_bytes // max(column_bytes, self._plane_bytes(), output_bytes))
        return _slices(images, num_blocks(images, num_blocks(images, fitting)))


@functools.lru_cache(1024)
def _slices(length: int, step: int) -> tuple[slice, ...]:
    return tuple(slice(first, min(first + step, length)) for first in range(0, length, step))

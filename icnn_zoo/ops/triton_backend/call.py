"""One call on CUDA: the numbers its kernels are told, its planes, and how kernels are launched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.triton_backend.columns_kernels import planes_kernel
from icnn_zoo.ops.triton_backend.limits import Limits

# Zero columns after each row of a plane. A shift of up to that many columns needs no test for the plane's left and
# right border; a larger one takes a slower branch.
GAP = 16

MAX_INT = 2**31 - 1


@dataclass(frozen=True)
class GradientSums:
    """What the backward fills: the input's gradient in its final form, the others as float32 sums, zero at first."""

    input: Tensor | None
    weight: Tensor | None
    positions: Tensor | None


def empty_like(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """Memory of a tensor's shape, with exactly the strides of a layout (``torch.empty_like`` may keep others)."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout)


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Runs a kernel as so many programs."""
    # Fusing is said, since Triton's default is about to change: its versions should give the same results.
    kernel[(programs,)](*args, **options, enable_fp_fusion=True)


def num_blocks(elements: int, block: int) -> int:
    """How many blocks cover so many elements."""
    return -(-elements // block)


def block_size(elements: int, largest: int) -> int:
    """A power of two for so many elements: full blocks, or one that is not much too large."""
    return min(largest, max(128, 1 << (elements - 1).bit_length()))


class Call:
    """The arguments of one call and the numbers that kernels need to know of them."""

    def __init__(self, input: Tensor, weight: Tensor, positions: Tensor, geometry: Geometry, limits: Limits) -> None:
        self.input, self.weight, self.positions = input, weight, positions
        self.geometry, self.limits = geometry, limits
        self.groups = geometry.groups
        self.num_outputs, self.group_channels, self.taps = weight.shape
        self.group_outputs = self.num_outputs // self.groups
        self.per_kernel = positions.dim() == 4
        (height, width), (out_height, out_width) = geometry.input_size, geometry.output_size
        self.out_pixels = out_height * out_width
        reach = [(size - 1) * stride for size, stride in zip(geometry.output_size, geometry.stride, strict=True)]
        gap = min(GAP, reach[1] + 2)
        pitch = width + gap
        # Past the bounds every read is outside the input wherever the origin is.
        bounds = [
            extent + size + abs(origin) + 2
            for extent, size, origin in zip(reach, geometry.input_size, geometry.origin, strict=True)
        ]
        plane_size = (height + 2) * pitch + 4
        largest = (reach[0] + height + bounds[0] + abs(geometry.origin[0]) + 2) * (
            max(pitch, out_width) + bounds[1] + abs(geometry.origin[1])
        )
        if largest > MAX_INT:
            raise ValueError(
                '`input` is too large for `backend`="triton", which numbers the pixels of a padded image with 32 bits; '
                f"got images of {height} x {width} and outputs of {out_height} x {out_width}."
            )
        self.plane_size = plane_size
        shared = {
            "height": height,
            "width": width,
            "out_height": out_height,
            "out_width": out_width,
            "origin_row": geometry.origin[0],
            "origin_col": geometry.origin[1],
            "bound_row": bounds[0],
            "bound_col": bounds[1],
            "STRIDE_ROW": geometry.stride[0],
            "STRIDE_COL": geometry.stride[1],
        }
        self.gathering: dict[str, Any] = shared
        self.fused: dict[str, Any] = {**shared, "pitch": pitch, "plane_size": plane_size}
        self.sampling: dict[str, Any] = {**self.fused, "last_free_shift": width + gap - 2 - reach[1]}
        self.grouping = {
            "group_outputs": self.group_outputs,
            "group_channels": self.group_channels,
            "taps": self.taps,
        }

    def planes(self, images: slice, channels: slice) -> Tensor:
        """Copies a part of the input to planes [S, c, plane_size]."""
        source = self.input[images, channels]
        num_images, num_channels = source.shape[:2]
        planes = source.new_empty(num_images, num_channels, self.plane_size)
        channels_last = source.stride(1) == 1 and num_channels > 1
        channel_block, pixel_block = (32, 64) if channels_last else (1, block_size(self.plane_size, 1024))
        grid = num_images * num_blocks(num_channels, channel_block) * num_blocks(self.plane_size, pixel_block)
        launch(
            planes_kernel,
            grid,
            source,
            planes,
            num_channels,
            *self.geometry.input_size,
            *source.stride(),
            self.sampling["pitch"],
            self.plane_size,
            BLOCK_CHANNELS=channel_block,
            BLOCK_PIXELS=pixel_block,
        )
        return planes

    def image_slabs(self, column_bytes: int = 0) -> Iterator[slice]:
        """Walks the images, as many at a time as keep what one launch reads or writes within a chunk.

        This also makes 32 bits enough for the pixels' numbers and for where all but the first image start.
        """
        size = self.input.element_size()
        output_bytes = self.num_outputs * self.out_pixels * size
        images = max(
            1, self.limits.chunk_bytes // max(column_bytes, self.input.shape[1] * self.plane_size * size, output_bytes)
        )
        for first in range(0, self.input.shape[0], images):
            yield slice(first, min(first + images, self.input.shape[0]))

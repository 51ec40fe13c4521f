"""Dense layers on CUDA by columns and matrix products."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import memory_format
from icnn_zoo.ops.triton_backend import columns_kernels
from icnn_zoo.ops.triton_backend.call import Call, Gradients, copy_planes, empty_like, take
from icnn_zoo.ops.triton_backend.launching import block_size, launch, num_blocks
from icnn_zoo.ops.triton_backend.products import ALIGNMENT, multiply, multiply_float32, round_up

# Columns of zeros between the rows of planes: enough for two at either side of a row.
PLANE_GAP = 2

# Rows of columns start at multiples of this many elements: fast kernels in cuBLAS.
_COLUMN_ALIGNMENT = 16

# Rows of a band, which are read at once; more need too many registers.
_BAND_ROWS = 8
# Lanes of a program; a warp works alone where it sums over its lanes for every tap: no barrier.
_LANES, _LANES_BACKWARD = 128, 32


@dataclass(frozen=True)
class _Bands:
    """How columns of images, the lanes, and bands of their rows are divided among programs."""

    rows: int
    lanes: int
    programs: int
    """Programs for each channel."""

    @staticmethod
    def of(lanes: int, rows: int, most_lanes: int) -> _Bands:
        """Makes all bands about as high."""
        band_rows = num_blocks(rows, num_blocks(rows, _BAND_ROWS))
        block = min(most_lanes, max(32, 1 << (lanes - 1).bit_length()))
        return _Bands(band_rows, block, num_blocks(lanes, block) * num_blocks(rows, band_rows))

    @property
    def constants(self) -> dict[str, int]:
        """What kernels are compiled for."""
        return {"ROWS": self.rows, "BLOCK": self.lanes, "num_warps": self.lanes // 32}


@dataclass(frozen=True)
class _Part:
    """Channels whose columns are made at once: several whole groups, or some of the channels of a single group."""

    groups: slice
    channels: slice
    """Channels within a group."""
    planes: slice
    """Channels within the input."""


_Chunks = tuple[tuple[slice, tuple[tuple[_Part, ...], ...]], ...]


def _column_chunks(call: Call) -> _Chunks:
    """Chunks of images; for each, parts that have groups in common stand together, to be summed."""
    channel_bytes = call.taps * call.out_pixels * call.input.element_size()
    image_bytes = channel_bytes * call.groups * call.group_channels
    if image_bytes <= call.limits.image_bytes:
        channels = call.groups * call.group_channels
    else:
        channels = max(1, call.limits.image_bytes // channel_bytes)
    parts = _parts(call.groups, call.group_channels, channels)
    return tuple((images, parts) for images in call.image_chunks(image_bytes))


@functools.lru_cache(1024)
def _parts(groups: int, group_channels: int, channels: int) -> tuple[tuple[_Part, ...], ...]:
    """Parts of at most so many channels."""
    step_groups = max(1, channels // group_channels)
    step_channels = min(channels, group_channels)
    parts = []
    for group in range(0, groups, step_groups):
        some = slice(group, min(group + step_groups, groups))
        summed = []
        for channel in range(0, group_channels, step_channels):
            within = slice(channel, min(channel + step_channels, group_channels))
            first = some.start * group_channels + within.start
            last = (some.stop - 1) * group_channels + within.stop
            summed.append(_Part(some, within, slice(first, last)))
        parts.append(tuple(summed))
    return tuple(parts)


def forward(call: Call, bias: Tensor | None, output: Tensor) -> None:
    """Fills the output [B, N, Ho, Wo] by a matrix product with stored columns."""
    weight = call.weight.view(call.groups, *call.grouping)  # [G, N / G, C / G, T]
    start = None if bias is None else bias.view(call.groups, -1, 1)
    # The rows of channels_last outputs are what the product writes, pixels at one stride, where that is aligned.
    in_place = memory_format(call.input) == torch.channels_last and call.num_outputs % ALIGNMENT == 0
    for images, parts in _column_chunks(call):
        planes = call.planes(images)
        length = _aligned_length(call, images)
        outputs = take(output, images)
        target = outputs.transpose(0, 1).unflatten(0, (call.groups, -1))  # [G, N / G, S, Ho, Wo]
        for summed in parts:
            groups = summed[0].groups
            rows = take(target, groups)
            bias_rows = None if start is None else take(start, groups)
            if len(summed) == 1:
                columns = _make_columns(call, planes, summed[0])
                factors = take(weight, groups).flatten(2)
                used = slice(0, length)
                if in_place:
                    strides = (call.group_outputs * outputs.stride(1), outputs.stride(1), outputs.stride(3))
                    out = rows.as_strided((*factors.shape[:2], length), strides)
                else:
                    out = take(columns.new_empty(*factors.shape[:2], columns.shape[2]), used, 2)
                product = multiply(factors, take(columns, used, 2), out, bias_rows)
                if in_place:
                    continue
                product = take(product, slice(0, planes.shape[0] * call.out_pixels), 2)
            else:
                product = _sum_parts(call, planes, summed, weight)
                product = product if bias_rows is None else product + bias_rows
            rows.copy_(product.unflatten(2, rows.shape[2:]))


def _aligned_length(call: Call, images: slice) -> int:
    """Pixels that a product covers: rounded up, as cuBLAS is slow otherwise, where no image follows and there is room.

    There is room for so many that the pixels of all images are rounded up.
    """
    length = (images.stop - images.start) * call.out_pixels
    room = round_up(len(call.input) * call.out_pixels) - images.start * call.out_pixels
    return round_up(length) if images.stop == len(call.input) and round_up(length) <= room else length


def _sum_parts(call: Call, planes: Tensor, parts: Sequence[_Part], weight: Tensor) -> Tensor:
    """Sums the products of the channels of one group in float32 [1, N / G, L]."""
    total = None
    for part in parts:
        columns = _make_columns(call, planes, part)[:, :, : planes.shape[0] * call.out_pixels]
        product = multiply_float32(weight[part.groups, :, part.channels].flatten(2), columns)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _empty_columns(call: Call, num_images: int, part: _Part) -> Tensor:
    """Memory for the columns of a part [g, c * T, L], L rounded up."""
    length = round_up(num_images * call.out_pixels, _COLUMN_ALIGNMENT)
    entries = (part.channels.stop - part.channels.start) * call.taps
    return call.input.new_empty(part.groups.stop - part.groups.start, entries, length)


def _make_columns(call: Call, planes: Tensor, part: _Part) -> Tensor:
    columns = _empty_columns(call, planes.shape[0], part)
    _launch_columns(call, planes, part, columns, gradient=False, store=True)
    return columns


def _launch_columns(
    call: Call, planes: Tensor, part: _Part, columns: Tensor, *, gradient: bool, store: bool
) -> Tensor | None:
    """Runs ``columns_kernel``; returns the positions' gradient [c, T, 2] of a part with ``gradient``."""
    planes = take(planes, part.planes, 1)
    channels, lanes = planes.shape[1], planes.shape[0] * call.geometry.output_size[1]
    bands = _Bands.of(lanes, call.geometry.output_size[0], _LANES_BACKWARD if gradient else _LANES)
    partials = planes.new_empty((bands.programs, channels, call.taps, 2), dtype=torch.float32) if gradient else None
    launch(
        columns_kernels.columns_kernel,
        channels * bands.programs,
        planes,
        take(call.positions, part.planes),
        columns,
        planes if partials is None else partials,
        planes.stride(0),
        channels,
        call.taps,
        lanes,
        columns.shape[2],
        *call.gathering,
        call.numbers.pitch,
        call.numbers.plane_size,
        **call.strides,
        GRADIENT=gradient,
        STORE=store,
        **bands.constants,
    )
    return None if partials is None else partials.sum(0)


def backward(call: Call, grad_output: Tensor, grads: Gradients) -> None:
    """Fills the gradients that are asked for."""
    weight = call.weight.view(call.groups, *call.grouping)  # [G, N / G, C / G, T]
    grad_rows = _pixels_as_rows(grad_output).t().unflatten(0, (call.groups, -1))  # [G, N / G, L]
    for images, groups_parts in _column_chunks(call):
        first, length = images.start * call.out_pixels, _aligned_length(call, images)
        span, pixels = slice(first, first + length), (images.stop - images.start) * call.out_pixels
        for part in (part for summed in groups_parts for part in summed):
            grad_part = take(take(grad_rows, part.groups), span, 2)
            columns = _empty_columns(call, images.stop - images.start, part)
            used = take(columns, slice(0, grad_part.shape[2]), 2)
            if grads.input is not None or grads.positions is not None:
                factors = take(take(weight, part.groups), part.channels, 2).flatten(2)
                multiply(factors.transpose(1, 2), grad_part, used)
            if grads.input is not None:
                _input_gradient(call, images, part, columns, grads.input)
            if grads.positions is None and grads.weight is None:
                continue
            by_position = _launch_columns(
                call,
                call.planes(images),
                part,
                columns,
                gradient=grads.positions is not None,
                store=grads.weight is not None,
            )
            if grads.positions is not None and by_position is not None:
                grads.positions = _add(grads.positions, by_position, images, part)
            if grads.weight is not None:
                if length > pixels:  # what lies past the last pixel is summed as well: zeros, whatever the weights are
                    used[:, :, pixels:].zero_()
                product = multiply_float32(grad_part, used.transpose(1, 2)).unflatten(2, (-1, call.taps))
                by_weight = _add(grads.weight.view_as(weight), product, images, part)
                grads.weight = by_weight.view_as(call.weight)


def _add(total: Tensor, value: Tensor, images: slice, part: _Part) -> Tensor:
    """The total after adding what a part of a chunk of images gives; at first its memory is not initialized.

    Args:
        total: By channel [C, ...], or by group, output and channel [G, N / G, C / G, ...].
        value: Those of the part.
        images: The images.
        part: The part.
    """
    if images.start == 0 and value.shape == total.shape:
        return value
    place = total[part.planes] if total.dim() == 3 else total[part.groups, :, part.channels]
    if images.start == 0:
        place.copy_(value)
    else:
        place.add_(value)
    return total


def _pixels_as_rows(grad_output: Tensor) -> Tensor:
    """The output's gradient as [B * Ho * Wo, N], rows and numbers of them rounded up to what cuBLAS is fast with.

    A channels_last one of such sizes is that already; of others a copy is filled up with zeros.
    """
    batch, outputs, height, width = grad_output.shape
    length = batch * height * width
    if outputs % ALIGNMENT == 0 and length % ALIGNMENT == 0:
        pixels = grad_output.permute(0, 2, 3, 1)
        if pixels.is_contiguous():
            return pixels.view(length, outputs)
    rows = grad_output.new_empty(round_up(length), round_up(outputs))[:, :outputs]
    rows[length:] = 0
    target = rows[:length].unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)
    if grad_output.is_contiguous():
        copy_planes(grad_output, target)
    else:
        target.copy_(grad_output)
    return rows


def _input_gradient(call: Call, images: slice, part: _Part, grad_columns: Tensor, grad_input: Tensor) -> None:
    target = take(take(grad_input, images), part.planes, 1)
    in_place = memory_format(call.input) == torch.contiguous_format
    planes = target if in_place else empty_like(target, torch.contiguous_format)
    num_images, channels, height, width = target.shape
    positions = take(call.positions, part.planes)
    if call.geometry.stride == (1, 1):
        bands = _Bands.of(num_images * width, height, _LANES_BACKWARD)
        launch(
            columns_kernels.banded_input_gradient_kernel,
            channels * bands.programs,
            grad_columns,
            positions,
            planes,
            call.taps,
            num_images * width,
            grad_columns.shape[2],
            planes.stride(0),
            *call.gathering,
            **bands.constants,
        )
    else:
        length = num_images * height * width
        block = block_size(length, 512)
        launch(
            columns_kernels.input_gradient_kernel,
            channels * num_blocks(length, block),
            grad_columns,
            positions,
            planes,
            call.taps,
            length,
            grad_columns.shape[2],
            planes.stride(0),
            *call.gathering,
            **call.strides,
            BLOCK=block,
            num_warps=4,
        )
    if not in_place:
        copy_planes(planes, target)

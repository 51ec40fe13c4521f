"""Dense layers on CUDA by columns and matrix products."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import memory_format
from icnn_zoo.ops.triton_backend import columns_kernels, staged
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
    weight = _weight_of_groups(call)
    start = None if bias is None else bias.view(call.groups, -1, 1)
    # The rows of channels_last outputs are what the product writes, pixels at one stride, where that is aligned.
    in_place = memory_format(call.input) == torch.channels_last and call.num_outputs % ALIGNMENT == 0
    for images, parts in _column_chunks(call):
        length = _aligned_length(call, images)
        outputs = take(output, images)
        for summed in parts:
            groups = summed[0].groups
            size = (groups.stop - groups.start, call.group_outputs, length)
            first = groups.start * call.group_outputs
            bias_rows = None if start is None else take(start, groups)
            if len(summed) == 1:
                columns = _make_columns(call, images, summed[0])
                factors, used = take(weight, groups), slice(0, length)
                if in_place:
                    offset = outputs.storage_offset() + first  # channels lie side by side
                    out = outputs.as_strided(size, (call.group_outputs, 1, outputs.stride(3)), offset)
                    multiply(factors, take(columns, used, 2), out, bias_rows)
                    continue
                out = take(columns.new_empty(*size[:2], columns.shape[2]), used, 2)
                product = multiply(factors, take(columns, used, 2), out, bias_rows)
                product = take(product, slice(0, (images.stop - images.start) * call.out_pixels), 2)
            else:
                product = _sum_parts(call, images, summed, weight)
                product = product if bias_rows is None else product + bias_rows
            rows = take(outputs, slice(first, first + size[0] * size[1]), 1).transpose(0, 1)
            rows.copy_(product.reshape(rows.shape))


def _weight_of_groups(call: Call) -> Tensor:
    """The weights [G, N / G, C / G * T]."""
    return call.weight.view(call.groups, call.group_outputs, -1)


def _aligned_length(call: Call, images: slice) -> int:
    """Pixels that a product covers: rounded up, as cuBLAS is slow otherwise, where no image follows and there is room.

    There is room for so many that the pixels of all images are rounded up.
    """
    length = (images.stop - images.start) * call.out_pixels
    room = round_up(len(call.input) * call.out_pixels) - images.start * call.out_pixels
    return round_up(length) if images.stop == len(call.input) and round_up(length) <= room else length


def _sum_parts(call: Call, images: slice, parts: Sequence[_Part], weight: Tensor) -> Tensor:
    """Sums the products of the channels of one group in float32 [1, N / G, L]."""
    total = None
    for part in parts:
        columns = _make_columns(call, images, part)[:, :, : (images.stop - images.start) * call.out_pixels]
        product = multiply_float32(take(take(weight, part.groups), _entries(call, part), 2), columns)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _entries(call: Call, part: _Part) -> slice:
    """The channels and taps of a part within its groups' weights [.., C / G * T]."""
    return slice(part.channels.start * call.taps, part.channels.stop * call.taps)


def _empty_columns(call: Call, num_images: int, part: _Part) -> Tensor:
    """Memory for the columns of a part [g, c * T, L], L rounded up."""
    length = round_up(num_images * call.out_pixels, _COLUMN_ALIGNMENT)
    entries = (part.channels.stop - part.channels.start) * call.taps
    return call.input.new_empty(part.groups.stop - part.groups.start, entries, length)


def _make_columns(call: Call, images: slice, part: _Part) -> Tensor:
    columns = _empty_columns(call, images.stop - images.start, part)
    _fill_columns(call, images, part, columns)
    return columns


def _fill_columns(call: Call, images: slice, part: _Part, columns: Tensor) -> None:
    launch = _staged(staged.columns_launch, call, images, part)
    if launch is None:
        _launch_columns(call, images, part, columns, gradient=False, store=True)
    else:
        staged.make_columns(launch, *_inputs(call, images, part), columns)


def _staged(find: Callable[[staged.Sizes], staged.Launch | None], call: Call, images: slice, part: _Part) -> Any:
    """A launch of a kernel that holds planes in shared memory, or None."""
    if not call.limits.staged or call.geometry.stride != (1, 1):
        return None
    num_images, channels = images.stop - images.start, part.planes.stop - part.planes.start
    dtypes = (call.input.dtype, call.positions.dtype)
    return find(staged.Sizes(call.geometry, num_images, channels, call.taps, *dtypes, call.input.get_device()))


def _inputs(call: Call, images: slice, part: _Part) -> tuple[Tensor, Tensor]:
    """Images and positions of a part."""
    return take(take(call.input, images), part.planes, 1), take(call.positions, part.planes)


def _launch_columns(
    call: Call, images: slice, part: _Part, columns: Tensor, *, gradient: bool, store: bool
) -> Tensor | None:
    """Runs ``columns_kernel``; returns the positions' gradient [c, T, 2] of a part with ``gradient``."""
    planes = take(call.planes(images), part.planes, 1)
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
    weight = _weight_of_groups(call)
    rows = _pixels_as_rows(grad_output)
    strides = (call.group_outputs * rows.stride(1), rows.stride(1), rows.stride(0))
    grad_rows = rows.as_strided((call.groups, call.group_outputs, rows.shape[0]), strides)
    for images, groups_parts in _column_chunks(call):
        first, length = images.start * call.out_pixels, _aligned_length(call, images)
        span, pixels = slice(first, first + length), (images.stop - images.start) * call.out_pixels
        for part in (part for summed in groups_parts for part in summed):
            grad_part = take(take(grad_rows, part.groups), span, 2)
            columns = _empty_columns(call, images.stop - images.start, part)
            used = take(columns, slice(0, grad_part.shape[2]), 2)
            if grads.input is not None or grads.positions is not None:
                factors = take(take(weight, part.groups), _entries(call, part), 2)
                multiply(factors.transpose(1, 2), grad_part, used)
            by_position = _gather_gradient(call, images, part, columns, grads)
            if grads.positions is not None and by_position is not None:
                grads.positions = _add(grads.positions, by_position, images, part.planes)
            if grads.weight is not None:
                if length > pixels:  # what lies past the last pixel is summed as well: zeros, whatever the weights are
                    used[:, :, pixels:].zero_()
                product = multiply_float32(grad_part, used.transpose(1, 2))
                by_weight = _add(grads.weight.view_as(weight), product, images, part.groups, _entries(call, part))
                grads.weight = by_weight.view_as(call.weight)


def _gather_gradient(call: Call, images: slice, part: _Part, columns: Tensor, grads: Gradients) -> Tensor | None:
    """Fills the input's gradient and returns the positions', where asked for, from the columns', which columns replace.

    Columns are made where weights need them.
    """
    launch = None
    if grads.input is not None or grads.positions is not None:
        launch = _staged(staged.gradient_launch, call, images, part)
    if launch is not None:
        target = None if grads.input is None else take(take(grads.input, images), part.planes, 1)
        inputs = _inputs(call, images, part)
        by_position = staged.gather_gradient(launch, columns, *inputs, target, grads.positions is not None)
        if grads.weight is not None:
            _fill_columns(call, images, part, columns)
        return by_position
    if grads.input is not None:
        _input_gradient(call, images, part, columns, grads.input)
    if grads.positions is None:
        if grads.weight is not None:
            _fill_columns(call, images, part, columns)
        return None
    return _launch_columns(call, images, part, columns, gradient=True, store=grads.weight is not None)


def _add(total: Tensor, value: Tensor, images: slice, first: slice, last: slice | None = None) -> Tensor:
    """The total after adding what a part of a chunk of images gives; at first its memory is not initialized.

    Args:
        total: By channel [C, T, 2], or by group, output and entry [G, N / G, C / G * T].
        value: Those of the part.
        images: The images.
        first: Where the part is along the first axis.
        last: Where it is along the last one; None for all.
    """
    if images.start == 0 and value.shape == total.shape:
        return value
    place = total[first] if last is None else total[first, ..., last]
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
    if outputs % ALIGNMENT == 0 and length % ALIGNMENT == 0 and _is_channels_last(grad_output):
        return grad_output.as_strided((length, outputs), (outputs, 1))
    rows = grad_output.new_empty(round_up(length), round_up(outputs))[:, :outputs]
    rows[length:] = 0
    target = rows[:length].unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)
    if grad_output.is_contiguous():
        copy_planes(grad_output, target)
    else:
        target.copy_(grad_output)
    return rows


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


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

"""Dense layers on CUDA by columns and matrix products, and layers with few outputs by both at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry, memory_format
from icnn_zoo.ops.triton_backend import columns_kernels
from icnn_zoo.ops.triton_backend.call import GAP, MAX_INT, Call, Gradients, empty_like, take
from icnn_zoo.ops.triton_backend.launching import block_size, launch, num_blocks
from icnn_zoo.ops.triton_backend.limits import Limits
from icnn_zoo.ops.triton_backend.products import ALIGNMENT, follows_tf32, multiply, multiply_float32, round_up

# Rows of columns start at multiples of this many elements: vector stores, and fast kernels in cuBLAS.
_COLUMN_ALIGNMENT = 16

# Pixels, entries (channels times taps) and outputs of a tile of columns made in registers: 128 registers a thread, so
# 16 warps at once.
_FUSED_TILE = (64, 16)
_FUSED_OUTPUTS = 32


def fits_fused(weight: Tensor, geometry: Geometry, limits: Limits) -> bool:
    """Whether columns are multiplied as they are made: few outputs, and pixels that 32 bits can number in a tile."""
    largest = MAX_INT // ((_FUSED_TILE[1] + 2) * 4)
    small = (geometry.input_size[0] + 2) * (geometry.input_size[1] + GAP) <= largest
    return small and weight.shape[0] // geometry.groups <= min(limits.fused_outputs, _FUSED_OUTPUTS)


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
    weight = call.weight.unflatten(0, (call.groups, -1))  # [G, N / G, C / G, T]
    start = None if bias is None else bias.view(call.groups, -1, 1)
    # The rows of channels_last outputs are what the product writes, pixels at one stride, where that is aligned.
    in_place = memory_format(call.input) == torch.channels_last and call.num_outputs % ALIGNMENT == 0
    for images, parts in _column_chunks(call):
        planes = call.planes(images)
        length = planes.shape[0] * call.out_pixels
        target = take(output, images).transpose(0, 1).unflatten(0, (call.groups, -1))  # [G, N / G, S, Ho, Wo]
        for summed in parts:
            groups = summed[0].groups
            rows = take(target, groups)
            bias_rows = None if start is None else take(start, groups)
            if len(summed) == 1:
                columns = _make_columns(call, planes, summed[0])
                factors = take(weight, groups).flatten(2)
                out = rows.flatten(2) if in_place else columns.new_empty(*factors.shape[:2], columns.shape[2])
                used = slice(0, length)
                product = multiply(factors, take(columns, used, 2), take(out, used, 2), bias_rows)
                if in_place:
                    continue
            else:
                product = _sum_parts(call, planes, summed, weight)
                product = product if bias_rows is None else product + bias_rows
            rows.copy_(product.unflatten(2, rows.shape[2:]))


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
    length, channels = planes.shape[0] * call.out_pixels, planes.shape[1]
    # With a sum over each block one warp works alone: no barrier for each tap.
    block, warps = (block_size(length, 256), 1) if gradient else (block_size(length, 1024), 4)
    # Stores of 32 bits a lane: wider ones would spread a warp's reads over more cache lines.
    vector = 4 // columns.element_size()
    blocks = num_blocks(length, block)
    partials = planes.new_empty((blocks, channels, call.taps, 2), dtype=torch.float32) if gradient else None
    launch(
        columns_kernels.columns_kernel,
        channels * blocks,
        planes,
        take(call.positions, part.planes),
        columns,
        planes if partials is None else partials,
        planes.stride(0),
        channels,
        call.taps,
        length,
        columns.shape[2] // vector,
        *call.sampling,
        **call.strides,
        GRADIENT=gradient,
        STORE=store,
        VECTOR=vector,
        BLOCK=block,
        num_warps=warps,
    )
    return None if partials is None else partials.sum(0)


def backward(call: Call, grad_output: Tensor, grads: Gradients) -> None:
    """Fills the gradients that are asked for."""
    weight = call.weight.unflatten(0, (call.groups, -1))  # [G, N / G, C / G, T]
    grad_rows = _pixels_as_rows(grad_output).t().unflatten(0, (call.groups, -1))  # [G, N / G, B * Ho * Wo]
    for images, groups_parts in _column_chunks(call):
        span = slice(images.start * call.out_pixels, images.stop * call.out_pixels)
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
                product = multiply_float32(grad_part, used.transpose(1, 2)).unflatten(2, (-1, call.taps))
                by_weight = _add(grads.weight.view_as(weight), product, images, part)
                grads.weight = by_weight.view_as(call.weight)


def _add(total: Tensor, value: Tensor, images: slice, part: _Part) -> Tensor:
    """The total after adding what a part of a chunk of images gives; at first its memory is not initialised.

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
    """The output's gradient as [B * Ho * Wo, N], which a channels_last one is; others and unaligned ones are copied."""
    pixels = grad_output.permute(0, 2, 3, 1)
    outputs = pixels.shape[3]
    if outputs % ALIGNMENT == 0:
        return pixels.reshape(-1, outputs)
    rows = grad_output.new_empty(pixels.shape[:3].numel(), round_up(outputs))[:, :outputs]
    rows.unflatten(0, pixels.shape[:3]).copy_(pixels)
    return rows


def _input_gradient(call: Call, images: slice, part: _Part, grad_columns: Tensor, grad_input: Tensor) -> None:
    target = take(take(grad_input, images), part.planes, 1)
    in_place = memory_format(call.input) == torch.contiguous_format
    planes = target if in_place else empty_like(target, torch.contiguous_format)
    num_images, channels, height, width = target.shape
    length = num_images * height * width
    block = block_size(length, 512)
    launch(
        columns_kernels.input_gradient_kernel,
        channels * num_blocks(length, block),
        grad_columns,
        take(call.positions, part.planes),
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
        target.copy_(planes)


def fused_forward(call: Call, bias: Tensor | None, output: Tensor) -> None:
    """Fills the output [B, N, Ho, Wo] by columns that are multiplied as they are made."""
    entries = call.group_channels * call.taps
    pixels, step = _FUSED_TILE
    for images in call.image_chunks():
        planes = call.planes(images)
        length = planes.shape[0] * call.out_pixels
        programs = call.groups * num_blocks(length, pixels)
        # Few pixels: several programs share the sum over the entries, at least 16 steps each.
        splits = max(1, min(call.limits.programs // programs, entries // (16 * step)))
        share = num_blocks(num_blocks(entries, splits), step) * step
        splits = num_blocks(entries, share)
        target = output[images]
        out = target if splits == 1 else planes.new_empty((splits, *target.shape), dtype=torch.float32)
        strides = (0, *out.stride()) if splits == 1 else out.stride()
        launch(
            columns_kernels.fused_forward_kernel,
            splits * programs,
            planes,
            call.weight,
            call.positions,
            call.weight if bias is None else bias,
            out,
            call.groups,
            *call.grouping,
            length,
            share,
            *strides[:3],
            strides[4],
            *call.sampling,
            **call.strides,
            HAS_BIAS=bias is not None and splits == 1,
            PRECISION="tf32" if follows_tf32() else "ieee",
            BLOCK_PIXELS=pixels,
            BLOCK_OUTPUTS=16 if call.group_outputs <= 16 else _FUSED_OUTPUTS,
            BLOCK_ENTRIES=step,
            num_warps=4,  # eight are known to be miscompiled in loops like this one
            num_stages=1,  # prefetching into shared memory, element by element, spills registers
        )
        if splits > 1:
            total = out.sum(0)
            target.copy_(total if bias is None else total + bias[:, None, None])

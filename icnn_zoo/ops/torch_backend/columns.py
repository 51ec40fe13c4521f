"""The two-step irregular convolution and its backward: columns, then matrix products, a block at a time.

A column is a channel's plane as one tap sees it. Columns are made for a slab of images and a block of channels at a
time and never kept: the backward makes them again, so that memory stays bounded. Every sum has a fixed order: two runs
agree bit for bit.

Letters used in shapes: B images, C input channels, N output channels, G groups, T taps, S images of a slab, c channels
of a block, L = length of a flattened slab of one column.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry, memory_format
from icnn_zoo.ops.torch_backend.limits import Limits
from icnn_zoo.ops.torch_backend.wide import WideColumns
from icnn_zoo.ops.torch_backend.windows import Block, WindowColumns

Columns = WindowColumns | WideColumns
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _blocks(
    maker: Columns, geometry: Geometry, output: Tensor, group_channels: int, elements: int, limits: Limits
) -> Iterator[Block]:
    """Walks slabs of images, then blocks of channels, of so many elements of columns."""
    if output.numel() == 0:
        return
    images = max(1, limits.slab_area // output[0, 0].numel())
    for image in range(0, output.shape[0], images):
        slab = slice(image, min(image + images, output.shape[0]))
        columns = (slab.stop - slab.start) * output[0, 0].numel() * maker.taps
        channels = max(1, elements // columns)
        step_groups = max(1, channels // group_channels)
        step_channels = min(channels, group_channels)
        for group in range(0, geometry.groups, step_groups):
            for channel in range(0, group_channels, step_channels):
                yield Block(
                    slab,
                    slice(group, min(group + step_groups, geometry.groups)),
                    slice(channel, min(channel + step_channels, group_channels)),
                    group_channels,
                )


def forward(
    maker: Columns, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, limits: Limits
) -> Tensor:
    """Computes the convolution with a shape per input channel.

    Args:
        maker: What makes the columns of ``input``.
        input: Images [B, C, H, W].
        weight: Weights [N, C / G, T].
        bias: Bias [N] or None.
        geometry: Sizes of the call.
        limits: Sizes to work in.

    Returns:
        Output [B, N, Ho, Wo] in the memory format of ``input``.
    """
    height, width = geometry.output_size
    num_outputs, group_channels = weight.shape[:2]
    grouped = weight.unflatten(0, (geometry.groups, -1))  # [G, N / G, C / G, T]
    output = input.new_empty(input.shape[0], num_outputs, height, width)
    start = input.new_zeros(num_outputs, 1) if bias is None else bias[:, None]
    start = start.to(maker.dtype).unflatten(0, (geometry.groups, -1))  # [G, N / G, 1]
    slab, total = slice(0, 0), output
    for block in _blocks(maker, geometry, output, group_channels, maker.block_elements, limits):
        if block.images != slab:
            _write_slab(output, slab, total)
            slab = block.images
            total = _start_slab(output, slab, start)
        columns = maker.columns(block)
        _add_product(
            total[block.groups],
            grouped[block.groups, :, block.channels].flatten(2),
            columns.unflatten(0, (block.groups.stop - block.groups.start, -1)),
        )
    _write_slab(output, slab, total)
    return output.contiguous(memory_format=memory_format(input))


def _start_slab(output: Tensor, slab: slice, start: Tensor) -> Tensor:
    """Sums [G, N / G, L] of a slab, with what they start from [G, N / G, 1]; those of one image are its output."""
    if _lies_in(output, slab, start.dtype):
        return output[slab.start].flatten(1).unflatten(0, start.shape[:2]).copy_(start)
    return start.expand(-1, -1, output[slab, 0].numel()).contiguous()


def _write_slab(output: Tensor, slab: slice, total: Tensor) -> None:
    """Copies the sums [G, N / G, L] of a slab to its images of the output, where they are not there already."""
    if slab.stop > slab.start and not _lies_in(output, slab, total.dtype):
        images = total.unflatten(-1, (-1, *output.shape[2:])).movedim(2, 0)  # [S, G, N / G, Ho, Wo]
        output[slab].unflatten(1, total.shape[:2]).copy_(images)


def _lies_in(output: Tensor, slab: slice, dtype: torch.dtype) -> bool:
    """Whether the sums of a slab, in this dtype, are a piece of the output."""
    return slab.stop - slab.start == 1 and output.dtype == dtype


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Total += left @ right over a batch of groups; half precision factors are summed into the float32 total."""
    right = right.to(left.dtype)
    if total.dtype != left.dtype:
        total += torch.bmm(left, right)
    elif total.shape[0] == 1:
        total[0].addmm_(left[0], right[0])
    else:
        total.baddbmm_(left, right)


def backward(
    maker: Columns,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    geometry: Geometry,
    limits: Limits,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Computes the gradients of :func:`forward`.

    Args:
        maker: What makes the columns of ``input``.
        grad_output: Gradient of the output [B, N, Ho, Wo].
        input: Images [B, C, H, W].
        weight: Weights [N, C / G, T].
        positions: Positions [C, T, 2], with spreads [C, T, 4].
        geometry: Sizes of the call.
        limits: Sizes to work in.
        needs: Whether the gradients of input, weight and positions are wanted.

    Returns:
        Gradients of input, weight and positions, None where not wanted.
    """
    needs_input, needs_weight, needs_positions = needs
    num_outputs, group_channels, taps = weight.shape
    grouped = weight.unflatten(0, (geometry.groups, -1))
    grad_input = torch.zeros_like(input, memory_format=torch.contiguous_format) if needs_input else None
    grad_weight = None
    if needs_weight:
        grad_weight = grouped.new_zeros(*grouped.shape[:2], group_channels * taps, dtype=maker.dtype)
    grad_shift = (
        positions.new_zeros(positions.shape[0] * taps, positions.shape[2], dtype=maker.dtype)
        if needs_positions
        else None
    )
    slab, grad_rows, grad_columns = slice(0, 0), grad_output, grad_output.new_empty(0)
    for block in _blocks(maker, geometry, grad_output, group_channels, maker.grad_block_elements, limits):
        if block.images != slab:
            slab = block.images
            images = grad_output[slab].transpose(0, 1)
            grad_rows = images.reshape(geometry.groups, num_outputs // geometry.groups, -1)
        grad_block = grad_rows[block.groups]
        block_weight = grouped[block.groups, :, block.channels].flatten(2)
        if needs_input or needs_positions:
            shape = (grad_block.shape[0], block_weight.shape[2], grad_block.shape[2])
            grad_columns = grad_columns if grad_columns.shape == shape else grad_block.new_empty(shape)
            torch.bmm(block_weight.transpose(1, 2), grad_block, out=grad_columns)
            planes, columns, shift = maker.gradients(block, grad_columns.flatten(0, 1).to(maker.dtype), needs)
            if grad_input is not None:
                assert planes is not None
                grad_input[slab, block.planes] = planes.transpose(0, 1)
            if grad_shift is not None:
                assert shift is not None
                grad_shift[block.planes.start * taps : block.planes.stop * taps] += shift
        else:
            columns = maker.columns(block)
        if grad_weight is not None:
            assert columns is not None
            columns = columns.unflatten(0, (block.groups.stop - block.groups.start, -1))
            in_group = slice(block.channels.start * taps, block.channels.stop * taps)
            _add_product(
                grad_weight[block.groups, :, in_group],
                grad_block,
                columns.transpose(1, 2),
            )
    return (
        None if grad_input is None else grad_input.contiguous(memory_format=memory_format(input)),
        None if grad_weight is None else grad_weight.reshape(weight.shape).to(weight.dtype),
        None if grad_shift is None else grad_shift.reshape(positions.shape).to(positions.dtype),
    )

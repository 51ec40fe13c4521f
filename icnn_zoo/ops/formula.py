"""The operator in standard operators: what exporters decompose it into, and where higher derivatives come from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from icnn_zoo.ops import interpolation
from icnn_zoo.ops.geometry import Geometry, memory_format
from icnn_zoo.ops.interpolation import OFFSETS


def irregular_conv2d(
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str = "auto",
) -> Tensor:
    """The operator as a differentiable, traceable formula of standard operators; all columns are held in memory."""
    geometry = Geometry.of(input.shape[-2:], weight.shape[-2:], stride, padding, dilation, groups)
    cell, fraction = interpolation.split(interpolation.join_unknown(positions))
    integer = cell.nan_to_num(0.0).clamp(-(2.0**30), 2.0**30).long()
    num_outputs, group_channels, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    grouped = input.unflatten(1, (groups, group_channels))
    per_kernel = positions.dim() == 4
    group = torch.arange(groups, device=input.device).repeat_interleave(
        (num_outputs if per_kernel else groups) // groups
    )
    owner_shape = (group.shape[0], group_channels, taps, 1, 1)
    channel = torch.arange(group_channels, device=input.device)[:, None, None, None]

    def corner(down: int, right: int) -> Tensor:
        rows, cols = (
            torch.arange(geometry.output_size[axis], device=input.device) * geometry.stride[axis]
            + geometry.origin[axis]
            + step
            + integer[..., axis].reshape(*owner_shape[:3], 1)
            for axis, step in ((0, down), (1, right))
        )
        height, width = geometry.input_size
        inside = ((rows >= 0) & (rows < height))[..., None] & ((cols >= 0) & (cols < width))[..., None, :]
        index = (
            group[:, None, None, None, None],
            channel,
            rows.clamp(0, height - 1)[..., None],
            cols.clamp(0, width - 1)[..., None, :],
        )
        return grouped[:, *index] * inside.to(input.dtype)  # [B, owners, C / G, T, Ho, Wo]

    by_row, by_col = (interpolation.weights(fraction[..., axis].reshape(owner_shape)) for axis in range(2))
    rows = [
        reduce(torch.add, (corner(down, right) * weight for right, weight in zip(OFFSETS, by_col, strict=True)))
        for down in OFFSETS
    ]
    columns = reduce(torch.add, (row * weight for row, weight in zip(rows, by_row, strict=True))).to(input.dtype)
    # What a tap at a position that is no number reads is no number, whichever pixel changes.
    unknown = (fraction * 0).sum(-1).detach().reshape(owner_shape)
    planes = grouped.sum((-2, -1))[:, group, :, None, None, None] * unknown
    columns = columns + torch.where(unknown.isnan(), planes, torch.zeros_like(planes)).to(input.dtype)
    if per_kernel:
        output = torch.einsum("bncthw,nct->bnhw", columns, weight.flatten(2))
    else:
        grouped_weight = weight.flatten(2).unflatten(0, (groups, -1))
        output = torch.einsum("bgcthw,gnct->bgnhw", columns, grouped_weight).flatten(1, 2)
    output = output if bias is None else output + bias[:, None, None]
    return output.contiguous(memory_format=memory_format(input))

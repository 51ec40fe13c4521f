"""The operator in standard operators: what exporters decompose it into, and where higher derivatives come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from icnn_zoo.ops import interpolation
from icnn_zoo.ops.geometry import Geometry, memory_format
from icnn_zoo.ops.interpolation import OFFSETS, join_unknown
from icnn_zoo.ops.tap_reading import read_axis
from icnn_zoo.ops.wide_interpolation import reach_of, weigh_differentiably


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
    interpolation: str = "bilinear",
    extent: Sequence[int] = (),
) -> Tensor:
    """The operator as a differentiable, traceable formula of standard operators; all columns are held in memory."""
    sizes = (input.shape[-2:], weight.shape[-2:], stride, padding, dilation, groups)
    geometry = Geometry.of(*sizes, interpolation, extent)
    columns = (_bilinear_columns if interpolation == "bilinear" else _wide_columns)(input, weight, positions, geometry)
    if positions.dim() == 4:
        output = torch.einsum("bncthw,nct->bnhw", columns, weight.flatten(2))
    else:
        grouped_weight = weight.flatten(2).unflatten(0, (groups, -1))
        output = torch.einsum("bgcthw,gnct->bgnhw", columns, grouped_weight).flatten(1, 2)
    output = output if bias is None else output + bias[:, None, None]
    return output.contiguous(memory_format=memory_format(input))


def _wide_columns(input: Tensor, weight: Tensor, taps: Tensor, geometry: Geometry) -> Tensor:
    """What each tap of each owner reads [B, owners, C / G, T, Ho, Wo]: by a matrix of rows and one of columns.

    Owners are the outputs in the full version, else the groups.
    """
    taps = join_unknown(taps)
    group_channels = weight.shape[1]
    grouped = input.unflatten(1, (geometry.groups, group_channels))
    owners = taps if taps.dim() == 4 else taps.unflatten(0, (geometry.groups, group_channels))
    if taps.dim() == 4:
        grouped = grouped.repeat_interleave(taps.shape[0] // geometry.groups, dim=1)
    dtype = torch.promote_types(input.dtype, torch.float32)
    matrices = []
    for axis in range(2):
        outputs = torch.arange(geometry.output_size[axis], device=input.device) * geometry.stride[axis]
        pixels = torch.arange(geometry.input_size[axis], device=input.device)
        read = pixels - (outputs + geometry.origin[axis])[:, None]  # [outputs, pixels]
        bound = math.ceil(reach_of(geometry.reading.interpolation, 1.0)) * geometry.largest_spread + 1
        matrices.append(weigh_differentiably(read_axis(owners, axis, geometry.reading), read, bound, dtype))
    rows, cols = matrices  # [owners, C / G, T, outputs, pixels]
    planes = grouped.to(dtype)[:, :, :, None]
    return (rows @ planes @ cols.transpose(-1, -2)).to(input.dtype)


def _bilinear_columns(input: Tensor, weight: Tensor, positions: Tensor, geometry: Geometry) -> Tensor:
    groups = geometry.groups
    cell, fraction = interpolation.split(join_unknown(positions))
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
    return columns + torch.where(unknown.isnan(), planes, torch.zeros_like(planes)).to(input.dtype)

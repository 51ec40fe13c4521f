"""Triangle and gaussian interpolation: a position reads all pixels within reach of its spread.

As in :mod:`icnn_zoo.ops.interpolation` the axes are separate, and everything here is about one. The pixel k weighs

    triangle:  max(0, spread - |k - p|)          spread of at least 1 pixel; at 1 this is bilinear interpolation
    gaussian:  exp(-((k - p) / spread)^2 / 2)    spread of at least 0.2 pixels, its standard deviation

over the sum of these numbers of all pixels that are read: those with ``-reach < k - p <= reach``, where the reach is
the triangle's spread and five times the gaussian's (what it leaves out is less than 1e-6 of all), and, where there is
an extent, no further from the center than that. These are the rules of DCLS ("max" and "gauss", arXiv:2306.00817),
whose kernel is the extent. At kinks (a triangle's pixels, ends of the reach) derivatives are those to the right.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from icnn_zoo.ops.interpolation import split

NARROWEST = {"triangle": 1.0, "gaussian": 0.2}
"""The least spread in pixels. A gaussian of 0.2 at an integer gives each neighbor 4e-6."""
_REACH = {"triangle": 1.0, "gaussian": 5.0}
_FAR = 2.0**32


class Axis(NamedTuple):
    """One coordinate of taps [...] as an interpolation reads it."""

    kind: str
    position: Tensor
    spread: Tensor
    limits: tuple[int, int] | None = None
    """The first and the last pixel of the extent."""


class Weighing(NamedTuple):
    """Weights of pixels [..., size] and their derivatives by position and spread."""

    weight: Tensor
    by_position: Tensor
    by_spread: Tensor


def reach_of(kind: str, spread: float) -> float:
    """How far from a position pixels are read."""
    return _REACH[kind] * spread


def start_window(axis: Axis) -> tuple[Tensor, int]:
    """The first pixel [...] that each tap could read, and how many; asks for the largest spread."""
    largest = float(axis.spread.detach().nan_to_num(0.0).amax()) if axis.spread.numel() else 0.0
    reach = reach_of(axis.kind, largest)
    return (axis.position.detach() - reach).floor() + 1, math.ceil(2 * reach)


def weigh_windows(axis: Axis, first: Tensor, size: int, dtype: torch.dtype) -> Weighing:
    """Weighs the pixels of each tap's own window, of which there are ``size`` from ``first`` [...] on."""
    run = _profile(axis, first[..., None] + torch.arange(size, device=first.device), dtype)
    return _normalized(run, run)


def carry_back(by_cells: Tensor, rows: Weighing, cols: Weighing) -> tuple[Tensor, Tensor]:
    """The gradients by a factor of each tap's weights [..., T] and by taps [..., T, 4] from that of its pixels.

    Args:
        by_cells: The gradient of the pixels of each window [..., T, Rr, Rc].
        rows: Weights [..., T, Rr] of the windows' rows.
        cols: Weights [..., T, Rc] of their columns.
    """
    by_rows = (by_cells @ cols.weight[..., None])[..., 0]
    by_cols = (rows.weight[..., None, :] @ by_cells)[..., 0, :]
    return (by_rows * rows.weight).sum(-1), slopes_of(by_rows, by_cols, rows, cols)


def slopes_of(by_rows: Tensor, by_cols: Tensor, rows: Weighing, cols: Weighing) -> Tensor:
    """The gradient by taps [..., T, 4] from those by the weights of rows [..., T, Rr] and columns [..., T, Rc]."""
    slopes = (
        (by_rows, rows.by_position),
        (by_cols, cols.by_position),
        (by_rows, rows.by_spread),
        (by_cols, cols.by_spread),
    )
    return torch.stack([(by * slope).sum(-1) for by, slope in slopes], dim=-1)


def weigh_run(axis: Axis, first: int, size: int, dtype: torch.dtype) -> Weighing:
    """Weighs one run of pixels for all taps; those outside of it count in the sum too."""
    start, count = start_window(axis)
    window = _profile(axis, start[..., None] + torch.arange(count, device=start.device), dtype)
    pixels = torch.arange(first, first + size, device=start.device, dtype=start.dtype)
    return _normalized(_profile(axis, pixels, dtype), window)


def weigh_differentiably(axis: Axis, pixels: Tensor, bound: int, dtype: torch.dtype) -> Tensor:
    """The weights [..., *pixels.shape] of ``pixels`` for autograd and tracing: nothing is asked of the numbers.

    Args:
        axis: The coordinates [...].
        pixels: Pixels of any shape.
        bound: Pixels further away from a position than this count for nothing.
        dtype: The type of the result.
    """
    cell, _ = split(axis.position)
    around = cell[..., None] + torch.arange(-bound, bound + 2, device=pixels.device)
    total = _divisor(_profile(axis, around, dtype).weight.sum(-1, keepdim=True))
    weight = _profile(axis, pixels.flatten().to(cell.dtype), dtype).weight
    return (weight / total).unflatten(-1, pixels.shape)


def _profile(axis: Axis, pixels: Tensor, dtype: torch.dtype) -> Weighing:
    """Weights before they are made to sum to one, of pixels [size], or [..., size] of each coordinate."""
    cell, fraction = (values[..., None] for values in split(axis.position))
    # Differences of whole numbers first, so that far positions lose nothing. As far as _FAR nothing is read: what is
    # farther may not become infinite, as zero times that is no number.
    distance = (pixels - cell).clamp(-_FAR, _FAR).to(dtype) - fraction.to(dtype)
    spread = axis.spread.to(dtype)[..., None]
    reach = reach_of(axis.kind, 1.0) * spread.detach()
    read = (distance.detach() > -reach) & (distance.detach() <= reach)
    if axis.limits is not None:
        read = read & (pixels >= axis.limits[0]) & (pixels <= axis.limits[1])
    inside = read.to(dtype)
    if axis.kind == "gaussian":
        scaled = distance / spread
        # Where nothing is read, numbers too small to be computed fast are avoided.
        weight = torch.exp((-0.5 * scaled.square()).clamp(min=-13.0)) * inside
        return Weighing(weight, weight * scaled / spread, weight * scaled.square() / spread)
    rises = distance.detach() > 0
    weight = torch.where(rises, spread - distance, spread + distance) * inside
    slope = torch.where(rises, 1.0, -1.0).to(dtype) * inside
    return Weighing(weight, slope + weight * 0, inside + weight * 0)


def _normalized(run: Weighing, window: Weighing) -> Weighing:
    total = _divisor(window.weight.sum(-1, keepdim=True))
    weight = run.weight / total
    by_position, by_spread = (
        (of_run - weight * of_window.sum(-1, keepdim=True)) / total
        for of_run, of_window in zip(run[1:], window[1:], strict=True)
    )
    return Weighing(weight, by_position, by_spread)


def _divisor(total: Tensor) -> Tensor:
    """A sum to divide by; where a tap reads nothing, beyond the extent, all weights and derivatives become zero."""
    return torch.where(total > 0, total, math.inf)

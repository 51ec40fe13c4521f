"""Bilinear interpolation: which pixels a position reads, with which weights and slopes.

The axes are separate: a pixel's weight is that of its row times that of its column, so everything here is about one
axis. Whoever needs to know what a position reads asks this module, or, for whichever interpolation,
:mod:`icnn_zoo.ops.tap_reading`: the reference, the formula, the torch backend, the standard forms of
:mod:`icnn_zoo.deployment`, the bound of :mod:`icnn_zoo.optim` and the count of dead taps.

Inner loops repeat the same rule for speed, and change with it: in ``native_backend/csrc`` ``split``, ``make_column``,
``scatter_column``, ``few_tile``, ``draw_work`` and ``fill_list``; in ``triton_backend`` ``split_position``, ``blend``,
``slopes``, ``columns_kernel``, the gathers of the input's gradient, ``drawn_kernels._near`` and
``boxes_kernels._cell_weight``; in ``torch_backend/windows.py`` ``Reads`` and the blends.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)

OFFSETS = (0, 1)
"""The pixels that a coordinate reads, counted from its cell."""


def split(coordinate: Number) -> tuple[Number, Number]:
    """Splits a coordinate in pixels into its cell, the last pixel that is not beyond it, and the fraction in [0, 1).

    The fraction of a coordinate that is NaN or infinite is NaN.
    """
    if isinstance(coordinate, Tensor):
        cell = coordinate.detach().floor()
        return cell, coordinate - cell
    cell = math.floor(coordinate)
    return cell, coordinate - cell


def weights(fraction: Number) -> tuple[Number, ...]:
    """The weights of the pixels at ``OFFSETS``."""
    return 1 - fraction, fraction


def slopes(fraction: Number) -> tuple[Number, ...]:
    """The derivatives of ``weights`` by the coordinate: at an integer, those of the cell to the right or below."""
    zero = fraction * 0  # NaN where there is no number
    return zero - 1, zero + 1


def weigh_pixels(coordinates: Tensor, first: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights and slopes of a run of pixels.

    Args:
        coordinates: Coordinates [...].
        first: The first pixel of the run.
        size: Its length.
        dtype: The type of the results.

    Returns:
        The weights [..., size] of the pixels and their derivatives by the coordinate, zero for those not read.
    """
    cell, fraction = split(coordinates)
    fraction = fraction.to(dtype)[..., None]
    offset = torch.arange(first, first + size, device=coordinates.device) - cell[..., None]
    read = [(offset == each).to(dtype) for each in OFFSETS]
    weight, slope = (
        sum((at * value for at, value in zip(read[1:], values[1:], strict=True)), read[0] * values[0])
        for values in (weights(fraction), slopes(fraction))
    )
    return weight, slope


def reach(coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last pixel that a coordinate reads, those included that weigh nothing but have a slope."""
    cell, _ = split(coordinates.detach())
    return cell + OFFSETS[0], cell + OFFSETS[-1]


def smooth_interval(coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of the interval around a coordinate in which the same pixels are read: there its gradient holds."""
    return coordinates.floor(), coordinates.ceil()


def join_unknown(positions: Tensor) -> Tensor:
    """Positions [..., 2], both coordinates NaN where one is no number: such a tap is nowhere, so are its gradients."""
    return positions + (positions.detach() * 0).sum(-1, keepdim=True)

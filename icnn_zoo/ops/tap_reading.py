"""What taps read along an axis, whichever interpolation a call has: bilinear, or one with a spread.

Backends get taps [..., T, 2], their positions (row, col), for bilinear interpolation, and [..., T, 4], with the spreads
(row, col) after the positions, for triangle and gaussian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icnn_zoo.ops import interpolation, wide_interpolation
from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.wide_interpolation import Axis

INTERPOLATIONS = ("bilinear", *wide_interpolation.NARROWEST)


def read_axis(taps: Tensor, axis: int, geometry: Geometry) -> Axis:
    """The coordinates of taps [..., 4] along an axis, as a triangle or gaussian reads them."""
    limits = None
    if geometry.extent is not None:
        first = -((geometry.extent[axis] - 1) // 2)
        limits = (first, first + geometry.extent[axis] - 1)
    return Axis(geometry.interpolation, taps[..., axis], taps[..., 2 + axis], limits)


def tabulate(taps: Tensor, axis: int, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The first pixel [...] that each tap may read along an axis, and the weights [..., R] of the R from there on."""
    if geometry.interpolation == "bilinear":
        cell, fraction = interpolation.split(taps[..., axis])
        return cell + interpolation.OFFSETS[0], torch.stack(interpolation.weights(fraction), dim=-1)
    read = read_axis(taps, axis, geometry)
    first, size = wide_interpolation.start_window(read)
    return first, wide_interpolation.weigh_windows(read, first, size, taps.dtype).weight


def weigh_pixels(
    taps: Tensor, axis: int, first: int, size: int, geometry: Geometry, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Weights [..., T, size] of a run of pixels, and their derivatives by position and, if there is one, spread.

    Args:
        taps: Taps [..., T, 2] or [..., T, 4].
        axis: 0 for rows, 1 for columns.
        first: The first pixel of the run, counted from position 0.
        size: Its length.
        geometry: Sizes of the call and its interpolation.
        dtype: The type of the results.
    """
    if geometry.interpolation == "bilinear":
        weight, slope = interpolation.weigh_pixels(taps[..., axis], first, size, dtype)
        return weight, [slope]
    weight, *slopes = wide_interpolation.weigh_run(read_axis(taps, axis, geometry), first, size, dtype)
    return weight, slopes


def reach(taps: Tensor, axis: int, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The first and the last pixel that each tap reads, counted from position 0."""
    if geometry.interpolation == "bilinear":
        return interpolation.reach(taps[..., axis])
    read = read_axis(taps, axis, geometry)
    first, size = wide_interpolation.start_window(read)
    last = first + size - 1
    return (first, last) if read.limits is None else (first.clamp(*read.limits), last.clamp(*read.limits))

"""What taps read along an axis, whichever interpolation a call has: bilinear, or one with a spread.

Backends get taps [..., T, 2], their positions (row, col), for bilinear interpolation, and [..., T, 4], with the spreads
(row, col) after the positions, for triangle and gaussian.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from icnn_zoo.ops import interpolation, wide_interpolation
from icnn_zoo.ops.wide_interpolation import Axis

INTERPOLATIONS = ("bilinear", *wide_interpolation.NARROWEST)


class Reading(NamedTuple):
    """How taps read the input."""

    interpolation: str = "bilinear"
    extent: tuple[int, int] | None = None
    """Rows and columns of pixels, around the center, that a triangle or gaussian reads; None for as many as it does."""

    @property
    def is_wide(self) -> bool:
        """Whether taps have spreads."""
        return self.interpolation != "bilinear"


BILINEAR = Reading()


def read_axis(taps: Tensor, axis: int, reading: Reading) -> Axis:
    """The coordinates of taps [..., 4] along an axis, as a triangle or gaussian reads them."""
    limits = None
    if reading.extent is not None:
        first = -((reading.extent[axis] - 1) // 2)
        limits = (first, first + reading.extent[axis] - 1)
    return Axis(reading.interpolation, taps[..., axis], taps[..., 2 + axis], limits)


def tabulate(taps: Tensor, axis: int, reading: Reading) -> tuple[Tensor, Tensor]:
    """The first pixel [...] that each tap may read along an axis, and the weights [..., R] of the R from there on."""
    if not reading.is_wide:
        cell, fraction = interpolation.split(taps[..., axis])
        return cell + interpolation.OFFSETS[0], torch.stack(interpolation.weights(fraction), dim=-1)
    read = read_axis(taps, axis, reading)
    first, size = wide_interpolation.start_window(read)
    return first, wide_interpolation.weigh_windows(read, first, size, taps.dtype).weight


def weigh_pixels(
    taps: Tensor, axis: int, first: int, size: int, reading: Reading, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Weights [..., T, size] of a run of pixels, and their derivatives by position and, if there is one, spread.

    Args:
        taps: Taps [..., T, 2] or [..., T, 4].
        axis: 0 for rows, 1 for columns.
        first: The first pixel of the run, counted from position 0.
        size: Its length.
        reading: How taps read.
        dtype: The type of the results.
    """
    if not reading.is_wide:
        weight, slope = interpolation.weigh_pixels(taps[..., axis], first, size, dtype)
        return weight, [slope]
    weight, *slopes = wide_interpolation.weigh_run(read_axis(taps, axis, reading), first, size, dtype)
    return weight, slopes


def reach(taps: Tensor, axis: int, reading: Reading) -> tuple[Tensor, Tensor]:
    """The first and the last pixel that each tap reads, counted from position 0."""
    if not reading.is_wide:
        return interpolation.reach(taps[..., axis])
    read = read_axis(taps, axis, reading)
    first, size = wide_interpolation.start_window(read)
    last = first + size - 1
    return (first, last) if read.limits is None else (first.clamp(*read.limits), last.clamp(*read.limits))

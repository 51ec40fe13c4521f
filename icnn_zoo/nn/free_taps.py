"""Taps that no regular grid tells: how many, and where they start."""

from __future__ import annotations

import operator

import torch
from torch import Tensor


def count_taps(taps: int) -> int:
    """The number of taps.

    Raises:
        ValueError: It is not an int of at least 1.
    """
    try:
        number = operator.index(taps)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"`taps` must be an int of at least 1; got {taps!r}.")
    return number


@torch.no_grad()
def scatter_taps(positions: Tensor, extent: tuple[int, int]) -> None:
    """Draws positions [..., 2] around the center with a standard deviation of 0.5 pixels, as DCLS does."""
    positions.normal_(std=0.5)
    for axis, size in enumerate(extent):
        positions[..., axis].clamp_(-((size - 1) // 2), size // 2)

"""Taps that no regular grid tells: where they start."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def scatter_taps(positions: Tensor, extent: tuple[int, int]) -> None:
    """Draws positions [..., 2] around the center with a standard deviation of 0.5 pixels, as DCLS does."""
    positions.normal_(std=0.5)
    for axis, size in enumerate(extent):
        positions[..., axis].clamp_(-((size - 1) // 2), size // 2)

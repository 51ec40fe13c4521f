"""How a layer keeps its taps along one axis or within a limit."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Axes = Literal["rows", "columns", "both"]
LEARNED = {"rows": slice(0, 1), "columns": slice(1, 2), "both": slice(0, 2)}
"""The coordinates of a position that are learned."""
Limit = float | Literal["extent"] | None


def pixel_limits(layer: Any, limit: Limit) -> tuple[Tensor, Tensor]:
    """The least and the greatest positions that a layer's ``limit`` allows: [2], or in the shape of the grid."""
    grid: Tensor = layer.regular_grid
    if limit is None:
        return grid.new_full((2,), -torch.inf), grid.new_full((2,), torch.inf)
    if limit != "extent":
        return grid - limit, grid + limit
    sizes = [(size, step) for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    low = [-step * ((size - 1) // 2) for size, step in sizes]
    high = [step * (size // 2) for size, step in sizes]
    return grid.new_tensor(low), grid.new_tensor(high)


def restrict(layer: Any, positions: Tensor) -> Tensor:
    """Positions of a layer as its ``axes`` and ``limit`` allow them: no gradient along a frozen axis or beyond."""
    if layer.axes != "both":
        rows, cols = positions.unbind(-1)
        free = (rows, cols.detach()) if layer.axes == "rows" else (rows.detach(), cols)
        positions = torch.stack(free, dim=-1)
    if layer.limit is not None:
        low, high = pixel_limits(layer, layer.limit)
        positions = positions.clamp(low, high)
    return positions

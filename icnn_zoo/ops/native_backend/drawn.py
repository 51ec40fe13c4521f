"""Depthwise layers with triangle or gaussian interpolation, as stencils whose taps are whole pixels.

What taps read is drawn into cells first: those of the box around all taps, or, where that is smaller, those of each
tap's own window. A cell is then a tap at an integer position, which the C kernel knows, and what it says of the cells'
weights is carried back to weights, positions and spreads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.tap_reading import BILINEAR, read_axis
from icnn_zoo.ops.torch_backend.dense import Box, draw_kernels, drawn_gradients, measure_box
from icnn_zoo.ops.wide_interpolation import carry_back, start_window, weigh_windows

CarryBack = Callable[[Tensor], tuple[Tensor, Tensor]]


def draw_cells(weight: Tensor, taps: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, CarryBack]:
    """Draws the taps of a depthwise layer.

    Args:
        weight: Weights [N, 1, T].
        taps: Positions and spreads [C, T, 4] or [N, 1, T, 4].
        geometry: Sizes of the call.

    Returns:
        Weights of the cells [N, 1, Q], their whole positions [C, Q, 2] or [N, 1, Q, 2], and what makes of the gradient
        of the former [N, 1, Q] those of ``weight`` and of taps [N, 1, T, 4].
    """
    own = taps if taps.dim() == 4 else taps.repeat_interleave(weight.shape[0] // taps.shape[0], dim=0)[:, None]
    box = measure_box(taps, geometry)
    windows = [(axis, *start_window(axis)) for axis in (read_axis(own, axis, geometry.reading) for axis in range(2))]
    if box is not None and box.cells <= weight.shape[-1] * math.prod(size for _, _, size in windows):
        return _draw_box(weight, own, taps.shape[:-2], box, geometry)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows, cols = (weigh_windows(*window, dtype) for window in windows)
    cells = weight[..., None, None] * rows.weight[..., :, None] * cols.weight[..., None, :]
    places = []
    for axis, (_, first, size) in enumerate(windows):
        steps = torch.arange(size, dtype=first.dtype).reshape((-1, 1) if axis == 0 else (1, -1))
        places.append((first[..., None, None] + steps).expand(cells.shape))
    positions = torch.stack(places, dim=-1).flatten(2, 4)

    def back(by_cells: Tensor) -> tuple[Tensor, Tensor]:
        by_weight, by_taps = carry_back(by_cells.unflatten(-1, cells.shape[2:]), rows, cols)
        return by_weight, weight[..., None] * by_taps

    return cells.flatten(2), positions, back


def _draw_box(
    weight: Tensor, own: Tensor, owners: torch.Size, box: Box, geometry: Geometry
) -> tuple[Tensor, Tensor, CarryBack]:
    kernels = draw_kernels(weight, own, box, geometry)
    rows = torch.arange(box.height) + (box.row - geometry.origin[0])
    cols = torch.arange(box.width) + (box.col - geometry.origin[1])
    positions = torch.cartesian_prod(rows, cols).to(own.dtype).reshape(-1, 2)

    def back(by_cells: Tensor) -> tuple[Tensor, Tensor]:
        return drawn_gradients(by_cells.unflatten(-1, (box.height, box.width)), weight, own, box, geometry)

    # A tap that is no number makes its kernel none, and so all that the kernel feeds.
    return kernels.flatten(2), positions.expand(*owners, *positions.shape), back


def plain(geometry: Geometry) -> Geometry:
    """The geometry of the cells: bilinear interpolation at whole pixels reads just these."""
    return replace(geometry, reading=BILINEAR)

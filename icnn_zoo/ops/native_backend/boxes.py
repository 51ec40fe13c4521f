"""Kernels that share no columns, in one box of pixels: the full version, and layers of many groups.

Where the box is small they are drawn into it, and are one dense convolution. The full version in a larger one, as with
dilated layers, picks its taps out of columns of the box's pixels (:mod:`.picks`). Taps that ran away are in neither:
they stay stencils, and do not widen the box of the others.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.native_backend import build, dense
from icnn_zoo.ops.native_backend.addresses import address_of
from icnn_zoo.ops.native_backend.picks import BLOCK, Picks

# Costs in multiply-adds of a dense convolution, for a kernel and an output pixel. A tap as a stencil, all taps being
# some; one alone, whose plane is copied for it; and a tap of columns that FEW_OUTPUTS share. A tap that is picked, and
# the making of a column, which all kernels of a block share.
STENCIL_COST = 12.0
OUTLIER_COST = 20.0
COLUMNS_COST = 3.0
FEW_OUTPUTS = 8
PICK_COST = 6.5
COLUMN_COST = 8.0


class _Drawing(ctypes.Structure):
    """``drawing_t`` of csrc/drawing.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kernels", "taps", "members", "sharing", "wide")),
        *((name, ctypes.c_int64 * 2) for name in ("least", "most", "first", "size")),
        ("outside", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("cell_cost", "outlier_cost")),
        ("skips", ctypes.c_int64),
        ("cost", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("weight", "positions", "drawn", "cells")),
        *((name, ctypes.c_void_p) for name in ("grad_cells", "grad_weight", "grad_shift")),
    ]


@dataclass
class Box:
    """The taps of a call that lie in the box.

    Attributes:
        geometry: Sizes of the call.
        weight: Weights [N, C / G, T], of which the outliers' are not drawn.
        positions: Positions [C, T, 2] or [N, C / G, T, 2] in float32 or float64.
        drawn: Which taps are in the box [N, C / G, T], 1 or 0: known once it was drawn or picked.
        picked: Whether taps are picked, else drawn.
    """

    geometry: Geometry
    weight: Tensor
    positions: Tensor
    drawn: Tensor
    picked: bool
    task: Any

    @property
    def num_outliers(self) -> int:
        """Taps that are not in the box, after it was drawn or picked."""
        outside: int = self.task.outside
        return outside

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the box."""
        rows, cols = self.task.size
        return rows, cols

    def forward(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """The output [B, N, Ho, Wo] of the taps in the box."""
        if self.picked:
            self._run("mark")
            return self._picks().forward(input, bias)
        return dense.forward(input, self._draw(), bias, self._origin, self.geometry)

    def backward(
        self, grad_output: Tensor, input: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of :func:`forward` for input, weight and shifts [N, C / G, T, 2], zero for other taps.

        Args:
            grad_output: The output's gradient.
            input: The input.
            needs: Whether that of the input, and those of weight and shifts are wanted; None stands for the others.
        """
        if self.picked:
            self._run("mark")
            return self._picks().backward(grad_output, input, needs)
        by_input = None
        if needs[0]:
            by_input = dense.input_gradient(grad_output, self._draw(), self._origin, self.geometry)
        if not needs[1]:
            return by_input, None, None
        if not needs[0]:
            self._run("mark")  # as drawing does: which taps are drawn, and how many are not
        by_cells = dense.cells_gradient(grad_output, input, self.size, self._origin, self.geometry)
        by_weight = torch.empty_like(self.weight)
        by_shift = torch.empty(*self.weight.shape, 2, dtype=torch.float64)
        self._run("gradients", grad_cells=by_cells, grad_weight=by_weight, grad_shift=by_shift)
        return by_input, by_weight, by_shift

    @property
    def _origin(self) -> tuple[int, int]:
        """Where the first cell of output 0 reads."""
        rows, cols = (self.task.first[axis] + self.geometry.origin[axis] for axis in range(2))
        return rows, cols

    def _picks(self) -> Picks:
        first, size = tuple(self.task.first), tuple(self.task.size)
        return Picks(self.weight, self.positions, self.geometry, first, size)

    def _draw(self) -> Tensor:
        cells = self.weight.new_empty(*self.weight.shape[:2], *self.size)
        self._run("draw", cells=cells)
        return cells

    def _run(self, what: str, **tensors: Tensor) -> None:
        lengths = {"cells": math.prod(self.size) * self.task.kernels, "grad_shift": 2 * self.weight.numel()}
        lengths |= {"grad_cells": lengths["cells"], "grad_weight": self.weight.numel()}
        for name, tensor in tensors.items():
            dtype = torch.float64 if name == "grad_shift" else self.weight.dtype
            setattr(self.task, name, address_of(name, tensor, dtype, lengths[name]))
        build.call(f"drawing_{what}", self.weight.dtype, self.task)


def choose_box(weight: Tensor, positions: Tensor, geometry: Geometry) -> Box | None:
    """The cheapest box; None where stencils or columns are cheaper.

    Args:
        weight: Weights [N, C / G, T], contiguous.
        positions: Positions [C, T, 2] or [N, C / G, T, 2] in float32 or float64.
        geometry: Sizes of the call.
    """
    outputs, members, taps = weight.shape
    per_kernel, per_group = positions.dim() == 4, outputs // geometry.groups
    if members == 1 or not (per_kernel or per_group <= FEW_OUTPUTS):
        return None
    positions = positions.contiguous()
    sharing, wide = 1 if per_kernel else per_group, positions.dtype == torch.float64
    sizes = {"kernels": outputs * members, "taps": taps, "members": members, "sharing": sharing, "wide": wide}
    task = _Drawing(**sizes, cell_cost=1, outlier_cost=OUTLIER_COST)
    for axis in range(2):
        # A cell reads its pixel and the next one.
        task.least[axis] = -geometry.origin[axis] - (geometry.output_size[axis] - 1) * geometry.stride[axis] - 1
        task.most[axis] = geometry.input_size[axis] - 1 - geometry.origin[axis]
    drawn = torch.empty(weight.shape, dtype=torch.uint8)
    task.weight = address_of("weight", weight, weight.dtype, outputs * members * taps)
    numbers = 2 * outputs // sharing * members * taps
    task.positions = address_of("positions", positions, torch.float64 if wide else torch.float32, numbers)
    task.drawn = address_of("drawn", drawn, torch.uint8, outputs * members * taps)
    choose = build.load()[0][weight.dtype].drawing_choose
    choose(ctypes.byref(task))
    picked = False
    if per_kernel and geometry.stride == (1, 1) and task.cost > PICK_COST * taps:
        picks = _Drawing.from_buffer_copy(task)
        picks.skips, picks.cell_cost = 1, COLUMN_COST / min(per_group, members, BLOCK)
        choose(ctypes.byref(picks))
        picks.cost += PICK_COST * taps
        picked = picks.cost < task.cost
        task = picks if picked else task
    if task.outside >= drawn.numel() or task.cost > taps * (STENCIL_COST if per_kernel else COLUMNS_COST):
        return None
    return Box(geometry, weight, positions, drawn, picked, task)

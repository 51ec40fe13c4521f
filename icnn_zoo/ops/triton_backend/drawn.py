"""Depthwise layers on CUDA: kernels are drawn as the dense boxes around their taps, where those are small."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry, memory_format
from icnn_zoo.ops.triton_backend import drawn_kernels, drawn_sum_kernels
from icnn_zoo.ops.triton_backend.call import GAP, Call, Gradients
from icnn_zoo.ops.triton_backend.direct import input_gradient
from icnn_zoo.ops.triton_backend.launching import launch, num_blocks

PLANE_GAP = GAP

# A tap takes as long as about so many cells.
_CELLS_PER_TAP = 8
# Neighboring channels whose kernels share a box, where channels come last.
_GROUP = 32
# Outputs that a thread computes, at most, and the warps and lanes of a program. Where channels come last a thread has
# two lanes, which are two channels: it reads them at once.
_PART = 20
_WARPS = 4
_LANES = 256
# The same of the cells' gradient, of whose sums a thread keeps so many for each lane.
_GRADIENT_PART = 10
_GRADIENT_WARPS = 1
_GRADIENT_LANES = 64
_SUMS = 30
# Programs of the cells' gradient that fit at once: 12 of a warp for each of 128 multiprocessors.
_GRADIENT_PROGRAMS = 1536


@dataclass(frozen=True)
class _Drawing:
    """Boxes of groups of kernels [groups, 4] (first row, first col, rows, cols) and their cells [CELLS, N]."""

    boxes: Tensor
    cells: Tensor
    constants: dict[str, Any]

    @staticmethod
    def of(call: Call) -> _Drawing:
        """Draws the kernels of a call."""
        channels = call.input.shape[1]
        channels_last = memory_format(call.input) == torch.channels_last
        constants = {
            "PER_KERNEL": call.per_kernel,
            "GROUP": min(_GROUP, _power_of_two(channels)) if channels_last else 1,
            "ROWS": math.isqrt(call.taps - 1) + 3,  # of a square kernel that is at most a pixel larger on each side
            "CELLS": _CELLS_PER_TAP * call.taps,
        }
        boxes = torch.empty(num_blocks(channels, constants["GROUP"]), 4, dtype=torch.int32, device=call.input.device)
        cells = call.input.new_empty((constants["CELLS"], call.num_outputs), dtype=torch.float32)
        launch(
            drawn_kernels.draw_kernel,
            call.num_outputs,
            call.weight,
            call.positions,
            boxes,
            cells,
            *_kernels_of(call),
            *call.gathering,
            **constants,
            BLOCK=128,
        )
        return _Drawing(boxes, cells, constants)

    def constants_for(self, *names: str) -> dict[str, Any]:
        """Some of the constants."""
        return {name: self.constants[name] for name in names}


def _power_of_two(size: int) -> int:
    """The smallest that is not less than a size."""
    return 1 << (size - 1).bit_length()


def _kernels_of(call: Call) -> tuple[int, int, int]:
    return call.num_outputs, call.group_outputs, call.taps


def _part(rows: int, most: int = _PART) -> int:
    """Rows that a thread computes: an even number, and as many for each as the fewest threads allow."""
    return 2 * num_blocks(num_blocks(rows, num_blocks(rows, most)), 2)


def forward(call: Call, bias: Tensor | None, output: Tensor) -> None:
    """Fills the output [B, N, Ho, Wo]."""
    _sum(call, _Drawing.of(call), call.input, bias, output, call.gathering, call.strides, adjoint=False)


def backward(call: Call, grad_output: Tensor, grads: Gradients) -> None:
    """Fills the gradients that are asked for."""
    drawing = _Drawing.of(call)
    geometry = call.geometry
    grad_output = grad_output.contiguous(memory_format=memory_format(call.input))
    if grads.input is not None:
        if geometry.stride == (1, 1):
            # Then the input's gradient is a sum like the output, with shifts the other way.
            turned = Geometry(geometry.output_size, geometry.input_size, (1, 1), geometry.origin, geometry.groups)
            sizes = (*turned.input_size, *turned.output_size, *geometry.origin, *call.numbers.bounds)
            _sum(call, drawing, grad_output, None, grads.input, sizes, call.strides, adjoint=True)
        else:
            for images in call.image_chunks():
                input_gradient(call, grad_output[images].contiguous(), grads.input[images])
    if grads.weight is not None or grads.positions is not None:
        _undraw(call, drawing, _sum_cells(call, drawing, grad_output), grads)


def _sum(
    call: Call,
    drawing: _Drawing,
    source: Tensor,
    bias: Tensor | None,
    target: Tensor,
    sizes: tuple[int, ...],
    strides: dict[str, int],
    *,
    adjoint: bool,
) -> None:
    images, channels, height, width = target.shape
    group = drawing.constants["GROUP"]
    part = _part(height)
    block = _LANES // group if group > 1 else _LANES // 2
    launch(
        drawn_sum_kernels.drawn_sum_kernel,
        num_blocks(channels, group) * num_blocks(height, part) * num_blocks(images * width, block),
        source,
        drawing.cells,
        drawing.boxes,
        call.weight,
        call.positions,
        call.weight if bias is None else bias,
        target,
        *_kernels_of(call),
        images * width,
        *sizes,
        *source.stride(),
        *target.stride(),
        **strides,
        ADJOINT=adjoint,
        HAS_BIAS=bias is not None,
        **drawing.constants_for("PER_KERNEL", "GROUP", "ROWS"),
        PART=part,
        COLUMNS=block,
        num_warps=_WARPS,
    )


def _sum_cells(call: Call, drawing: _Drawing, grad_output: Tensor) -> Tensor:
    """Sums over pixels of the output's gradient times what each cell reads: [splits, CELLS, N]."""
    images, channels, height, width = grad_output.shape
    group, rows = drawing.constants["GROUP"], drawing.constants["ROWS"]
    strips = num_blocks(rows, max(1, _SUMS // rows))
    groups = num_blocks(channels, group)
    part = _part(height, _GRADIENT_PART)
    block = _GRADIENT_LANES // group if group > 1 else _GRADIENT_LANES // 2
    steps = num_blocks(images * width, block) * num_blocks(height, part)
    split_steps = num_blocks(steps, min(steps, num_blocks(_GRADIENT_PROGRAMS, groups * strips)))
    splits = num_blocks(steps, split_steps)
    partials = drawing.cells.new_empty((splits, *drawing.cells.shape))
    launch(
        drawn_sum_kernels.drawn_gradient_kernel,
        splits * strips * groups,
        grad_output,
        call.input,
        drawing.boxes,
        call.positions,
        partials,
        *_kernels_of(call),
        images * width,
        split_steps,
        *call.gathering,
        *call.input.stride(),
        *grad_output.stride(),
        **call.strides,
        **drawing.constants,
        PART=part,
        COLUMNS=block,
        STRIP=num_blocks(rows, strips),
        STRIPS=strips,
        num_warps=_GRADIENT_WARPS,
    )
    return partials


def _undraw(call: Call, drawing: _Drawing, partials: Tensor, grads: Gradients) -> None:
    """Fills the gradients of weights and positions from those of the cells."""
    shape = call.weight.shape
    by_weight = partials.new_empty(shape) if grads.weight is None else grads.weight
    shared = call.group_outputs > 1 and not call.per_kernel
    by_position = partials.new_empty(*shape, 2) if shared or grads.positions is None else grads.positions
    launch(
        drawn_kernels.undraw_kernel,
        num_blocks(call.num_outputs, 32) * num_blocks(call.taps, 4),
        partials,
        drawing.boxes,
        call.weight,
        call.positions,
        by_weight,
        by_position,
        *_kernels_of(call),
        partials.shape[0],
        *call.gathering,
        **drawing.constants_for("PER_KERNEL", "GROUP", "CELLS"),
        KERNELS=32,
        TAPS=4,
        num_warps=4,
    )
    if shared and grads.positions is not None:
        grads.positions.copy_(by_position.unflatten(0, (call.groups, -1)).sum(1).flatten(0, 1))

"""Depthwise layers on CUDA: each kernel is drawn as the dense box around its taps, where that is small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.triton_backend import drawn_kernels
from icnn_zoo.ops.triton_backend.call import GAP, Call, Gradients, Numbers
from icnn_zoo.ops.triton_backend.direct import input_gradient, planes_for
from icnn_zoo.ops.triton_backend.launching import block_size, launch, num_blocks

PLANE_GAP = GAP

# A cell takes about a fourth of the instructions of a tap.
_CELLS_PER_TAP = 4


@dataclass(frozen=True)
class _Drawing:
    """Kernels drawn as boxes [N, 4] (first row, first col, rows, cols) of cells [N, CELLS]."""

    boxes: Tensor
    cells: Tensor
    constants: dict[str, Any]

    @staticmethod
    def of(call: Call) -> _Drawing:
        """Draws the kernels of a call."""
        limit = _CELLS_PER_TAP * call.taps
        capacity = 1 << (limit - 1).bit_length()
        boxes = torch.empty(call.num_outputs, 4, dtype=torch.int32, device=call.input.device)
        cells = call.input.new_empty((call.num_outputs, capacity), dtype=torch.float32)
        constants = {"PER_KERNEL": call.per_kernel, "TAPS": 1 << (call.taps - 1).bit_length(), "CELLS": capacity}
        launch(
            drawn_kernels.draw_kernel,
            call.num_outputs,
            call.weight,
            call.positions,
            boxes,
            cells,
            call.group_outputs,
            call.taps,
            limit,
            *call.sampling,
            **constants,
        )
        return _Drawing(boxes, cells, constants)


def forward(call: Call, bias: Tensor | None, output: Tensor) -> None:
    """Fills the output [B, N, Ho, Wo]."""
    drawing = _Drawing.of(call)
    for images in call.image_chunks():
        _sum(call, drawing, call.planes(images), bias, output[images], call.sampling, call.strides, adjoint=False)


def backward(call: Call, grad_output: Tensor, grads: Gradients) -> None:
    """Fills the gradients that are asked for."""
    drawing = _Drawing.of(call)
    geometry = call.geometry
    # With stride 1 the input's gradient is a sum like the output, with shifts the other way.
    turned = Geometry(geometry.output_size, geometry.input_size, (1, 1), geometry.origin, geometry.groups)
    numbers = Numbers.of(turned)
    sampling = (*turned.input_size, *turned.output_size, *call.gathering[4:], *numbers.of_planes)
    sums = None
    for images in call.image_chunks():
        grad = grad_output[images]
        if grads.input is not None:
            if geometry.stride == (1, 1):
                planes = call.make_planes(grad, numbers)
                _sum(call, drawing, planes, None, grads.input[images], sampling, call.strides, adjoint=True)
            else:
                input_gradient(call, grad.contiguous(), grads.input[images])
        if grads.weight is not None or grads.positions is not None:
            found = _sum_cells(call, drawing, grad.contiguous(), call.planes(images))
            sums = found if sums is None else sums.add_(found)
    if sums is not None:
        _undraw(call, drawing, sums, grads)


def _sum(
    call: Call,
    drawing: _Drawing,
    planes: Tensor,
    bias: Tensor | None,
    target: Tensor,
    sampling: tuple[int, ...],
    strides: dict[str, int],
    *,
    adjoint: bool,
) -> None:
    out = planes_for(target)
    length = target.shape[0] * target.shape[2] * target.shape[3]
    block = block_size(length, 1024)
    constants = {key: value for key, value in drawing.constants.items() if key != "TAPS"}
    launch(
        drawn_kernels.drawn_sum_kernel,
        target.shape[1] * num_blocks(length, block),
        planes,
        drawing.cells,
        drawing.boxes,
        call.weight,
        call.positions,
        call.weight if bias is None else bias,
        out,
        call.num_outputs,
        call.group_outputs,
        call.taps,
        length,
        *sampling,
        **strides,
        ADJOINT=adjoint,
        HAS_BIAS=bias is not None,
        BLOCK=block,
        **constants,
        num_warps=4,
    )
    if out is not target:
        target.copy_(out)


def _sum_cells(call: Call, drawing: _Drawing, grad_output: Tensor, planes: Tensor) -> Tensor:
    """Sums over pixels of the output's gradient times what each cell reads: [N, CELLS]."""
    length = planes.shape[0] * call.out_pixels
    block = block_size(length, 256)
    blocks = num_blocks(length, block)
    split_blocks = num_blocks(blocks, min(blocks, num_blocks(16 * call.limits.programs, call.num_outputs)))
    splits = num_blocks(blocks, split_blocks)
    partials = planes.new_empty((splits, *drawing.cells.shape), dtype=torch.float32)
    constants = {key: value for key, value in drawing.constants.items() if key != "TAPS"}
    launch(
        drawn_kernels.drawn_gradient_kernel,
        splits * call.num_outputs,
        grad_output,
        planes,
        drawing.boxes,
        call.positions,
        partials,
        call.num_outputs,
        call.group_outputs,
        call.taps,
        length,
        split_blocks,
        *call.sampling,
        **call.strides,
        **constants,
        BLOCK=block,
        num_warps=1,
    )
    return partials.sum(0)


def _undraw(call: Call, drawing: _Drawing, sums: Tensor, grads: Gradients) -> None:
    """Fills the gradients of weights and positions from those of the cells."""
    by_weight = sums.new_empty(call.weight.shape)
    by_position = sums.new_empty(*call.weight.shape, 2)
    launch(
        drawn_kernels.undraw_kernel,
        call.num_outputs,
        sums,
        drawing.boxes,
        call.weight,
        call.positions,
        by_weight,
        by_position,
        call.group_outputs,
        call.taps,
        *call.gathering,
        **drawing.constants,
    )
    if grads.weight is not None:
        grads.weight.copy_(by_weight)
    if grads.positions is not None:
        shared = by_position.unflatten(0, (call.groups, -1)).sum(1).flatten(0, 1)
        grads.positions.copy_(by_position if call.per_kernel else shared)

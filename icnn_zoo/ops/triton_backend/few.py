"""Dense layers with few outputs on CUDA: the product first, as a 1x1 convolution to every cell, the shifts second.

A tap's positions lie close together: its box of 3 x 3 cells, around the median over the channels, holds all positions
less than a pixel from there, whose samples are sums over the box. One product gives what each output gets from each
cell, without columns, and a sum over the cells at their offsets is the output. Entries (channels and taps) outside of
their boxes are listed on the GPU and added by columns, so that the result is exact wherever the positions are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry, memory_format
from icnn_zoo.ops.triton_backend import few_kernels, listed_kernels
from icnn_zoo.ops.triton_backend.boxes import ALIGNMENT, CELLS, Boxes
from icnn_zoo.ops.triton_backend.call import GAP, MAX_INT, Call, Gradients, Numbers
from icnn_zoo.ops.triton_backend.launching import block_size, launch, num_blocks
from icnn_zoo.ops.triton_backend.limits import Limits
from icnn_zoo.ops.triton_backend.products import (
    follows_tf32,
    multiply,
    multiply_float32,
    round_up,
    uses_tensor_cores,
)

PLANE_GAP = GAP

_SUM_BLOCK = 128  # pixels of a program that sums the cells
_OUTPUTS = 32
_WEIGHT_SPLITS = 4
# Programs that share the pixels of listed entries, or of a channel: few, so that a launch that finds none is short.
_LISTED_SPLITS, _CHANNEL_SPLITS = 16, 4


def fits(input: Tensor, weight: Tensor, geometry: Geometry, limits: Limits) -> bool:
    """Whether nine times the multiply-adds, at the speed of tensor cores, cost less than making columns."""
    outputs, channels, taps = weight.shape
    column_bytes = channels * taps * geometry.output_size[0] * geometry.output_size[1] * input.element_size()
    return (
        geometry.groups == 1
        and outputs <= min(limits.few_outputs, _OUTPUTS)
        and channels >= limits.few_channels
        and uses_tensor_cores(input.dtype)
        and column_bytes <= limits.image_bytes
        and channels * Numbers.of(geometry).plane_size <= MAX_INT // 2
    )


def _pixels(tensor: Tensor) -> Tensor:
    """Images [S, C, H, W] as rows [S * H * W, C], which channels_last ones are."""
    return tensor.permute(0, 2, 3, 1).reshape(-1, tensor.shape[1])


def forward(call: Call, bias: Tensor | None, output: Tensor) -> None:
    """Fills the output [B, N, Ho, Wo]."""
    boxes = Boxes.of(call)
    spread = boxes.spread(call)
    outputs = call.num_outputs
    for images in call.image_chunks(_cell_bytes(call)):
        pixels = _pixels(call.input[images])
        products = spread.new_empty(len(spread), round_up(len(pixels), ALIGNMENT))
        multiply(spread[None], pixels.t()[None], products[None, :, : len(pixels)])
        target = output[images]
        length = target.shape[0] * call.out_pixels
        rest = _listed_sum(call, boxes, images, length)
        block = block_size(length, _SUM_BLOCK)
        launch(
            few_kernels.shifted_sum_kernel,
            outputs * num_blocks(length, block),
            products,
            boxes.offsets,
            rest,
            call.weight if bias is None else bias,
            target,
            outputs,
            len(boxes.offsets),
            length,
            products.shape[1],
            len(rest),
            target.stride(0),
            target.stride(1),
            target.stride(3),
            *call.geometry.input_size,
            *call.geometry.output_size,
            **call.strides,
            HAS_BIAS=bias is not None,
            BLOCK=block,
            num_warps=4,
        )


def _cell_bytes(call: Call) -> int:
    """Memory for the products of an image."""
    height, width = call.geometry.input_size
    return call.taps * CELLS * call.num_outputs * height * width * call.input.element_size()


def _column_bytes(call: Call) -> int:
    """Memory for the columns of all entries of an image, of which only those listed are used."""
    return call.group_channels * call.taps * call.out_pixels * call.input.element_size()


def _tile(call: Call) -> dict[str, Any]:
    precision = "tf32" if follows_tf32() else "ieee"
    return {"PRECISION": precision, "BLOCK_PIXELS": 64, "BLOCK_OUTPUTS": 16 if call.num_outputs <= 16 else _OUTPUTS}


def _listed_sum(call: Call, boxes: Boxes, images: slice, length: int) -> Tensor:
    """What listed entries give to the output [splits, N, L]."""
    source = call.input[images]
    blocks = num_blocks(length, 64)
    splits = 1 << max(0, min(3, (call.limits.programs // blocks).bit_length() - 1))
    rest = source.new_empty((splits, call.num_outputs, length), dtype=torch.float32)
    launch(
        listed_kernels.listed_sum_kernel,
        splits * blocks,
        source,
        call.weight,
        call.positions,
        boxes.entries,
        boxes.count,
        rest,
        call.num_outputs,
        call.group_channels * call.taps,
        call.taps,
        length,
        *source.stride(),
        *call.gathering,
        **call.strides,
        **_tile(call),
        BLOCK_ENTRIES=16,
        SPLITS=splits,
        num_warps=4,  # eight are known to be miscompiled in loops like this one
        num_stages=1,
    )
    return rest


def backward(call: Call, grad_output: Tensor, grads: Gradients) -> None:
    """Fills the gradients that are asked for."""
    boxes = Boxes.of(call)
    spread = boxes.spread(call)
    num_rows = len(boxes.offsets) * call.num_outputs
    by_cell = rest_weight = rest_positions = None
    for images in call.image_chunks(max(_cell_bytes(call), _column_bytes(call))):
        grad = grad_output[images].contiguous()
        source = call.input[images]
        length = source.shape[0] * source.shape[2] * source.shape[3]
        shifted = _shift(call, boxes, grad, len(spread), length)
        if grads.input is not None:
            target = grads.input[images]
            in_place = memory_format(call.input) == torch.channels_last
            rows = _pixels(target) if in_place else spread.new_empty(length, source.shape[1])
            multiply(shifted[:, :length].t()[None], spread[None], rows[None])
            if not in_place:
                target.copy_(rows.view(len(source), *source.shape[2:], -1).permute(0, 3, 1, 2))
        if grads.weight is not None or grads.positions is not None:
            product = multiply_float32(shifted[None, :num_rows, :length], _pixels(source)[None])[0]
            by_cell = product if by_cell is None else by_cell.add_(product)
        columns = _listed_column_gradient(call, boxes, grad)
        if grads.input is not None:
            _listed_input_gradient(call, boxes, columns, grads.input[images])
        if grads.weight is not None or grads.positions is not None:
            by_position = _listed_columns(call, boxes, images, columns)
            by_weight = _listed_weight_gradient(call, boxes, grad, columns)
            rest_positions = by_position if rest_positions is None else rest_positions.add_(by_position)
            rest_weight = by_weight if rest_weight is None else rest_weight.add_(by_weight)
    if by_cell is not None and rest_weight is not None and rest_positions is not None:
        by_weight, by_position = boxes.gather(call, by_cell, rest_weight, rest_positions)
        if grads.weight is not None:
            grads.weight = by_weight
        if grads.positions is not None:
            grads.positions = by_position


def _shift(call: Call, boxes: Boxes, grad: Tensor, num_rows: int, length: int) -> Tensor:
    """The output's gradient at the offsets of all cells [rows, L], L rounded up."""
    shifted = grad.new_empty(num_rows, round_up(length, ALIGNMENT))
    block = block_size(shifted.shape[1], 1024)
    launch(
        few_kernels.shift_gradient_kernel,
        num_rows * num_blocks(shifted.shape[1], block),
        grad,
        boxes.offsets,
        shifted,
        call.num_outputs,
        len(boxes.offsets) * call.num_outputs,
        length,
        shifted.shape[1],
        *call.geometry.input_size,
        *call.geometry.output_size,
        **call.strides,
        BLOCK=block,
        num_warps=4,
    )
    return shifted


def _listed_column_gradient(call: Call, boxes: Boxes, grad: Tensor) -> Tensor:
    """Columns' gradient of listed entries [slots, L], L rounded up."""
    length, entries = len(grad) * call.out_pixels, call.group_channels * call.taps
    columns = grad.new_empty(entries, round_up(length, ALIGNMENT))
    launch(
        listed_kernels.listed_column_gradient_kernel,
        num_blocks(entries, 64) * _LISTED_SPLITS,
        grad,
        call.weight,
        boxes.entries,
        boxes.count,
        columns,
        call.num_outputs,
        entries,
        length,
        call.out_pixels,
        columns.shape[1],
        **_tile(call),
        BLOCK_ENTRIES=64,
        SPLITS=_LISTED_SPLITS,
        num_warps=4,
        num_stages=1,
    )
    return columns


def _listed_input_gradient(call: Call, boxes: Boxes, columns: Tensor, target: Tensor) -> None:
    length = target.shape[0] * target.shape[2] * target.shape[3]
    block = block_size(length, 512)
    launch(
        listed_kernels.listed_input_gradient_kernel,
        call.group_channels * _CHANNEL_SPLITS,
        columns,
        call.positions,
        boxes.slots,
        target,
        call.taps,
        length,
        columns.shape[1],
        target.stride(0),
        target.stride(1),
        target.stride(3),
        *call.gathering,
        **call.strides,
        BLOCK=block,
        SPLITS=_CHANNEL_SPLITS,
        num_warps=4,
    )


def _listed_columns(call: Call, boxes: Boxes, images: slice, columns: Tensor) -> Tensor:
    """Makes columns over their gradient; returns the positions' gradient [C, T, 2]."""
    source = call.input[images]
    partials = source.new_empty((_CHANNEL_SPLITS, call.group_channels, call.taps, 2), dtype=torch.float32)
    launch(
        listed_kernels.listed_columns_kernel,
        call.group_channels * _CHANNEL_SPLITS,
        source,
        call.positions,
        boxes.slots,
        columns,
        partials,
        call.group_channels,
        call.taps,
        len(source) * call.out_pixels,
        columns.shape[1],
        *source.stride(),
        *call.gathering,
        **call.strides,
        BLOCK=64,
        SPLITS=_CHANNEL_SPLITS,
        num_warps=1,
    )
    return partials.sum(0)


def _listed_weight_gradient(call: Call, boxes: Boxes, grad: Tensor, columns: Tensor) -> Tensor:
    """Weights' gradient by slot [C * T, outputs rounded up]."""
    tile = _tile(call)
    entries = len(columns)
    partials = columns.new_empty((_WEIGHT_SPLITS, entries, tile["BLOCK_OUTPUTS"]), dtype=torch.float32)
    launch(
        listed_kernels.listed_weight_gradient_kernel,
        num_blocks(entries, 64) * _WEIGHT_SPLITS,
        grad,
        columns,
        boxes.count,
        partials,
        call.num_outputs,
        entries,
        len(grad) * call.out_pixels,
        call.out_pixels,
        columns.shape[1],
        **{**tile, "BLOCK_PIXELS": 32},  # a longer step takes too many registers
        BLOCK_ENTRIES=64,
        SPLITS=_WEIGHT_SPLITS,
        num_warps=4,
        num_stages=1,
    )
    return partials.sum(0)

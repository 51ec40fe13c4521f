"""The forward of layers with few outputs in a group on CUDA: columns that are multiplied as they are made."""

from __future__ import annotations

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.triton_backend import fused_kernels
from icnn_zoo.ops.triton_backend.call import GAP, MAX_INT, Call
from icnn_zoo.ops.triton_backend.launching import launch, num_blocks
from icnn_zoo.ops.triton_backend.limits import Limits
from icnn_zoo.ops.triton_backend.products import follows_tf32

PLANE_GAP = GAP

# Pixels, entries (channels times taps) and outputs of a tile of columns made in registers: 128 registers a thread, so
# 16 warps at once.
_TILE = (64, 16)
_OUTPUTS = 32


def fits(weight: Tensor, geometry: Geometry, limits: Limits) -> bool:
    """Whether columns are multiplied as they are made: few outputs, and pixels that 32 bits can number in a tile."""
    largest = MAX_INT // ((_TILE[1] + 2) * 4)
    small = (geometry.input_size[0] + 2) * (geometry.input_size[1] + GAP) <= largest
    return small and weight.shape[0] // geometry.groups <= min(limits.fused_outputs, _OUTPUTS)


def forward(call: Call, bias: Tensor | None, output: Tensor) -> None:
    """Fills the output [B, N, Ho, Wo] by columns that are multiplied as they are made."""
    entries = call.group_channels * call.taps
    pixels, step = _TILE
    for images in call.image_chunks():
        planes = call.planes(images)
        length = planes.shape[0] * call.out_pixels
        programs = call.groups * num_blocks(length, pixels)
        # Few pixels: several programs share the sum over the entries, at least 16 steps each.
        splits = max(1, min(call.limits.programs // programs, entries // (16 * step)))
        share = num_blocks(num_blocks(entries, splits), step) * step
        splits = num_blocks(entries, share)
        target = output[images]
        out = target if splits == 1 else planes.new_empty((splits, *target.shape), dtype=torch.float32)
        strides = (0, *out.stride()) if splits == 1 else out.stride()
        launch(
            fused_kernels.fused_forward_kernel,
            splits * programs,
            planes,
            call.weight,
            call.positions,
            call.weight if bias is None else bias,
            out,
            call.groups,
            *call.grouping,
            length,
            share,
            *strides[:3],
            strides[4],
            *call.sampling,
            **call.strides,
            HAS_BIAS=bias is not None and splits == 1,
            PRECISION="tf32" if follows_tf32() else "ieee",
            BLOCK_PIXELS=pixels,
            BLOCK_OUTPUTS=16 if call.group_outputs <= 16 else _OUTPUTS,
            BLOCK_ENTRIES=step,
            num_warps=4,  # eight are known to be miscompiled in loops like this one
            num_stages=1,  # prefetching into shared memory, element by element, spills registers
        )
        if splits > 1:
            total = out.sum(0)
            target.copy_(total if bias is None else total + bias[:, None, None])

"""Tiny groups and the full version on CUDA: taps summed one by one, without columns."""

from __future__ import annotations

import torch
from torch import Tensor

from icnn_zoo.ops.triton_backend import direct_kernels
from icnn_zoo.ops.triton_backend.call import GAP, Call, Gradients, copy_planes, empty_like
from icnn_zoo.ops.triton_backend.launching import block_size, launch, num_blocks

PLANE_GAP = GAP


def forward(call: Call, bias: Tensor | None, output: Tensor) -> None:
    """Fills the output [B, N, Ho, Wo]."""
    for images in call.image_chunks():
        planes = call.planes(images)
        target = output[images]
        out = planes_for(target)
        length = planes.shape[0] * call.out_pixels
        block = block_size(length, 512)
        launch(
            direct_kernels.direct_forward_kernel,
            call.num_outputs * num_blocks(length, block),
            planes,
            call.weight,
            call.positions,
            call.weight if bias is None else bias,
            out,
            call.num_outputs,
            *call.grouping,
            length,
            *call.sampling,
            **call.strides,
            PER_KERNEL=call.per_kernel,
            HAS_BIAS=bias is not None,
            BLOCK=block,
            num_warps=4,
        )
        if out is not target:
            copy_planes(out, target)


def planes_for(target: Tensor) -> Tensor:
    """Where a kernel that computes by planes puts its results: the target itself if it is made of planes."""
    return target if target.is_contiguous() else empty_like(target, torch.contiguous_format)


def backward(call: Call, grad_output: Tensor, grads: Gradients) -> None:
    """Fills the gradients that are asked for."""
    partials = None
    for images in call.image_chunks():
        grad = grad_output[images].contiguous()
        if grads.input is not None:
            input_gradient(call, grad, grads.input[images])
        if grads.weight is not None or grads.positions is not None:
            sums = _kernel_gradient(call, grad, call.planes(images))
            partials = sums if partials is None else partials.add_(sums)
    if grads.weight is not None:
        assert partials is not None
        grads.weight.copy_(partials[..., 0])
    if grads.positions is not None:
        assert partials is not None
        by_kernel = partials[..., 1:] * call.weight.float()[..., None]  # [N, C / G, T, 2]
        if call.per_kernel:
            grads.positions.copy_(by_kernel)
        else:
            grads.positions.copy_(by_kernel.unflatten(0, (call.groups, -1)).sum(1).flatten(0, 1))


def input_gradient(call: Call, grad_output: Tensor, target: Tensor) -> None:
    """Fills the input's gradient [S, C, H, W]."""
    planes = planes_for(target)
    num_images, channels, height, width = target.shape
    length = num_images * height * width
    block = block_size(length, 512)
    launch(
        direct_kernels.direct_input_gradient_kernel,
        channels * num_blocks(length, block),
        grad_output,
        call.weight,
        call.positions,
        planes,
        call.num_outputs,
        *call.grouping,
        length,
        *call.gathering,
        **call.strides,
        PER_KERNEL=call.per_kernel,
        BLOCK=block,
        num_warps=4,
    )
    if planes is not target:
        copy_planes(planes, target)


def _kernel_gradient(call: Call, grad_output: Tensor, planes: Tensor) -> Tensor:
    """Sums over pixels of the output's gradient times sample, slope by row and slope by col: [N, C / G, T, 3]."""
    length = planes.shape[0] * call.out_pixels
    block = block_size(length, 256)
    blocks = num_blocks(length, block)
    pairs = call.num_outputs * call.group_channels
    split_blocks = num_blocks(blocks, min(blocks, num_blocks(16 * call.limits.programs, pairs)))
    splits = num_blocks(blocks, split_blocks)
    shape = (splits, call.num_outputs, call.group_channels, call.taps, 3)
    partials = planes.new_empty(shape, dtype=torch.float32)
    launch(
        direct_kernels.direct_kernel_gradient_kernel,
        splits * pairs,
        grad_output,
        planes,
        call.positions,
        partials,
        call.num_outputs,
        *call.grouping,
        length,
        split_blocks,
        *call.sampling,
        **call.strides,
        PER_KERNEL=call.per_kernel,
        TAPS=1 << (call.taps - 1).bit_length(),
        BLOCK=block,
        num_warps=1,
    )
    return partials.sum(0)

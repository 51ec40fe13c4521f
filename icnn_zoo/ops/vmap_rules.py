"""``torch.func.vmap`` of the operators: one call for all members of a batch, not a loop.

Members that differ in their images only are more images. Where shapes or weights differ too (an ensemble), members are
groups of channels: that is what a grouped convolution computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Rule = tuple[Any, Any]


def forward(
    info: Any,
    in_dims: tuple[Any, ...],
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    *options: Any,
) -> Rule:
    """The rule of ``irregular_conv2d``."""
    members, (stride, padding, dilation, groups, *how) = info.batch_size, options
    if in_dims[1:4] == (None, None, None):
        images = input.movedim(in_dims[0], 0)
        output = torch.ops.icnn_zoo.irregular_conv2d(images.flatten(0, 1), weight, positions, bias, *options)
        return output.unflatten(0, images.shape[:2]), 0
    stacked = _stack(weight, in_dims[1], members)
    output = torch.ops.icnn_zoo.irregular_conv2d(
        _as_channels(input, in_dims[0], members),
        stacked.flatten(0, 1),
        _stack(positions, in_dims[2], members).flatten(0, 1),
        None if bias is None else _stack(bias, in_dims[3], members).flatten(0, 1),
        stride,
        padding,
        dilation,
        members * groups,
        *how,
    )
    return output.unflatten(1, stacked.shape[:2]), 1


def backward(
    info: Any,
    in_dims: tuple[Any, ...],
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    *options: Any,
) -> Rule:
    """The rule of ``irregular_conv2d_backward``."""
    members, (stride, padding, dilation, groups, mask, *how) = info.batch_size, options
    stacked = [_stack(tensor, dim, members) for tensor, dim in zip((weight, positions), in_dims[2:4], strict=True)]
    grads = torch.ops.icnn_zoo.irregular_conv2d_backward(
        _as_channels(grad_output, in_dims[0], members),
        _as_channels(input, in_dims[1], members),
        *(tensor.flatten(0, 1) for tensor in stacked),
        stride,
        padding,
        dilation,
        members * groups,
        mask,
        *how,
    )
    outputs, dims = [], []
    for grad, wanted, axis in zip(grads, mask, (1, 0, 0), strict=True):
        outputs.append(grad.unflatten(axis, (members, grad.shape[axis] // members)) if wanted else grad)
        dims.append(axis if wanted else None)
    return tuple(outputs), tuple(dims)


def _stack(tensor: Tensor, dim: int | None, members: int) -> Tensor:
    """The members along a first axis; one that all share is repeated."""
    return tensor.expand(members, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _as_channels(tensor: Tensor, dim: int | None, members: int) -> Tensor:
    """The channels [B, C, ...] of all members side by side [B, members * C, ...]."""
    return _stack(tensor, dim, members).transpose(0, 1).flatten(1, 2)

"""The irregular convolution as one ordinary convolution: every kernel drawn into the box that holds its taps.

Bilinear interpolation is linear in the input, so a kernel of T taps at real positions equals a dense kernel with up to
four cells a tap. The cost is that of a convolution with the box's kernel size, hence grows with the spread of the
positions: cheap for depthwise layers, the only shared computation there is in the full version, too dear for wide boxes
(:mod:`icnn_zoo.ops.torch_backend` then takes columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from icnn_zoo.ops.geometry import Geometry

# A gathered column element costs as much as about this many multiply-adds of a convolution (two CPU cores, float32).
MAX_CELLS_PER_TAP = 64

# Elements of the dense kernels drawn at once in the full version (64 MiB in float32).
_KERNEL_ELEMENTS = 2**24


@dataclass(frozen=True)
class Box:
    """The cells that hold every tap, as offsets from the input pixel at (r * stride, c * stride)."""

    row: int
    col: int
    height: int
    width: int

    @property
    def cells(self) -> int:
        return self.height * self.width


def measure_box(
    positions: Tensor,
    input_size: Sequence[int],
    output_size: Sequence[int],
    stride: Sequence[int],
    origin: Sequence[int],
) -> Box | None:
    """The smallest box around all taps that can read the input.

    Returns:
        The box, or None where looking at the positions would synchronise with a device or break tracing.
    """
    if positions.device.type != "cpu" or torch.compiler.is_compiling() or positions.numel() == 0:
        return None
    low, high = positions.detach().nan_to_num(0.0).flatten(0, -2).aminmax(dim=0)
    first, size = [], []
    for axis in range(2):
        # Cells below `bottom` or above `top` are outside the input for every output.
        bottom, top = -(output_size[axis] - 1) * stride[axis], input_size[axis] - 1
        lowest = min(max(_clamped_floor(low[axis]) + origin[axis], bottom), top)
        highest = max(min(_clamped_floor(high[axis]) + 1 + origin[axis], top), lowest)
        first.append(lowest)
        size.append(highest - lowest + 1)
    return Box(first[0], first[1], size[0], size[1])


def _clamped_floor(value: Tensor) -> int:
    return int(value.clamp(-(2.0**30), 2.0**30).floor())


def draw_kernels(weight: Tensor, positions: Tensor, box: Box, origin: Sequence[int]) -> Tensor:
    """Draws taps into dense kernels; differentiable, without scattering.

    The interpolation weights of a tap are the outer product of a row and a column vector with two cells each, so the
    sum over taps is a matrix product. At integer positions the derivative is that of the cell to the right/below.

    Args:
        weight: Weights [..., T].
        positions: Absolute positions [..., T, 2], in pixels, batch dimensions as ``weight``.
        box: The cells to draw.
        origin: Offset (rows, columns) of the kernel's centre from the input pixel at (r * stride, c * stride).

    Returns:
        Kernels [..., box.height, box.width] in the dtype of ``weight``; what lies outside the box is not drawn.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)

    def cells(position: Tensor, first: int, size: int) -> Tensor:
        floor = position.detach().floor()
        fraction = (position - floor).to(dtype)[..., None]
        distance = torch.arange(first, first + size, device=position.device) - floor[..., None]
        return (distance == 0).to(dtype) * (1 - fraction) + (distance == 1).to(dtype) * fraction

    rows = cells(positions[..., 0], box.row - origin[0], box.height) * weight.to(dtype)[..., None]
    cols = cells(positions[..., 1], box.col - origin[1], box.width)
    return (rows.transpose(-1, -2) @ cols).to(weight.dtype)


def irregular_conv2d(input: Tensor, weight: Tensor, positions: Tensor, box: Box, geometry: Geometry) -> Tensor:
    """Computes the convolution with dense kernels.

    Args:
        input: Images [B, C, H, W].
        weight: Weights [N, C / G, kh, kw].
        positions: Positions [C, T, 2] of a depthwise layer, or [N, C / G, T, 2] of the full version.
        box: What :func:`measure_box` returned.
        geometry: Sizes of the call.

    Returns:
        Output [B, N, Ho, Wo] without bias. In the full version the dense kernels of a group of output channels are
        drawn at a time and drawn again in the backward, which bounds the memory.
    """
    per_kernel = positions.dim() == 4
    weight = weight.flatten(2)
    if not per_kernel:
        positions = positions.repeat_interleave(weight.shape[0] // positions.shape[0], dim=0)[:, None]

    def convolve(input: Tensor, weight: Tensor, positions: Tensor, groups: int) -> Tensor:
        kernels = draw_kernels(weight, positions, box, geometry.origin)
        return _convolve(input, kernels, box, geometry, groups)

    if not per_kernel:
        return convolve(input, weight, positions, geometry.groups)
    outputs_per_group = weight.shape[0] // geometry.groups
    group_channels = weight.shape[1]
    chunk = max(1, _KERNEL_ELEMENTS // (group_channels * box.cells))
    outputs = []
    for group in range(geometry.groups):
        group_input = input[:, group * group_channels : (group + 1) * group_channels]
        last_of_group = (group + 1) * outputs_per_group
        for first in range(group * outputs_per_group, last_of_group, chunk):
            span = slice(first, min(first + chunk, last_of_group))
            part = checkpoint(
                convolve, group_input, weight[span], positions[span], 1, use_reentrant=False, preserve_rng_state=False
            )
            outputs.append(part)
    return torch.cat(outputs, dim=1)


def _convolve(input: Tensor, kernels: Tensor, box: Box, geometry: Geometry, groups: int) -> Tensor:
    height, width = input.shape[-2:]
    needed = [
        (size - 1) * step + extent
        for size, step, extent in zip(geometry.output_size, geometry.stride, (box.height, box.width), strict=True)
    ]
    top, left = -box.row, -box.col
    bottom, right = needed[0] - height - top, needed[1] - width - left
    if min(top, left, bottom, right) >= 0 and (bottom - top, right - left) == (0, 0):
        return F.conv2d(input, kernels, None, geometry.stride, (top, left), 1, groups)
    return F.conv2d(F.pad(input, (left, right, top, bottom)), kernels, None, geometry.stride, 0, 1, groups)

"""The irregular convolution as one ordinary convolution: every kernel drawn into the box that holds its taps.

Interpolation is linear in the input, so a kernel of T taps at real positions equals a dense kernel, with up to four
cells a tap where it is bilinear. The cost is that of a convolution with the box's kernel size, hence grows with how far
positions lie apart: cheap for depthwise layers, the only shared computation there is in the full version, too dear for
wide boxes (:mod:`icnn_zoo.ops.torch_backend` then takes columns).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry, memory_format
from icnn_zoo.ops.tap_reading import reach, weigh_pixels
from icnn_zoo.ops.torch_backend.limits import Limits


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


def measure_box(positions: Tensor, geometry: Geometry) -> Box | None:
    """The smallest box around all taps that can read the input.

    Returns:
        The box, or None where looking at the positions would synchronise with a device. With spreads that does not
        count: how far they reach is asked in any case.
    """
    if positions.numel() == 0 or (positions.device.type != "cpu" and not geometry.reading.is_wide):
        return None
    first, size = [], []
    for axis in range(2):
        low, high = (end.nan_to_num(0.0).clamp(-(2.0**30), 2.0**30) for end in reach(positions, axis, geometry.reading))
        # Cells below `bottom` or above `top` are outside the input for every output.
        bottom, top = -(geometry.output_size[axis] - 1) * geometry.stride[axis], geometry.input_size[axis] - 1
        lowest = min(max(int(low.amin()) + geometry.origin[axis], bottom), top)
        highest = max(min(int(high.amax()) + geometry.origin[axis], top), lowest)
        first.append(lowest)
        size.append(highest - lowest + 1)
    return Box(first[0], first[1], size[0], size[1])


def draw_kernels(weight: Tensor, positions: Tensor, box: Box, geometry: Geometry) -> Tensor:
    """Draws taps into dense kernels, without scattering.

    The interpolation weights of a tap are the outer product of a row and a column vector, so the sum over taps is a
    matrix product.

    Args:
        weight: Weights [..., T].
        positions: Absolute positions [..., T, 2] in pixels, with spreads [..., T, 4]; batch dimensions as ``weight``.
        box: The cells to draw.
        geometry: Sizes of the call.

    Returns:
        Kernels [..., box.height, box.width] in the dtype of ``weight``; what lies outside the box is not drawn.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    (rows, _), (cols, _) = _weigh(positions, box, geometry, dtype)
    return ((rows * weight.to(dtype)[..., None]).transpose(-1, -2) @ cols).to(weight.dtype)


def drawn_gradients(
    grad_kernels: Tensor, weight: Tensor, positions: Tensor, box: Box, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`draw_kernels` by weight and positions, spreads included.

    At integer positions the derivative is that of the cell to the right/below.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    (rows, row_slopes), (cols, col_slopes) = _weigh(positions, box, geometry, dtype)
    by_rows = cols @ grad_kernels.to(dtype).transpose(-1, -2)  # [..., T, box.height]
    by_cols = rows @ grad_kernels.to(dtype)
    scale = weight.to(dtype)
    by_positions = [
        scale * (grad * slope).sum(-1)
        for slopes in zip(row_slopes, col_slopes, strict=True)
        for grad, slope in zip((by_rows, by_cols), slopes, strict=True)
    ]
    return (by_rows * rows).sum(-1).to(weight.dtype), torch.stack(by_positions, dim=-1).to(positions.dtype)


def _weigh(
    positions: Tensor, box: Box, geometry: Geometry, dtype: torch.dtype
) -> tuple[tuple[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]:
    """Weights and slopes of the box's rows and of its columns."""
    rows = weigh_pixels(positions, 0, box.row - geometry.origin[0], box.height, geometry.reading, dtype)
    return rows, weigh_pixels(positions, 1, box.col - geometry.origin[1], box.width, geometry.reading, dtype)


class Convolution(Protocol):
    """Convolves with drawn kernels [N, C / G, box.height, box.width]: groups and sizes are those of ``geometry``."""

    def forward(self, input: Tensor, kernels: Tensor, bias: Tensor | None, box: Box, geometry: Geometry) -> Tensor:
        """The output [B, N, Ho, Wo] of images [B, C, H, W]."""

    def input_gradient(self, grad_output: Tensor, kernels: Tensor, box: Box, geometry: Geometry) -> Tensor:
        """The gradient [B, C, H, W] by the images."""

    def kernel_gradient(self, grad_output: Tensor, input: Tensor, box: Box, geometry: Geometry) -> Tensor:
        """The gradient by the kernels."""


class TorchConvolution:
    """PyTorch's own."""

    def forward(self, input: Tensor, kernels: Tensor, bias: Tensor | None, box: Box, geometry: Geometry) -> Tensor:
        padded = F.pad(input, _margins(box, geometry))
        return F.conv2d(padded, kernels, bias, geometry.stride, groups=geometry.groups)

    def input_gradient(self, grad_output: Tensor, kernels: Tensor, box: Box, geometry: Geometry) -> Tensor:
        left, right, top, bottom = margins = _margins(box, geometry)
        height, width = geometry.input_size
        shape = (grad_output.shape[0], kernels.shape[1] * geometry.groups, top + height + bottom, left + width + right)
        by_padded = _convolution_backward(grad_output, grad_output.new_empty(shape), kernels, geometry)[0]
        return F.pad(by_padded, [-margin for margin in margins])

    def kernel_gradient(self, grad_output: Tensor, input: Tensor, box: Box, geometry: Geometry) -> Tensor:
        kernels = input.new_empty(grad_output.shape[1], input.shape[1] // geometry.groups, box.height, box.width)
        padded = F.pad(input, _margins(box, geometry))
        return _convolution_backward(grad_output, padded, kernels, geometry, by_kernels=True)[1]


def _convolution_backward(
    grad_output: Tensor, padded: Tensor, kernels: Tensor, geometry: Geometry, by_kernels: bool = False
) -> tuple[Tensor, Tensor]:
    by_padded, by_weight, _ = torch.ops.aten.convolution_backward(
        grad_output,
        padded,
        kernels,
        None,
        geometry.stride,
        (0, 0),
        (1, 1),
        False,
        (0, 0),
        geometry.groups,
        (not by_kernels, by_kernels, False),
    )
    return by_padded, by_weight


def forward(
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    box: Box,
    geometry: Geometry,
    limits: Limits,
    convolution: Convolution,
) -> Tensor:
    """Computes the convolution with dense kernels, of some output channels at a time where kernels are many.

    Args:
        input: Images [B, C, H, W].
        weight: Weights [N, C / G, T].
        positions: Positions [C, T, 2], or [N, C / G, T, 2] of the full version; with spreads [..., T, 4].
        bias: Bias [N] or None.
        box: What :func:`measure_box` returned.
        geometry: Sizes of the call.
        limits: Sizes to work in.
        convolution: What convolves.

    Returns:
        Output [B, N, Ho, Wo].
    """
    parts = []
    for part in _parts(weight, positions, box, geometry, limits):
        kernels = draw_kernels(weight[part.outputs], part.positions, box, geometry)
        part_bias = None if bias is None else bias[part.outputs]
        sizes = replace(geometry, groups=part.groups)
        parts.append(convolution.forward(input[:, part.channels], kernels, part_bias, box, sizes))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    box: Box,
    geometry: Geometry,
    limits: Limits,
    convolution: Convolution,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Computes the gradients of :func:`forward` for input, weight and positions, None where not in ``needs``."""
    grad_input = torch.zeros_like(input, memory_format=torch.contiguous_format) if needs[0] else None
    grad_weight = torch.zeros_like(weight) if needs[1] or needs[2] else None
    grad_positions = torch.zeros_like(positions) if needs[1] or needs[2] else None
    for part in _parts(weight, positions, box, geometry, limits):
        part_weight = weight[part.outputs]
        grad, sizes = grad_output[:, part.outputs], replace(geometry, groups=part.groups)
        if grad_input is not None:
            kernels = draw_kernels(part_weight, part.positions, box, geometry)
            grad_input[:, part.channels] += convolution.input_gradient(grad, kernels, box, sizes)
        if grad_weight is not None and grad_positions is not None:
            by_kernels = convolution.kernel_gradient(grad, input[:, part.channels], box, sizes)
            by_weight, by_positions = drawn_gradients(by_kernels, part_weight, part.positions, box, geometry)
            grad_weight[part.outputs] = by_weight
            if positions.dim() == 4:
                grad_positions[part.outputs] = by_positions
            else:
                # The outputs of a channel share its shape.
                by_output = by_positions.unflatten(0, (part.groups, -1))  # [g, n, C / G, T, ...]
                grad_positions[part.channels] += by_output.sum(1).flatten(0, 1)
    if grad_input is not None:
        grad_input = spread_unknown(grad_input, positions, geometry).contiguous(memory_format=memory_format(input))
    return (
        grad_input,
        grad_weight if needs[1] else None,
        grad_positions if needs[2] else None,
    )


def spread_unknown(grad_input: Tensor, positions: Tensor, geometry: Geometry) -> Tensor:
    """Makes the gradient of every pixel that a tap at no number reads no number, also those between strides."""
    unknown = (positions * 0).sum((-2, -1))  # [C], or [N, C / G] in the full version
    if unknown.dim() == 2:
        unknown = unknown.unflatten(0, (geometry.groups, -1)).sum(1).flatten()
    return grad_input if unknown.isfinite().all() else grad_input + unknown[:, None, None].to(grad_input.dtype)


@dataclass(frozen=True)
class _Part:
    """Output channels drawn at once, what they read, and their positions [n, C / G, T, 2], or those of all in one."""

    outputs: slice
    channels: slice
    groups: int
    positions: Tensor


def _parts(weight: Tensor, positions: Tensor, box: Box, geometry: Geometry, limits: Limits) -> Iterator[_Part]:
    num_outputs, group_channels = weight.shape[:2]
    per_group = num_outputs // geometry.groups
    few = group_channels == 1 or num_outputs * group_channels * box.cells <= limits.kernel_elements
    if positions.dim() == 3 and geometry.groups > 1 and few:
        moved = positions.unflatten(0, (geometry.groups, -1)).repeat_interleave(per_group, dim=0)
        yield _Part(slice(0, num_outputs), slice(0, positions.shape[0]), geometry.groups, moved)
        return
    chunk = max(1, limits.kernel_elements // (group_channels * box.cells))
    for group in range(geometry.groups):
        channels = slice(group * group_channels, (group + 1) * group_channels)
        last_of_group = (group + 1) * per_group
        for first in range(group * per_group, last_of_group, chunk):
            span = slice(first, min(first + chunk, last_of_group))
            yield _Part(span, channels, 1, positions[channels][None] if positions.dim() == 3 else positions[span])


def _margins(box: Box, geometry: Geometry) -> tuple[int, int, int, int]:
    """What to pad (crop, where negative) on the left, right, top and bottom so that the box never leaves the input."""
    height, width = geometry.input_size
    rows, cols = (
        (size - 1) * step + extent
        for size, step, extent in zip(geometry.output_size, geometry.stride, (box.height, box.width), strict=True)
    )
    return -box.col, cols - width + box.col, -box.row, rows - height + box.row

"""The irregular convolution in standard PyTorch operators, with an explicit backward.

Positions vary neither over space nor over the batch, so every (channel, tap) reads its plane at one fixed sub-pixel
shift. The forward gathers whole rows of the shifted plane (contiguous runs, no per-pixel index), blends them twice with
``torch.lerp`` and multiplies the columns by the weights. The adjoint with respect to the input is again a gather, of
the columns' gradient at the negated shift, so nothing is scattered and two runs agree bit for bit.

Letters used in shapes: B images, C input channels, N output channels, G groups, T taps, K = channels x taps of a block,
S = images of a slab, L = length of a flattened slab of one plane. Columns are computed for a slab of images and a block
of channels at a time and never kept: the backward recomputes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from icnn_zoo.ops import dense
from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.windows import Corners, Shift, gap_columns, read_windows, shifts

# Elements of one gathered block. 2 Mi float32 values (8 MiB) keep the three passes over a block near the cache and the
# matrix product large enough to run at full speed; 1 to 4 Mi measure alike.
_BLOCK_ELEMENTS = 2**21


def irregular_conv2d(
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Computes the irregular convolution of checked arguments; see :func:`icnn_zoo.irregular_conv2d`.

    Args:
        input: Images [B, C, H, W].
        weight: Weights [N, C / groups, kh, kw].
        positions: Absolute positions in pixels [C, kh * kw, 2], or [N, C / groups, kh * kw, 2] for the full version.
        bias: Bias [N] or None.
        stride: Stride (rows, columns).
        padding: Zeros (top, bottom, left, right) around the input.
        dilation: Dilation (rows, columns); sets the origin and the output size only.
        groups: Number of groups.

    Returns:
        Output [B, N, Ho, Wo] in the memory format of ``input``.
    """
    geometry = Geometry.of(input.shape[-2:], weight.shape[-2:], stride, padding, dilation, groups)
    per_kernel = positions.dim() == 4
    depthwise = weight.shape[1] == 1
    if per_kernel or depthwise:
        box = dense.measure_box(positions, geometry.input_size, geometry.output_size, stride, geometry.origin)
        if box is not None and box.cells <= dense.MAX_CELLS_PER_TAP * positions.shape[-2]:
            output = dense.irregular_conv2d(input, weight, positions, box, geometry)
            return _finish(output, bias, input)
    if per_kernel:
        output = _per_kernel(input, weight, positions, geometry)
    else:
        output = _IrregularConv2d.apply(input, weight.flatten(2), positions, geometry)
    return _finish(output, bias, input)


def _finish(output: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
    if bias is not None:
        output = output + bias[:, None, None]
    if not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last):
        output = output.contiguous(memory_format=torch.channels_last)
    return output


def _per_kernel(input: Tensor, weight: Tensor, positions: Tensor, geometry: Geometry) -> Tensor:
    """The full version by columns: an output channel is a group that reads its own copy of its input channels."""
    num_outputs, group_channels, taps = positions.shape[:3]
    outputs_per_group = num_outputs // geometry.groups
    height, width = geometry.output_size
    chunk = max(1, _BLOCK_ELEMENTS // max(1, group_channels * taps * height * width))
    outputs = []
    for first in range(0, num_outputs, chunk):
        last = min(first + chunk, num_outputs)
        channels = [
            output // outputs_per_group * group_channels + channel
            for output in range(first, last)
            for channel in range(group_channels)
        ]
        grouped = Geometry(
            geometry.input_size, geometry.output_size, geometry.stride, geometry.origin, groups=last - first
        )
        # Recomputed in the backward: the chunk's copy of its input channels must not be kept.
        outputs.append(
            checkpoint(
                _chunk,
                input,
                weight[first:last],
                positions[first:last],
                channels,
                grouped,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    return torch.cat(outputs, dim=1)


def _chunk(input: Tensor, weight: Tensor, positions: Tensor, channels: list[int], geometry: Geometry) -> Tensor:
    return _IrregularConv2d.apply(input[:, channels], weight.flatten(2), positions.flatten(0, 1), geometry)


class _IrregularConv2d(torch.autograd.Function):
    """Columns by shifted reads, then a matrix product; the shared shape. weight is [N, C / G, T]."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, positions: Tensor, geometry: Geometry) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return _forward(input, weight, positions, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, positions, geometry = inputs
        ctx.save_for_backward(input, weight, positions)
        ctx.geometry = geometry

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, positions = ctx.saved_tensors
        with torch.autocast(input.device.type, enabled=False):
            grads = _Gradients.apply(grad_output, input, weight, positions, ctx.geometry, ctx.needs_input_grad[:3])
            return (*grads, None)


class _Gradients(torch.autograd.Function):
    """The backward as a function of its own, so that a second derivative raises instead of being silently zero.

    ``once_differentiable`` raises only for some of the inputs: with ``allow_unused=True`` it gives None.
    """

    @staticmethod
    def forward(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        positions: Tensor,
        geometry: Geometry,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return _backward(grad_output, input, weight, positions, geometry, needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("`irregular_conv2d` can be differentiated only once; this asked for a second derivative.")


@dataclass(frozen=True)
class _Block:
    """Channels computed at once: several whole groups, or a part of a single one."""

    first_group: int
    last_group: int
    first_channel: int  # within the group
    last_channel: int


def _blocks(groups: int, group_channels: int, elements_per_channel: int) -> Iterator[_Block]:
    channels = max(1, _BLOCK_ELEMENTS // max(1, elements_per_channel))
    if channels >= group_channels:
        step = max(1, channels // group_channels)
        for group in range(0, groups, step):
            yield _Block(group, min(group + step, groups), 0, group_channels)
        return
    for group in range(groups):
        for channel in range(0, group_channels, channels):
            yield _Block(group, group + 1, channel, min(channel + channels, group_channels))


def _slabs(geometry: Geometry, batch: int) -> Iterator[tuple[int, int]]:
    """Images computed at once: few enough that even a single channel's taps stay small, many for small maps."""
    height, width = geometry.output_size
    images = max(1, 4096 // max(1, (height + 1) * (width + 1)))
    for first in range(0, batch, images):
        yield first, min(first + images, batch)


def _padded(planes: Tensor, gap: int) -> Tensor:
    return F.pad(planes, (0, gap, 1, 1))


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Shifted reads are blended in at least float32; half precision is for the matrix product."""
    return torch.promote_types(dtype, torch.float32)


class _Call:
    """What forward and backward share: the walk over slabs and blocks, and the columns of one block."""

    def __init__(self, input: Tensor, weight: Tensor, positions: Tensor, geometry: Geometry) -> None:
        self.geometry = geometry
        self.input = input.unflatten(1, (geometry.groups, -1))  # [B, G, C / G, H, W]
        self.weight = weight.unflatten(0, (geometry.groups, -1))  # [G, N / G, C / G, T]
        self.group_channels, self.taps = weight.shape[1:]
        self.dtype = _compute_dtype(input.dtype)
        self.shift = shifts(positions, geometry, self.dtype)
        self.shared = geometry.stride == (1, 1)
        height, width = geometry.output_size
        self.rows, self.pitch = (height + 1, width + 1) if self.shared else (height, width)
        self.gap = gap_columns(self.shift.col, geometry.input_size[1], width, geometry.stride[1])

    def slabs_and_blocks(self) -> Iterator[tuple[tuple[int, int], Iterator[_Block]]]:
        for first, last in _slabs(self.geometry, self.input.shape[0]):
            elements = (last - first) * self.rows * self.pitch * self.taps
            yield (first, last), _blocks(self.geometry.groups, self.group_channels, elements)

    def block_weight(self, block: _Block) -> Tensor:
        """Weights of a block [g, N / G, c * T]."""
        weight = self.weight[block.first_group : block.last_group, :, block.first_channel : block.last_channel]
        return weight.flatten(2)

    def block_range(self, block: _Block) -> tuple[int, int]:
        first = (block.first_group * self.group_channels + block.first_channel) * self.taps
        last = ((block.last_group - 1) * self.group_channels + block.last_channel) * self.taps
        return first, last

    def block_corners(self, block: _Block, images: tuple[int, int], shift: Shift) -> Corners:
        planes = self.input[
            images[0] : images[1], block.first_group : block.last_group, block.first_channel : block.last_channel
        ]
        planes = planes.flatten(1, 2).transpose(0, 1).to(self.dtype)  # [P, S, H, W]
        plane = torch.arange(planes.shape[0], device=planes.device).repeat_interleave(self.taps)
        geometry = self.geometry
        windows = read_windows(
            _padded(planes, self.gap),
            plane,
            shift.row,
            shift.col,
            self.gap,
            geometry.input_size,
            geometry.output_size,
            geometry.stride,
        )
        return Corners.of(windows)

    def crop(self, flat: Tensor, images: int) -> Tensor:
        """[..., S * rows * pitch] to [..., S, Ho, Wo]."""
        height, width = self.geometry.output_size
        return flat.unflatten(-1, (images, self.rows, self.pitch))[..., :height, :width]


def _forward(input: Tensor, weight: Tensor, positions: Tensor, geometry: Geometry) -> Tensor:
    call = _Call(input, weight, positions, geometry)
    num_outputs = weight.shape[0]
    output = input.new_empty(input.shape[0], num_outputs, *geometry.output_size)
    if output.numel() == 0:
        return output
    for (first, last), blocks in call.slabs_and_blocks():
        images = last - first
        total = input.new_zeros(
            geometry.groups, num_outputs // geometry.groups, images * call.rows * call.pitch, dtype=call.dtype
        )
        for block in blocks:
            shift = call.shift.select(*call.block_range(block))
            corners = call.block_corners(block, (first, last), shift)
            columns = corners.columns(shift)
            _add_product(
                total[block.first_group : block.last_group, :, : corners.length],
                call.block_weight(block),
                columns.unflatten(0, (block.last_group - block.first_group, -1)),
            )
        output[first:last] = call.crop(total.flatten(0, 1), images).transpose(0, 1)
    return output


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Total += left @ right over a batch of groups; half precision factors are summed into the float32 total."""
    right = right.to(left.dtype)
    if total.dtype != left.dtype:
        total += torch.bmm(left, right)
    elif total.shape[0] == 1:
        total[0].addmm_(left[0], right[0])
    else:
        total.baddbmm_(left, right)


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    geometry: Geometry,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs_input, needs_weight, needs_positions = needs
    call = _Call(input, weight, positions, geometry)
    groups, taps = geometry.groups, call.taps
    grad_input = torch.zeros_like(input, memory_format=torch.contiguous_format) if needs_input else None
    grad_weight = torch.zeros_like(call.weight.flatten(2), dtype=call.dtype) if needs_weight else None
    grad_shift = positions.new_zeros(positions.shape[0] * taps, 2, dtype=call.dtype) if needs_positions else None
    if grad_output.numel() == 0:
        return _grads(grad_input, grad_weight, grad_shift, weight, positions)
    height, width = geometry.output_size
    for (first, last), blocks in call.slabs_and_blocks():
        images = last - first
        # Zeros in the gaps between rows and images, so that products over flat rows count each output once.
        padded = F.pad(grad_output[first:last], (0, call.pitch - width, 0, call.rows - height)).transpose(0, 1)
        grad_rows = padded.reshape(groups, -1, images * call.rows * call.pitch)
        for block in blocks:
            span = call.block_range(block)
            shift = call.shift.select(*span)
            in_groups = slice(block.first_group, block.last_group)
            num_groups = block.last_group - block.first_group
            grad_block = grad_rows[in_groups]
            grad_columns = torch.bmm(call.block_weight(block).transpose(1, 2), grad_block).flatten(0, 1).to(call.dtype)
            if grad_input is not None:
                gathered = _input_gradient(call, grad_columns, shift, images)
                channels = slice(span[0] // taps, span[1] // taps)
                grad_input[first:last, channels] = gathered.transpose(0, 1)
            if grad_weight is None and grad_shift is None:
                continue
            corners = call.block_corners(block, (first, last), shift)
            if grad_shift is not None:
                grad_shift[span[0] : span[1]] += corners.position_gradient(grad_columns[:, : corners.length], shift)
            if grad_weight is not None:
                in_channels = slice(block.first_channel * taps, block.last_channel * taps)
                columns = corners.columns(shift).unflatten(0, (num_groups, -1))
                _add_product(
                    grad_weight[in_groups, :, in_channels],
                    grad_block[:, :, : corners.length],
                    columns.transpose(1, 2),
                )
    return _grads(grad_input, grad_weight, grad_shift, weight, positions)


def _grads(
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_shift: Tensor | None,
    weight: Tensor,
    positions: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        grad_input,
        None if grad_weight is None else grad_weight.reshape(weight.shape).to(weight.dtype),
        None if grad_shift is None else grad_shift.reshape(positions.shape).to(positions.dtype),
    )


def _input_gradient(call: _Call, grad_columns: Tensor, shift: Shift, images: int) -> Tensor:
    """Gathers the gradient of one block's input planes [c, S, H, W] from its columns' gradient [c * T, L].

    With a stride the columns' gradient is first spread over the input's grid, zeros between, and read as with stride 1.
    """
    geometry = call.geometry
    size = geometry.input_size
    step_rows, step_cols = geometry.stride
    rows = (geometry.output_size[0] - 1) * step_rows + 1
    cols = (geometry.output_size[1] - 1) * step_cols + 1
    adjoint = shift.negated()
    gap = gap_columns(adjoint.col, cols, size[1], 1)
    num_planes = grad_columns.shape[0]
    source = grad_columns.new_zeros(num_planes, images, rows + 2, cols + gap)
    source[:, :, 1 : rows + 1 : step_rows, :cols:step_cols] = call.crop(grad_columns, images)
    plane = torch.arange(num_planes, device=source.device)
    windows = read_windows(source, plane, adjoint.row, adjoint.col, gap, (rows, cols), size, (1, 1))
    corners = Corners.of(windows)
    flat = corners.weighted_sum(adjoint, call.taps)
    flat = F.pad(flat, (0, corners.values.shape[1] - corners.length))
    return flat.unflatten(1, (images, size[0] + 1, size[1] + 1))[..., : size[0], : size[1]]

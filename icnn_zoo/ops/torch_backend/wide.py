"""Columns of triangle and gaussian interpolation: each tap's plane, shifted and smoothed by a kernel of its own.

Letters used in shapes: T taps, K = channels x taps, S images, c channels, (Rr, Rc) pixels that a tap reads along rows
and columns, (Ho, Wo) size of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.tap_reading import read_axis
from icnn_zoo.ops.torch_backend.limits import Limits
from icnn_zoo.ops.torch_backend.windows import Block, Frame, compute_dtype
from icnn_zoo.ops.wide_interpolation import Weighing, carry_back, start_window, weigh_windows


def weigh_taps(taps: Tensor, geometry: Geometry, dtype: torch.dtype) -> tuple[list[Tensor], list[Weighing]]:
    """The windows that taps [C, T, 4] read: per axis, where they start [C * T] for output 0, and what pixels weigh."""
    starts: list[Tensor] = []
    weighings: list[Weighing] = []
    for axis in range(2):
        read = read_axis(taps, axis, geometry.reading)
        first, size = start_window(read)
        weighing = weigh_windows(read, first, size, dtype)
        weighings.append(Weighing(*(values.flatten(0, 1) for values in weighing)))
        # A window that ends before the input, or begins behind it, may lie right beside it.
        least = -(geometry.output_size[axis] - 1) * geometry.stride[axis] - size
        bounds = (float(end - geometry.origin[axis]) for end in (least, geometry.input_size[axis] + 1))
        starts.append((first.nan_to_num(0.0).clamp(*bounds).long() + geometry.origin[axis]).flatten())
    return starts, weighings


class WideColumns:
    """Makes the columns of a block, and their adjoint, as :class:`WindowColumns` does for bilinear interpolation.

    Args:
        input: Images [B, C, H, W].
        taps: Positions and spreads [C, T, 4].
        geometry: Sizes of the call.
        limits: Sizes to work in.
    """

    def __init__(self, input: Tensor, taps: Tensor, geometry: Geometry, limits: Limits) -> None:
        self.input, self.geometry = input, geometry
        self.taps = taps.shape[-2]
        self.dtype = compute_dtype(input.dtype)
        self.rows, self.cols = geometry.output_size
        self.block_elements = self.grad_block_elements = limits.block_elements
        # The first row and column [C * T] of what output pixel (0, 0) reads; weights of rows [C * T, Rr] and columns.
        self.first, self.weighings = weigh_taps(taps, geometry, self.dtype)

    def columns(self, block: Block) -> Tensor:
        """The block's columns [c * T, S * Ho * Wo]."""
        return self._smooth(self._windows(block), self._kernels(self._span(block)))

    def gradients(
        self, block: Block, grad_columns: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of a block: the planes' gradient [c, S, H, W], the columns [c * T, L], the taps' gradient [c * T, 4].

        Args:
            block: The block.
            grad_columns: The columns' gradient [c * T, S * Ho * Wo].
            needs: Which of the three; None stands for the others.
        """
        needs_input, needs_columns, needs_taps = needs
        span = self._span(block)
        kernels = self._kernels(span)
        grad = grad_columns.unflatten(1, (-1, self.rows, self.cols))  # [c * T, S, Ho, Wo]
        planes = self._spread_unknown(self._input_gradient(grad, kernels, span), span) if needs_input else None
        if not (needs_columns or needs_taps):
            return planes, None, None
        windows = self._windows(block)
        return (
            planes,
            self._smooth(windows, kernels) if needs_columns else None,
            self._tap_gradient(windows, grad, span) if needs_taps else None,
        )

    def _span(self, block: Block) -> slice:
        return slice(block.planes.start * self.taps, block.planes.stop * self.taps)

    def _kernels(self, span: slice) -> Tensor:
        rows, cols = (weighing.weight[span] for weighing in self.weighings)
        return rows[:, :, None] * cols[:, None, :]  # [c * T, Rr, Rc]

    def _spread_unknown(self, planes: Tensor, span: slice) -> Tensor:
        """Makes no number of the gradient [c, S, H, W] of a plane that a tap at no number reads."""
        unknown = sum((weighing.weight[span].sum(-1) * 0 for weighing in self.weighings), planes.new_zeros(()))
        return planes + unknown.unflatten(0, (-1, self.taps)).sum(-1)[:, None, None, None]

    def _windows(self, block: Block) -> Tensor:
        """What each tap reads [c * T, S, (Ho - 1) * stride + Rr, (Wo - 1) * stride + Rc]."""
        planes = self.input[block.images, block.planes].transpose(0, 1).to(self.dtype)
        plane = torch.arange(planes.shape[0], device=planes.device).repeat_interleave(self.taps)
        size = [
            (outputs - 1) * step + weighing.weight.shape[1]
            for outputs, step, weighing in zip(
                self.geometry.output_size, self.geometry.stride, self.weighings, strict=True
            )
        ]
        rows, cols = (whole[self._span(block)] for whole in self.first)
        return _read(planes, plane, (rows, cols), (size[0], size[1]))

    def _smooth(self, windows: Tensor, kernels: Tensor) -> Tensor:
        """Columns [c * T, S * Ho * Wo] of windows: one channel of a convolution for each tap."""
        images = windows.shape[1]
        kernels = kernels.repeat_interleave(images, dim=0)[:, None]
        flat = windows.flatten(0, 1)[None]
        columns = F.conv2d(flat, kernels, stride=self.geometry.stride, groups=flat.shape[1])
        return columns.reshape(windows.shape[0], -1)

    def _tap_gradient(self, windows: Tensor, grad: Tensor, span: slice) -> Tensor:
        """Derivative by taps [c * T, 4] of sum(grad * columns)."""
        images = windows.shape[1]
        rows, cols = (Weighing(*(values[span] for values in weighing)) for weighing in self.weighings)
        shape = (windows.shape[0] * images, 1, rows.weight.shape[1], cols.weight.shape[1])
        flat = windows.flatten(0, 1)[None]
        _, by_kernels, _ = torch.ops.aten.convolution_backward(
            grad.reshape(1, -1, *grad.shape[2:]),
            flat,
            flat.new_empty(shape),
            None,
            self.geometry.stride,
            (0, 0),
            (1, 1),
            False,
            (0, 0),
            flat.shape[1],
            (False, True, False),
        )
        by_kernels = by_kernels.reshape(-1, images, *shape[2:]).sum(1)  # [c * T, Rr, Rc]
        return carry_back(by_kernels, rows, cols)[1]

    def _input_gradient(self, grad: Tensor, kernels: Tensor, span: slice) -> Tensor:
        """Gathers the gradient of the planes [c, S, H, W] from that of their columns [c * T, S, Ho, Wo].

        The columns' gradient, spread over the input's grid, is read as the input is, with the kernels turned around.
        """
        height, width = self.geometry.output_size
        step_rows, step_cols = self.geometry.stride
        size = ((height - 1) * step_rows + 1, (width - 1) * step_cols + 1)
        source = grad
        if (step_rows, step_cols) != (1, 1):
            source = grad.new_zeros(*grad.shape[:2], *size)
            source[:, :, ::step_rows, ::step_cols] = grad
        reads = kernels.shape[1:]
        rows, cols = (1 - read - whole[span] for read, whole in zip(reads, self.first, strict=True))
        extent = self.geometry.input_size
        plane = torch.arange(grad.shape[0], device=grad.device)
        windows = _read(source, plane, (rows, cols), (extent[0] + reads[0] - 1, extent[1] + reads[1] - 1))
        images = grad.shape[1]
        turned = kernels.flip(1, 2).unflatten(0, (-1, self.taps))
        # Taps are summed as the input channels of a convolution with one group for each plane of each image.
        by_plane = windows.unflatten(0, (-1, self.taps)).transpose(1, 2).flatten(0, 2)[None]
        planes = F.conv2d(by_plane, turned.repeat_interleave(images, dim=0), groups=turned.shape[0] * images)
        return planes.reshape(-1, images, *extent)


def _read(planes: Tensor, plane: Tensor, firsts: tuple[Tensor, Tensor], size: tuple[int, int]) -> Tensor:
    """Windows [K, S, *size] of planes [P, S, Hi, Wi] from (row, col) ``firsts`` on, zeros outside."""
    number, images, height, width = planes.shape
    frame = Frame((height, width), size, firsts)
    framed = frame.planes(number, images, planes)
    framed.values.copy_(planes)
    windows = planes.new_empty(plane.shape[0], images, *size)
    framed.reading(plane, frame.rows + frame.cols, windows)()
    return windows

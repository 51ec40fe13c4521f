"""Reading planes at fixed sub-pixel shifts: whole rows by one gather, then two blends.

The blends and their adjoint (``Corners``, ``Shift.negated``) are an inner loop of :mod:`icnn_zoo.ops.interpolation`.

Letters used in shapes: T taps, K = channels x taps, P planes, S images, (Hi, Wi) size of a plane, (Ho, Wo) of the
output, L = length of a plane's slab of images, flattened.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.interpolation import split


@dataclass(frozen=True)
class Shift:
    """Integer and fractional part of each tap's shift, flattened to [K] rows of one block or of all channels."""

    row: Tensor
    col: Tensor
    row_fraction: Tensor
    col_fraction: Tensor

    def select(self, first: int, last: int) -> Shift:
        return Shift(
            self.row[first:last],
            self.col[first:last],
            self.row_fraction[first:last],
            self.col_fraction[first:last],
        )

    def negated(self) -> Shift:
        """The adjoint's shift: reading at -p has integer part -floor(p) - 1 and fraction 1 - frac(p)."""
        return Shift(-self.row - 1, -self.col - 1, 1 - self.row_fraction, 1 - self.col_fraction)


def shifts(positions: Tensor, geometry: Geometry, dtype: torch.dtype) -> Shift:
    """Splits positions [..., T, 2] into integer and fractional shifts of the input, flattened to [K]."""
    cell, fraction = split(positions)
    fraction = fraction.to(dtype)  # NaN stays NaN here, while the integer part below is made safe
    integers = []
    for axis, (outputs, stride, extent, origin) in enumerate(
        zip(geometry.output_size, geometry.stride, geometry.input_size, geometry.origin, strict=True)
    ):
        # Past the bound every read is outside the input wherever the origin is: clamping does not change the function.
        bound = float((outputs - 1) * stride + extent + 2 + abs(origin))
        integers.append((cell[..., axis].nan_to_num(0.0).clamp(-bound, bound).long() + origin).flatten())
    row, col = integers
    return Shift(row, col, fraction[..., 0].reshape(-1, 1), fraction[..., 1].reshape(-1, 1))


def _column_limits(in_width: int, out_width: int, step: int) -> tuple[int, int]:
    """Smallest and largest useful first column of a window: outside, every read is zero."""
    return -((out_width - 1) * step + 2), in_width


def gap_columns(col: Tensor, in_width: int, out_width: int, step: int) -> int:
    """Zero columns needed after each row so that no window leaves its row's own gap.

    The true need is read from the positions on a CPU; elsewhere reading would synchronise (or break tracing), so the
    bound that serves every position is taken: the window's width.
    """
    bound = (out_width - 1) * step + 2
    if col.device.type != "cpu" or col.numel() == 0:
        return bound
    low, high = (int(value) for value in col.aminmax())
    return min(max(-low, high + bound - in_width, 0), bound)


def read_windows(
    source: Tensor,
    plane: Tensor,
    row: Tensor,
    col: Tensor,
    gap: int,
    in_size: tuple[int, int],
    out_size: tuple[int, int],
    step: tuple[int, int],
) -> Tensor:
    """Gathers, for each of K taps, the rows of its plane that start at (row, col); zeros outside the plane.

    Args:
        source: Padded planes [P, S, Hi + 2, Wi + gap]: a zero row above, one below, ``gap`` zero columns at the right,
            which also serve as the left gap of the next row.
        plane: Plane of each tap [K].
        row: First row of each tap's window [K].
        col: First column of each tap's window [K].
        gap: Zero columns after each row.
        in_size: Size (Hi, Wi) of a plane.
        out_size: Output size (Ho, Wo).
        step: Distance between neighboring outputs in the input (rows, columns).

    Returns:
        With step 1: [K, S, Ho + 1, Wo + 1], all that bilinear interpolation needs. Otherwise the four corners
        [2, 2, K, S, Ho, Wo], first index the lower row, second the right column.
    """
    height, width = in_size
    pitch = width + gap
    images = source.shape[1]
    flat = source.reshape(-1)
    col = col.clamp(*_column_limits(width, out_size[1], step[1]))
    first_plane = plane[:, None] * images + torch.arange(images, device=row.device)
    first_plane = (first_plane * ((height + 2) * pitch))[:, :, None]

    def gather(row: Tensor, col: Tensor, num_rows: int, num_cols: int) -> Tensor:
        rows = row[:, None] + torch.arange(num_rows, device=row.device) * step[0]
        rows = torch.where((rows >= 0) & (rows < height), rows, height)  # row Hi is the zero row below
        start = first_plane + ((rows + 1) * pitch + col[:, None])[:, None, :]
        reach = (num_cols - 1) * step[1]
        return flat.as_strided((flat.numel() - reach, num_cols), (1, step[1]))[start]

    if step == (1, 1):
        return gather(row, col, out_size[0] + 1, out_size[1] + 1)
    return torch.stack(
        [torch.stack([gather(row + down, col + right, *out_size) for right in (0, 1)]) for down in (0, 1)]
    )


@dataclass(frozen=True)
class Corners:
    """The four neighbours of every sample as flat rows [K, L]; with step 1 they are views of one gathered tensor."""

    values: Tensor
    shared: bool
    pitch: int
    length: int

    @staticmethod
    def of(windows: Tensor) -> Corners:
        if windows.dim() == 4:  # [K, S, Ho + 1, Wo + 1]
            pitch = windows.shape[3]
            values = windows.reshape(windows.shape[0], -1)
            return Corners(values, True, pitch, max(values.shape[1] - pitch - 1, 0))
        values = windows.reshape(2, 2, windows.shape[2], -1)
        return Corners(values, False, windows.shape[-1], values.shape[-1])

    def corner(self, down: int, right: int) -> Tensor:
        if not self.shared:
            return self.values[down, right]
        start = down * self.pitch + right
        return self.values[:, start : start + self.length]

    def columns(self, shift: Shift) -> Tensor:
        if not self.shared:
            rows = torch.lerp(self.values[:, 0], self.values[:, 1], shift.col_fraction)
            return torch.lerp(rows[0], rows[1], shift.row_fraction)
        rows = torch.lerp(self.values[:, :-1], self.values[:, 1:], shift.col_fraction)
        return torch.lerp(rows[:, : self.length], rows[:, self.pitch : self.pitch + self.length], shift.row_fraction)

    def position_gradient(self, grad_columns: Tensor, shift: Shift) -> Tensor:
        """Derivative by (row, col) of sum(grad_columns * columns), [K, 2]: four dot products per tap."""
        grad = grad_columns[:, None, :]
        top_left, top_right, bottom_left, bottom_right = (
            torch.bmm(grad, self.corner(down, right)[:, :, None])[:, 0] for down in (0, 1) for right in (0, 1)
        )
        by_row = torch.lerp(bottom_left - top_left, bottom_right - top_right, shift.col_fraction)
        by_col = torch.lerp(top_right - top_left, bottom_right - bottom_left, shift.row_fraction)
        return torch.cat([by_row, by_col], dim=1)

    def weighted_sum(self, shift: Shift, taps: int) -> Tensor:
        """Sum over each channel's taps of the interpolated values, [K / taps, L]."""
        rows = torch.lerp(self.values[:, :-1], self.values[:, 1:], shift.col_fraction)
        rows = rows.unflatten(0, (-1, taps))
        lower = shift.row_fraction.reshape(-1, 1, taps)
        total = torch.bmm(1 - lower, rows[:, :, : self.length])
        return total.baddbmm_(lower, rows[:, :, self.pitch : self.pitch + self.length])[:, 0]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Shifted reads are blended in at least float32; half precision is for the matrix product."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Block:
    """Channels computed at once for a slab of images: several whole groups, or a part of a single one."""

    images: slice
    groups: slice
    channels: slice
    """Channels within a group."""
    group_channels: int

    @property
    def planes(self) -> slice:
        """Channels within the input."""
        first = self.groups.start * self.group_channels + self.channels.start
        return slice(first, (self.groups.stop - 1) * self.group_channels + self.channels.stop)


class WindowColumns:
    """Makes the columns of a block, flat rows of ``pitch`` elements of which the first Wo are used, and their adjoint.

    With stride 1 a row keeps the one element more that its window has, so that nothing is copied.

    Args:
        input: Images [B, C, H, W].
        positions: Positions [C, T, 2].
        geometry: Sizes of the call.
    """

    def __init__(self, input: Tensor, positions: Tensor, geometry: Geometry) -> None:
        self.input, self.geometry = input, geometry
        self.taps = positions.shape[-2]
        self.dtype = compute_dtype(input.dtype)
        self.shift = shifts(positions, geometry, self.dtype)
        height, width = geometry.output_size
        self.rows, self.pitch = (height + 1, width + 1) if geometry.stride == (1, 1) else (height, width)
        self.gap = gap_columns(self.shift.col, geometry.input_size[1], width, geometry.stride[1])

    def columns(self, block: Block) -> Tensor:
        """The block's columns [c * T, L]; L stops after the last used element."""
        shift = self._shift(block)
        return self._corners(block, shift).columns(shift)

    def gradients(
        self, block: Block, grad_columns: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of a block: the planes' gradient [c, S, H, W], the columns [c * T, L], the shifts' gradient [c * T, 2].

        Args:
            block: The block.
            grad_columns: The columns' gradient [c * T, S * rows * pitch], zero in what is not used of a row.
            needs: Which of the three; None stands for the others.
        """
        needs_input, needs_columns, needs_positions = needs
        shift = self._shift(block)
        images = block.images.stop - block.images.start
        planes = self._input_gradient(grad_columns, shift, images) if needs_input else None
        if not (needs_columns or needs_positions):
            return planes, None, None
        corners = self._corners(block, shift)
        return (
            planes,
            corners.columns(shift) if needs_columns else None,
            corners.position_gradient(grad_columns[:, : corners.length], shift) if needs_positions else None,
        )

    def _shift(self, block: Block) -> Shift:
        return self.shift.select(block.planes.start * self.taps, block.planes.stop * self.taps)

    def _corners(self, block: Block, shift: Shift) -> Corners:
        planes = self.input[block.images, block.planes].transpose(0, 1).to(self.dtype)  # [c, S, H, W]
        plane = torch.arange(planes.shape[0], device=planes.device).repeat_interleave(self.taps)
        sizes = (self.geometry.input_size, self.geometry.output_size, self.geometry.stride)
        windows = read_windows(F.pad(planes, (0, self.gap, 1, 1)), plane, shift.row, shift.col, self.gap, *sizes)
        return Corners.of(windows)

    def _input_gradient(self, grad_columns: Tensor, shift: Shift, images: int) -> Tensor:
        """Gathers the gradient of one block's input planes [c, S, H, W] from its columns' gradient [c * T, L].

        With a stride the columns' gradient is first spread over the input's grid, zeros between, and read as with
        stride 1.
        """
        size = self.geometry.input_size
        height, width = self.geometry.output_size
        step_rows, step_cols = self.geometry.stride
        rows, cols = (height - 1) * step_rows + 1, (width - 1) * step_cols + 1
        adjoint = shift.negated()
        gap = gap_columns(adjoint.col, cols, size[1], 1)
        num_planes = grad_columns.shape[0]
        source = grad_columns.new_zeros(num_planes, images, rows + 2, cols + gap)
        used = grad_columns.unflatten(-1, (images, self.rows, self.pitch))[..., :height, :width]
        source[:, :, 1 : rows + 1 : step_rows, :cols:step_cols] = used
        plane = torch.arange(num_planes, device=source.device)
        windows = read_windows(source, plane, adjoint.row, adjoint.col, gap, (rows, cols), size, (1, 1))
        corners = Corners.of(windows)
        flat = corners.weighted_sum(adjoint, self.taps)
        flat = F.pad(flat, (0, corners.values.shape[1] - corners.length))
        return flat.unflatten(1, (images, size[0] + 1, size[1] + 1))[..., : size[0], : size[1]]

"""Reading planes at fixed sub-pixel shifts: windows of planes between zeros, one copy each, then two blends.

The adjoint reads the windows of the columns' gradient at the negated shift, so nothing is scattered, and both gradients
are small products with them: the input's sums a channel's taps, each weighted by what it reads (:meth:`Reads.table`);
the positions' multiplies each tap's window with the plane, moved by what the tap reads. With strides, pixels of a plane
fall into phases, those that leave one remainder, and a window is one of a phase.

The blends and :class:`Reads` repeat, as an inner loop, the rule of :mod:`icnn_zoo.ops.interpolation`.

Letters used in shapes: T taps, K = channels x taps, P planes, S images, c channels of a block, (Hi, Wi) size of a
plane, (Ho, Wo) of the output, (sr, sc) the stride, (Mr, Mc) pixels of a phase, L = length of a column of all S images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.interpolation import OFFSETS, split, weights
from icnn_zoo.ops.torch_backend.limits import Limits


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


class Frame:
    """The zeros around planes of one size that make every window a plain piece of memory, also where it begins outside.

    Args:
        size: Size of a plane (Hi, Wi).
        window: Size of a window.
        firsts: First rows and first columns [..., K] of all windows that will be read.

    Attributes:
        rows: Where in a framed plane the first row of each window begins.
        cols: Where in its row each window begins.
    """

    def __init__(self, size: tuple[int, int], window: tuple[int, int], firsts: tuple[Tensor, Tensor]) -> None:
        self.size, self.window = size, window
        # A window outside its plane may lie right beside it.
        first_row, first_col = (
            first.clamp(-span, extent) for first, span, extent in zip(firsts, window, size, strict=True)
        )
        (self.above, below), (left, right) = (
            _margins(first, span, extent)
            for first, span, extent in zip((first_row, first_col), window, size, strict=True)
        )
        self.pitch = size[1] + max(left, right)  # the zeros right of a row are those left of the next
        # Pixels of a window's row: all of a frame's where these are few more, as what is one piece is copied fast.
        self.line = self.pitch if window[1] <= self.pitch <= window[1] * 5 // 4 else window[1]
        self.height = self.above + size[0] + below
        self.rows, self.cols = (self.above + first_row) * self.pitch, first_col

    def planes(self, number: int, images: int, like: Tensor) -> FramedPlanes:
        """Memory for planes."""
        return FramedPlanes(self, number, images, like)


def _margins(first: Tensor, span: int, extent: int) -> tuple[int, int]:
    """Zeros needed before and after a plane.

    The need is read from the windows on a CPU; elsewhere reading would synchronise (or break tracing), so that enough
    for all is taken.
    """
    if first.device.type != "cpu" or first.numel() == 0:
        return span, span
    low, high = (int(value) for value in first.aminmax())
    return max(-low, 0), max(high + span - extent, 0)


class FramedPlanes:
    """Planes [P, S, Hi, Wi], in ``values`` to be written to, with their frames in one memory."""

    def __init__(self, frame: Frame, number: int, images: int, like: Tensor) -> None:
        self.images, self.area = images, frame.height * frame.pitch
        # A row of zeros before and one after everything, as windows may begin left of a plane and end right of it.
        self.flat = flat = like.new_zeros(number * images * self.area + 2 * frame.pitch)
        inner = flat[frame.pitch : -frame.pitch].view(number, images, -1, frame.pitch)
        self.values = inner[:, :, frame.above : frame.above + frame.size[0], : frame.size[1]]
        self.pitch = frame.pitch

    def reading(self, plane: Tensor, start: Tensor, out: Tensor) -> Callable[[], object]:
        """What copies windows [K, S, rows, cols] that begin at ``start`` of ``plane`` [K] to contiguous ``out``."""
        first = plane * (self.images * self.area) + (start + self.pitch)
        if self.images > 1:
            first = first[:, None] + torch.arange(self.images, device=first.device) * self.area
        rows, cols = out.shape[2:]
        size, strides = ((rows, cols), (self.pitch, 1)) if cols != self.pitch else ((rows * cols,), (1,))
        beyond = (rows - 1) * self.pitch + cols - 1
        windows = self.flat.as_strided((self.flat.numel() - beyond, *size), (1, *strides))
        if out.device.type == "cpu":
            return partial(torch.index_select, windows, 0, first.flatten(), out=out.view(-1, *size))
        # Elsewhere index_select might first copy everything that it is to select from.
        return lambda: out.copy_(windows[first].view(out.shape))


class Reads:
    """What taps read along one axis: output pixel j the pixels ``j * step + cell + OFFSETS`` of the input.

    Args:
        cell: Integer part of the shift [K].
        fraction: The rest [K, 1].
        step: The stride.

    Attributes:
        phase: The phases [2, K] of the pixels at ``OFFSETS``.
        first: The first of these, counted within their phase [2, K].
    """

    def __init__(self, cell: Tensor, fraction: Tensor, step: int) -> None:
        pixel = torch.stack([cell + offset for offset in OFFSETS])
        self.fraction, self.step = fraction, step
        self.phase, self.first = pixel.remainder(step), pixel.div(step, rounding_mode="floor")

    def slots(self) -> Tensor:
        """Where each offset belongs [K, 2] in a table of the phases, times how many pixels further they are read."""
        return (self.phase * 2 + self.first - self.first[0]).T

    def table(self) -> Tensor:
        """The weights in that table [K, 2 * step]; NaN throughout where there is no position."""
        unknown = (self.fraction * 0).repeat(1, 2 * self.step)
        return unknown.scatter(1, self.slots(), torch.cat(weights(self.fraction), dim=1))


class _OneWindow(NamedTuple):
    """How columns of stride 1 are made of one window each: the same for every slab of images."""

    planes: Tensor
    read: Callable[[], object]
    ends: tuple[Tensor, Tensor, Tensor]
    """Left and right pixels, and how far between them."""
    lines: Tensor
    rows: tuple[Tensor, Tensor, Tensor]
    """Upper and lower lines, and how far between them."""


class WindowColumns:
    """Makes the columns of a block, and their adjoint.

    Args:
        input: Images [B, C, H, W].
        positions: Positions [C, T, 2].
        geometry: Sizes of the call.
        limits: Sizes to work in.
    """

    def __init__(self, input: Tensor, positions: Tensor, geometry: Geometry, limits: Limits) -> None:
        self.input, self.geometry, self.taps = input, geometry, positions.shape[-2]
        self.dtype = compute_dtype(input.dtype)
        self.rows, self.cols = height, width = geometry.output_size
        self.shares_window = geometry.stride == (1, 1)
        on_cpu = input.device.type == "cpu"
        self.block_elements = limits.block_elements
        self.grad_block_elements = limits.grad_elements if on_cpu else limits.block_elements
        self.cached_elements = limits.cached_elements if on_cpu else limits.block_elements
        self.channel = torch.arange(input.shape[1], device=input.device).repeat_interleave(self.taps)
        self.by_row, self.by_col = _reads(positions, geometry, self.dtype)
        high, wide = (-(-extent // step) for extent, step in zip(geometry.input_size, geometry.stride, strict=True))
        self.phases = (high, wide)
        """Pixels of a phase (Mr, Mc)."""
        if self.shares_window:  # rows of one window hold all four corners, and one row more ends the last blend
            firsts, window = (self.by_row.first[:1], self.by_col.first[:1]), (height + 2, width + 1)
        else:
            firsts, window = (self.by_row.first, self.by_col.first), (height, width)
        self.frame = Frame(self.phases, window, firsts)
        self.line = self.frame.line
        self._one_windows: dict[tuple[int, ...], _OneWindow] = {}
        self._planes: dict[tuple[str, int, int], FramedPlanes] = {}
        self._tensors: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @cached_property
    def grad_frame(self) -> Frame:
        """Of the columns' gradient: pixel m of a phase was read by the window's pixels m and m + 1."""
        high, wide = self.phases
        firsts = (-self.by_row.first[0] - 1, -self.by_col.first[0] - 1)
        return Frame(self.geometry.output_size, (high + 1, wide + 1), firsts)

    @cached_property
    def table(self) -> Tensor:
        """What taps weigh what they read with [C, T, 4 * sr * sc], for each phase and window's corner."""
        return (self.by_row.table()[:, :, None] * self.by_col.table()[:, None]).view(self.input.shape[1], self.taps, -1)

    @cached_property
    def slots(self) -> Tensor:
        """Where in that table the four corners are [C * T, 4]."""
        step = self.geometry.stride[1]
        return (self.by_row.slots()[:, :, None] * (2 * step) + self.by_col.slots()[:, None]).flatten(1)

    def columns(self, block: Block) -> Tensor:
        """The block's columns [c * T, L], good until those of the next block."""
        images, first = block.images.stop - block.images.start, block.planes.start
        span = self._span(block.planes, first)
        columns = self._tensor("columns", (span.stop, images, self.rows, self.cols))
        write = self._blend_one_window if self.shares_window else self._blend_four
        for planes in self._parts(block):
            write(block.images, planes, columns[self._span(planes, first)])
        return columns.flatten(1)

    def gradients(
        self, block: Block, grad_columns: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of a block: the planes' gradient [c, S, H, W], the columns [c * T, L], the shifts' gradient [c * T, 2].

        Args:
            block: The block.
            grad_columns: The columns' gradient [c * T, L].
            needs: Which of the three; None stands for the others.
        """
        needs_input, needs_columns, needs_positions = needs
        by_planes = by_shifts = None
        if needs_input or needs_positions:
            windows = self._grad_windows(block.planes, grad_columns)
            by_planes = self._sum_taps(block.planes, windows) if needs_input else None
            by_shifts = self._shift_gradient(block.images, block.planes, windows) if needs_positions else None
        return by_planes, self.columns(block) if needs_columns else None, by_shifts

    def _parts(self, block: Block) -> Iterator[slice]:
        """The block's planes, as many at a time as let a core's cache hold their windows until they are blended."""
        images = block.images.stop - block.images.start
        step = max(1, self.cached_elements // max(1, self.taps * images * self.rows * self.cols))
        for start in range(block.planes.start, block.planes.stop, step):
            yield slice(start, min(start + step, block.planes.stop))

    def _span(self, planes: slice, first: int = 0) -> slice:
        return slice((planes.start - first) * self.taps, (planes.stop - first) * self.taps)

    def _blend_one_window(self, images: slice, planes: slice, columns: Tensor) -> None:
        """Writes columns [c * T, S, Ho, Wo] of stride 1, where one window holds what the four corners read."""
        key = (planes.start, *columns.shape)
        if key not in self._one_windows:
            self._one_windows[key] = self._prepare_one_window(planes, columns)
        prepared = self._one_windows[key]
        prepared.planes.copy_(self.input[images, planes].transpose(0, 1))
        prepared.read()
        torch.lerp(*prepared.ends, out=prepared.lines)
        torch.lerp(*prepared.rows, out=columns)

    def _prepare_one_window(self, planes: slice, columns: Tensor) -> _OneWindow:
        span, images = self._span(planes), columns.shape[1]
        source = self._framed("input", self.frame, planes.stop - planes.start, images)
        windows = self._tensor("windows", (columns.shape[0], images, self.rows + 2, self.line))
        lines = self._tensor("lines", (columns.shape[0], images, (self.rows + 1) * self.line))
        apart = lines.unflatten(2, (-1, self.line))[..., : self.cols]
        start = (self.frame.rows[0] + self.frame.cols[0])[span]
        flat, length = windows.flatten(2), lines.shape[2]
        return _OneWindow(
            planes=source.values,
            read=source.reading(self.channel[span] - planes.start, start, windows),
            ends=(flat[:, :, :length], flat[:, :, 1 : length + 1], self.by_col.fraction[span, None]),
            lines=lines,
            rows=(apart[:, :, :-1], apart[:, :, 1:], self.by_row.fraction[span, None, None]),
        )

    def _blend_four(self, images: slice, planes: slice, columns: Tensor) -> None:
        """Writes columns [c * T, S, Ho, Wo] of windows for each of the four corners."""
        span, frame, (step_rows, step_cols) = self._span(planes), self.frame, self.geometry.stride
        phases = self._by_phase(images, planes)
        source = self._framed("input", frame, phases.shape[:3].numel(), columns.shape[1])
        source.values.unflatten(0, phases.shape[:3]).copy_(phases)
        channel, by_row, by_col = self.channel[span] - planes.start, self.by_row, self.by_col

        def corner(down: int, right: int) -> Tensor:
            phase = (channel * step_rows + by_row.phase[down, span]) * step_cols + by_col.phase[right, span]
            windows = self._tensor(f"corner {down} {right}", (*columns.shape[:2], self.rows, self.line))
            source.reading(phase, frame.rows[down, span] + frame.cols[right, span], windows)()
            return windows.flatten(2)

        across = by_col.fraction[span, None]
        upper, lower = (
            torch.lerp(corner(down, 0), corner(down, 1), across).unflatten(2, (-1, self.line))[..., : self.cols]
            for down in OFFSETS
        )
        torch.lerp(upper, lower, by_row.fraction[span, None, None], out=columns)

    def _grad_windows(self, planes: slice, grad_columns: Tensor) -> Tensor:
        """The windows [c, T, S, Mr + 1, Mc + 1] of the columns' gradient [c * T, L]."""
        span, frame = self._span(planes), self.grad_frame
        grad = grad_columns.unflatten(1, (-1, self.rows, self.cols))
        source = self._framed("gradient", frame, *grad.shape[:2])
        source.values.copy_(grad)
        windows = self._tensor("grad windows", (*grad.shape[:2], frame.window[0], frame.line))
        source.reading(torch.arange(grad.shape[0], device=grad.device), (frame.rows + frame.cols)[span], windows)()
        return windows.unflatten(0, (-1, self.taps))

    def _sum_taps(self, planes: slice, windows: Tensor) -> Tensor:
        """The gradient of planes [c, S, H, W]."""
        flat = windows.flatten(2)
        sums = self._tensor("sums", (flat.shape[0], self.table.shape[2], flat.shape[2]))
        torch.bmm(self.table[planes].transpose(1, 2), flat, out=sums)
        parts = [self._corner(sums, windows, down, right) for down in OFFSETS for right in OFFSETS]
        total = (parts[0] + parts[1]).add_(parts[2]).add_(parts[3])
        (high, wide), (step_rows, step_cols) = self.phases, self.geometry.stride
        whole = total.permute(0, 3, 4, 1, 5, 2).reshape(*windows.shape[:3:2], high * step_rows, wide * step_cols)
        return whole[..., : self.geometry.input_size[0], : self.geometry.input_size[1]]

    def _shift_gradient(self, images: slice, planes: slice, windows: Tensor) -> Tensor:
        """The gradient of shifts [c * T, 2]: that of a corner's weight is its pixels times the tap's gradient."""
        rows, cols = self.geometry.stride
        moved = self._tensor("moved", (windows.shape[0], 4 * rows * cols, windows[0, 0].numel()), fill=0)
        phases = self._by_phase(images, planes)
        for down in OFFSETS:
            for right in OFFSETS:
                self._corner(moved, windows, down, right).copy_(phases)
        dots = torch.bmm(windows.flatten(2), moved.transpose(1, 2)).flatten(0, 1)
        corners = dots.gather(1, self.slots[self._span(planes)])
        top_left, top_right, bottom_left, bottom_right = corners.split(1, dim=1)
        span = self._span(planes)
        row_fraction, col_fraction = (read.fraction[span] for read in (self.by_row, self.by_col))
        by_row = torch.lerp(bottom_left - top_left, bottom_right - top_right, col_fraction)
        by_col = torch.lerp(top_right - top_left, bottom_right - bottom_left, row_fraction)
        return torch.cat([by_row, by_col], dim=1)

    def _corner(self, table: Tensor, windows: Tensor, down: int, right: int) -> Tensor:
        """Of a table [c, 4 * sr * sc, L] the phases [c, sr, sc, S, Mr, Mc] as windows read them, so much further."""
        (rows, cols), (high, wide) = self.geometry.stride, self.phases
        apart = table.view(-1, rows, 2, cols, 2, *windows.shape[2:])
        return apart[:, :, down, :, right, :, 1 - down : 1 - down + high, 1 - right : 1 - right + wide]

    def _by_phase(self, images: slice, planes: slice) -> Tensor:
        """The input's phases [c, sr, sc, S, Mr, Mc]."""
        (high, wide), (step_rows, step_cols) = self.phases, self.geometry.stride
        height, width = self.geometry.input_size
        part = self.input[images, planes]
        if (high * step_rows, wide * step_cols) != (height, width):
            part = F.pad(part, (0, wide * step_cols - width, 0, high * step_rows - height))
        return part.unflatten(3, (wide, step_cols)).unflatten(2, (high, step_rows)).permute(1, 3, 5, 0, 2, 4)

    def _framed(self, name: str, frame: Frame, number: int, images: int) -> FramedPlanes:
        """Planes whose memory all blocks of a size use; what frames them stays zero."""
        key = (name, number, images)
        if key not in self._planes:
            self._planes[key] = frame.planes(number, images, self.input.new_empty(0, dtype=self.dtype))
        return self._planes[key]

    def _tensor(self, name: str, shape: tuple[int, ...], fill: float | None = None) -> Tensor:
        """A tensor whose memory all blocks of a size use; at first without contents, or all of it so much."""
        if (name, shape) not in self._tensors:
            tensor = self.input.new_empty(shape, dtype=self.dtype)
            self._tensors[name, shape] = tensor if fill is None else tensor.fill_(fill)
        return self._tensors[name, shape]


def _reads(positions: Tensor, geometry: Geometry, dtype: torch.dtype) -> tuple[Reads, Reads]:
    """What taps [C, T, 2] read along rows and along columns."""
    cell, fraction = split(positions)
    fraction = fraction.to(dtype)  # NaN stays NaN here, while the integer part below is made safe
    reads = []
    for axis, (outputs, step, extent, origin) in enumerate(
        zip(geometry.output_size, geometry.stride, geometry.input_size, geometry.origin, strict=True)
    ):
        # Past the bound every read is outside the input wherever the origin is: clamping changes nothing.
        bound = float((outputs - 1) * step + extent + 2 + abs(origin))
        whole = (cell[..., axis].nan_to_num(0.0).clamp(-bound, bound).long() + origin).flatten()
        reads.append(Reads(whole, fraction[..., axis].reshape(-1, 1), step))
    return reads[0], reads[1]

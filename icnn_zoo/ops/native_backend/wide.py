"""Columns of triangle and gaussian interpolation by the C kernel, where the stride is 1."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.native_backend import build
from icnn_zoo.ops.native_backend.addresses import address_of
from icnn_zoo.ops.torch_backend.limits import Limits
from icnn_zoo.ops.torch_backend.wide import WideColumns
from icnn_zoo.ops.torch_backend.windows import Block
from icnn_zoo.ops.wide_interpolation import Weighing, slopes_of

# A window of more pixels a side is read by torch: frames have as many zeros around the plane.
LARGEST_WINDOW = 64

_SIZES = ("height", "width", "out_height", "out_width", "stride_row", "stride_col", "origin_row", "origin_col")
_COUNTS = ("images", "channels", "taps", "reads_row", "reads_col", "image_step", "channel_step")
_POINTERS = (
    *("input", "first_row", "first_col", "rows", "cols"),
    *("columns", "grad", "grad_input", "by_rows", "by_cols"),
)


class _Task(ctypes.Structure):
    """``wide_t`` of csrc/wide.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_SIZES, *_COUNTS)),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


class NativeWideColumns(WideColumns):
    """As its base; arguments are those of a CPU.

    Attributes:
        by_kernel: Whether C makes the columns.
        windows: Then what it wants to know of taps: the first row and column [C * T] of the windows of output (0, 0),
            and the weights of their rows and columns [C * T, reads].
    """

    def __init__(self, input: Tensor, taps: Tensor, geometry: Geometry, limits: Limits) -> None:
        super().__init__(input, taps, geometry, limits)
        self.reads = [weighing.weight.shape[1] for weighing in self.weighings]
        self.by_kernel = geometry.stride == (1, 1) and max(self.reads) <= LARGEST_WINDOW
        self.windows: dict[str, Tensor] = {}
        if self.by_kernel:
            self.input = input.to(self.dtype).contiguous()
            # A window that ends before the input, or begins behind it, may lie right beside it.
            first = [
                start.clamp(-(outputs + reads), extent + 1)
                for start, outputs, reads, extent in zip(
                    self.first, geometry.output_size, self.reads, geometry.input_size, strict=True
                )
            ]
            weights = [weighing.weight.contiguous() for weighing in self.weighings]
            self.windows = dict(zip(("first_row", "first_col", "rows", "cols"), (*first, *weights), strict=True))

    def columns(self, block: Block) -> Tensor:
        if not self.by_kernel:
            return super().columns(block)
        columns = self._columns_like(block)
        self._run(block, columns=columns)
        return columns

    def gradients(
        self, block: Block, grad_columns: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not self.by_kernel:
            return super().gradients(block, grad_columns, needs)
        needs_input, needs_columns, needs_taps = needs
        span = self._span(block)
        channels, images = block.planes.stop - block.planes.start, block.images.stop - block.images.start
        planes = self.input.new_empty(channels, images, *self.geometry.input_size) if needs_input else None
        columns = self._columns_like(block) if needs_columns else None
        count = channels * self.taps
        by_rows, by_cols = (
            torch.zeros(count, reads, dtype=torch.float64) if needs_taps else None for reads in self.reads
        )
        grad = grad_columns.contiguous()
        self._run(block, columns=columns, grad=grad, grad_input=planes, by_rows=by_rows, by_cols=by_cols)
        planes = None if planes is None else self._spread_unknown(planes, span)
        if by_rows is None or by_cols is None:
            return planes, columns, None
        rows, cols = (Weighing(*(values[span] for values in weighing)) for weighing in self.weighings)
        return planes, columns, slopes_of(by_rows.to(self.dtype), by_cols.to(self.dtype), rows, cols)

    def _columns_like(self, block: Block) -> Tensor:
        span, images = self._span(block), block.images.stop - block.images.start
        return self.input.new_empty(span.stop - span.start, images * self.rows * self.pitch)

    def _run(self, block: Block, **tensors: Tensor | None) -> None:
        span = self._span(block)
        planes = self.input[block.images, block.planes]
        geometry = self.geometry
        sizes = (*geometry.input_size, *geometry.output_size, *geometry.stride, *geometry.origin)
        counts = (planes.shape[0], planes.shape[1], self.taps, *self.reads, planes.stride(0), planes.stride(1))
        arguments = {**{name: values[span] for name, values in self.windows.items()}, **tensors}
        task = _Task(**dict(zip((*_SIZES, *_COUNTS), (*sizes, *counts), strict=True)))
        # What C will touch, by the sizes that it is told; planes lie at the strides of the checked input.
        images, channels, taps, pixels = *planes.shape[:2], self.taps, geometry.input_size[0] * geometry.input_size[1]
        results = channels * taps * images * self.rows * self.pitch
        lengths = {
            **dict.fromkeys(("first_row", "first_col"), channels * taps),
            **dict.fromkeys(("rows", "by_rows"), channels * taps * self.reads[0]),
            **dict.fromkeys(("cols", "by_cols"), channels * taps * self.reads[1]),
            **dict.fromkeys(("columns", "grad"), results),
            "grad_input": channels * images * pixels,
        }
        types = {"first_row": torch.int64, "first_col": torch.int64, "by_rows": torch.float64, "by_cols": torch.float64}
        address_of("input", self.input, self.dtype, self.input.numel())
        task.input = planes.data_ptr()
        for name, tensor in arguments.items():
            if tensor is not None:
                setattr(task, name, address_of(name, tensor, types.get(name, self.dtype), lengths[name]))
        threads = ctypes.c_uint(torch.get_num_threads())
        library = build.load()[0][self.dtype]
        if library.wide_columns(ctypes.c_void_p(build.find_parallel()), threads, ctypes.byref(task)):
            raise MemoryError("`irregular_conv2d` found no memory for a thread's buffer.")

"""Dense convolutions by csrc/dense_planes.c and dense_cells.c: every sum has one order with any number of threads.

Letters used in shapes: B images, C input channels, N output channels, G groups, (Hb, Wb) cells of a kernel.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping

from torch import Tensor

from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.native_backend import build
from icnn_zoo.ops.native_backend.addresses import address_of
from icnn_zoo.ops.torch_backend.dense import Box


class Task(ctypes.Structure):
    """``dense_t`` of csrc/dense.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("height", "width", "out_height", "out_width")),
        *((name, ctypes.c_int64) for name in ("stride_row", "stride_col", "origin_row", "origin_col")),
        *((name, ctypes.c_int64) for name in ("images", "channels", "outputs", "groups", "rows", "cols")),
        *((name, ctypes.c_void_p) for name in ("input", "cells", "bias", "output")),
        *((name, ctypes.c_void_p) for name in ("grad_output", "grad_input", "grad_cells", "workspace")),
    ]


def forward(input: Tensor, cells: Tensor, bias: Tensor | None, origin: tuple[int, int], geometry: Geometry) -> Tensor:
    """The output [B, N, Ho, Wo] in the dtype of all, float32 or float64, contiguous.

    Args:
        input: Images [B, C, H, W].
        cells: Kernels [N, C / G, Hb, Wb].
        bias: Bias [N] or None.
        origin: The pixel that the first cell reads for output (0, 0).
        geometry: Sizes of the call.
    """
    output = input.new_empty(input.shape[0], cells.shape[0], *geometry.output_size)
    tensors = {"input": input, "cells": cells, "bias": bias, "output": output}
    _convolve("planes", (input.shape[1], *cells.shape[2:]), origin, geometry, tensors, 0)
    return output


def input_gradient(grad_output: Tensor, cells: Tensor, origin: tuple[int, int], geometry: Geometry) -> Tensor:
    """The gradient [B, C, H, W] of :func:`forward` by its input."""
    channels = cells.shape[1] * geometry.groups
    grad_input = grad_output.new_empty(grad_output.shape[0], channels, *geometry.input_size)
    tensors = {"cells": cells, "grad_output": grad_output, "grad_input": grad_input}
    _convolve("planes", (channels, *cells.shape[2:]), origin, geometry, tensors, 1)
    return grad_input


def cells_gradient(
    grad_output: Tensor, input: Tensor, size: tuple[int, int], origin: tuple[int, int], geometry: Geometry
) -> Tensor:
    """The gradient [N, C / G, *size] of :func:`forward` by its kernels."""
    channels = input.shape[1]
    grad_cells = input.new_empty(grad_output.shape[1], channels // geometry.groups, *size)
    tensors = {"input": input, "grad_output": grad_output, "grad_cells": grad_cells}
    _convolve("cells", (channels, *size), origin, geometry, tensors)
    return grad_cells


class NativeConvolution:
    """A ``Convolution`` of the torch backend's drawn kernels, for arguments on a CPU."""

    def forward(self, input: Tensor, kernels: Tensor, bias: Tensor | None, box: Box, geometry: Geometry) -> Tensor:
        if 0 in (input.shape[0], kernels.shape[0], *geometry.output_size):
            return input.new_empty(input.shape[0], kernels.shape[0], *geometry.output_size)
        bias = None if bias is None else bias.contiguous()
        return forward(input.contiguous(), kernels.contiguous(), bias, (box.row, box.col), geometry)

    def input_gradient(self, grad_output: Tensor, kernels: Tensor, box: Box, geometry: Geometry) -> Tensor:
        if grad_output.numel() == 0:
            channels = kernels.shape[1] * geometry.groups
            return grad_output.new_zeros(grad_output.shape[0], channels, *geometry.input_size)
        return input_gradient(grad_output.contiguous(), kernels.contiguous(), (box.row, box.col), geometry)

    def kernel_gradient(self, grad_output: Tensor, input: Tensor, box: Box, geometry: Geometry) -> Tensor:
        size = (box.height, box.width)
        if grad_output.numel() == 0:
            return input.new_zeros(grad_output.shape[1], input.shape[1] // geometry.groups, *size)
        return cells_gradient(grad_output.contiguous(), input.contiguous(), size, (box.row, box.col), geometry)


def _convolve(
    what: str,
    sizes: tuple[int, ...],
    origin: tuple[int, int],
    geometry: Geometry,
    tensors: Mapping[str, Tensor | None],
    *direction: int,
) -> None:
    """Calls C for so many channels and a kernel of such a size."""
    channels, *size = sizes
    result = tensors.get("output", tensors.get("grad_output"))
    assert result is not None
    images, outputs = result.shape[:2]
    task = Task(*geometry.input_size, *geometry.output_size, *geometry.stride, *origin)
    task.images, task.channels, task.outputs, task.groups = images, channels, outputs, geometry.groups
    task.rows, task.cols = size
    pixels = images * channels * math.prod(geometry.input_size)
    results = images * outputs * math.prod(geometry.output_size)
    cells = outputs * (channels // geometry.groups) * math.prod(size)
    lengths = {"input": pixels, "grad_input": pixels, "output": results, "grad_output": results, "bias": outputs}
    lengths |= {"cells": cells, "grad_cells": cells}
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(task, name, address_of(name, tensor, result.dtype, lengths[name]))
    length = getattr(build.load()[0][result.dtype], f"{what}_workspace_length")(ctypes.byref(task), *direction)
    workspace = result.new_empty(length)
    task.workspace = workspace.data_ptr()
    build.call(f"dense_{what}", result.dtype, task, *direction)

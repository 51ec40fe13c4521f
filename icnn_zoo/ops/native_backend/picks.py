"""The full version by picking four columns for each tap: csrc/picks.c.

Letters used in shapes: B images, C input channels, N output channels, G groups, T taps.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.native_backend import build
from icnn_zoo.ops.native_backend.addresses import address_of

BLOCK = 128  # results that share columns, as in csrc/picks.c


class Task(ctypes.Structure):
    """``picks_t`` of csrc/picks.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("height", "width", "out_height", "out_width")),
        *((name, ctypes.c_int64) for name in ("stride_row", "stride_col", "origin_row", "origin_col")),
        *((name, ctypes.c_int64) for name in ("images", "channels", "outputs", "groups", "taps", "wide")),
        *((name, ctypes.c_int64 * 2) for name in ("first", "size")),
        *((name, ctypes.c_void_p) for name in ("input", "weight", "positions", "bias", "output", "grad_output")),
        *((name, ctypes.c_void_p) for name in ("grad_input", "grad_weight", "grad_shift", "workspace")),
    ]


class Picks:
    """The taps of a full version that lie in a box; strides of 1.

    Args:
        weight: Weights [N, C / G, T], contiguous.
        positions: Positions [N, C / G, T, 2] in float32 or float64, contiguous.
        geometry: Sizes of the call.
        first: First row and column of the box, in pixels from position 0.
        size: Its rows and columns.
    """

    def __init__(
        self, weight: Tensor, positions: Tensor, geometry: Geometry, first: tuple[int, int], size: tuple[int, int]
    ) -> None:
        self.weight, self.positions, self.geometry = weight, positions, geometry
        self.first, self.size = first, size

    def forward(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """The output [B, N, Ho, Wo]."""
        output = input.new_empty(input.shape[0], self.weight.shape[0], *self.geometry.output_size)
        self._run("planes", 0, input=input, bias=bias, output=output)
        return output

    def backward(
        self, grad_output: Tensor, input: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of :func:`forward`, as :meth:`.boxes.Box.backward` gives them."""
        by_input = by_weight = by_shift = None
        if needs[0]:
            by_input = torch.empty_like(input)
            self._run("planes", 1, grad_output=grad_output, grad_input=by_input)
        if needs[1]:
            by_weight = torch.empty_like(self.weight)
            by_shift = torch.empty(self.positions.shape, dtype=torch.float64)
            tensors = {"grad_output": grad_output, "input": input, "grad_weight": by_weight, "grad_shift": by_shift}
            self._run("kernels", **tensors)
        return by_input, by_weight, by_shift

    def _run(self, what: str, *direction: int, **tensors: Tensor | None) -> None:
        dtype, places, geometry = self.weight.dtype, self.positions.dtype, self.geometry
        outputs, members, taps = self.weight.shape
        planes = tensors.get("output", tensors.get("grad_output"))
        assert planes is not None
        images, channels = planes.shape[0], members * geometry.groups
        task = Task(*geometry.input_size, *geometry.output_size, *geometry.stride, *geometry.origin)
        task.images, task.channels, task.outputs = images, channels, outputs
        task.groups, task.taps, task.wide = geometry.groups, taps, places == torch.float64
        task.first[:], task.size[:] = self.first, self.size
        pixels = images * channels * math.prod(geometry.input_size)
        results = images * outputs * math.prod(geometry.output_size)
        lengths = {"input": pixels, "grad_input": pixels, "output": results, "grad_output": results, "bias": outputs}
        lengths |= dict.fromkeys(("weight", "grad_weight"), self.weight.numel())
        lengths |= dict.fromkeys(("positions", "grad_shift"), 2 * self.weight.numel())
        types = {"positions": places, "grad_shift": torch.float64}
        for name, tensor in {"weight": self.weight, "positions": self.positions, **tensors}.items():
            if tensor is not None:
                setattr(task, name, address_of(name, tensor, types.get(name, dtype), lengths[name]))
        length = build.load()[0][dtype].picks_workspace_length(ctypes.byref(task)) if what == "kernels" else 0
        workspace = self.weight.new_empty(length)
        task.workspace = workspace.data_ptr()
        build.call(f"picks_{what}", dtype, task, *direction)

"""The irregular convolution on CPUs by a small C kernel, compiled on first use where a C compiler is found.

The C code (``csrc``) makes columns where the matrix product wants them, in the cache or, where a group has few outputs,
in registers, and walks depthwise layers as stencils of at most four cells a tap, so that no cost depends on how far
positions moved. What lies close together in the full version and in small groups is drawn into dense kernels; what lies
farther apart in the full version is picked out of columns that its kernels share, and what ran away are stencils
(:mod:`.boxes`). It runs on PyTorch's own threads (``torch.set_num_threads``). Without a compiler the torch backend does
the same, slower.

The compiled library is kept in ``$XDG_CACHE_HOME/icnn_zoo/native`` (``~/.cache/icnn_zoo/native``), named after its
source, flags, compiler and processor. ``$CC`` chooses the compiler.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry, memory_format
from icnn_zoo.ops.interpolation import join_unknown
from icnn_zoo.ops.native_backend import build
from icnn_zoo.ops.native_backend.addresses import address_of
from icnn_zoo.ops.native_backend.boxes import Box, choose_box
from icnn_zoo.ops.native_backend.dense import NativeConvolution
from icnn_zoo.ops.native_backend.drawn import draw_cells, plain
from icnn_zoo.ops.native_backend.wide import Windows
from icnn_zoo.ops.tap_reading import INTERPOLATIONS
from icnn_zoo.ops.torch_backend import TorchBackend
from icnn_zoo.ops.torch_backend.dense import spread_unknown


@dataclass(frozen=True)
class Limits:
    """Sizes chosen for speed; what is computed depends on them by rounding only."""

    depth: int = 192
    """Rows of columns that a product takes at once: a tile's worth of both factors stays in the nearest cache."""
    band: int = 384
    """Output pixels of a band, about: with ``depth`` rows of columns it stays in the second cache."""
    few: int = 24
    """Outputs of a group up to which its columns are made anew for every eight of them, and never stored."""
    draw: bool = True
    """Draws kernels that share no columns into a box, where that is cheaper."""


class NativeBackend:
    """The backend "native".

    Args:
        limits: Sizes to work in.
    """

    interpolations = INTERPOLATIONS
    joins_unknown = True

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._drawn = TorchBackend(convolution=NativeConvolution(), shared=self)

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot run on a device, or None; the first call for a CPU compiles the kernel."""
        if device.type != "cpu":
            return f"it needs a CPU; the input is on {device}"
        return build.load()[1]

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether this backend computes in a dtype: in all floating ones, half precision by float32."""
        return dtype.is_floating_point

    def forward(
        self, input: Tensor, weight: Tensor, positions: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        """Computes the irregular convolution of checked arguments.

        Args:
            input: Images [B, C, H, W] on a CPU.
            weight: Weights [N, C / G, T].
            positions: Absolute positions in pixels [C, T, 2], or [N, C / G, T, 2] for the full version.
            bias: Bias [N] or None.
            geometry: Sizes of the call.

        Returns:
            Output [B, N, Ho, Wo] in the memory format of ``input``.
        """
        if geometry.reading.is_wide:
            positions = join_unknown(positions)
            if positions.dim() == 4 and weight.shape[1] > 1:
                return self._drawn.forward(input, weight, positions, bias, geometry)
            if weight.shape[1] == 1:
                weight, positions, _ = draw_cells(weight, positions, geometry)
                return self.forward(input, weight, positions, bias, plain(geometry))
        return self._forward(_Call(input, weight, positions, geometry, self.limits), input, bias, geometry)

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        positions: Tensor,
        geometry: Geometry,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Computes the gradients of :func:`forward` for input, weight and positions, None where not in ``needs``."""
        if geometry.reading.is_wide:
            positions = join_unknown(positions)
            if positions.dim() == 4 and weight.shape[1] > 1:
                return self._drawn.backward(grad_output, input, weight, positions, geometry, needs)
            if weight.shape[1] == 1:
                return self._drawn_backward(grad_output, input, weight, positions, geometry, needs)
        call = _Call(input, weight, positions, geometry, self.limits)
        grads: dict[str, Tensor | None]
        box = self._choose_box(call, geometry) if grad_output.numel() > 0 else None
        if box is not None:
            wide = grad_output.to(call.dtype).contiguous()
            wanted = (needs[0], needs[1] or needs[2])
            names = ("grad_input", "grad_weight", "grad_shift")
            grads = dict(zip(names, box.backward(wide, call.arguments["input"], wanted), strict=True))
            if box.num_outliers:
                self._outliers(call, box).run("backward", grad_output=wide, **grads)
            return _in_types_of(grads, input, weight, positions, geometry, needs)
        # C writes every number, on its threads.
        make = torch.empty if grad_output.numel() > 0 else torch.zeros
        grad_input = make(input.shape, dtype=call.dtype) if needs[0] else None
        # A stencil's shifts belong to the outputs: those of a channel are summed below.
        stencil = call.is_stencil
        grad_weight = make(weight.shape, dtype=call.dtype) if needs[1] or (stencil and needs[2]) else None
        shape = weight.shape if stencil else positions.shape[:2]
        numbers = call.lengths["grad_shift"] // math.prod(shape)
        grad_shift = make(*shape, numbers, dtype=torch.float64) if needs[2] or (stencil and needs[1]) else None
        grads = {"grad_input": grad_input, "grad_weight": grad_weight, "grad_shift": grad_shift}
        if grad_output.numel() > 0:
            call.run("backward", grad_output=grad_output.to(call.dtype).contiguous(), **grads)
        if call.windows is not None and grad_shift is not None:
            grads["grad_shift"] = call.windows.carry_back(grad_shift.flatten(0, 1))
        return _in_types_of(grads, input, weight, positions, geometry, needs)

    def _drawn_backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        positions: Tensor,
        geometry: Geometry,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        cells, places, carry_back = draw_cells(weight, positions, geometry)
        learns = needs[1] or needs[2]
        found = self.backward(grad_output, input, cells, places, plain(geometry), (needs[0], learns, False))
        by_input = None if found[0] is None else spread_unknown(found[0], positions, geometry)
        if found[1] is None:
            return by_input, None, None
        by_weight, by_taps = carry_back(found[1])
        if positions.dim() == 3:  # the outputs of a channel share its shape
            by_taps = by_taps.unflatten(0, (positions.shape[0], -1)).sum((1, 2))
        by_taps = by_taps.to(positions.dtype) + positions * 0  # a position that is no number may read nothing
        return by_input, by_weight.to(weight.dtype) if needs[1] else None, by_taps if needs[2] else None

    def _forward(self, call: _Call, input: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        bias = None if bias is None else bias.to(call.dtype).contiguous()
        return _like(input, self._compute(call, bias, geometry))

    def _compute(self, call: _Call, bias: Tensor | None, geometry: Geometry) -> Tensor:
        input, weight = call.arguments["input"], call.arguments["weight"]
        output = input.new_empty(input.shape[0], weight.shape[0], *geometry.output_size)
        if output.numel() == 0:
            return output
        few = (
            not (call.is_stencil or geometry.reading.is_wide) and weight.shape[0] // geometry.groups <= self.limits.few
        )
        if few and call.run_few(bias=bias, output=output):
            return output
        box = self._choose_box(call, geometry)
        if box is None:
            call.run("forward", bias=bias, output=output)
            return output
        output = box.forward(input, bias)
        if box.num_outliers:
            self._outliers(call, box).run("forward", output=output)
        return output

    def _choose_box(self, call: _Call, geometry: Geometry) -> Box | None:
        drawn = self.limits.draw and not geometry.reading.is_wide
        return choose_box(call.arguments["weight"], call.positions, geometry) if drawn else None

    def _outliers(self, call: _Call, box: Box) -> _Call:
        """The taps that are not in the box, as stencils that add to what the box gave."""
        arguments = call.arguments
        stencils = _Call(arguments["input"], arguments["weight"], box.positions, box.geometry, self.limits, True)
        stencils.task.drawn = box.drawn.data_ptr()  # one for each weight, as choose_box has made it
        return stencils


def _in_types_of(
    grads: dict[str, Tensor | None],
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What C gave, in the types and layouts of the arguments, shifts summed over those who share one."""
    grad_input, grad_weight, grad_shift = grads["grad_input"], grads["grad_weight"], grads["grad_shift"]
    by_input = by_weight = by_positions = None
    if grad_input is not None:
        by_input = _like(input, grad_input)
    if needs[1] and grad_weight is not None:
        by_weight = grad_weight.to(weight.dtype)
    if needs[2] and grad_shift is not None:
        if grad_shift.dim() == 4 and positions.dim() == 3:
            grad_shift = grad_shift.unflatten(0, (geometry.groups, -1)).sum(1)
        unknown = (positions * 0).sum(-1, keepdim=True)  # a position that is no number may have met no pixel
        by_positions = grad_shift.reshape(positions.shape).to(positions.dtype) + unknown
    return by_input, by_weight, by_positions


def _like(input: Tensor, tensor: Tensor) -> Tensor:
    """A contiguous tensor in the dtype and the memory format of an input."""
    if tensor.dtype == input.dtype and input.is_contiguous():  # each operation has its price for a small layer
        return tensor
    return tensor.to(input.dtype).contiguous(memory_format=memory_format(input))


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as C reads it."""
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()


def _integers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


class _Sizes(ctypes.Structure):
    """``sizes_t`` of csrc/plane.h."""

    _fields_ = [
        *_integers("height", "width", "out_height", "out_width", "stride_row", "stride_col"),
        *_integers("origin_row", "origin_col"),
    ]


class _Columns(ctypes.Structure):
    """``columns_t`` of csrc/columns.h."""

    _fields_ = [
        ("sizes", _Sizes),
        *_integers("images", "channels", "outputs", "groups", "taps", "depth", "band"),
        *_pointers("input", "weight", "positions", "bias", "output"),
        *_pointers("grad_output", "grad_input", "grad_weight", "grad_shift", "workspace"),
        *_integers("reads_row", "reads_col"),
        *_pointers("first_row", "first_col", "rows", "cols"),
    ]


class _Stencil(ctypes.Structure):
    """``stencil_t`` of csrc/stencil.h."""

    _fields_ = [
        ("sizes", _Sizes),
        *_integers("images", "channels", "outputs", "groups", "taps"),
        ("per_kernel", ctypes.c_int),
        *_pointers("input", "weight", "positions", "bias", "output"),
        *_pointers("grad_output", "grad_input", "grad_weight", "grad_shift", "workspace", "drawn"),
    ]


_TYPES = {
    **dict.fromkeys(("positions", "grad_shift"), torch.float64),
    **dict.fromkeys(("first_row", "first_col"), torch.int64),
}


class _Call:
    """The arguments that forward and backward share, as C wants them.

    Layers whose outputs share no columns (depthwise, the full version) are stencils, others where it is asked for.
    """

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        positions: Tensor,
        geometry: Geometry,
        limits: Limits,
        as_stencil: bool = False,
    ) -> None:
        self.is_stencil = as_stencil or positions.dim() == 4 or weight.shape[1] == 1
        # Half precision is computed in float32 and rounded once.
        self.dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        self.arguments = {"input": _plain(input, self.dtype), "weight": _plain(weight, self.dtype)}
        self.positions = positions
        self.windows = Windows(positions, geometry, self.dtype) if geometry.reading.is_wide else None
        (images, channels), (outputs, _, taps) = input.shape[:2], weight.shape
        self.task = (_Stencil if self.is_stencil else _Columns)(
            sizes=_Sizes(*geometry.input_size, *geometry.output_size, *geometry.stride, *geometry.origin),
            images=images,
            channels=channels,
            outputs=outputs,
            groups=geometry.groups,
            taps=taps,
        )
        self.strides = geometry.stride
        # What C will touch, by the sizes that it is told.
        weights = outputs * (channels // geometry.groups) * taps
        shapes = weights if positions.dim() == 4 else channels * taps
        pixels = images * channels * geometry.input_size[0] * geometry.input_size[1]
        results = images * outputs * geometry.output_size[0] * geometry.output_size[1]
        self.lengths = {
            "input": pixels,
            "weight": weights,
            "positions": 2 * shapes,
            "bias": outputs,
            "output": results,
            "grad_output": results,
            "grad_input": pixels,
            "grad_weight": weights,
            "grad_shift": 2 * (weights if self.is_stencil else shapes),
        }
        if self.windows is not None:
            rows, cols = self.task.reads_row, self.task.reads_col = self.windows.reads
            self.lengths |= dict.fromkeys(("first_row", "first_col"), shapes)
            self.lengths |= {"rows": shapes * rows, "cols": shapes * cols, "grad_shift": shapes * (rows + cols)}
        if self.is_stencil:
            self.task.per_kernel = positions.dim() == 4
        else:
            self.task.depth, self.task.band = limits.depth, limits.band

    def run(self, direction: str, **tensors: Tensor | None) -> None:
        """Calls C with the tensors of one direction; those that are None are not wanted.

        Raises:
            MemoryError: There is no memory for a thread's buffer.
        """
        library, task = build.load()[0][self.dtype], ctypes.byref(self.task)
        tensors = self._point(tensors)
        if not self.is_stencil:
            workspace = torch.empty(library.workspace_length(task, int(direction == "backward")), dtype=self.dtype)
        else:
            length = library.moments_length(task) if direction == "backward" else 0
            workspace = torch.empty(length, dtype=torch.float64)
        self.task.workspace = workspace.data_ptr()
        build.call(f"{'stencil' if self.is_stencil else 'columns'}_{direction}", self.dtype, self.task)

    def run_few(self, **tensors: Tensor | None) -> bool:
        """The forward by columns that are not stored; false where planes would leave the cache: nothing is done then.

        Raises:
            MemoryError: There is no memory for a thread's buffer.
        """
        tensors = self._point(tensors)
        return build.call("few_forward", self.dtype, self.task) == 0

    def _point(self, tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Gives C the addresses of tensors: the one place where any reaches it, each held against what C will touch.

        Returns:
            All that C has addresses of, to be held until it is done.

        Raises:
            ValueError: A tensor or a size is not what C takes it for.
        """
        lengths = self.lengths
        plain = {"positions": _plain(self.positions, torch.float64)} if self.windows is None else {}
        windows = {} if self.windows is None else self.windows.arguments
        tensors = {**self.arguments, **plain, **windows, **tensors}
        if min(lengths.values()) < 1 or min(self.strides) < 1:
            raise ValueError("the native backend needs at least one of everything: images, channels, taps and outputs.")
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            dtype = _TYPES.get(name, self.dtype)
            setattr(self.task, name, address_of(name, tensor, dtype, lengths[name]))
        return tensors

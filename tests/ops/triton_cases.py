"""Calls for the tests of the Triton backend, and what makes tiny ones take every way through it."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the package triton (pip install triton)")

import triton

from icnn_zoo.ops import reference
from icnn_zoo.ops.geometry import Geometry, memory_format
from icnn_zoo.ops.triton_backend import Limits, TritonBackend
from icnn_zoo.ops.triton_backend.call import Call

# The interpreter takes the place of the compiler in a whole process: its tests run in one of their own.
INTERPRETED = bool(triton.knobs.runtime.interpret)
RELEASE = tuple(map(int, triton.__version__.split(".")[:2]))
Pair = tuple[int, int]
Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]


DEFAULT = TritonBackend()


@dataclass(frozen=True)
class Case:
    """One call: sizes, geometry, and how far positions lie from the regular grid."""

    name: str = "plain"
    batch: int = 2
    size: Pair = (4, 6)
    channels: Pair = (2, 2)
    kernel: Pair = (2, 2)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1
    spread: float = 0.7
    bias: bool = True
    shapes: str = "channel"
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format

    @property
    def sizes(self) -> tuple[Pair, tuple[int, int, int, int], Pair, int]:
        rows, cols = self.padding
        return self.stride, (rows, rows, cols, cols), self.dilation, self.groups

    @property
    def geometry(self) -> Geometry:
        return Geometry.of(self.size, self.kernel, *self.sizes)

    def tensors(self) -> Tensors:
        """Input, weight [N, C / G, kh, kw], positions, bias and the output's gradient."""
        generator = torch.Generator().manual_seed(1)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        in_channels, out_channels = self.channels
        rows, cols = (d * (torch.arange(k) - (k - 1) // 2) for d, k in zip(self.dilation, self.kernel, strict=True))
        grid = torch.cartesian_prod(rows, cols).reshape(-1, 2)
        owners = (out_channels, in_channels // self.groups) if self.shapes == "kernel" else (in_channels,)
        input = rand(self.batch, in_channels, *self.size).to(self.dtype).contiguous(memory_format=self.layout)
        grad_output = rand(self.batch, out_channels, *self.geometry.output_size)
        return (
            input,
            rand(out_channels, in_channels // self.groups, *self.kernel).to(self.dtype),
            grid + self.spread * rand(*owners, *grid.shape),
            rand(out_channels).to(self.dtype) if self.bias else None,
            grad_output.to(self.dtype).contiguous(memory_format=self.layout),
        )

    def run(self, tensors: Tensors, backend: TritonBackend = DEFAULT) -> list[Tensor]:
        """Output and gradients of input, weight and positions by the Triton backend."""
        input, weight, positions, _, grad_output = tensors
        weight = weight.flatten(2)
        output = self.forward(tensors, backend)
        grads = backend.backward(grad_output, input, weight, positions, self.geometry, (True, True, True))
        assert output.dtype == input.dtype
        assert [grad.dtype for grad in grads] == [input.dtype, weight.dtype, positions.dtype]
        for result in (output, grads[0]):
            layout = memory_format(input)
            assert not result._is_view()  # which in-place operators would refuse
            assert result.stride() == torch.empty(result.shape, device="meta", memory_format=layout).stride()
        return [output, *grads]

    def forward(self, tensors: Tensors, backend: TritonBackend = DEFAULT) -> Tensor:
        """Output of the Triton backend."""
        input, weight, positions, bias, _ = tensors
        return backend.forward(input, weight.flatten(2), positions, bias, self.geometry)

    def expected(self, tensors: Tensors) -> list[Tensor]:
        """The same by the reference in float64."""
        *arguments, grad_output = tensors
        output = reference.irregular_conv2d_forward(*arguments, *self.sizes)
        by_input, by_weight, by_positions, _ = reference.irregular_conv2d_backward(grad_output, *arguments, *self.sizes)
        return [output, by_input, by_weight.flatten(2), by_positions]


CASES = [
    Case(),
    Case("3x3", kernel=(3, 3), channels=(2, 3)),
    Case("no bias, channels_last", bias=False, layout=torch.channels_last),
    Case("channels_last, groups", groups=2, channels=(4, 4), layout=torch.channels_last),
    Case("channels_last, aligned outputs", channels=(2, 8), layout=torch.channels_last),
    Case("channels_last, groups of aligned outputs", groups=2, channels=(2, 16), layout=torch.channels_last),
    Case("stride 2", stride=(2, 2)),
    Case("unequal strides", stride=(3, 2), size=(8, 6)),
    Case("unequal strides, one is 1", stride=(1, 2)),
    Case("groups, stride and dilation", groups=2, channels=(4, 2), stride=(2, 1), dilation=(2, 3), padding=(3, 2)),
    Case("depthwise, multiplier 2", channels=(2, 4), groups=2),
    Case("depthwise, stride 2", channels=(3, 3), groups=3, stride=(2, 2)),
    Case("one input channel", channels=(1, 3)),
    Case("2x4, dilation 2", kernel=(2, 4), dilation=(2, 2), padding=(2, 2)),
    Case("1x1, stride 2", kernel=(1, 1), stride=(2, 2)),
    Case("7x7", kernel=(7, 7), padding=(3, 3), channels=(1, 1)),
    Case("large padding", padding=(4, 6)),
    Case("one pixel", size=(1, 1)),
    Case("one row, wider than a gap", size=(1, 40), spread=12.0),
    Case("batch 0", batch=0),
    Case("spread 20 px", spread=20.0),
    Case("spread 20 px, stride 2", spread=20.0, stride=(2, 2)),
    Case("spread 1e9 px", spread=1e9),
    Case("integer positions", spread=0.0),
]
PER_KERNEL = [
    Case("per kernel, groups, stride 2", shapes="kernel", groups=2, channels=(4, 4), stride=(2, 2)),
    Case("per kernel, depthwise, multiplier 2", shapes="kernel", channels=(2, 4), groups=2),
    Case("per kernel, batch 0", shapes="kernel", batch=0),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for result, truth in zip(actual, expected, strict=True):
        scale = truth.abs().max().item() if truth.numel() and truth.isfinite().all() else 1.0
        close = {"rtol": 0, "atol": tolerance * max(scale, 1e-30), "equal_nan": True}
        torch.testing.assert_close(result.double().cpu(), truth.cpu(), **close)


class Guarded(TritonBackend):
    """Puts NaN before and after the planes: a read outside them shows."""

    def make_call(self, *arguments: Any) -> Call:
        made = super().make_call(*arguments)
        make_planes = made.make_planes

        def guarded(source: Tensor) -> Tensor:
            inside = make_planes(source)
            margin = 5000
            around = inside.new_full((inside.numel() + 2 * margin,), float("nan"))
            around[margin:-margin] = inside.flatten()
            return around[margin:-margin].view(inside.shape)

        made.make_planes = guarded
        return made


def surround(tensor: Tensor) -> Tensor:
    """A copy with NaN before and after it in memory: a read outside of it shows."""
    margin = 5000
    around = tensor.new_full((tensor.numel() + 2 * margin,), float("nan"))
    return around.as_strided(tensor.shape, tensor.stride(), margin).copy_(tensor)


# What makes tiny sizes take a form; the full version has only one.
COLUMNS = Limits(drawn_taps=0, direct_channels=0, direct_product=0, few_outputs=0)
FORMS = {
    "columns": COLUMNS,
    "direct": replace(COLUMNS, direct_product=10**9),
}
FEW = replace(COLUMNS, few_outputs=32, few_channels=1)
FEW_CASES = [
    Case("few outputs, most taps in their boxes", channels=(5, 3), kernel=(2, 3), spread=0.4),
    Case("few outputs, stride 2", channels=(6, 2), stride=(2, 1), spread=1.0, layout=torch.channels_last),
    Case("few outputs, far away", channels=(3, 2), spread=3.0, bias=False),
]
DRAWN = [
    Case("drawn", channels=(2, 2), groups=2, kernel=(3, 3)),
    Case("drawn, multiplier 2, stride 2", channels=(2, 4), groups=2, stride=(2, 1), layout=torch.channels_last),
    Case("drawn, multiplier 2", channels=(2, 4), groups=2, padding=(0, 2), size=(5, 4)),
    Case("drawn, per kernel", channels=(2, 4), groups=2, shapes="kernel"),
    Case("drawn, some boxes too large", channels=(3, 3), groups=3, size=(2, 40), spread=3.0),
    Case("drawn, spread 1e9 px", channels=(2, 2), groups=2, spread=1e9),
    Case("drawn, boxes of several parts", channels=(3, 3), groups=3, size=(3, 5), kernel=(3, 3), spread=1.2),
    Case("drawn, maps of several parts", batch=1, channels=(2, 2), groups=2, kernel=(3, 1), size=(23, 2)),
    Case("drawn, two groups", batch=3, channels=(40, 40), groups=40, size=(3, 2), layout=torch.channels_last),
    Case("drawn, channels_last, multiplier 2", channels=(3, 6), groups=3, layout=torch.channels_last),
    Case("drawn, channels_last, too large", channels=(3, 6), groups=3, spread=3.0, layout=torch.channels_last),
    Case("drawn, stride 3", channels=(2, 2), groups=2, kernel=(3, 3), stride=(3, 3), padding=(0, 0), spread=1.0),
    Case("drawn, one pixel", batch=1, channels=(5, 5), groups=5, size=(1, 1), kernel=(3, 3)),
]

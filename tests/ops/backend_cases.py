"""Calls for the tests of the CPU backends, and what the reference in float64 gives for them."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

import icnn_zoo
from icnn_zoo.ops.sharing import Shapes

Pair = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One call: sizes, geometry, and how far positions lie from the regular grid."""

    name: str = "plain 3x3"
    size: Pair = (5, 7)
    channels: Pair = (4, 6)
    kernel: Pair = (3, 3)
    stride: int | Pair = 1
    padding: int | Pair | str = 1
    dilation: int | Pair = 1
    groups: int = 1
    batch: int = 2
    spread: float = 0.7
    bias: bool = True
    shapes: Shapes = "channel"

    def regular_positions(self) -> Tensor:
        """The regular grid in the shape of the positions."""
        dilation = self.dilation if isinstance(self.dilation, tuple) else (self.dilation, self.dilation)
        rows, cols = (d * (torch.arange(k) - (k - 1) // 2) for d, k in zip(dilation, self.kernel, strict=True))
        grid = torch.cartesian_prod(rows, cols).reshape(-1, 2).double()
        in_channels, out_channels = self.channels
        owners = {
            "layer": (1,),
            "group": (self.groups,),
            "channel": (in_channels,),
            "kernel": (out_channels, in_channels // self.groups),
        }[self.shapes]
        return grid.expand(*owners, *grid.shape).contiguous()

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Input, weight, positions and bias, as leaves; the same numbers in each dtype."""
        generator = torch.Generator().manual_seed(1)
        in_channels, out_channels = self.channels

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        regular = self.regular_positions()
        tensors = [
            rand(self.batch, in_channels, *self.size),
            rand(out_channels, in_channels // self.groups, *self.kernel),
            regular + self.spread * rand(*regular.shape),
        ]
        if self.bias:
            tensors.append(rand(out_channels))
        return [tensor.float().to(dtype).requires_grad_() for tensor in tensors]

    def run(self, tensors: list[Tensor], backend: str = "auto") -> Tensor:
        """Call the public function."""
        bias = tensors[3] if self.bias else None
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return icnn_zoo.irregular_conv2d(*tensors[:3], bias, *geometry, backend=backend)


PLAIN = Case()
CASES = [
    PLAIN,
    Case("no bias", bias=False),
    Case("stride 2", stride=2),
    Case("unequal strides", stride=(3, 2), size=(8, 6)),
    Case("dilation 2", dilation=2, padding=2),
    Case("unequal dilations", dilation=(1, 3), padding=(0, 3)),
    Case("stride and dilation", stride=(2, 1), dilation=(2, 3), padding=(3, 2)),
    Case("groups", groups=2),
    Case("long rows, eleven outputs", size=(3, 37), channels=(2, 11), batch=1),
    Case("depthwise", channels=(4, 4), groups=4),
    Case("depthwise, multiplier 2", channels=(3, 6), groups=3),
    Case("depthwise, stride 2", channels=(4, 4), groups=4, stride=2),
    Case("one input channel", channels=(1, 3)),
    Case("2x2", kernel=(2, 2)),
    Case("4x4, dilation 2, same", kernel=(4, 4), dilation=2, padding="same"),
    Case("2x3, same", kernel=(2, 3), padding="same"),
    Case("valid", padding="valid"),
    Case("1x5", kernel=(1, 5), padding=(0, 2)),
    Case("5x1", kernel=(5, 1), padding=(2, 0)),
    Case("1x1", kernel=(1, 1), padding=0),
    Case("1x1, stride 2, padding 1", kernel=(1, 1), stride=2),
    Case("7x7", kernel=(7, 7), padding=3, channels=(2, 2)),
    Case("large padding", padding=(4, 6)),
    Case("kernel larger than the input", size=(2, 3), kernel=(5, 5), padding=2),
    Case("one pixel", size=(1, 1)),
    Case("one row", size=(1, 9), padding=(1, 0)),
    Case("batch 0", batch=0),
    Case("batch 1", batch=1),
    Case("spread 20 px", spread=20.0),
    Case("spread 20 px, stride 2", spread=20.0, stride=2),
    Case("spread 1000 px", spread=1000.0),
    Case("spread 20 px, depthwise", spread=20.0, channels=(4, 4), groups=4),
    Case("integer positions", spread=0.0),
    Case("one shape, groups, stride 2", shapes="layer", groups=2, stride=2),
    Case("one shape, depthwise", shapes="layer", channels=(4, 4), groups=4),
    Case("per group", shapes="group", groups=2),
    Case("per kernel", shapes="kernel"),
    Case("per kernel, all in a box, stride 2", shapes="kernel", groups=2, stride=2, spread=0.2),
    Case("small groups, all in a box", groups=2, spread=0.2),
    Case("per kernel, groups, stride 2", shapes="kernel", groups=2, stride=2),
    Case("per kernel, depthwise, multiplier 2", shapes="kernel", channels=(3, 6), groups=3),
    Case("per kernel, spread 20 px", shapes="kernel", spread=20.0),
    Case("per kernel, even, unequal dilations", shapes="kernel", kernel=(2, 4), dilation=(2, 1)),
    Case("per kernel, batch 0", shapes="kernel", batch=0),
]

KINDS = ["shared", "per kernel"]


def gradients(output: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of the output."""
    grad_output = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad(output, tensors, grad_output.to(output.dtype))


@functools.cache
def oracle(case: Case) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients of the reference in float64."""
    tensors = case.tensors()
    output = case.run(tensors, "reference")
    return output.detach(), gradients(output, tensors)

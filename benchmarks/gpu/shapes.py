"""The layers that are checked and timed on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Pair = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """A convolution: sizes, and how far positions lie from the regular grid, at most."""

    channels: Pair
    size: Pair
    kernel: int = 3
    dilation: int = 1
    groups: int = 1
    stride: int = 1
    batch: int = 2
    spread: float = 0.75
    per_kernel: bool = False
    interpolation: str = "bilinear"
    """What "bilinear" is not is computed by the torch backend, which reads the spreads: no CUDA graph holds that."""
    staged: bool = False
    """Whether it takes the kernels in CUDA C++."""
    target: float | None = None
    """What forward and backward should take at most, of cuDNN's time."""

    @property
    def geometry(self) -> dict[str, int]:
        """Arguments of a convolution that keeps the size at stride 1."""
        padding = self.dilation * (self.kernel // 2)
        return {"stride": self.stride, "padding": padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def sizes(self) -> tuple[Pair, tuple[int, int, int, int], Pair, int]:
        """The same as operators take them."""
        stride, padding, dilation, groups = self.geometry.values()
        return (stride, stride), (padding,) * 4, (dilation, dilation), groups

    def tensors(
        self,
        device: str,
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.channels_last,
    ) -> list[Tensor]:
        """Input, weight, positions, bias and the output's gradient, the same on every device."""
        generator = torch.Generator().manual_seed(0)
        in_channels, out_channels = self.channels
        fan_in = in_channels // self.groups
        steps = self.dilation * (torch.arange(self.kernel) - (self.kernel - 1) // 2).float()
        owners = (out_channels, fan_in) if self.per_kernel else (in_channels,)
        moved = torch.rand(*owners, self.kernel**2, 2, generator=generator) * 2 - 1
        positions = torch.cartesian_prod(steps, steps) + moved * self.spread
        positions = positions.floor() + (positions % 1).clamp(0.05, 0.95)  # off the kinks at integers
        output_size = [(size - 1) // self.stride + 1 for size in self.size]

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        if self.interpolation != "bilinear":
            positions = torch.cat((positions, torch.full_like(positions, SPREADS[self.interpolation])), -1)
        weight = rand(out_channels, fan_in, self.kernel, self.kernel) / (fan_in * self.kernel**2) ** 0.5
        input = rand(self.batch, in_channels, *self.size).contiguous(memory_format=layout)
        grad = rand(self.batch, out_channels, *output_size).contiguous(memory_format=layout)
        return [input, weight, positions.to(device), rand(out_channels), grad]

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


SPREADS = {"triangle": 1.0, "gaussian": 0.5}
MAP = (41, 43)
FORMS = {
    "columns": Layer((64, 96), MAP, dilation=2),
    "columns, stride 2": Layer((64, 96), MAP, stride=2),
    "columns, spread by 8 px": Layer((64, 96), MAP, spread=8.0),
    "staged": Layer((64, 96), MAP, dilation=2, staged=True),
    "staged, whole blocks": Layer((256, 64), MAP, dilation=2, batch=9, staged=True),
    "staged, groups and far taps": Layer((96, 96), (33, 20), groups=3, batch=3, spread=8.0, staged=True),
    "few outputs": Layer((256, 21), MAP, dilation=12),
    "2 outputs": Layer((64, 2), MAP),
    "groups of 8": Layer((128, 128), MAP, groups=16),
    "depthwise 5x5": Layer((96, 96), MAP, kernel=5, groups=96),
    "depthwise 3x3, stride 2": Layer((96, 96), MAP, groups=96, stride=2),
    "a shape per kernel": Layer((16, 16), MAP, per_kernel=True),
}
REHEARSED_FORMS = {
    "columns": Layer((3, 40), (4, 5)),
    "staged": Layer((2, 34), (3, 4), staged=True),
    "few outputs": Layer((4, 5), (3, 3), batch=1),
    "depthwise": Layer((3, 3), (4, 5), groups=3),
    "a shape per kernel": Layer((2, 2), (4, 5), per_kernel=True),
}

TIMED = {
    "layer3": Layer((256, 256), (41, 41), dilation=2, batch=16, target=1.8),
    "layer4": Layer((512, 512), (41, 41), dilation=4, batch=16, target=1.3),
    "head": Layer((2048, 21), (41, 41), dilation=12, batch=16, target=2.0),
    "depthwise 5x5": Layer((672, 672), (20, 20), kernel=5, groups=672, batch=16, target=1.5),
    "depthwise 7x7": Layer((384, 384), (20, 20), kernel=7, groups=384, batch=16, target=1.5),
    "layer3 at 65": Layer((256, 256), (65, 65), dilation=2, batch=16),
    "layer4 at 65": Layer((512, 512), (65, 65), dilation=4, batch=16),
    "stride 2": Layer((256, 256), (41, 41), stride=2, batch=16),
    "32 groups": Layer((256, 256), (41, 41), groups=32, batch=16),
    "groups of 4": Layer((128, 128), (41, 41), groups=32, batch=16),
    "layer3, batch 2": Layer((256, 256), (41, 41), dilation=2, batch=2),
    "layer3, batch 10": Layer((256, 256), (41, 41), dilation=2, batch=10),
    "layer3 at 64": Layer((256, 256), (64, 64), dilation=2, batch=16),
    "64 channels, a shape per kernel": Layer((64, 64), (41, 41), batch=4, per_kernel=True),
    "layer3, triangle": Layer((256, 256), (41, 41), dilation=2, batch=16, interpolation="triangle"),
    "layer3, gaussian": Layer((256, 256), (41, 41), dilation=2, batch=16, interpolation="gaussian"),
}
TIMED |= {
    f"{name}, staged": replace(TIMED[name], staged=True)
    for name in ("layer3", "layer4", "layer3 at 65", "layer4 at 65", "layer3, batch 2", "32 groups")
}
REHEARSED_TIMED = {
    "layer3": replace(TIMED["layer3"], channels=(3, 40), size=(4, 5), dilation=1, batch=1),
    "head": replace(TIMED["head"], channels=(3, 21), size=(4, 5), dilation=1, batch=1),
}

"""The shapes that are timed, their tensors, and every way to compute a convolution of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from measuring import LINUX, SEED, counter
from torch import Tensor

import icnn_zoo
from icnn_zoo.ops.sharing import Shapes, expand_shapes

OFF_INTEGER = 0.01  # distance of positions from integers, where bilinear interpolation has kinks


@dataclass(frozen=True)
class Shape:
    """Sizes of one case: B, C, N, H = W; positions are the regular grid + uniform(-spread, spread) pixels."""

    batch: int
    channels: int
    outputs: int
    size: int
    kernel: int = 3
    dilation: int = 1
    groups: int = 1
    stride: int = 1
    spread: float = 0.75
    shapes: Shapes = "channel"
    outliers: float = 0.0
    """Share of taps that are 15 pixels away."""

    def shrunk(self) -> Shape:
        """The same kind of shape with about 16 channels on an 11 x 11 map."""
        scale = max(1, self.channels // 16)
        groups = self.channels // scale if self.groups == self.channels else max(1, self.groups // scale)
        outputs = groups if self.groups == self.outputs else max(2, self.outputs // scale)
        return replace(self, batch=1, channels=self.channels // scale, outputs=outputs, groups=groups, size=11)

    @property
    def geometry(self) -> dict[str, Any]:
        """Keyword arguments of conv2d but for groups; the padding keeps the size at stride 1."""
        return {"stride": self.stride, "padding": self.dilation * (self.kernel // 2), "dilation": self.dilation}

    def __str__(self) -> str:
        words = f"B{self.batch} C{self.channels} N{self.outputs} {self.size}x{self.size}"
        words += f" k{self.kernel} d{self.dilation} g{self.groups} s{self.stride} ±{self.spread:g} px"
        words += f" per {self.shapes}" if self.shapes != "channel" else ""
        return words + (f", {self.outliers:.1%} of taps 15 px away" if self.outliers else "")


SHAPES = {
    "layer3": Shape(2, 256, 256, 41),
    "layer3-d2": Shape(2, 256, 256, 41, dilation=2),
    "layer3-d4": Shape(2, 256, 256, 41, dilation=4),
    "layer4": Shape(1, 512, 512, 41, dilation=4),
    "classifier": Shape(1, 2048, 21, 41, dilation=12),
    "depthwise5": Shape(4, 672, 672, 20, kernel=5, groups=672),
    "convnext7": Shape(4, 384, 384, 20, kernel=7, groups=384),
    "grouped": Shape(2, 256, 256, 41, groups=32),
    "stride2": Shape(2, 256, 256, 41, stride=2),
    "spread8": Shape(2, 256, 256, 41, spread=8.0),
    "layer": Shape(2, 256, 256, 41, shapes="layer"),
    "full": Shape(1, 64, 64, 41, shapes="kernel"),
    "full-d4": Shape(1, 64, 64, 41, dilation=4, shapes="kernel"),
    "full-outliers": Shape(1, 64, 64, 41, shapes="kernel", outliers=0.001),
}


class Case:
    """Float32 tensors of a shape, drawn on the CPU so that every device gets the same; ``grad`` is of the output."""

    def __init__(self, shape: Shape, device: str) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.shape = shape
        fan_in, taps = shape.channels // shape.groups, shape.kernel**2
        steps = (torch.arange(shape.kernel) - (shape.kernel - 1) // 2) * float(shape.dilation)
        self.grid = torch.cartesian_prod(steps, steps).to(device)
        owners = {"layer": (1,), "channel": (shape.channels,), "kernel": (shape.outputs, fan_in)}
        lead = owners[shape.shapes]
        moved = self.grid.cpu() + (torch.rand(*lead, taps, 2, generator=generator) * 2 - 1) * shape.spread
        if shape.outliers:
            moved += 15 * (torch.rand(*lead, taps, 1, generator=generator) < shape.outliers)
        self.positions = (moved.floor() + (moved % 1).clamp(OFF_INTEGER, 1 - OFF_INTEGER)).to(device)
        out = (shape.size - 1) // shape.stride + 1
        self.input = torch.randn(shape.batch, shape.channels, shape.size, shape.size, generator=generator).to(device)
        weight = torch.randn(shape.outputs, fan_in, shape.kernel, shape.kernel, generator=generator)
        self.weight = weight.to(device) / (fan_in * taps) ** 0.5
        self.grad = torch.randn(shape.batch, shape.outputs, out, out, generator=generator).to(device)

    def leaves(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh leaves input, weight and positions that require gradients."""
        input, weight, positions = (t.clone().requires_grad_() for t in (self.input, self.weight, positions))
        return input, weight, positions


def conv2d(input: Tensor, weight: Tensor, positions: Tensor, case: Case) -> Tensor:
    """The baseline: taps on the regular grid."""
    return F.conv2d(input, weight, **case.shape.geometry, groups=case.shape.groups)


def irregular(input: Tensor, weight: Tensor, positions: Tensor, case: Case) -> Tensor:
    """This package's operator."""
    return icnn_zoo.irregular_conv2d(input, weight, positions, **case.shape.geometry, groups=case.shape.groups)


def irregular_torch(input: Tensor, weight: Tensor, positions: Tensor, case: Case) -> Tensor:
    """This package's operator in standard PyTorch operators."""
    geometry = case.shape.geometry
    return icnn_zoo.irregular_conv2d(input, weight, positions, **geometry, groups=case.shape.groups, backend="torch")


def deform_conv2d(input: Tensor, weight: Tensor, positions: Tensor, case: Case) -> Tensor:
    """torchvision's, offsets constant over space; the full version copies the input channels for every output."""
    shape = case.shape
    if shape.shapes == "kernel":
        per_group, fan_in = shape.outputs // shape.groups, shape.channels // shape.groups
        channels = torch.arange(shape.outputs) // per_group * fan_in
        input = input[:, (channels[:, None] + torch.arange(fan_in)).flatten().to(input.device)]
    offsets = (positions - case.grid).reshape(1, -1, 1, 1).expand(input.shape[0], -1, *case.grad.shape[-2:])
    return torchvision.ops.deform_conv2d(input, offsets, weight, **shape.geometry)


def unfold_gemm(input: Tensor, weight: Tensor, positions: Tensor, case: Case) -> Tensor:
    """The regular convolution as im2col and a matrix product, for scale."""
    shape = case.shape
    columns = F.unfold(input, shape.kernel, **shape.geometry).unflatten(1, (shape.groups, -1))
    output = weight.flatten(1).unflatten(0, (shape.groups, -1)) @ columns
    return output.flatten(1, 2).unflatten(-1, case.grad.shape[-2:])


class Dcls:
    """DCLS v1 (bilinear): dense kernels with room for every tap, where its normalization divides by one."""

    def __init__(self, case: Case) -> None:
        shape = case.shape
        reach = math.ceil(case.positions.abs().max().item())
        side = 2 * reach + 1
        # Per weight and cell: two coordinates and about as much again for products, masks and the backward.
        need = 12 * 2 * 4 * side**2 * case.weight.numel()
        free = counter("meminfo", "MemAvailable") if LINUX else need
        free = torch.cuda.mem_get_info()[0] if case.input.is_cuda else free
        if need > free:
            raise MemoryError(f"dense {side}x{side} kernels need about {need >> 30} GiB, {free >> 30} GiB are free")
        from DCLS.construct.modules import Dcls2d

        sizes = {"stride": shape.stride, "padding": reach, "dilated_kernel_size": side, "groups": shape.groups}
        logging.disable(logging.WARNING)  # which kernel it uses
        module = Dcls2d(shape.channels, shape.outputs, shape.kernel**2, bias=False, version="v1", **sizes)
        logging.disable(logging.NOTSET)
        positions = case.positions
        if shape.shapes != "kernel":
            positions = expand_shapes(positions, shape.channels).unflatten(0, (shape.groups, 1, -1))
            positions = positions.expand(-1, shape.outputs // shape.groups, -1, -1, -1).flatten(0, 1)
        module.weight.data = case.weight.flatten(2).clone()
        module.P.data = positions.permute(3, 0, 1, 2).flip(0).contiguous()  # DCLS puts columns first
        self.module = module.to(case.input.device)

    def __call__(self, input: Tensor, weight: Tensor, positions: Tensor, case: Case) -> Tensor:
        """Uses the module's own weight and positions."""
        return self.module(input)


Operator = Callable[[Tensor, Tensor, Tensor, Case], Tensor]
PEERS: dict[str, Callable[[Case], Operator]] = {
    "conv2d": lambda case: conv2d,
    "icnn_zoo": lambda case: irregular,
    "icnn_zoo torch": lambda case: irregular_torch,
    "deform_conv2d": lambda case: deform_conv2d,
    "DCLS": Dcls,
    "unfold+GEMM": lambda case: unfold_gemm,
}
REGULAR = (conv2d, unfold_gemm)

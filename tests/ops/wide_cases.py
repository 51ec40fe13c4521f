"""Calls with triangle and gaussian interpolation."""

import torch
from torch import Tensor

import icnn_zoo

KINDS = ["triangle", "gaussian"]
LAYOUTS = {  # groups, whether each kernel has its shape
    "channel": (2, False),
    "depthwise": (4, False),
    "kernel": (2, True),
    "kernel, depthwise": (4, True),
}


def arguments(kind: str, layout: str, far: float = 0.0) -> list[Tensor]:
    """Input, weight, positions, spread and bias in float64, as leaves."""
    groups, per_kernel = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(3)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator) * 2 - 1

    owners = (4, 4 // groups) if per_kernel else (4,)
    positions = rand(*owners, 6, 2) * 2
    positions[..., 0, :] += far
    least = {"triangle": 1.05, "gaussian": 0.3}[kind]
    tensors = [rand(2, 4, 4, 5), rand(4, 4 // groups, 2, 3), positions, least + rand(*owners, 6, 2).abs(), rand(4)]
    return [tensor.requires_grad_() for tensor in tensors]


def run(tensors: list[Tensor], kind: str, layout: str, stride: int, extent: object, backend: str) -> Tensor:
    input, weight, positions, spread, bias = tensors
    options = {"interpolation": kind, "spread": spread, "extent": extent, "backend": backend}
    return icnn_zoo.irregular_conv2d(input, weight, positions, bias, stride, 1, 1, LAYOUTS[layout][0], **options)

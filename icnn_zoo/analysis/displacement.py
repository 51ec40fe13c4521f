"""How far the taps of irregular layers moved, and how many no longer read the feature map."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from icnn_zoo.nn.irregular_conv import IrregularConv2d, irregular_layers
from icnn_zoo.ops.tap_reading import reach


class InputSizes:
    """Remembers the size (H, W) that each irregular layer last saw, by forward hooks.

    Attributes:
        sizes: Dotted layer name to (H, W); empty before the first forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sizes: dict[str, tuple[int, int]] = {}
        self._handles = [
            layer.register_forward_pre_hook(self._hook(name)) for name, layer in irregular_layers(model).items()
        ]

    def _hook(self, name: str) -> Any:
        def remember(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self.sizes[name] = (arguments[0].shape[-2], arguments[0].shape[-1])

        return remember

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def displacement_statistics(
    model: nn.Module, input_sizes: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, dict[str, float]]:
    """Statistics of every irregular layer's displacement.

    Args:
        model: A converted network.
        input_sizes: Size (H, W) of each layer's input, see :class:`InputSizes`; without it dead taps are not counted.

    Returns:
        For each layer name: "mean", "p95" and "max" of the taps' Euclidean displacement in pixels; "std_row" and
        "std_col", the standard deviations of all of the layer's positions, 0.82 each for regular 3x3 kernels; and
        "dead", the share of taps (channel by channel) that at no output position read a pixel of the input (of their
        2x2 cell, if they are bilinear). A dead tap has no gradient.
    """
    statistics = {}
    for name, layer in irregular_layers(model).items():
        distance = layer.displacement.detach().norm(dim=-1).flatten()
        positions = layer.positions.detach().flatten(0, -2)
        values = [distance.mean(), _quantile(distance, 0.95), distance.max(), *positions.std(dim=0, correction=0)]
        keys = ["mean", "p95", "max", "std_row", "std_col"]
        if input_sizes and name in input_sizes:
            values.append(dead_taps(layer, input_sizes[name]).to(distance.dtype).mean())
            keys.append("dead")
        statistics[name] = dict(zip(keys, torch.stack(values).tolist(), strict=True))
    return statistics


def warn_of_dead_taps(model: nn.Module, input_sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Warns, layer by layer, of taps that read nothing but zeros: they have no gradient.

    Args:
        model: A converted network.
        input_sizes: Size (H, W) of each layer's input, see :class:`InputSizes`; layers without one are left out.

    Returns:
        The names of the layers that have such taps.
    """
    found = []
    for name, layer in irregular_layers(model).items():
        if name not in input_sizes:
            continue
        dead, (height, width) = dead_taps(layer, input_sizes[name]), input_sizes[name]
        if dead.any():
            found.append(name)
            warnings.warn(
                f"{int(dead.sum())} of {dead.numel()} taps of {name!r} read nothing but zeros of its {height} x "
                f"{width} input; they have no gradient any more. Lower the rate of positions (position_lr), or keep "
                "taps near: `limit` of icnn_zoo.convert and of the task, icnn_zoo.limit_taps, "
                "icnn_zoo.distance_penalty.",
                stacklevel=2,
            )
    return found


@torch.no_grad()
def dead_taps(layer: IrregularConv2d, input_size: tuple[int, int]) -> Tensor:
    """Which taps read nothing but zeros.

    A tap lives if for some output position what it reads, its cell (floor and floor + 1, both axes) if it is bilinear,
    overlaps the input.

    Args:
        layer: The layer.
        input_size: Size (H, W) of its input.

    Returns:
        Booleans in the shape of ``layer.positions`` without the last dimension.
    """
    padding = layer.padding_rule(layer, torch.empty(0, *input_size, device="meta"))
    dead = torch.zeros(layer.displacement.shape[:-1], dtype=torch.bool, device=layer.displacement.device)
    for axis in range(2):
        before, after = padding[2 * axis], padding[2 * axis + 1]
        kernel, stride, dilation = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
        # With another padding mode than zeros what lies in the padding is data too.
        outside = 0 if layer.padding_mode == "zeros" else before
        extent = input_size[axis] + (0 if layer.padding_mode == "zeros" else before + after)
        outputs = (input_size[axis] + before + after - dilation * (kernel - 1) - 1) // stride + 1
        origin = dilation * ((kernel - 1) // 2) - before + outside
        first_pixel, last_pixel = (pixel + origin for pixel in reach(layer.read_taps, axis, layer.reading))
        first = torch.ceil(-last_pixel / stride).clamp(min=0)  # first output that reads not only above the input
        dead |= (first > outputs - 1) | (first * stride + first_pixel > extent - 1)
    return dead


def _quantile(values: Tensor, q: float) -> Tensor:
    """Like torch.quantile, which refuses more than 16 million numbers."""
    return values.kthvalue(max(1, round(q * values.numel()))).values

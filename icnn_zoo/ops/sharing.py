"""Who shares a shape: all of a layer, a group, the kernels of an input channel, or nobody."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor

Shapes = Literal["layer", "group", "channel", "kernel"]
SHAPES: tuple[Shapes, ...] = get_args(Shapes)


def shape_owners(shapes: Shapes, conv: Any) -> tuple[int, ...]:
    """The leading sizes of a convolution's positions: (1,), (G,), (C,) or (N, C / G).

    Args:
        shapes: "layer" for one shape of all, "group" for one per group, "channel" for one per input channel, shared by
            all kernels, "kernel" for one per kernel and input channel.
        conv: What has ``in_channels``, ``out_channels`` and ``groups``.

    Raises:
        ValueError: Other ``shapes``.
    """
    if shapes not in SHAPES:
        raise ValueError(f"`shapes` must be one of {', '.join(SHAPES)}; got {shapes!r}.")
    if shapes == "kernel":
        return conv.out_channels, conv.in_channels // conv.groups
    return ({"layer": 1, "group": conv.groups, "channel": conv.in_channels}[shapes],)


def expand_shapes(positions: Tensor, channels: int) -> Tensor:
    """Writes positions [1, T, 2] or [G, T, 2] out for each channel [C, T, 2]; others stay as they are."""
    owners = len(positions)
    if positions.dim() == 4 or owners == channels:
        return positions
    if owners == 1:
        return positions.expand(channels, -1, -1)
    return positions[:, None].expand(-1, channels // owners, -1, -1).flatten(0, 1)


def rename_per_kernel(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in today's words: up to 0.1 ``per_kernel`` said what ``shapes`` says, True for "kernel"."""
    options = dict(options)
    per_kernel = options.pop("per_kernel", None)
    return options if per_kernel is None else {**options, "shapes": "kernel" if per_kernel else "channel"}

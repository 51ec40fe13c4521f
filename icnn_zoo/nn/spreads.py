"""Spreads of triangle and gaussian interpolation: where they start, who shares one, and how they narrow over a run."""

from __future__ import annotations

import math
from typing import Any, Literal, SupportsFloat, get_args

import torch
from torch import Tensor, nn

from icnn_zoo.ops.tap_reading import INTERPOLATIONS
from icnn_zoo.ops.wide_interpolation import NARROWEST

Interpolation = Literal["bilinear", "triangle", "gaussian"]
SpreadPer = Literal["tap", "channel", "layer"]
INITIAL = {"triangle": 1.0, "gaussian": 0.5}
"""Spreads in pixels that layers start with: bilinear interpolation, and DCLS's gaussian."""


def initial_spread(interpolation: Interpolation, spread: float | None) -> float | None:
    """The spread that a layer starts with, in pixels; None for bilinear interpolation, which has none.

    Raises:
        ValueError: ``interpolation`` is unknown, or ``spread`` is not a number of pixels that it allows.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"`interpolation` must be one of {', '.join(INTERPOLATIONS)}; got {interpolation!r}.")
    if interpolation == "bilinear":
        if spread is not None:
            raise ValueError(f"`spread` must be None for bilinear interpolation, which has none; got {spread!r}.")
        return None
    if spread is None:
        return INITIAL[interpolation]
    least = NARROWEST[interpolation]
    if not (isinstance(spread, SupportsFloat) and math.isfinite(spread) and float(spread) >= least):
        raise ValueError(
            f"`spread` must be a number of at least {least} pixels for {interpolation} interpolation; got {spread!r}."
        )
    return float(spread)


def spread_shape(spread_per: SpreadPer, displacement: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a layer's spreads, by that of its displacement [..., T, 2]: one (row, column) for each who has one.

    Raises:
        ValueError: ``spread_per`` is unknown.
    """
    if spread_per not in get_args(SpreadPer):
        raise ValueError(f"`spread_per` must be one of {', '.join(get_args(SpreadPer))}; got {spread_per!r}.")
    *owners, taps, _ = displacement
    if spread_per == "layer":
        owners = [1] * len(owners)
    return (*owners, taps if spread_per == "tap" else 1, 2)


def spread_of(widening: Tensor, interpolation: Interpolation) -> Tensor:
    """The narrowest spread plus the size of ``widening``; its derivative at 0 is 1, so that none is stuck there."""
    return NARROWEST[interpolation] + torch.where(widening < 0, -widening, widening)


@torch.no_grad()
def narrow_spreads(model: nn.Module, factor: float) -> None:
    """Multiplies what every spread has over its narrowest by ``factor``: 0 makes all of them the narrowest.

    Called with factors below 1 during training, spreads go from wide to narrow while they go on to be learned.

    Args:
        model: A network with irregular layers; those with bilinear interpolation stay as they are.
        factor: At least 0.

    Raises:
        ValueError: ``factor`` is negative or not finite, or no layer has spreads.

    Example:
        >>> import icnn_zoo
        >>> layer = icnn_zoo.IrregularConv2d(2, 3, 3, interpolation="gaussian", spread=1.2)
        >>> icnn_zoo.narrow_spreads(layer, 0.5)
        >>> round(layer.spread.max().item(), 3)
        0.7
    """
    if not (math.isfinite(factor) and factor >= 0):
        raise ValueError(f"`factor` must be a number of at least 0; got {factor!r}.")
    layers: list[Any] = [layer for layer in model.modules() if isinstance(getattr(layer, "widening", None), Tensor)]
    if not layers:
        raise ValueError("`model` must have layers with triangle or gaussian interpolation; none has spreads.")
    for layer in layers:
        if isinstance(layer.widening, nn.Parameter):
            layer.widening.mul_(factor)
        else:
            layer.widening = layer.widening * factor  # by the parametrization's right inverse

"""Shapes that several layers share, as those of a stage in DCLS."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from icnn_zoo.nn.irregular_conv import IrregularConv2d, irregular_layers
from icnn_zoo.nn.modules import find_name
from icnn_zoo.nn.tap_restriction import pixel_limits


def tie_shapes(layers: Iterable[IrregularConv2d]) -> nn.Parameter:
    """Lets layers share one displacement: that of the first, as the very same Parameter.

    Tie before the optimizer is made. From then on it is one parameter: its gradient is the sum over the layers, an
    optimizer holds it once, and the bound of Eq. 7 is applied once. Each layer keeps its entry in state dicts, equal to
    the others', so that states of tied and of untied networks have the same names; copies of a network are tied as it
    is. As with every parameter that PyTorch shares, ``load_state_dict(assign=True)`` and ``to_empty`` untie.

    Args:
        layers: At least two layers, of equal number of taps and kind of sharing (``shapes``, channels).

    Returns:
        The parameter that they share.

    Raises:
        TypeError: One of them is not an irregular layer, or its displacement is parametrized.
        ValueError: There are fewer than two, or their displacements differ in shape, dtype or device, or the layers in
            interpolation or in where their taps may go (``limit_taps``).

    Example:
        >>> import torch, icnn_zoo
        >>> stage = [icnn_zoo.IrregularConv2d(8, 8, 3) for _ in range(3)]
        >>> shared = icnn_zoo.tie_shapes(stage)
        >>> all(layer.displacement is shared for layer in stage)
        True
    """
    layers = list(layers)
    for layer in layers:
        if not isinstance(layer, IrregularConv2d):
            raise TypeError(f"`layers` must be irregular layers; got a {type(layer).__name__}.")
        if not isinstance(layer.displacement, nn.Parameter):
            raise TypeError("`layers`: a displacement is parametrized; remove the parametrization before tying.")
    if len(layers) < 2:
        raise ValueError(f"`layers` must be two or more, or there is nothing to tie; got {len(layers)}.")
    first = layers[0].displacement
    for layer in layers[1:]:
        own = layer.displacement
        if (own.shape, own.dtype, own.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"`layers` must have displacements of one shape, dtype and device to share; got {list(first.shape)} "
                f"({first.dtype}, {first.device}) and {list(own.shape)} ({own.dtype}, {own.device}). Layers of "
                'different channels can share with shapes="layer".'
            )
    for layer in layers[1:]:
        for name in ("interpolation", "has_free_taps", "axes", "limit"):
            if getattr(layer, name) != getattr(layers[0], name):
                raise ValueError(
                    f"`layers` must agree in {name} to share a shape; got {getattr(layers[0], name)!r} and "
                    f"{getattr(layer, name)!r}."
                )
        reach = [limits - each.regular_grid for each in (layers[0], layer) for limits in pixel_limits(each, each.limit)]
        if not (torch.equal(reach[0], reach[2]) and torch.equal(reach[1], reach[3])):
            raise ValueError('`layers` with limit="extent" must have one kernel size and dilation to share a shape.')
    for layer in layers[1:]:
        layer.displacement = first
    return first  # type: ignore[return-value]  # checked above


def tie_by_name(model: nn.Module, tied: Iterable[Sequence[str]]) -> None:
    """Ties the layers of each group of names, in full or by their only ending.

    Raises:
        ValueError: A name is not that of an irregular layer, or as :func:`tie_shapes`.
    """
    layers = irregular_layers(model)
    for group in tied:
        names = [find_name(name, list(layers), argument="tied", what="irregular layer") for name in group]
        tie_shapes(layers[name] for name in names)

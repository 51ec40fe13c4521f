"""The learned shapes of a network as plain numbers: what the statistics, the figures and the page are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from icnn_zoo.nn.irregular_conv import IrregularConv2d, irregular_layers
from icnn_zoo.nn.modules import find_name

_MOST_CIRCLES = 200  # of the spreads of free taps


@dataclass(frozen=True)
class LayerShapes:
    """The shapes of one layer.

    Attributes:
        name: Dotted name of the layer, "" for a layer by itself.
        kernel_size: Taps (rows, columns); of free taps the pixels that they lie in.
        grid: Positions of the regular kernel [T, 2] in pixels (row, col); zeros for free taps.
        positions: Learned positions [S, T, 2] in pixels, float64. S counts the shapes: one per input channel, or one
            per kernel and input channel in the full version, kernel by kernel.
        num_shapes: How many shapes the layer has, where ``positions`` is a choice of them; None: ``positions`` is all.
        spread: Spreads [S, T, 2] of triangle and gaussian taps in pixels (rows, columns), None for bilinear ones.
    """

    name: str
    kernel_size: tuple[int, int]
    grid: np.ndarray
    positions: np.ndarray
    num_shapes: int | None = None
    spread: np.ndarray | None = None

    @property
    def total(self) -> int:
        """How many shapes the layer has, drawn or not."""
        return len(self.positions) if self.num_shapes is None else self.num_shapes

    @property
    def displacement(self) -> np.ndarray:
        """Positions minus the regular grid [S, T, 2]."""
        return self.positions - self.grid

    @property
    def has_free_taps(self) -> bool:
        """Whether no regular grid says where taps belong."""
        return not self.grid.any() and self.kernel_size != (1, 1)

    @property
    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """The least and the greatest (row, col) of the regular kernel's receptive field, or of free taps' extent."""
        if self.has_free_taps:
            size = np.array(self.kernel_size)
            return -((size - 1) // 2) - 0.5, size // 2 + 0.5
        return self.grid.min(axis=0) - 0.5, self.grid.max(axis=0) + 0.5

    def thinned(self, most: int) -> LayerShapes:
        """At most ``most`` shapes, evenly chosen among all, in their order."""
        chosen = np.unique(np.linspace(0, len(self.positions) - 1, most).round().astype(int))
        spread = None if self.spread is None else self.spread[chosen]
        return replace(self, positions=self.positions[chosen], num_shapes=self.total, spread=spread)

    def spread_circles(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where taps read how widely: tap numbers [K], centers and radii [K, 2], (row, col) in pixels.

        The mean of each tap over all shapes; of free taps, which mean something else in each shape, those of some.
        """
        if self.spread is None:
            return np.zeros(0, int), np.zeros((0, 2)), np.zeros((0, 2))
        taps = len(self.grid)
        if self.has_free_taps:
            step = -(-taps * len(self.positions) // _MOST_CIRCLES)
            centers, radii = (values[::step].reshape(-1, 2) for values in (self.positions, self.spread))
        else:
            centers, radii = self.positions.mean(axis=0), self.spread.mean(axis=0)
        return np.arange(len(centers)) % taps, centers, radii


def layer_shapes(model: nn.Module, layers: Sequence[str] | None = None) -> list[LayerShapes]:
    """Takes the shapes out of a network.

    Args:
        model: A network with irregular layers, or one such layer.
        layers: Names of the layers to take, in full or a unique ending; None for all of them.

    Returns:
        One entry per layer, in the order of registration, in which networks are usually as deep.

    Raises:
        ValueError: There is no irregular layer, no layer of a given name, ``layers`` is empty, or a position is
            not a finite number.

    Example:
        >>> import torch, icnn_zoo
        >>> from icnn_zoo.analysis import layer_shapes
        >>> layer_shapes(icnn_zoo.IrregularConv2d(8, 16, 3))[0].positions.shape
        (8, 9, 2)
    """
    found = {"": model} if isinstance(model, IrregularConv2d) else irregular_layers(model)
    if not found:
        raise ValueError(
            "`model` has no irregular layer, so it has no shapes to look at: take a checkpoint that was trained with "
            "`model.start` set, or convert the network first: icnn_zoo.convert(model, start=...)."
        )
    return [_shapes_of(name, found[name]) for name in find_layers(layers, list(found))]


def find_layers(layers: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """The names that ``layers`` means, in full or by a unique ending; all of them for None.

    Raises:
        ValueError: One of them is no name, or could be several, or there is none.
    """
    if layers is None:
        return list(names)
    if isinstance(layers, str):  # its letters would be names otherwise
        layers = [layers]
    if not layers:
        raise ValueError(f"`layers` must name at least one layer, or be None for all: {', '.join(names[:3])}, ...")
    return [find_name(name, names, argument="layers", what="irregular layer") for name in layers]


def _shapes_of(name: str, layer: IrregularConv2d) -> LayerShapes:
    grid = layer.regular_grid.detach().cpu().double().numpy()
    positions = layer.positions.detach().cpu().double().numpy().reshape(-1, *grid.shape)
    lost = int((~np.isfinite(positions)).any(axis=-1).sum())
    if lost:
        raise ValueError(
            f"layer {name!r} has {lost} taps whose position is not a finite number: the training diverged. Take an "
            "earlier checkpoint, or train with a smaller `position_lr`."
        )
    shapes = LayerShapes(name, layer.kernel_size, grid, positions)
    if layer.spread is None:
        return shapes
    spread = layer.spread.detach().expand_as(layer.displacement).cpu().double().numpy()
    return replace(shapes, spread=spread.reshape(positions.shape))

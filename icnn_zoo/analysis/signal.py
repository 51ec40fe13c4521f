"""How much of what shapes learned is common to several trainings, and how much is the chance of each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from icnn_zoo.nn.irregular_conv import IrregularConv2d, irregular_layers
from icnn_zoo.nn.tap_restriction import LEARNED


@dataclass(frozen=True)
class SignalShare:
    """The part of the squared displacement that several trainings have in common.

    Attributes:
        share: Estimate; 1 if all moved alike, 0 in expectation if they have nothing in common. It has no bias, so it
            can come out below 0 where there is no signal.
        low: Lower end of the interval.
        high: Upper end of the interval.
        chance: What displacements of these lengths reach by chance: the ``level`` quantile of the share of independent
            ones, such as random walks. A share below it is no sign of signal.
    """

    share: float
    low: float
    high: float
    chance: float

    @property
    def significant(self) -> bool:
        """Whether the share is above what chance gives."""
        return self.share > self.chance


def signal_share(
    displacements: Sequence[Any], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> SignalShare:
    """Estimates the share of the squared displacement that is common to several trainings of one layer.

    The trainings start from the same weights and see other data, so that channel c is the same channel in all of them.
    With D_s the displacement of training s, of n, as one long vector::

        share = mean of <D_s, D_t> over pairs s != t  /  mean of <D_s, D_s> over s

    Where D_s = M + noise_s, with noises of mean 0 that are independent of each other, the numerator's expectation is
    |M|^2 and the denominator's |M|^2 + E|noise|^2: no squared noise enters the numerator, hence no correction.

    The interval is the percentile bootstrap over the shapes, whose taps may depend on each other, or over the taps of
    a layer with one shape; it does not cover the choice of trainings. ``chance`` comes from the same numbers with the
    direction of every shape of every training reversed at random, which leaves lengths and takes agreement away.

    Args:
        displacements: One array or tensor [..., T, 2] for each training, at least two, of one size: how far the taps
            moved in pixels since the common start (without the initial epsilon, which is common to all).
        level: Level of the interval and of ``chance``.
        resamples: Number of bootstrap samples and of reversals.
        seed: Seed of both. The result is a pure function of the arguments.

    Returns:
        The share with its interval and what chance gives.

    Raises:
        ValueError: Fewer than two displacements, of different sizes, not finite, all zero, or an argument out of its
            range.

    Example:
        >>> import numpy as np
        >>> from icnn_zoo.analysis import signal_share
        >>> rng = np.random.default_rng(0)
        >>> common = rng.standard_normal((200, 9, 2))
        >>> result = signal_share([common + rng.standard_normal(common.shape) for _ in range(3)])
        >>> round(result.share, 1), result.significant
        (0.5, True)
    """
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1; got {level}.")
    if resamples < 1:
        raise ValueError(f"`resamples` must be at least 1; got {resamples}.")
    products = _products(displacements)
    trainings = products.shape[-1]
    rng = np.random.default_rng(seed)
    own = np.trace(products, axis1=1, axis2=2)
    common = (products.sum(axis=(1, 2)) - own) / (trainings - 1)
    drawn = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=resamples)
    lengths = drawn @ own
    shares = (drawn @ common)[lengths > 0] / lengths[lengths > 0]
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    chance = np.quantile([_reversed_share(products, own, rng) for _ in range(resamples)], level)
    return SignalShare(float(common.sum() / own.sum()), float(low), float(high), float(chance))


def signal_shares(
    models: Sequence[nn.Module], *, start: nn.Module | None = None, **kwargs: Any
) -> dict[str, SignalShare]:
    """The signal share of every irregular layer of several trainings of one network.

    Args:
        models: The trained networks, which started from the same weights.
        start: The network that they started from; None where every displacement was ``layer.epsilon``, as after
            ``convert``. Coordinates that are frozen (``axes``) do not count.
        **kwargs: Those of :func:`signal_share`.

    Returns:
        One entry for each layer's name, in the order of registration.

    Raises:
        ValueError: The networks have different irregular layers or none, two of them equal shapes, a layer never moved,
            a layer with free taps has no ``start``, or as :func:`signal_share`.
    """
    layers = [irregular_layers(model) for model in models]
    begun = None if start is None else irregular_layers(start)
    if begun is not None and layers and begun.keys() != layers[0].keys():
        raise ValueError("`start` must be a network with the irregular layers of `models`.")
    if not layers or not layers[0] or any(found.keys() != layers[0].keys() for found in layers):
        raise ValueError("`models` must be several trainings of one network with irregular layers.")
    for first, second in itertools.combinations(range(len(layers)), 2):
        if all(layer.displacement.equal(layers[second][name].displacement) for name, layer in layers[first].items()):
            raise ValueError(
                f"`models` {first} and {second} have equal shapes: one training twice, or two that saw the same data "
                "in the same order. Train with other seeds of the data (data.init_args.seed), from the same weights."
            )
    shares = {}
    for name, layer in layers[0].items():
        if begun is None and layer.has_free_taps:
            raise ValueError(f"`start` is needed: the taps of {name!r} are free, and began nowhere in particular.")
        origin = layer.epsilon if begun is None else _numbers(begun[name])
        moved = [_numbers(found[name]) - origin for found in layers]
        for displacement in moved:
            frozen = torch.ones(2, dtype=torch.bool)
            frozen[LEARNED[layer.axes]] = False
            displacement[..., frozen] = 0
        shares[name] = signal_share(moved, **kwargs)
    return shares


def _numbers(layer: IrregularConv2d) -> Tensor:
    return layer.displacement.detach().cpu().double()


def _products(displacements: Sequence[Any]) -> np.ndarray:
    """Inner products of all trainings' displacements [units, n, n]; a unit is a shape, or a tap of a single shape."""
    arrays = [torch.as_tensor(displacement).detach().cpu().double().numpy() for displacement in displacements]
    if len(arrays) < 2:
        raise ValueError(f"`displacements` must be those of at least two trainings; got {len(arrays)}.")
    sizes = {array.shape for array in arrays}
    if len(sizes) > 1 or arrays[0].ndim < 2 or arrays[0].shape[-1] != 2:
        raise ValueError(f"`displacements` must have one size [..., taps, 2]; got {sorted(sizes)}.")
    stacked = np.stack(arrays)
    if not np.isfinite(stacked).all() or not stacked.any():
        raise ValueError("`displacements` must be finite and not all zero.")
    stacked = stacked.reshape(len(arrays), -1, *stacked.shape[-2:])
    if stacked.shape[1] == 1:
        stacked = stacked[:, 0, :, None]
    products: np.ndarray = np.einsum("nuti,muti->unm", stacked, stacked)
    return products


def _reversed_share(products: np.ndarray, own: np.ndarray, rng: np.random.Generator) -> float:
    signs = rng.choice([-1.0, 1.0], size=products.shape[:2])
    total = np.einsum("un,unm,um->", signs, products, signs)
    return float((total - own.sum()) / (products.shape[1] - 1) / own.sum())

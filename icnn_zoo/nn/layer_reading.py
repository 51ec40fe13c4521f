"""How the taps of a layer read, by its attributes and parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from icnn_zoo.nn.spreads import Interpolation, SpreadPer, spread_of
from icnn_zoo.ops.interpolation import smooth_interval
from icnn_zoo.ops.tap_reading import Reading


class TapReading:
    """What :class:`icnn_zoo.IrregularConv2d` tells of its taps."""

    weight: nn.Parameter
    kernel_size: tuple[int, int]
    interpolation: Interpolation
    widening: Tensor | None
    spread_per: SpreadPer

    @property
    def positions(self) -> Tensor:
        raise NotImplementedError

    @property
    def spread(self) -> Tensor | None:
        """Spreads (rows, columns) in pixels: the narrowest plus the size of ``widening``; None where there are none."""
        return None if self.widening is None else spread_of(self.widening, self.interpolation)

    @property
    def read_taps(self) -> Tensor:
        """Positions [..., T, 2], with spreads [..., T, 4] where there are any: what ``reading`` says how to read."""
        positions, spread = self.positions, self.spread
        return positions if spread is None else torch.cat([positions, spread.expand_as(positions)], dim=-1)

    @property
    def reading(self) -> Reading:
        """How taps read."""
        return Reading(self.interpolation, self.kernel_size if self.has_free_taps else None)

    @property
    def has_free_taps(self) -> bool:
        """Whether taps are any number, anywhere, and ``kernel_size`` is the extent that they lie in."""
        return self.weight.dim() == 3

    def smooth_interval(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of the interval around coordinates, in the shape of ``displacement``, in which gradients hold.

        That is the cell of pixels, but for a gaussian, which has no kinks: its gradient reaches as far as its spread.
        """
        spread: Any = self.spread
        if self.interpolation == "gaussian" and spread is not None:
            if hasattr(spread, "to_local"):  # FSDP2 shards it as it does the displacement
                spread = spread.full_tensor() if self.spread_per == "layer" else spread.to_local()
            return coordinates - spread.detach(), coordinates + spread.detach()
        return smooth_interval(coordinates)

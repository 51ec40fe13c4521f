"""Notices that positions left their cell without the bound of Eq. 7."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from icnn_zoo.ops.interpolation import smooth_interval

Interval = Callable[[Tensor], tuple[Tensor, Tensor]]

# A step that is seen is longer than this beyond the cell's border, in pixels: SAM moves parameters a little on purpose.
MARGIN = 0.5


@dataclass
class StepWatch:
    """What is known of a displacement since the last bounded step.

    Hooks of an optimizer do not run everywhere: a copied or unpickled optimizer has none, and wrappers may step around
    them. A layer asks its watch in every forward in training mode. It compares numbers only after something else than a
    bounded step wrote to the displacement.
    """

    name: str
    """Dotted name of the layer."""
    seen: Tensor | None = None
    """The displacement when it was last known to be right; None for whatever comes next."""
    version: int = -1
    """Torch's count of in-place changes at that time."""

    def __deepcopy__(self, memo: Any) -> StepWatch:
        """A watch that knows nothing: what a copy is for, such as an average, may set its positions otherwise."""
        return StepWatch(self.name)

    def see(self, displacement: Tensor, copy: Tensor | None = None) -> None:
        """Takes the displacement as right; ``copy``, where there is one already, is kept."""
        if _is_plain(displacement):
            self.seen = displacement.detach().clone() if copy is None else copy
            self.version = displacement._version
        else:
            self.forget()

    def forget(self) -> None:
        """Takes whatever comes next as right, such as loaded numbers."""
        self.seen = None

    @torch.no_grad()
    def check(self, displacement: Tensor, smooth_interval: Interval = smooth_interval) -> None:
        """Warns if positions are further than one bounded step from where they were.

        Args:
            displacement: The displacement.
            smooth_interval: The layer's own, from where a step begins to where it may end.
        """
        if not _is_plain(displacement) or (self.seen is not None and displacement._version == self.version):
            return
        if self.seen is not None and self.seen.shape == displacement.shape:
            # The regular grid is whole, so the cells of displacements are those of positions.
            low, high = smooth_interval(self.seen.to(displacement))
            left = (displacement < low - MARGIN) | (displacement > high + MARGIN)
            if left.any():
                warnings.warn(
                    f"{int(left.sum())} positions of {self.name!r} left their cells without the bound of Eq. 7: a step "
                    "went by without the hooks of icnn_zoo.bound_positions. A copied or unpickled optimizer, or one "
                    "that wraps another, needs a call of its own. (If you set the positions yourself, all is well.)",
                    stacklevel=2,
                )
        self.see(displacement)


def _is_plain(displacement: Tensor) -> bool:
    """Not one that a parametrization computes, a transform of torch.func stands for, or FSDP2 shards."""
    return type(displacement) is nn.Parameter and not displacement.is_meta

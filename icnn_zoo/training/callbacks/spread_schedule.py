"""Spreads that go from wide to narrow over a run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from icnn_zoo.nn.spreads import narrow_spreads


class NarrowSpreads(Callback):
    """Narrows the spreads of triangle and gaussian interpolation after each step, while they go on to be learned.

    Wide at first, gradients of positions reach far; narrow in the end, the network reads as sharply as a regular one.
    With ``--model.spread 2`` for the start::

        --trainer.callbacks+=icnn_zoo.training.callbacks.NarrowSpreads --trainer.callbacks.share 0.01

    Args:
        share: What is left at the end of the run of what a spread had over the narrowest, were it not learned; the same
            part of it goes in every step. 0 would be reached in no number of equal parts, hence is not allowed.

    Raises:
        ValueError: ``share`` is not above 0 and at most 1, the run has no length, or no layer has spreads.
    """

    def __init__(self, share: float = 0.05) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"`share` must be above 0 and at most 1; got {share}.")
        self.share = share
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.estimated_stepping_batches == float("inf"):
            raise ValueError("NarrowSpreads needs the run's length: set trainer.max_steps or trainer.max_epochs.")
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        steps = trainer.global_step - self._step  # none while gradients are accumulated
        if steps > 0:
            narrow_spreads(pl_module, self.share ** (steps / float(trainer.estimated_stepping_batches)))
            self._step = trainer.global_step

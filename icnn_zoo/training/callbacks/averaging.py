"""Averages of a network over its training: exponential (EMA) or equal (SWA), evaluated, saved and published."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from icnn_zoo.nn.irregular_conv import irregular_layers


class NetworkAverage(WeightAveraging):
    """Keeps the average of a network, and takes its place in validation, in checkpoints and when training ends.

    Training itself goes on with the newest network, whose every step Eq. 7 bounds; an average of positions needs no
    bound of its own, as it lies between them. Numbers that do not change, such as regular positions, stay as they are
    to the bit. Norm layers' statistics are averaged too. Checkpoints hold the average as the network, and the newest
    one beside it, from which a resumed run goes on. Before the first update the network is its own average.

    Args:
        decay: Share of the average that an update keeps (EMA); None weighs all updates equally (SWA).
        start_step: Optimizer steps before the first update.
        every_n_steps: Optimizer steps from one update to the next.

    Raises:
        ValueError: A number out of its range.
    """

    def __init__(self, decay: float | None = 0.999, start_step: int = 0, every_n_steps: int = 1) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"`decay` must be at least 0 and below 1, or None for equal weights; got {decay}.")
        if start_step < 0 or every_n_steps < 1:
            raise ValueError(
                f"`start_step` must be at least 0 and `every_n_steps` at least 1; got {start_step} and {every_n_steps}."
            )
        super().__init__(use_buffers=True, avg_fn=self._update)
        self.decay, self.start_step, self.every_n_steps = decay, start_step, every_n_steps

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether a step is one whose network is averaged."""
        if step_idx is None or step_idx < self.start_step:
            return False
        return (step_idx - self.start_step) % self.every_n_steps == 0

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._begun:
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._begun:
            super().on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._begun:
            super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._begun:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # One without an average is of a run that had none yet: the first update takes the network as it is then.
        if self._average_model is not None and "averaging_state" in checkpoint:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _update(self, average: Tensor, newest: Tensor, number: Tensor) -> Tensor:
        """The average of ``number`` updates and one more; counts are the newest."""
        if not average.is_floating_point():
            return newest
        # Lightning's formula, decay * average + (1 - decay) * newest, rounds what should stay as it is.
        return average.lerp(newest, 1 / (int(number) + 1) if self.decay is None else 1 - self.decay)

    @property
    def _begun(self) -> bool:
        return self._average_model is not None and bool(self._average_model.n_averaged)


def check_averaging(trainer: pl.Trainer, model: nn.Module) -> None:
    """Refuses averages that would not be those of the positions, or would not be what is evaluated and saved.

    Raises:
        ValueError: Lightning's own EMAWeightAveraging or StochasticWeightAveraging with a network that has irregular
            layers.
    """
    reasons = {
        EMAWeightAveraging: "it rounds regular positions, by thousandths of a pixel at a decay of 0.9999",
        StochasticWeightAveraging: "it gives positions the rate of the weights, and saves and evaluates no average",
    }
    for callback in getattr(trainer, "callbacks", []):
        for kind, reason in reasons.items():
            if isinstance(callback, kind) and irregular_layers(model):
                raise ValueError(
                    f"{kind.__name__} is not for networks with learned positions: {reason}. Take "
                    "icnn_zoo.training.callbacks.NetworkAverage; `decay: null` weighs all steps equally."
                )

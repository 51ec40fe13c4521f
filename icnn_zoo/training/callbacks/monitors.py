"""What a run says while it trains: displacements, and scores as a table."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.table import Table
from rich.text import Text

from icnn_zoo.analysis.displacement import InputSizes, displacement_statistics, warn_of_dead_taps
from icnn_zoo.io.console import print_table
from icnn_zoo.training.scores import score_names

_SCORES = ("IoU", "Dice", "precision", "recall")


class DisplacementMonitor(Callback):
    """Logs how far taps moved and the share of dead ones, per layer, every ``trainer.log_every_n_steps`` steps.

    Metrics are ``displacement/<statistic>/<layer>`` with the statistics of
    :func:`icnn_zoo.analysis.displacement_statistics`, and ``displacement/<statistic>`` for the worst layer. A layer
    whose first taps die is warned of, once a run.
    """

    def __init__(self) -> None:
        self._sizes: InputSizes | None = None
        self._warned: set[str] = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sizes = InputSizes(pl_module)
        self._warned.clear()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._sizes is None or trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        statistics = displacement_statistics(pl_module, self._sizes.sizes)
        values: dict[str, float] = {}
        for layer, of_layer in statistics.items():
            for statistic, value in of_layer.items():
                values[f"displacement/{statistic}/{layer.removeprefix('model.')}"] = value
                values[f"displacement/{statistic}"] = max(values.get(f"displacement/{statistic}", 0.0), value)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        if trainer.is_global_zero:
            sizes = self._sizes.sizes.items()
            dying = {layer: size for layer, size in sizes if layer not in self._warned and statistics[layer]["dead"]}
            self._warned.update(warn_of_dead_taps(pl_module, dying))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._sizes is not None:
            self._sizes.remove()
            self._sizes = None


class ScoreTable(Callback):
    """Prints IoU, Dice, precision and recall per class, mIoU and pixel accuracy after fit, validate and test."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._print(trainer, pl_module, "val")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._print(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._print(trainer, pl_module, "test")

    def _print(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        metrics = trainer.callback_metrics
        if not trainer.is_global_zero or f"{split}/mIoU" not in metrics:
            return
        table = Table(title=f"{split}: scores of classes", title_justify="left")
        table.add_column("class")
        for score in _SCORES:
            table.add_column(score, justify="right")
        names = list(pl_module.class_names)  # type: ignore[arg-type]
        for name, *keys in zip(names, *(score_names(split, names, score) for score in _SCORES), strict=True):
            values = [float(metrics[key]) for key in keys]
            shown = ["-" if math.isnan(value) else f"{value:.3f}" for value in values[1:]]
            iou = "absent" if math.isnan(values[0]) else f"{values[0]:.3f}"
            table.add_row(Text(name), iou, *shown)  # no markup in names
        table.add_section()
        table.add_row("mIoU", f"{float(metrics[f'{split}/mIoU']):.3f}")
        table.add_row(Text(f"mIoU of {names[0]} everywhere"), f"{float(metrics[f'{split}/mIoU_background']):.3f}")
        table.add_row("pixel accuracy", f"{float(metrics[f'{split}/pixel_accuracy']):.3f}")
        print_table(table)

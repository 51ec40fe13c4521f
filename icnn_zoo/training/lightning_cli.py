"""The LightningCLI subclass behind both programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from icnn_zoo.data import SegmentationDataModule
from icnn_zoo.training.callbacks.pictures import (
    LastCheckpoint,
    PredictionWriter,
    SamplePictures,
    ScoreTable,
    run_folder,
)
from icnn_zoo.training.task import SegmentationTask


class ZooCLI(LightningCLI):
    """LightningCLI for :class:`icnn_zoo.training.task.SegmentationTask` and any of the package's data modules.

    Attributes:
        task: The class of the model; that of a subclass may be another SegmentationTask.
    """

    task: type[SegmentationTask] = SegmentationTask

    @classmethod
    def run(cls, args: Sequence[str] | None = None) -> ZooCLI:
        """Parses ``args`` (default: the program's) and runs the subcommand."""
        return cls(
            cls.task,
            SegmentationDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "callbacks": [LastCheckpoint(), ScoreTable(), PredictionWriter()],
                "use_distributed_sampler": False,
            },
            parser_kwargs={"prog": "lightning", "description": "Trains and evaluates networks with learnable shapes."},
            args=None if args is None else list(args),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(SamplePictures, "pictures")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.ignore_index", "model.ignore_index", apply_on="instantiate")
        parser.link_arguments("data.classes", "model.class_names", apply_on="instantiate")

    def predict(self, model: pl.LightningModule, **kwargs: Any) -> None:
        """Predicts without keeping label maps: PredictionWriter has written them, and a set's would be gigabytes."""
        self.trainer.predict(model, **{**kwargs, "return_predictions": False})

    def after_fit(self) -> None:
        _print_run_folder(self.trainer)

    def after_validate(self) -> None:
        _print_run_folder(self.trainer)

    def after_test(self) -> None:
        _print_run_folder(self.trainer)

    def after_predict(self) -> None:
        _print_run_folder(self.trainer)


def _print_run_folder(trainer: pl.Trainer) -> None:
    if trainer.is_global_zero:
        print(f"Run folder: {run_folder(trainer).resolve()}")

"""The LightningCLI subclass behind both programs."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from icnn_zoo.data import SegmentationDataModule
from icnn_zoo.io.files import write_whole
from icnn_zoo.training.callbacks import LastCheckpoint, PredictionWriter, SamplePictures, ScoreTable
from icnn_zoo.training.run_folder import RunFolder
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

    @classmethod
    def build(cls, config: Mapping[str, Any], overrides: Sequence[str] = (), **trainer: Any) -> ZooCLI:
        """Builds the task and data that a run's configuration describes, and runs nothing.

        Args:
            config: A run's configuration; sections "model" and "data" and "seed_everything" are read, the rest is about
                training and would make folders or ask for devices.
            overrides: Further arguments of the command line, such as "--data.init_args.root=elsewhere".
            **trainer: Arguments of the trainer.

        Returns:
            The command line, with ``model``, ``datamodule`` and ``trainer``.

        Raises:
            ValueError: The configuration does not fit this version.
        """
        used = {key: config[key] for key in ("seed_everything", "model", "data") if key in config}
        logging.disable(logging.INFO)  # Lightning tells of devices
        try:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that `args` replace sys.argv, and Lightning's own use of jsonargparse
                file = write_whole(Path(folder) / "config.yaml", yaml.safe_dump(used, sort_keys=False))
                return cls(
                    cls.task,
                    SegmentationDataModule,
                    subclass_mode_data=True,
                    run=False,
                    save_config_callback=None,
                    seed_everything_default=0,
                    trainer_defaults={
                        "logger": False,
                        "enable_checkpointing": False,
                        "use_distributed_sampler": False,
                        **trainer,
                    },
                    parser_kwargs={"exit_on_error": False},
                    args=["--config", str(file), "--pictures.num_samples=0", *overrides],
                )
        except ArgumentError as error:
            raise ValueError(f"the configuration does not fit this version of icnn_zoo: {error}") from error
        finally:
            logging.disable(logging.NOTSET)

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
        print(f"Run folder: {RunFolder.of(trainer).path.resolve()}")

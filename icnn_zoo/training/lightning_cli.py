"""The LightningCLI subclass behind both programs."""

from __future__ import annotations

import logging
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import CheckpointIO

from icnn_zoo.data import SegmentationDataModule
from icnn_zoo.io.files import write_whole
from icnn_zoo.io.transports import is_local
from icnn_zoo.nn.class_paths import read_spec
from icnn_zoo.ops.sharing import rename_per_kernel
from icnn_zoo.training.callbacks import (
    LastCheckpoint,
    PredictionWriter,
    SamplePictures,
    ScoreTable,
    StepProgress,
    ValidateAtEnd,
)
from icnn_zoo.training.checkpoints import WholeCheckpointIO, check_network, check_size, read_task, task_options
from icnn_zoo.training.console import calm
from icnn_zoo.training.given_options import (
    check_agreement,
    check_given,
    check_source,
    check_trained,
    name_weights,
    remembered,
)
from icnn_zoo.training.loggers import NoLogs
from icnn_zoo.training.run_folder import RunFolder
from icnn_zoo.training.task import SegmentationTask


class RunConfig(SaveConfigCallback):
    """Writes config.yaml into the run folder, whichever logger the run has."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        config = self.config.clone()
        source = config.get("ckpt_path")
        if source is not None:
            config["ckpt_path"] = None  # what this run makes of it is what its config is used with later
        note = "" if source is None else f"# ckpt_path was {source}\n"
        text = self.parser.dump(config, skip_none=False)
        write_whole(RunFolder.of(trainer).config, note + text)


_USAGE = "lightning {0} -c CONFIG [--SECTION.OPTION VALUE ...]     (lightning {0} --help lists them)"


class ZooCLI(LightningCLI):
    """LightningCLI for :class:`icnn_zoo.training.task.SegmentationTask` and any of the package's data modules.

    What is given on the command line or in a config decides; options of the task that nobody gave come from the
    checkpoint of ``--ckpt_path``. Where they disagree about the network, an error says both.

    Attributes:
        task: The class of the model; that of a subclass may be another SegmentationTask.
    """

    task: type[SegmentationTask] = SegmentationTask

    @classmethod
    def run(cls, args: Sequence[str] | None = None) -> ZooCLI:
        """Parses ``args`` (default: the program's) and runs the subcommand."""
        with calm():
            return cls(
                cls.task,
                SegmentationDataModule,
                subclass_mode_data=True,
                seed_everything_default=0,
                save_config_callback=RunConfig,
                save_config_kwargs={"save_to_log_dir": False},
                trainer_defaults={
                    "callbacks": [ValidateAtEnd(), ScoreTable(), PredictionWriter()],
                    "enable_model_summary": False,  # ZooCLI tells of the network in a line
                    "use_distributed_sampler": False,
                },
                parser_kwargs={
                    "prog": "lightning",
                    "description": "Trains and evaluates networks with learnable shapes.",
                    # Of hundreds of options argparse would print all before each error.
                    **{name: {"usage": _USAGE.format(name)} for name in ("fit", "validate", "test", "predict")},
                },
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
        parser.link_arguments("data.channels", "model.in_channels", apply_on="instantiate")
        parser.link_arguments("data.classes", "model.class_names", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and completes the model's options by those of the checkpoint."""
        super().parse_arguments(parser, args)
        self._remembered: dict[str, Any] = {}
        self._step: int | None = None
        command = self.config.get("subcommand")
        if command is None:
            return
        section = self.config[command]
        path = section.get("ckpt_path")
        if not path or not is_local(path) or not Path(path).is_file():
            return
        checkpoint = read_task(path)
        given = parser.parse_args(args, defaults=False)[command].get("model", {})
        check_given(command, task_options(checkpoint), given)
        if given.get("network") is not None:
            check_network(checkpoint, path, [read_spec("network", given["network"])[0]])
        check_size(self.task, checkpoint, path)
        self._remembered, self._step = task_options(checkpoint), checkpoint.get("global_step")
        given = rename_per_kernel(dict(given.items()))
        options = remembered(self._remembered, given, list(section["model"].keys()))
        self.config = parser.parse_object({command: {"model": options}}, self.config)

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning 2.6 would let the checkpoint's options win over those of the command line here."""

    def instantiate_classes(self) -> None:
        """As Lightning's, but what a class says of its arguments stands alone, not as one of a union's types."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause = error.__cause__
            raise (cause if str(error).startswith("Does not validate") and cause is not None else error) from None

    def before_instantiate_classes(self) -> None:
        section = self.config[self.subcommand] if self.subcommand is not None else self.config
        model = section["model"]
        for name, value in rename_per_kernel({"per_kernel": model.pop("per_kernel")}).items():
            model[name] = value  # a config of version 0.1; what the run writes says `shapes`
        check_source(section.get("ckpt_path"))
        if self.subcommand == "fit" and section.get("ckpt_path") in ("best", "last"):
            raise ValueError(
                f"`ckpt_path`={section['ckpt_path']!r} names no run: name the file, such as "
                "runs/NAME/version_0/checkpoints/last.ckpt."
            )
        if self.subcommand in ("validate", "test", "predict"):
            configs = [str(file) for file in section.get("config") or []]
            check_trained(self.subcommand, section.get("ckpt_path"), model["pretrained"], configs)

    def after_instantiate_classes(self) -> None:
        options = dict(self.model.hparams)
        check_agreement(self.task.architecture, options, self._remembered)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Makes the trainer with what every run of the command line has: its checkpoints, its bar and a folder."""
        if self.subcommand is None:
            return super().instantiate_trainer(**kwargs)
        options = {**self._get(self.config_init, "trainer"), **kwargs}
        callbacks = list(_as_list(options["callbacks"]))
        if options["enable_checkpointing"] is not False:
            callbacks.append(LastCheckpoint())
        if options["enable_progress_bar"] is not False and not any(isinstance(it, ProgressBar) for it in callbacks):
            callbacks.append(StepProgress())
        plugins = _as_list(options["plugins"])
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(WholeCheckpointIO())
        logger = options["logger"]
        if logger is False:
            logger = NoLogs(Path(options["default_root_dir"] or ".") / "runs")
        elif isinstance(logger, list):
            # The run folder is that of the first: it has the metrics, where there is a logger that writes them there.
            logger = sorted(logger, key=lambda it: not isinstance(it, CSVLogger))
        trainer = super().instantiate_trainer(
            **{**kwargs, "callbacks": callbacks, "plugins": plugins, "logger": logger}
        )
        # After a validation averages leave the network's place last but for checkpoints: what is drawn is what was
        # validated.
        trainer.callbacks.sort(key=lambda it: 2 * isinstance(it, Checkpoint) + isinstance(it, WeightAveraging))  # type: ignore[attr-defined]
        return trainer

    def fit(self, model: SegmentationTask, **kwargs: Any) -> None:
        """Trains."""
        self._run(self.trainer.fit, model, **kwargs)
        if self.trainer.is_global_zero and self.trainer.global_step == self._step:
            print(f"Nothing was trained: step {self._step} of the checkpoint is this run's last; raise its length.")

    def validate(self, model: SegmentationTask, **kwargs: Any) -> None:
        """Scores on the validation data."""
        self._run(self.trainer.validate, model, **kwargs)

    def test(self, model: SegmentationTask, **kwargs: Any) -> None:
        """Scores on the test data."""
        self._run(self.trainer.test, model, **kwargs)

    def predict(self, model: SegmentationTask, **kwargs: Any) -> None:
        """Predicts without keeping label maps: PredictionWriter has written them, and a set's would be gigabytes."""
        self._run(self.trainer.predict, model, **{**kwargs, "return_predictions": False})

    def _run(self, call: Callable[..., Any], model: SegmentationTask, **kwargs: Any) -> None:
        if self.trainer.is_global_zero:
            print(f"Network: {model.describe()}")
            weights = name_weights(model.pretrained, kwargs.get("ckpt_path"), self._step)
            print(f"Weights: {weights}", flush=True)
        claimed = RunFolder.claim(self.trainer) if self.trainer.is_global_zero else None
        try:
            call(model, **{**kwargs, "weights_only": True})  # code of a checkpoint never runs, wherever it lies
        except BaseException as error:
            self._leave_nothing(claimed)
            if self.trainer.received_sigterm:
                raise SystemExit(128 + signal.SIGTERM) from error
            raise
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            print(f"Run folder: {RunFolder.of(self.trainer).path.resolve()}")

    def _leave_nothing(self, claimed: RunFolder | None) -> None:
        """Removes the folder of a run that was refused before its first step, if it holds its configuration alone."""
        wrote = any(isinstance(it, RunConfig) and it.already_saved for it in self.trainer.callbacks)  # type: ignore[attr-defined]
        made = self.trainer.is_global_zero and (wrote or claimed is not None)
        if not made or self.trainer.global_step > (self._step or 0):
            return
        folder = (claimed or RunFolder.of(self.trainer)).path
        if {path.name for path in folder.iterdir()} <= {"config.yaml", "hparams.yaml"}:
            shutil.rmtree(folder)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]

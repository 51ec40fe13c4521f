"""The network that a file describes: a checkpoint of a run, or the config of one."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml

from icnn_zoo.task import SegmentationTask


def load_task(source: str | Path) -> SegmentationTask:
    """Builds the task that a checkpoint or a config describes, in eval mode on the CPU.

    Args:
        source: A Lightning checkpoint (.ckpt) of a :class:`icnn_zoo.task.SegmentationTask`: its weights. Or a config
            (.yaml, .yml): random or pretrained weights, as its ``seed_everything`` and ``model.pretrained`` say.

    Returns:
        The task; ``task.model`` is the network.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is neither, or of something else; the message says what is missing.
    """
    source = Path(source)
    if not source.is_file():
        raise FileNotFoundError(f"There is no file {str(source)!r}; name a checkpoint (.ckpt) or a config (.yaml).")
    if source.suffix in (".yaml", ".yml"):
        return _from_config(source)
    if source.suffix != ".ckpt":
        raise ValueError(f"The source must be a checkpoint (.ckpt) or a config (.yaml); got {str(source)!r}.")
    return _from_checkpoint(source)


def _from_checkpoint(source: Path) -> SegmentationTask:
    try:
        checkpoint: Any = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds for a file that is no checkpoint
        # weights_only runs no code of the file, so a file that would need some is refused too.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{str(source)!r} cannot be read as a checkpoint of tensors and plain values: {reason}"
        ) from error
    missing = [key for key in ("hyper_parameters", "state_dict") if key not in checkpoint]
    if missing:
        raise ValueError(
            f"{str(source)!r} is no checkpoint of a run of this package: it has no {' and no '.join(missing)}. Name "
            "runs/<name>/version_<n>/checkpoints/last.ckpt."
        )
    # Names that start with an underscore are Lightning's own.
    arguments = {key: value for key, value in checkpoint["hyper_parameters"].items() if not key.startswith("_")}
    try:
        task = SegmentationTask(**arguments)
        task.load_state_dict(checkpoint["state_dict"])
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{str(source)!r} is no checkpoint of a SegmentationTask: {error}") from error
    return task.eval()


def _from_config(source: Path) -> SegmentationTask:
    from icnn_zoo.data import SegmentationDataModule
    from icnn_zoo.lightning_cli import ZooCLI

    try:
        config = yaml.safe_load(source.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{str(source)!r} is no YAML: {error}") from error
    missing = [key for key in ("model", "data") if not isinstance(config, dict) or key not in config]
    if missing:
        raise ValueError(f"{str(source)!r} is no config of a run: it has no section {' and no '.join(missing)}.")
    # Only what makes the network; the rest is about training and would make folders or ask for devices.
    used = {key: config[key] for key in ("seed_everything", "model", "data") if key in config}
    logging.disable(logging.INFO)  # LightningCLI makes a trainer too, and tells of devices
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that `args` replace sys.argv, and Lightning's own use of jsonargparse
            cli = ZooCLI(
                SegmentationTask,
                SegmentationDataModule,
                subclass_mode_data=True,
                run=False,
                save_config_callback=None,
                seed_everything_default=0,
                trainer_defaults={"accelerator": "cpu", "logger": False, "enable_checkpointing": False},
                args=used,
            )
    finally:
        logging.disable(logging.NOTSET)
    task: SegmentationTask = cli.model
    if task.pretrained:
        task.load_pretrained()
    return task.eval()

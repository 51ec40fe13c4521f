"""Makes a card from a run: its network, its configuration, its curves and its metrics."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from icnn_zoo.io.label_pictures import color_map
from icnn_zoo.models.segmentation import SegmentationModel
from icnn_zoo.nn.class_paths import without_weights
from icnn_zoo.publishing.about import About
from icnn_zoo.publishing.card_metrics import measure
from icnn_zoo.training.checkpoints import read_checkpoint
from icnn_zoo.training.run_folder import RunFolder
from icnn_zoo.training.run_metrics import read_metrics, thinned
from icnn_zoo.training.task import SegmentationTask
from icnn_zoo.zoo.cards import FORMAT, Card, Conversion, Metric, Training, Weights, complaints
from icnn_zoo.zoo.golden import golden_of

_CURVES = r"train/loss$|val/mIoU$|displacement/mean/"  # metrics whose curves a card keeps
_CURVE_POINTS = 40


def read_config(file: Path) -> dict[str, Any]:
    """The configuration of the run that a checkpoint is of, without what means something on one machine only.

    Raises:
        FileNotFoundError: There is no config.yaml beside its folder.
        ValueError: It does not have the run's seed.
    """
    path = RunFolder.around(file).config
    if not path.is_file():
        raise FileNotFoundError(
            f"`source`: a card holds the run's configuration, and there is no {str(path)!r}; publish from a run folder."
        )
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not isinstance(config.get("seed_everything"), int):
        raise ValueError(f"{str(path)!r} must have the run's seed as `seed_everything`.")
    return _portable(config)


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what means something on one machine only, and would stop others from using it.

    That is the checkpoint from which an interrupted run went on, the folders that its logs went to, and where its data
    lay.
    """
    portable = {key: value for key, value in config.items() if key != "ckpt_path"}
    trainer = dict(portable.get("trainer") or {})
    logger = trainer.get("logger")
    for place in logger if isinstance(logger, list) else [logger]:
        options = place.get("init_args") if isinstance(place, dict) else None
        if options and Path(str(options.get("save_dir"))).is_absolute():
            options["save_dir"] = "runs"
    if trainer.get("default_root_dir") and Path(str(trainer["default_root_dir"])).is_absolute():
        trainer["default_root_dir"] = None
    for section in (portable.get("model"), (portable.get("data") or {}).get("init_args")):
        values: dict[str, Any] = section or {}
        for key, value in values.items():
            if isinstance(value, str) and Path(value).is_absolute():
                values[key] = Path(value).name
    return {**portable, "trainer": trainer}


def training_of(file: Path, config: dict[str, Any], wanted: About) -> Training:
    """What a card says of the run.

    Raises:
        ValueError: Neither the checkpoint nor ``wanted`` says which software made it.
    """
    checkpoint = read_checkpoint(file, mmap=True)
    made = checkpoint.get("provenance")
    if made is None and wanted.provenance is not None:
        made = wanted.provenance.model_dump()
    if made is None:
        raise ValueError(
            f"{str(file)!r} does not say which software made it: give `provenance` (packages, commit) in `about`."
        )
    steps = checkpoint.get("global_step", 0)
    table = RunFolder.around(file).metrics
    metrics = read_metrics(table, steps) if table.is_file() else {}
    curves = {
        name: tuple(thinned(series, _CURVE_POINTS))
        for name, series in metrics.items()
        if re.match(_CURVES, name) and series
    }
    return Training(config=config, seed=config["seed_everything"], steps=steps, curves=curves, **made)


def make_card(
    name: str, task: SegmentationTask, about: About, training: Training, data: bytes, overrides: Sequence[str]
) -> Card:
    """The card of a network.

    Args:
        name: ``arch.tag``.
        task: The network.
        about: What it does not say of itself.
        training: The run.
        data: Its safetensors file.
        overrides: As in :func:`icnn_zoo.publishing.card_metrics.measure`.

    Raises:
        ValueError: The card would not be valid; the message names the keys.
    """
    model, options = task.model, dict(task.hparams)
    # What the class takes today, so that an argument added to it is kept without a change here.
    taken = set(inspect.signature(SegmentationModel).parameters) - {"num_classes", "mean", "std"}
    start = options["start"]
    palette = about.palette or [f"#{bytes(color).hex()}" for color in color_map(len(task.class_names))]
    usual = {"network": None, "in_channels": 3}  # what earlier versions do not know is left out where it says nothing
    network = {key: value for key, value in options.items() if key in taken and usual.get(key, ...) != value}
    if model.spec is not None:
        network = {"network": without_weights("network", model.spec), "freeze_norm": options["freeze_norm"]}
        network["in_channels"] = model.in_channels
    elif network.get("head_dilation") is None:  # a default that another version might choose otherwise
        network["head_dilation"] = model.head_dilation
    try:
        return Card(
            format=FORMAT,
            name=name,
            description=about.description.strip(),
            network=network,
            conversion=None
            if start is None
            else Conversion(**{name: options[name] for name in Conversion.model_fields}),
            classes=task.class_names,
            palette=tuple(palette),
            mean=_channels(model.mean),
            std=_channels(model.std),
            dataset=about.dataset,
            metrics=_metrics(task, about, training.config, overrides),
            training=training,
            weights=Weights(
                sha256=hashlib.sha256(data).hexdigest(),
                size=len(data),
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                licence=about.licence,
            ),
            golden=golden_of(model),
        )
    except ValidationError as error:
        raise ValueError(f"the card of {name} would not be valid: {complaints(error)}") from error


def _metrics(
    task: SegmentationTask, about: About, config: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[Metric, ...]:
    missing = [metric.name for metric in about.metrics if metric.value is None]
    found: dict[str, float] = {}
    if missing:
        found = measure(task.model, config, missing, overrides)
    values = ((metric, found[metric.name] if metric.value is None else metric.value) for metric in about.metrics)
    return tuple(Metric(name=metric.name, value=round(value, 6), protocol=metric.protocol) for metric, value in values)


def _channels(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.7g}") for value in values.flatten().tolist())

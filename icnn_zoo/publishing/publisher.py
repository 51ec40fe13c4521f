"""Publishing a run's network into a registry: stripped, described, read back, compared, and only then listed."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
import yaml
from filelock import FileLock
from pydantic import Field, ValidationError

from icnn_zoo.data.voc_classes import color_map
from icnn_zoo.io.transports import is_local, local_path
from icnn_zoo.models.segmentation import SegmentationModel
from icnn_zoo.training.network_sources import load_task
from icnn_zoo.training.run_folder import RunFolder, find_ckpt
from icnn_zoo.training.run_metrics import read_metrics, thinned
from icnn_zoo.training.task import SegmentationTask
from icnn_zoo.zoo.cards import (
    FORMAT,
    Card,
    Color,
    Conversion,
    Dataset,
    Metric,
    Provenance,
    Record,
    Text,
    Training,
    Weights,
    check_name,
    complaints,
    dump,
    parse,
    readme,
)
from icnn_zoo.zoo.golden import golden_logits, golden_of
from icnn_zoo.zoo.networks import assemble, parse_weights
from icnn_zoo.zoo.registry import CARD, INDEX, README, WEIGHTS, Entry, File, Index

_STAGING = ".staging-"
_CURVES = r"train/loss$|val/mIoU$|displacement/mean/"  # metrics whose curves a card keeps
_CURVE_POINTS = 40


class MetricToBe(Record):
    """A metric of a card; where ``value`` is missing, it is measured."""

    name: Text
    value: float | None = None
    protocol: Text


class About(Record):
    """What a checkpoint does not say of itself: the file about.yaml.

    Attributes:
        description: One paragraph.
        licence: Of the weights.
        dataset: Name, split, licence and attribution of the training data.
        metrics: Names as ``lightning validate`` and ``test`` log them, protocols, and values, or none to measure them.
        palette: Colours by class, as #rrggbb; None for PASCAL VOC's colours.
        pictures: Picture files to publish too, and what they show.
        provenance: Packages and commit, for checkpoints that do not hold them.
    """

    description: Text
    licence: Text
    dataset: Dataset
    metrics: Annotated[list[MetricToBe], Field(min_length=1)]
    palette: list[Color] | None = None
    pictures: dict[str, Text] = Field(default_factory=dict)
    provenance: Provenance | None = None


def publish(
    source: str | Path,
    name: str,
    to: str | Path,
    about: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
) -> Path:
    """Adds the network of a run to a registry.

    Training state is left behind. What was written is read back and must give exactly the outputs of the original. The
    checkpoint is listed only then, in one step: a kill before leaves the registry as it was.

    Args:
        source: A run folder, ``runs/<name>/version_<n>`` (its best.ckpt, else last.ckpt), or a .ckpt of one. The run's
            config.yaml must be beside its checkpoints.
        name: ``arch.tag`` with the backbone's timm name as arch.
        to: Folder of the registry; it is made where it is missing. Others can be copied from it as they are.
        about: What a checkpoint does not say of itself, :class:`About`: a YAML file or the same as a mapping.
        overrides: Arguments for measuring metrics, such as "--data.init_args.root=elsewhere".

    Returns:
        The checkpoint's folder.

    Raises:
        FileNotFoundError: The source, its config.yaml or a picture is missing.
        ValueError: The name exists; the card would miss something, which the message names; the network does not come
            back as it was.
    """
    folder = _target_folder(to)
    check_name(name)
    if any(entry.name == name for entry in _read_index(folder).checkpoints):
        raise ValueError(
            f"`name`: {name} is published in {str(folder)!r} already, and stays as it is; take another tag."
        )
    wanted, pictures = _read_about(about)
    file = find_ckpt(Path(source))
    config = _read_config(file)
    task = load_task(file)
    training = _training(file, config, wanted)
    data = safetensors.torch.save(_plain_tensors(task.model), metadata={"format": "pt"})
    card = _make_card(name, task, wanted, training, data, overrides)
    folder.mkdir(parents=True, exist_ok=True)
    # The lock is freed when its process ends, however it ends.
    with FileLock(folder / ".lock"):
        return _add(folder, card, data, pictures, wanted.pictures, task.model)


def _target_folder(to: str | Path) -> Path:
    if not is_local(str(to)):
        raise ValueError(f"`to` must be a folder; got {str(to)!r}. Publish into a folder, and copy that to its host.")
    return Path(local_path(str(to)))


def _read_index(folder: Path) -> Index:
    file = folder / INDEX
    if not file.is_file():
        return Index(format=FORMAT, checkpoints=())
    return parse(Index, file.read_bytes(), str(file))


def _read_about(about: str | Path | Mapping[str, Any]) -> tuple[About, dict[str, Path]]:
    base = Path()
    values: Any = about
    if isinstance(about, (str, Path)):
        base = Path(about).parent
        try:
            values = yaml.safe_load(Path(about).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"`about`: there is no file {str(about)!r}.") from error
        except yaml.YAMLError as error:
            raise ValueError(f"`about`: {str(about)!r} is no YAML: {error}") from error
    try:
        # Lists of YAML stand for tuples, as those of JSON do.
        wanted = About.model_validate(values, strict=False)
    except ValidationError as error:
        raise ValueError(f"`about`: {complaints(error)}") from error
    pictures = {Path(name).name: base / name for name in wanted.pictures}
    for file in pictures.values():
        if not file.is_file():
            raise FileNotFoundError(f"`about`: there is no picture {str(file)!r}.")
    return wanted, pictures


def _read_config(file: Path) -> dict[str, Any]:
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

    That is the checkpoint from which an interrupted run went on, and the folders that its logs went to.
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
    return {**portable, "trainer": trainer}


def _training(file: Path, config: dict[str, Any], wanted: About) -> Training:
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
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


def _plain_tensors(model: SegmentationModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _make_card(
    name: str, task: SegmentationTask, about: About, training: Training, data: bytes, overrides: Sequence[str]
) -> Card:
    model, options = task.model, dict(task.hparams)
    # What the class takes today, so that an argument added to it is kept without a change here.
    taken = set(inspect.signature(SegmentationModel).parameters) - {"num_classes", "mean", "std"}
    start = options["start"]
    palette = about.palette or [f"#{bytes(color).hex()}" for color in color_map(len(task.class_names))]
    network = {key: value for key, value in options.items() if key in taken}
    if network.get("head_dilation") is None:  # a default that another version might choose otherwise
        network["head_dilation"] = model.head_dilation
    try:
        return Card(
            format=FORMAT,
            name=name,
            description=about.description.strip(),
            network=network,
            conversion=None
            if start is None
            else Conversion(start=start, epsilon=options["epsilon"], per_kernel=options["per_kernel"]),
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
        from icnn_zoo.publishing.card_metrics import measure

        found = measure(task.model, config, missing, overrides)
    values = ((metric, found[metric.name] if metric.value is None else metric.value) for metric in about.metrics)
    return tuple(Metric(name=metric.name, value=round(value, 6), protocol=metric.protocol) for metric, value in values)


def _channels(values: torch.Tensor) -> tuple[float, float, float]:
    red, green, blue = (float(f"{value:.7g}") for value in values.flatten().tolist())
    return red, green, blue


def _add(
    folder: Path,
    card: Card,
    data: bytes,
    pictures: Mapping[str, Path],
    captions: Mapping[str, str],
    original: SegmentationModel,
) -> Path:
    for left in folder.glob(f"{_STAGING}*"):  # of a process that was killed: the lock says that none is at work
        shutil.rmtree(left)
    index = _read_index(folder)
    target = folder / card.name
    if any(entry.name == card.name for entry in index.checkpoints):
        raise ValueError(f"`name`: {card.name} was published in {str(folder)!r} meanwhile; take another tag.")
    if target.exists():
        # Moved in by a process that was killed before it could list it.
        known = {WEIGHTS, CARD, README, *pictures}
        strange = (
            [path.name for path in target.iterdir() if path.name not in known] if target.is_dir() else [target.name]
        )
        if strange:
            raise ValueError(f"{str(target)!r} is in the way and holds {', '.join(strange)}; move it elsewhere.")
        shutil.rmtree(target)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    try:
        text = dump(card)
        (staging / WEIGHTS).write_bytes(data)
        (staging / CARD).write_bytes(text)
        (staging / README).write_text(
            readme(card, {Path(name).name: what for name, what in captions.items()}), encoding="utf-8"
        )
        for name, path in pictures.items():
            shutil.copyfile(path, staging / name)
        _read_back(staging, card.name, original)
        staging.chmod(0o755)  # mkdtemp lets nobody else in
        os.rename(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    entry = Entry(
        name=card.name,
        summary=" ".join(card.description.split())[:200],
        card=File(sha256=hashlib.sha256(text).hexdigest(), size=len(text)),
        weights=File(sha256=card.weights.sha256, size=card.weights.size),
    )
    entries = sorted([*index.checkpoints, entry], key=lambda item: item.name)
    _replace(folder / INDEX, dump(Index(format=FORMAT, checkpoints=tuple(entries))))
    return target


def _read_back(staging: Path, name: str, original: SegmentationModel) -> None:
    card = parse(Card, (staging / CARD).read_bytes(), name)
    model = assemble(card, parse_weights((staging / WEIGHTS).read_bytes(), name))
    for seed in (card.golden.seed, card.golden.seed + 1):
        before, after = (golden_logits(network, seed, card.golden.size) for network in (original, model))
        if not torch.equal(before, after):
            raise ValueError(
                f"{name} does not come back as it was: outputs for golden image {seed} differ by "
                f"{(before - after).abs().max():.1e}. Nothing was published."
            )


def _replace(file: Path, data: bytes) -> None:
    temporary = file.with_name(f".{file.name}")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)

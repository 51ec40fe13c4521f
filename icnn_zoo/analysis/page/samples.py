"""Images to show a network with: those of a person, or those that its run was validated with."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from icnn_zoo.analysis.files import read_image
from icnn_zoo.data import SegmentationDataModule, ShapesDataModule
from icnn_zoo.task import SegmentationTask


@dataclass(frozen=True)
class Sample:
    """An image to look at.

    Attributes:
        name: What to call it.
        image: RGB uint8 [H, W, 3].
        mask: True labels [H, W], None where they are not known.
    """

    name: str
    image: np.ndarray
    mask: np.ndarray | None = None


def find_samples(
    source: str | Path, task: SegmentationTask, images: Sequence[str | Path] = (), number: int = 4
) -> list[Sample]:
    """Takes the given images, or else the first validation samples of the run that a checkpoint is of.

    Args:
        source: What the network was loaded from: a checkpoint, whose run folder holds ``config.yaml``, or a config.
        task: The network.
        images: Image files; they have no truth.
        number: How many samples to take of the run's data.

    Returns:
        At least one sample.

    Raises:
        FileNotFoundError: An image, or the run's data, are not there.
        ValueError: A file is no image, or there is neither an image nor data to take one from.
    """
    if images:
        return [Sample(Path(path).name, read_image(path)) for path in images]
    data = _data_of_run(Path(source)) or _procedural(task)
    if data is None:
        raise ValueError(
            f"there is no image to show {str(source)!r} with: no config.yaml beside it says what it was trained on, "
            "and its classes are not those of ShapesDataModule. Name image files."
        )
    if list(data.classes) != list(task.class_names):
        raise ValueError(
            f"the run's data have the classes {', '.join(data.classes)}, the network {', '.join(task.class_names)}. "
            "Name image files."
        )
    dataset = data.make_dataset("val")
    found: list[dict[str, Any]] = [dict(dataset[index]) for index in range(min(number, len(dataset)))]
    return [Sample(entry["name"], entry["image"], entry["mask"]) for entry in found]


def run_config(source: Path) -> Path | None:
    """The config that a source is, or the one of the run that a checkpoint is of."""
    candidates = (source,) if source.suffix in (".yaml", ".yml") else (source.parent.parent / "config.yaml",)
    return next((path for path in candidates if path.is_file()), None)


def _data_of_run(source: Path) -> SegmentationDataModule | None:
    path = run_config(source)
    if path is None:
        return None
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    section = config.get("data") if isinstance(config, dict) else None
    if not isinstance(section, dict) or "class_path" not in section:
        return None
    module, _, name = section["class_path"].rpartition(".")
    kind = getattr(importlib.import_module(module), name, None) if module else None
    if not (isinstance(kind, type) and issubclass(kind, SegmentationDataModule)):
        raise ValueError(f"{str(path)!r}: data.class_path {section['class_path']!r} is no data module of this package.")
    return kind(**(section.get("init_args") or {}))


def _procedural(task: SegmentationTask) -> ShapesDataModule | None:
    if not 2 <= len(task.class_names) <= 255:
        return None
    data = ShapesDataModule(num_classes=len(task.class_names), image_size=97)
    return data if list(data.classes) == list(task.class_names) else None

"""Images to show a network with: those of a person, or those that its run was validated with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import icnn_zoo.data
from icnn_zoo.data import SegmentationDataModule, ShapesDataModule
from icnn_zoo.io.label_pictures import color_map
from icnn_zoo.io.rasters import read_pixels
from icnn_zoo.training.network_sources import Source
from icnn_zoo.training.task import SegmentationTask
from icnn_zoo.zoo.card_config import DATA_MODULES


@dataclass(frozen=True)
class Sample:
    """An image to look at.

    Attributes:
        name: What to call it.
        image: [H, W, C] as the network takes it: RGB uint8, or float32 of other channels, in 0 to 255.
        mask: True labels [H, W], None where they are not known.
    """

    name: str
    image: np.ndarray
    mask: np.ndarray | None = None


def find_samples(
    source: Source,
    task: SegmentationTask,
    images: Sequence[str | Path] = (),
    number: int = 4,
    *,
    white_level: int | None = None,
) -> list[Sample]:
    """Takes the given images, or else the first validation samples of the run that a checkpoint is of.

    Args:
        source: What the network was loaded from; its config says which data the run had.
        task: The network.
        images: Image files; they have no truth.
        number: How many samples to take of the run's data.
        white_level: The value that is white in images of 16 bits, which are refused without it.

    Returns:
        At least one sample.

    Raises:
        FileNotFoundError: An image, or the run's data, are not there.
        ValueError: A file is not an image, or there is neither an image nor data to take one from.
    """
    if images:
        channels = task.model.in_channels
        return [Sample(Path(path).name, read_pixels(path, channels, white_level)) for path in images]
    data = find_data(source) or _procedural(task)
    if data is None:
        raise ValueError(
            f"there is no image to show {source.title!r} with: no config.yaml beside it says what it was trained on, "
            "and its classes are not those of ShapesDataModule. Name image files."
        )
    if list(data.classes) != list(task.class_names):
        raise ValueError(
            f"the run's data have the classes {', '.join(data.classes)}, the network {', '.join(task.class_names)}. "
            "Name image files."
        )
    try:
        dataset = data.make_dataset("val")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Or name image files of your own.") from error
    found: list[dict[str, Any]] = [dict(dataset[index]) for index in range(min(number, len(dataset)))]
    return [Sample(entry["name"], entry["image"], entry["mask"]) for entry in found]


def find_data(source: Source) -> SegmentationDataModule | None:
    """The data module of the run that a source is of; None where there is no config to say so.

    Raises:
        ValueError: The config names another kind of class.
    """
    section = (source.config() or {}).get("data")
    if not isinstance(section, dict) or "class_path" not in section:
        return None
    path = section["class_path"]
    if path not in DATA_MODULES:  # importing another one would run whatever a folder from elsewhere names
        raise ValueError(
            f"the config of {source.title}: data.class_path {path!r} is not a data module of this package. Name image "
            "files."
        )
    kind = getattr(icnn_zoo.data, path.rpartition(".")[2])
    return kind(**(section.get("init_args") or {}))


def find_palette(source: Source, task: SegmentationTask) -> np.ndarray:
    """Colors by class, uint8 [classes, 3]: those of the card, else of the run's data, else PASCAL VOC's."""
    card = source.card()
    if card is not None:
        return np.array(card.colors, dtype=np.uint8)
    data = find_data(source)
    if data is not None and len(data.classes) == len(task.class_names):
        return np.asarray(data.palette, dtype=np.uint8)
    return color_map(len(task.class_names))


def _procedural(task: SegmentationTask) -> ShapesDataModule | None:
    if not 2 <= len(task.class_names) <= 255:
        return None
    data = ShapesDataModule(num_classes=len(task.class_names), image_size=97)
    return data if list(data.classes) == list(task.class_names) else None

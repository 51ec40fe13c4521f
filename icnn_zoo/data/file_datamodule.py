"""Base for datasets stored as image and label files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from icnn_zoo.data.datamodule import SegmentationDataModule, Split
from icnn_zoo.data.folders import missing_files
from icnn_zoo.data.label_files import ColorTable, read_classes
from icnn_zoo.data.samples import Sample
from icnn_zoo.io.images import read_header, read_image
from icnn_zoo.io.rasters import read_measured

Number = int | Literal["official", "any"]


_TURNED = (
    "The camera was turned (EXIF orientation), images are read upright, and the labels are of the pixels as they are "
    "stored: turn the labels, or remove the orientation from the image (exiftool -Orientation= FILE)."
)


class Item(NamedTuple):
    """One image of a dataset and its labels.

    Attributes:
        name: Identifies it in logs and names its prediction.
        image: The picture.
        labels: The label file; None where there is none, or it is not wanted.
        table: What the label file's values mean: :func:`icnn_zoo.data.label_files.class_table`.
    """

    name: str
    image: Path
    labels: Path | None
    table: np.ndarray | ColorTable


class FileSamples:
    """Items as samples: "image" uint8 [H, W, 3], "mask" uint8 [H, W] (``ignore_index`` without labels), "name".

    Files are read by :func:`icnn_zoo.io.images.read_image`; of several pages the first, without a warning for each.
    """

    def __init__(
        self, items: Sequence[Item], ignore_index: int, white_level: float | None = None, channels: int | None = None
    ) -> None:
        self.items = items
        self.ignore_index = ignore_index
        self.white_level = white_level
        self.channels = channels

    def __len__(self) -> int:
        return len(self.items)

    def read_mask(self, index: int) -> np.ndarray:
        """The mask of a sample alone."""
        item = self.items[index]
        if item.labels is None:
            return np.full(0, self.ignore_index, dtype=np.uint8)
        return read_classes(item.labels, item.table, warn_pages=False)

    def __getitem__(self, index: int, /) -> Sample:
        item = self.items[index]
        image = read_as(item.image, self.channels, self.white_level)
        if item.labels is None:
            mask = np.full(image.shape[:2], self.ignore_index, dtype=np.uint8)
        else:
            mask = read_classes(item.labels, item.table, warn_pages=False)
            check_sizes(item, image.shape[:2], mask.shape)
        return {"image": image, "mask": mask, "name": item.name}


class FileDataModule(SegmentationDataModule):
    """A data module of images and label files. A subclass gives ``classes``, :meth:`items` and :attr:`advice`.

    Args:
        num_train: Number of training images that there must be: a number, "official" for that of the dataset's owners,
            or "any".
        num_val: Number of validation images, likewise.
        num_test: Number of test images, likewise.
        predict_split: The images that ``predict`` runs on, "train", "val" or "test". Their labels are not read.
        official: The official numbers by split.
        **kwargs: Those of :class:`icnn_zoo.data.SegmentationDataModule`.

    Attributes:
        white_level: The value that is white in images of 16 bits, which are refused where it is None.
        stored_channels: Channels of images that are read as they are stored; None for photographs, in RGB of 8 bits.

    Raises:
        ValueError: An argument out of its range.
    """

    white_level: float | None = None
    stored_channels: int | None = None

    def __init__(
        self,
        *,
        num_train: Number = "official",
        num_val: Number = "official",
        num_test: Number = "official",
        predict_split: Literal["train", "val", "test"] = "val",
        official: Mapping[str, int],
        **kwargs: Any,
    ) -> None:
        self.numbers: dict[str, Number] = {"train": num_train, "val": num_val, "test": num_test}
        for split, number in self.numbers.items():
            if number not in ("official", "any") and (not isinstance(number, int) or number < 1):
                raise ValueError(f"`num_{split}` must be a positive number, official or any; got {number!r}.")
        if predict_split not in official:
            raise ValueError(f"`predict_split` must be one of {', '.join(official)}; got {predict_split!r}.")
        super().__init__(**kwargs)
        self.predict_split = predict_split
        self.official = official

    @property
    @abstractmethod
    def advice(self) -> str:
        """What to do where files are missing: the end of error messages."""

    @abstractmethod
    def items(self, split: Split) -> list[Item]:
        """The images and label files of a split, whether or not they are there; :meth:`disk_split` says which.

        Raises:
            FileNotFoundError: A folder or list is missing.
        """

    def disk_split(self, split: Split) -> str:
        """Where the samples of a split come from: ``predict_split`` for "predict", else the split itself."""
        return self.predict_split if split == "predict" else split

    def check_number(self, split: Split, number: int) -> None:
        """Compares a number of images with what was asked for.

        Raises:
            ValueError: They differ; the message says how to accept the number.
        """
        name = self.disk_split(split)
        wanted = self.official[name] if self.numbers[name] == "official" else self.numbers[name]
        if wanted not in ("any", number):
            raise ValueError(
                f"the split {name} must have {wanted} images and has {number}: a list or folder is incomplete, or of "
                f"another version. To use it as it is, set `num_{name}` to {number} or to any. {self.advice}"
            )

    def make_dataset(self, split: Split) -> FileSamples:
        items = self.items(split)
        self.check_number(split, len(items))
        require_files(items, self.advice)
        return FileSamples(items, self.ignore_index, self.white_level, self.stored_channels)


def read_as(path: Path, channels: int | None, white_level: float | None) -> np.ndarray:
    """An image: a photograph, uint8 [H, W, 3], or with a number of channels as it is stored, float32 [H, W, C]."""
    if channels is None:
        return read_image(path, white_level=None if white_level is None else int(white_level), warn_pages=False)
    return read_measured(path, channels, white_level)


def require_files(items: Sequence[Item], advice: str) -> None:
    """Checks that every image and label file is there.

    Raises:
        FileNotFoundError: Some are not; the message names the first ones.
    """
    missing = missing_files(path for item in items for path in (item.image, item.labels) if path is not None)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} files of {len(items)} samples are missing, such as "
            f"{', '.join(repr(str(path)) for path in missing[:3])}. {advice}"
        )


def check_sizes(item: Item, image: tuple[int, ...], labels: tuple[int, ...]) -> None:
    """Checks that (height, width) of an item's image, upright, and of its labels are equal.

    Raises:
        ValueError: They are not; the message names both files.
    """
    if tuple(image) == tuple(labels):
        return
    turned = tuple(image) == tuple(labels)[::-1] and read_header(item.image).orientation != 1
    raise ValueError(
        f"image and labels must have one size: {str(item.image)!r} has {tuple(image)} and {str(item.labels)!r} "
        f"{tuple(labels)} (height, width).{f' {_TURNED}' if turned else ''}"
    )

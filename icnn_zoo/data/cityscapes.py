"""Cityscapes' finely labeled images: 19 classes, read from the files of ids as they are downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from icnn_zoo.data.datamodule import Split
from icnn_zoo.data.file_datamodule import FileDataModule, Item, Number
from icnn_zoo.data.label_files import class_table, read_table
from icnn_zoo.data.transforms import Size
from icnn_zoo.io.files import user_path

OFFICIAL = {"train": 2975, "val": 500, "test": 1525}
IGNORE = 255
_IMAGE = "_leftImg8bit.png"
_IDS = "_gtFine_labelIds.png"
_TRAIN_IDS = "_gtFine_labelTrainIds.png"

_LABELS = read_table("cityscapes_labels")
_CLASSES = sorted((row for row in _LABELS if 0 <= int(row["trainId"]) < IGNORE), key=lambda row: int(row["trainId"]))
# Of labelIds files; the license plate's -1 is 255 in 8 bits.
ID_TABLE = class_table({**{int(row["id"]): int(row["trainId"]) for row in _LABELS if int(row["id"]) >= 0}, 255: IGNORE})
TRAIN_ID_TABLE = class_table({**{index: index for index in range(len(_CLASSES))}, 255: IGNORE})
_TO_ID = np.array([int(row["id"]) for row in _CLASSES], dtype=np.uint8)


class CityscapesDataModule(FileDataModule):
    """Cityscapes, the fine set: 19 classes, everything else is ignored.

    Below ``root`` or ``root/cityscapes`` it needs ``leftImg8bit`` and ``gtFine`` as they are downloaded. Labels are
    ``*_gtFine_labelIds.png``, mapped while they are read; ``*_gtFine_labelTrainIds.png`` are taken where they exist.
    Prediction PNGs hold label ids, 8 bits and gray, and are named as the official evaluation and the test server want
    them: ``<city>_<sequence>_<frame>_pred_labelIds.png``. ``test`` is on the validation images, as the test set's
    labels are not public.

    Args:
        root: The folder given to ``icnn-zoo prepare cityscapes``.
        num_train: Training images that there must be: a number, "official" (2,975), or "any".
        num_val: Validation images, likewise (500).
        num_test: Test images, likewise (1,525), where ``predict_split`` is "test".
        predict_split: "val", "test" or "train": images that ``predict`` runs on.
        crop_size: Training crop in pixels: one number or (height, width).
        eval_size: Size that images are padded to in evaluation; None for their own, 1024 x 2048.
        **kwargs: Those of :class:`SegmentationDataModule`.

    Raises:
        ValueError: An argument out of its range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] = "data",
        *,
        num_train: Number = "official",
        num_val: Number = "official",
        num_test: Number = "official",
        predict_split: Literal["train", "val", "test"] = "val",
        crop_size: Size = 473,
        eval_size: Size | None = None,
        **kwargs: Any,
    ) -> None:
        self.root = user_path(root)
        super().__init__(
            num_train=num_train,
            num_val=num_val,
            num_test=num_test,
            predict_split=predict_split,
            official=OFFICIAL,
            crop_size=crop_size,
            eval_size=eval_size,
            **kwargs,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(row["name"] for row in _CLASSES)

    @property
    def palette(self) -> np.ndarray:
        return np.array([[int(row[channel]) for channel in "rgb"] for row in _CLASSES], dtype=np.uint8)

    @property
    def advice(self) -> str:
        return cityscapes_advice(self.root)

    def disk_split(self, split: Split) -> str:
        return "val" if split == "test" else super().disk_split(split)

    def items(self, split: Split) -> list[Item]:
        return cityscapes_items(self.root, self.disk_split(split), labeled=split != "predict")

    def prediction_file(self, name: str) -> str:
        return f"{name}_pred_labelIds.png"

    def encode_labels(self, labels: np.ndarray) -> Image.Image:
        return Image.fromarray(_TO_ID[labels])


def cityscapes_advice(root: Path) -> str:
    """What to do where files are missing."""
    return (
        "Fetch leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com (free, "
        "with registration; or with csDownload of the package cityscapesscripts), unpack both in "
        f"{str(root)!r}, and check with: icnn-zoo prepare cityscapes --root {root}"
    )


def cityscapes_items(root: Path, split: str, *, labeled: bool = True) -> list[Item]:
    """The images of a split and their label files, by ``<city>_<sequence>_<frame>``, sorted.

    Raises:
        FileNotFoundError: There is no such folder, or nothing in it.
    """
    folders = [folder for folder in (root, root / "cityscapes") if (folder / "leftImg8bit" / split).is_dir()]
    found = sorted((folders[0] / "leftImg8bit" / split).glob(f"*/*{_IMAGE}")) if folders else []
    images = [path for path in found if not path.name.startswith(".")]  # a Mac's ._ files
    if not images:
        looked = " and ".join(repr(str(folder / "leftImg8bit" / split)) for folder in (root, root / "cityscapes"))
        raise FileNotFoundError(f"no images of {split}: looked for */*{_IMAGE} in {looked}. {cityscapes_advice(root)}")
    items = []
    present: dict[Path, set[str]] = {}
    for image in images:
        name = image.name.removesuffix(_IMAGE)
        folder = folders[0] / "gtFine" / split / image.parent.name
        if folder not in present:
            present[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
        ready = name + _TRAIN_IDS in present[folder]
        labels = folder / (name + (_TRAIN_IDS if ready else _IDS))
        items.append(Item(name, image, labels if labeled else None, TRAIN_ID_TABLE if ready else ID_TABLE))
    return items


def train_id_file(ids: Path) -> Path:
    """The labelTrainIds file that belongs to a labelIds file."""
    return ids.with_name(ids.name.replace(_IDS, _TRAIN_IDS))

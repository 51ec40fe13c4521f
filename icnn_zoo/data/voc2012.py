"""PASCAL VOC 2012 with SBD's additional labels: 10,582 training images, as everybody trains on them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from icnn_zoo.data.datamodule import Split
from icnn_zoo.data.file_datamodule import FileDataModule, Item, Number
from icnn_zoo.data.folders import files_in, find_folder, read_list, search_folder
from icnn_zoo.data.label_files import class_table
from icnn_zoo.data.transforms import Size
from icnn_zoo.data.voc_classes import VOC_CLASSES
from icnn_zoo.io.files import user_path
from icnn_zoo.io.label_pictures import color_map, palette_picture

OFFICIAL = {"train": 1464, "train_aug": 10582, "val": 1449, "test": 1456}
AUG_FOLDER = "SegmentationClassAug"
AUG_LIST = "ImageSets/SegmentationAug/train_aug.txt"  # what ``icnn-zoo prepare`` writes
_VOC_FOLDERS = ("VOCdevkit/VOC2012", "VOC2012", ".")
_SBD_FOLDERS = ("benchmark_RELEASE/dataset", "sbd", "SBD", "VOCdevkit/VOCaug/dataset", "VOCaug/dataset")
_AUG_LISTS = (
    AUG_LIST,
    "ImageSets/SegmentationAug/trainaug.txt",
    "ImageSets/Segmentation/train_aug.txt",
    "ImageSets/Segmentation/trainaug.txt",
    "ImageSets/Segmentation/aug.txt",
)
_TEST_ADVICE = (
    "The test images are an archive of their own, which VOC's evaluation server (host.robots.ox.ac.uk) gives after "
    "registration; unpack it beside VOCdevkit, so that its files join those of VOCdevkit/VOC2012."
)
LABEL_TABLE = class_table({**{index: index for index in range(len(VOC_CLASSES))}, 255: 255})


class VOC2012DataModule(FileDataModule):
    """PASCAL VOC 2012: 20 classes and background.

    Below ``root`` it needs ``VOCdevkit/VOC2012`` as its owners distribute it and, for ``train_aug``, SBD: raw
    (``benchmark_RELEASE/dataset`` with ``cls/*.mat``, ``train.txt`` and ``val.txt``; also in ``sbd`` or
    ``VOCdevkit/VOCaug/dataset``) or as ``VOCdevkit/VOC2012/SegmentationClassAug/*.png``. ``icnn-zoo prepare voc2012``
    checks, converts and downloads them.

    ``train_aug`` is set(VOC train + SBD train + SBD val) - set(VOC val), sorted. Its ids beyond VOC's come from
    ``train_list``, else from a list in ``ImageSets/SegmentationAug`` or ``ImageSets/Segmentation`` (DeepLab's
    ``train_aug.txt``, mmsegmentation's ``trainaug.txt`` or ``aug.txt``), else from SBD's lists, else from the files in
    SegmentationClassAug. Two kinds of that folder are about: DeepLab's, in which VOC's own images have VOC's labels
    with their unlabeled borders, and mmsegmentation's, in which they have SBD's. They train the same here, as images
    of VOC's train list take their labels from SegmentationClass. Validation, also as ``test``, is on SegmentationClass.

    Args:
        root: The folder given to ``icnn-zoo prepare voc2012``.
        train_set: "train_aug" (10,582 images) or VOC's own "train" (1,464).
        train_list: A list to train on instead, relative to ``root``: ids, or DeepLab's two columns, whose label files,
            relative to VOC2012, are then taken as they stand. Images of VOC's val list are left out in any case.
        num_train: Training images that there must be: a number, "official", or "any".
        num_val: Validation images, likewise.
        num_test: Images of the test server, likewise, where ``predict_split`` is "test".
        predict_split: "val", "test" (``ImageSets/Segmentation/test.txt``, without labels) or "train". Predictions are
            palette PNGs in the evaluation server's folders, ``results/VOC2012/Segmentation/comp6_<split>_cls``.
        crop_size: Training crop in pixels: one number or (height, width).
        eval_size: Size that images are padded to in evaluation; None for native sizes.
        **kwargs: Those of :class:`SegmentationDataModule`.

    Raises:
        ValueError: An argument out of its range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] = "data",
        *,
        train_set: Literal["train_aug", "train"] = "train_aug",
        train_list: str | None = None,
        num_train: Number = "official",
        num_val: Number = "official",
        num_test: Number = "official",
        predict_split: Literal["train", "val", "test"] = "val",
        crop_size: Size = 321,
        eval_size: Size | None = 513,
        **kwargs: Any,
    ) -> None:
        if train_set not in ("train_aug", "train"):
            raise ValueError(f"`train_set` must be train_aug or train; got {train_set!r}.")
        self.root = user_path(root)
        self.train_set = train_set
        self.train_list = train_list
        super().__init__(
            num_train=num_train,
            num_val=num_val,
            num_test=num_test,
            predict_split=predict_split,
            official={"train": OFFICIAL[train_set], "val": OFFICIAL["val"], "test": OFFICIAL["test"]},
            crop_size=crop_size,
            eval_size=eval_size,
            **kwargs,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        return VOC_CLASSES

    @property
    def advice(self) -> str:
        return voc_advice(self.root)

    def disk_split(self, split: Split) -> str:
        return "val" if split == "test" else super().disk_split(split)  # test has no public labels

    def items(self, split: Split) -> list[Item]:
        voc, name = voc_folder(self.root), self.disk_split(split)
        labels: dict[str, Path | None]
        if name == "train":
            labels = dict(self._train_labels(voc))
        else:
            ids = voc_ids(voc, name, self.advice if name != "test" else _TEST_ADVICE)
            labels = {key: None if name == "test" else voc / "SegmentationClass" / f"{key}.png" for key in ids}
        if split == "predict":
            labels = dict.fromkeys(labels)
        return [Item(key, voc / "JPEGImages" / f"{key}.jpg", path, LABEL_TABLE) for key, path in labels.items()]

    def prediction_file(self, name: str) -> str:
        return f"results/VOC2012/Segmentation/comp6_{self.predict_split}_cls/{name}.png"

    def encode_labels(self, labels: np.ndarray) -> Image.Image:
        return palette_picture(labels, color_map(256))

    def _train_labels(self, voc: Path) -> dict[str, Path]:
        if self.train_list is not None:
            advice = "`train_list` must be a file, relative to `root`."
            listed = read_list(self.root / self.train_list, advice)
            left_out = set(voc_ids(voc, "val"))
            known = train_aug_labels(self.root, [key for key, _ in listed])
            return {
                key: known[key] if label is None else voc / label.lstrip("/")
                for key, label in listed
                if key not in left_out
            }
        if self.train_set == "train":
            return {key: voc / "SegmentationClass" / f"{key}.png" for key in voc_ids(voc, "train")}
        return train_aug_labels(self.root, train_aug_ids(self.root))


def voc_advice(root: Path) -> str:
    """What to do where files of VOC or SBD are missing."""
    return (
        f"`icnn-zoo prepare voc2012 --root {root} --download` fetches and checks what is missing, and without "
        "--download says what to fetch by hand."
    )


def voc_folder(root: Path) -> Path:
    """The folder VOC2012 below ``root``.

    Raises:
        FileNotFoundError: There is none.
    """
    return find_folder(root, _VOC_FOLDERS, "ImageSets/Segmentation", voc_advice(root))


def has_voc(root: Path) -> bool:
    """Whether the folder VOC2012 is below ``root``."""
    return search_folder(root, _VOC_FOLDERS, "ImageSets/Segmentation") is not None


def sbd_folder(root: Path) -> Path | None:
    """The folder of SBD's ``cls`` and lists below ``root``, None if there is none."""
    return search_folder(root, _SBD_FOLDERS, "cls")


def voc_ids(voc: Path, name: str, advice: str = "") -> list[str]:
    """The ids of one of VOC's own lists, "train", "val" or "test"."""
    return [key for key, _ in read_list(voc / "ImageSets" / "Segmentation" / f"{name}.txt", advice)]


def train_aug_ids(root: Path) -> list[str]:
    """The ids of ``train_aug``, sorted: see :class:`VOC2012DataModule`.

    Raises:
        FileNotFoundError: Neither lists nor labels beyond VOC's own are there.
    """
    voc, sbd = voc_folder(root), sbd_folder(root)
    ready = next((voc / name for name in _AUG_LISTS if (voc / name).is_file()), None)
    if ready is not None:
        more = [key for key, _ in read_list(ready)]
    elif sbd is not None:
        more = [key for name in ("train", "val") for key, _ in read_list(sbd / f"{name}.txt")]
    else:
        more = list(files_in(voc / AUG_FOLDER, ".png"))
        if not more:
            looked = [str(voc / AUG_FOLDER), *(str(root / name / "cls") for name in _SBD_FOLDERS)]
            raise FileNotFoundError(
                f"train_aug needs SBD's labels, and none of these folders holds any: {', '.join(looked)}. "
                f"{voc_advice(root)} To train on VOC's own images alone, set `train_set` to train."
            )
    return sorted({*voc_ids(voc, "train"), *more} - set(voc_ids(voc, "val")))


def train_aug_labels(root: Path, ids: list[str]) -> dict[str, Path]:
    """The label file of each id: VOC's own for its train list, else SegmentationClassAug's, else SBD's ``.mat``."""
    voc, sbd = voc_folder(root), sbd_folder(root)
    own = set(voc_ids(voc, "train"))
    ready = files_in(voc / AUG_FOLDER, ".png")
    raw = {} if sbd is None else files_in(sbd / "cls", ".mat")
    return {
        key: voc / "SegmentationClass" / f"{key}.png"
        if key in own
        else ready.get(key) or raw.get(key) or voc / AUG_FOLDER / f"{key}.png"
        for key in ids
    }

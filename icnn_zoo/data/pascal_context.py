"""PASCAL-Context: 59 classes and background on the images of VOC 2010, from LabelMaps or ready PNGs of either order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from icnn_zoo.data.datamodule import Split
from icnn_zoo.data.file_datamodule import FileDataModule, Item, Number
from icnn_zoo.data.folders import files_in, find_folder, read_list, search_folder
from icnn_zoo.data.label_files import class_table, read_labels, read_table
from icnn_zoo.data.transforms import Size
from icnn_zoo.io.files import read_text, user_path
from icnn_zoo.io.label_pictures import color_map, palette_picture

Order = Literal["official", "alphabetical"]
OFFICIAL = {"train": 4998, "val": 5105}
PREPARED_FOLDER = "SegmentationClassContext59"  # what ``icnn-zoo prepare`` makes, below VOC2010
ORDER_FILE = "class_order.txt"
_VOC_FOLDERS = ("VOCdevkit/VOC2010", "VOC2010", ".")
_MAT_FOLDERS = ("trainval", "VOCdevkit/VOC2010/trainval", "pascal-context/trainval", "VOC2010/trainval")
_LISTS = ("ImageSets/SegmentationContext", "ImageSets/Main")

_ROWS = read_table("pascal_context_59")
_IGNORE = 255


class PascalContextDataModule(FileDataModule):
    """PASCAL-Context: 59 classes and background, in the order of the owners' ``59_labels.txt``.

    Below ``root`` it needs ``VOCdevkit/VOC2010`` and labels, the first of: PNGs that ``icnn-zoo prepare
    pascal-context`` made, PNGs in ``VOCdevkit/VOC2010/SegmentationClassContext`` (mmsegmentation, from the Detail API)
    or ``59_context_labels``, the owners' LabelMaps ``trainval/*.mat`` of 459 classes. Images are those of
    ``ImageSets/SegmentationContext``, else of ``ImageSets/Main``.

    PNGs come in two class orders, the owners' and the alphabetical one of mmsegmentation and the Detail API. Either is
    mapped to the owners', and predictions are written in the order of the label files. ``class_order="auto"`` believes
    a file ``class_order.txt`` beside the PNGs, which prepare writes; else it compares PNGs with VOC 2010's own
    ``SegmentationClass``, whose 20 classes are among the 59, and fails where that does not decide.

    Args:
        root: The folder given to ``icnn-zoo prepare pascal-context``.
        labels: Folder of label files (.png or .mat), relative to ``root``; None for the first of the above.
        class_order: Of ready PNGs: "official", "alphabetical" or "auto". LabelMaps tell by themselves.
        background: True scores 60 classes; False ignores background (255) and shifts the others down by one: 59.
        num_train: Training images that there must be: a number, "official" (4,998), or "any". The lists of the Detail
            API have 4,996.
        num_val: Validation images, likewise (5,105; Detail API 5,104).
        predict_split: "val" or "train": images that ``predict`` runs on.
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
        labels: str | None = None,
        class_order: Literal["auto", "official", "alphabetical"] = "auto",
        background: bool = True,
        num_train: Number = "official",
        num_val: Number = "official",
        predict_split: Literal["train", "val"] = "val",
        crop_size: Size = 321,
        eval_size: Size | None = 513,
        **kwargs: Any,
    ) -> None:
        if class_order not in ("auto", "official", "alphabetical"):
            raise ValueError(f"`class_order` must be auto, official or alphabetical; got {class_order!r}.")
        self.root = user_path(root)
        self.labels = labels
        self.class_order = class_order
        self.background = background
        super().__init__(
            num_train=num_train,
            num_val=num_val,
            predict_split=predict_split,
            official=OFFICIAL,
            crop_size=crop_size,
            eval_size=eval_size,
            **kwargs,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(row["name"] for row in _ROWS[0 if self.background else 1 :])

    @property
    def palette(self) -> np.ndarray:
        return color_map(60)[0 if self.background else 1 :]

    @property
    def advice(self) -> str:
        return context_advice(self.root)

    def disk_split(self, split: Split) -> str:
        return "val" if split == "test" else super().disk_split(split)

    def items(self, split: Split) -> list[Item]:
        voc, folder = context_folder(self.root), label_folder(self.root, self.labels)
        ids = context_ids(voc, self.disk_split(split))
        raw = holds_label_maps(folder)
        table = label_map_table() if raw else png_table(self._order(folder))
        if not self.background:
            table = np.where(table == 0, _IGNORE, np.where((table > 0) & (table < _IGNORE), table - 1, table))
        suffix = ".mat" if raw else ".png"
        return [
            Item(
                key,
                voc / "JPEGImages" / f"{key}.jpg",
                None if split == "predict" else folder / f"{key}{suffix}",
                table,
            )
            for key in ids
        ]

    def encode_labels(self, labels: np.ndarray) -> Image.Image:
        folder = label_folder(self.root, self.labels)
        order: Order = "official" if holds_label_maps(folder) else self._order(folder)
        values = np.array([_value(row, order) for row in _ROWS[0 if self.background else 1 :]], dtype=np.uint8)
        colors = np.zeros((60, 3), dtype=np.uint8)
        colors[values] = self.palette
        return palette_picture(values[labels], colors)

    def _order(self, folder: Path) -> Order:
        if self.class_order != "auto":
            return self.class_order
        order = recognize_order(folder, context_folder(self.root) / "SegmentationClass")
        self.class_order = order  # one look is enough, and predictions need it image by image
        return order


def context_advice(root: Path) -> str:
    """What to do where files are missing."""
    return f"`icnn-zoo prepare pascal-context --root {root}` says what to fetch, converts and checks what is there."


def context_folder(root: Path) -> Path:
    """The folder VOC2010 below ``root``.

    Raises:
        FileNotFoundError: There is none.
    """
    return find_folder(root, _VOC_FOLDERS, "JPEGImages", context_advice(root))


def has_voc(root: Path) -> bool:
    """Whether the folder VOC2010 is below ``root``."""
    return search_folder(root, _VOC_FOLDERS, "JPEGImages") is not None


def context_ids(voc: Path, name: str) -> list[str]:
    """The ids of "train" or "val"."""
    lists = [voc / folder / f"{name}.txt" for folder in _LISTS]
    path = next((path for path in lists if path.is_file()), lists[-1])
    return [key for key, _ in read_list(path, "It comes with VOC 2010 (VOCtrainval_03-May-2010.tar).")]


def raw_folder(root: Path) -> Path | None:
    """The folder of LabelMaps below ``root``, None if there is none."""
    found = (root / name for name in _MAT_FOLDERS)
    return next((folder for folder in found if holds_label_maps(folder)), None)


def label_folder(root: Path, labels: str | None = None) -> Path:
    """The folder of label files, as :class:`PascalContextDataModule` looks for it.

    Raises:
        FileNotFoundError: There is none.
    """
    if labels is not None:
        if not (root / labels).is_dir():
            raise FileNotFoundError(f"`labels`: there is no folder {str(root / labels)!r}. {context_advice(root)}")
        return root / labels
    voc = context_folder(root)
    ready = (voc / PREPARED_FOLDER, voc / "SegmentationClassContext", root / "59_context_labels")
    folder = next((path for path in ready if path.is_dir()), None) or raw_folder(root)
    if folder is None:
        looked = [*map(str, ready), *(str(root / name / "*.mat") for name in _MAT_FOLDERS)]
        raise FileNotFoundError(f"no labels of PASCAL-Context: looked for {', '.join(looked)}. {context_advice(root)}")
    return folder


def holds_label_maps(folder: Path) -> bool:
    """Whether a folder's label files are LabelMaps (.mat)."""
    return bool(files_in(folder, ".mat"))


def label_map_table() -> np.ndarray:
    """The 459 values of a LabelMap as the 60 classes; 0 and what is not among the 59 is background."""
    return class_table({**dict.fromkeys(range(460), 0), **{int(row["id459"]): int(row["index"]) for row in _ROWS}})


def png_table(order: Order) -> np.ndarray:
    """The values of a PNG of 60 classes in an order as those of the official one; 255 is ignored."""
    return class_table({**{_value(row, order): int(row["index"]) for row in _ROWS}, _IGNORE: _IGNORE})


def recognize_order(folder: Path, voc_labels: Path, number: int = 40) -> Order:
    """The class order of PNGs, from the file beside them or by comparing them with VOC's labels of the same images.

    Args:
        folder: Of the PNGs.
        voc_labels: VOC 2010's SegmentationClass.
        number: Images to compare.

    Raises:
        ValueError: Neither decides.
    """
    note = folder / ORDER_FILE
    if note.is_file():
        order = read_text(note).strip()
        if order not in ("official", "alphabetical"):
            raise ValueError(f"{str(note)!r} must say official or alphabetical; it says {order[:40]!r}.")
        return "official" if order == "official" else "alphabetical"
    known = files_in(voc_labels, ".png")
    common = [path for key, path in files_in(folder, ".png").items() if key in known]
    alphabetical = np.array([_value(row, "alphabetical") for row in _ROWS[:21]])
    votes = np.zeros(2, dtype=np.int64)
    for path in common[:number]:
        truth, labels = read_labels(known[path.stem]), read_labels(path)
        told = (truth > 1) & (truth <= 20)  # background, and aeroplane, are the same number in both orders
        if truth.shape == labels.shape:
            truth, labels = truth[told], labels[told]
            votes += [np.count_nonzero(labels == truth), np.count_nonzero(labels == alphabetical[truth])]
    if votes.max() == 0 or votes.min() > 0.25 * votes.max():
        raise ValueError(
            f"cannot tell in which class order the PNGs of {str(folder)!r} are: there is no {ORDER_FILE} beside them, "
            f"and {len(common)} of them have labels in {str(voc_labels)!r} to compare with. Set `class_order` to "
            "official (59_labels.txt: aeroplane, bicycle, bird) or alphabetical (mmsegmentation: aeroplane, bag, bed)."
        )
    return "official" if votes[0] > votes[1] else "alphabetical"


def _value(row: dict[str, str], order: Order) -> int:
    return int(row["index" if order == "official" else "mmseg_index"])

"""``icnn-zoo prepare`` for the datasets of the paper: fetch what may be fetched, convert once, check, report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from icnn_zoo.data import cityscapes, pascal_context, voc2012
from icnn_zoo.data.cityscapes import CityscapesDataModule
from icnn_zoo.data.datamodule import Split
from icnn_zoo.data.file_datamodule import FileDataModule, Item
from icnn_zoo.data.inspection import SHOWN_PROBLEMS, progress, survey
from icnn_zoo.data.label_files import palette_picture, read_classes, write_picture
from icnn_zoo.data.pascal_context import PascalContextDataModule
from icnn_zoo.data.preparation.archives import fetch, sbd_archive, voc_archive
from icnn_zoo.data.voc2012 import VOC2012DataModule
from icnn_zoo.data.voc_classes import color_map
from icnn_zoo.io.files import write_whole

_LABELLED: tuple[Split, ...] = ("train", "val")


def prepare_voc2012(root: Path, *, download: bool = False, any_number: bool = False) -> str:
    """Makes ``SegmentationClassAug`` of VOC 2012 and SBD, and checks everything.

    The folder is DeepLab's: SBD's labels as PNGs, and VOC's own for VOC's images; with it comes the list
    ``ImageSets/SegmentationAug/train_aug.txt``. It appears when it is complete; an interrupted call goes on. A folder
    of that name that is there is only checked.

    Args:
        root: The data modules' ``root``.
        download: Fetches VOC 2012 (2 GB) and SBD (1.4 GB) if they are not there.
        any_number: Accepts numbers of images that are not the official ones.

    Returns:
        The report.

    Raises:
        FileNotFoundError: VOC or SBD is not there; the message says what to fetch and where to put it.
        RuntimeError: A download failed.
        ValueError: Problems with files; the message names them.
    """
    has_voc = voc2012.has_voc(root)
    has_aug = voc2012.sbd_folder(root) or (has_voc and (voc2012.voc_folder(root) / voc2012.AUG_FOLDER).exists())
    fetch([*([] if has_voc else [voc_archive("2012")]), *([] if has_aug else [sbd_archive()])], root, download)
    voc = voc2012.voc_folder(root)
    folder = voc / voc2012.AUG_FOLDER
    if not folder.exists():
        ids = voc2012.train_aug_ids(root)
        labels = voc2012.train_aug_labels(root, ids)
        labels |= {key: voc / "SegmentationClass" / f"{key}.png" for key in voc2012.voc_ids(voc, "val")}
        _convert({key: (path, voc2012.LABEL_TABLE) for key, path in labels.items()}, folder, color_map(256))
        lines = (f"/JPEGImages/{key}.jpg /{voc2012.AUG_FOLDER}/{key}.png\n" for key in ids)
        write_whole(voc / voc2012.AUG_LIST, "".join(lines).encode())
    return _report("voc2012", root, VOC2012DataModule(root), any_number)


def prepare_pascal_context(root: Path, *, download: bool = False, any_number: bool = False) -> str:
    """Converts PASCAL-Context's LabelMaps to PNGs of 60 classes in the official order, and checks everything.

    The folder ``SegmentationClassContext59`` appears below VOC2010 when it is complete; an interrupted call goes on.
    Ready PNGs are only checked.

    Args:
        root: The data module's ``root``.
        download: Fetches VOC 2010 (1.3 GB) if it is not there. The LabelMaps have to be fetched by hand.
        any_number: Accepts numbers of images that are not the official ones.

    Returns:
        The report.

    Raises:
        FileNotFoundError: Something is not there; the message says what to fetch and where to put it.
        RuntimeError: A download failed.
        ValueError: Problems with files; the message names them.
    """
    if not pascal_context.has_voc(root):
        fetch([voc_archive("2010")], root, download)
    try:
        labels = pascal_context.label_folder(root)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"PASCAL-Context's labels are not in {str(root)!r}. Fetch trainval.tar.gz (LabelMaps, 459 classes) from "
            "https://cs.stanford.edu/~roozbeh/pascal-context or https://roozbehm.info/pascal-context, and unpack it in "
            f"{str(root)!r}, which gives {str(root / 'trainval' / '<id>.mat')!r}. Or put ready PNGs of 60 classes into "
            f"{str(pascal_context.context_folder(root) / 'SegmentationClassContext')!r}."
        ) from None
    folder = pascal_context.context_folder(root) / pascal_context.PREPARED_FOLDER
    data = PascalContextDataModule(root)
    if pascal_context.holds_label_maps(labels):
        files = {item.name: (item.labels, item.table) for item in _all_items(data) if item.labels is not None}
        _convert(files, folder, color_map(60), {pascal_context.ORDER_FILE: b"official\n"})
    return _report("pascal-context", root, data, any_number)


def prepare_cityscapes(root: Path, *, train_ids: bool = False, any_number: bool = False) -> str:
    """Checks Cityscapes' fine set; on request writes ``*_gtFine_labelTrainIds.png`` beside the labelIds.

    Args:
        root: The data module's ``root``.
        train_ids: Whether to write them. The data module does not need them.
        any_number: Accepts numbers of images that are not the official ones.

    Returns:
        The report.

    Raises:
        FileNotFoundError: It is not there; the message says what to fetch and where to put it.
        ValueError: Problems with files; the message names them.
    """
    data = CityscapesDataModule(root)
    if train_ids:
        todo = [item.labels for item in _all_items(data) if item.table is cityscapes.ID_TABLE and item.labels]
        for path in progress(todo, "Writing labelTrainIds"):
            if path.is_file():  # the report names those that are missing
                write_picture(Image.fromarray(read_classes(path, cityscapes.ID_TABLE)), cityscapes.train_id_file(path))
    return _report("cityscapes", root, data, any_number)


def _all_items(data: FileDataModule) -> list[Item]:
    return [item for split in _LABELLED for item in data.items(split)]


def _convert(
    files: Mapping[str, tuple[Path, np.ndarray]],
    folder: Path,
    palette: np.ndarray,
    notes: Mapping[str, bytes] | None = None,
) -> None:
    """Writes label files as palette PNGs ``<name>.png``; ``folder`` appears when all are there, with the notes.

    Raises:
        ValueError: Some cannot be converted; the others are kept for the next call.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    problems = []
    for name, (path, table) in progress(list(files.items()), f"Converting to {folder.name}"):
        target = partial / f"{name}.png"
        if not target.exists():
            try:
                write_picture(palette_picture(read_classes(path, table), palette), target)
            except (FileNotFoundError, ValueError) as error:
                problems.append(str(error))
    if problems:
        raise ValueError(f"{len(problems)} label files cannot be converted:\n" + _first(problems))
    for note, content in (notes or {}).items():
        write_whole(partial / note, content)
    os.replace(partial, folder)


def _report(name: str, root: Path, data: FileDataModule, any_number: bool) -> str:
    """Looks at all files, writes the report to ``root/prepare-<name>.txt`` and returns it.

    Raises:
        ValueError: There are problems; its message is the report.
    """
    splits = {split: data.items(split) for split in _LABELLED}
    problems = []
    for split, items in splits.items():
        try:
            data.check_number(split, len(items))
        except ValueError as error:
            problems.append(str(error))
    found = survey({str(split): items for split, items in splits.items()}, data.classes)
    found.problems[:0] = [] if any_number else problems
    file = root / f"prepare-{name}.txt"
    write_whole(file, f"{name} in {root}\n{found.text()}\n".encode())
    text = f"{name}\n{found.text(SHOWN_PROBLEMS)}\nReport: {file}"
    if found.problems:
        raise ValueError(f"there are problems with {text}")
    return text


def _first(problems: Sequence[str]) -> str:
    more = len(problems) - SHOWN_PROBLEMS
    return "\n".join([*problems[:SHOWN_PROBLEMS], *([f"and {more} more"] if more > 0 else [])])

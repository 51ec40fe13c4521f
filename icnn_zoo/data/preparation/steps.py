"""Steps of preparing a dataset of files: convert labels once, check everything, report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.progress import track

from icnn_zoo.data.datamodule import Split
from icnn_zoo.data.file_datamodule import FileDataModule, Item
from icnn_zoo.data.inspection import SHOWN_PROBLEMS, survey
from icnn_zoo.data.label_files import ColorTable, read_classes
from icnn_zoo.io.files import write_whole
from icnn_zoo.io.images import write_picture
from icnn_zoo.io.label_pictures import palette_picture

_LABELED: tuple[Split, ...] = ("train", "val")


def all_items(data: FileDataModule) -> list[Item]:
    """The labeled items of a dataset."""
    return [item for split in _LABELED for item in data.items(split)]


def convert_labels(
    files: Mapping[str, tuple[Path, np.ndarray | ColorTable]],
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
    for name, (path, table) in track(list(files.items()), f"Converting to {folder.name}"):
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


def check_and_report(name: str, root: Path, data: FileDataModule, any_number: bool) -> str:
    """Looks at all files, writes the report to ``root/prepare-<name>.txt`` and returns it.

    Raises:
        ValueError: There are problems; its message is the report.
    """
    splits = {split: data.items(split) for split in _LABELED}
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

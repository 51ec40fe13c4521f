"""``icnn-zoo prepare cityscapes``: the fine set, checked."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from rich.progress import track

from icnn_zoo.data import cityscapes
from icnn_zoo.data.cityscapes import CityscapesDataModule
from icnn_zoo.data.label_files import read_classes
from icnn_zoo.data.preparation.steps import all_items, check_and_report
from icnn_zoo.io.images import write_picture


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
        todo = [item.labels for item in all_items(data) if item.table is cityscapes.ID_TABLE and item.labels]
        for path in track(todo, "Writing labelTrainIds"):
            if path.is_file():  # the report names those that are missing
                write_picture(Image.fromarray(read_classes(path, cityscapes.ID_TABLE)), cityscapes.train_id_file(path))
    return check_and_report("cityscapes", root, data, any_number)

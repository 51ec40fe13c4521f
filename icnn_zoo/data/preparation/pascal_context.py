"""``icnn-zoo prepare pascal-context``: LabelMaps converted to PNGs of 60 classes."""

from __future__ import annotations

from pathlib import Path

from icnn_zoo.data import pascal_context
from icnn_zoo.data.pascal_context import PascalContextDataModule
from icnn_zoo.data.preparation.archives import fetch, voc_archive
from icnn_zoo.data.preparation.steps import all_items, check_and_report, convert_labels
from icnn_zoo.io.label_pictures import color_map


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
        files = {item.name: (item.labels, item.table) for item in all_items(data) if item.labels is not None}
        convert_labels(files, folder, color_map(60), {pascal_context.ORDER_FILE: b"official\n"})
    return check_and_report("pascal-context", root, data, any_number)

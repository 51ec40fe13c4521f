"""``icnn-zoo prepare voc2012``: VOC 2012 and SBD, joined to one folder of labels."""

from __future__ import annotations

from pathlib import Path

from icnn_zoo.data import voc2012
from icnn_zoo.data.preparation.archives import fetch, sbd_archive, voc_archive
from icnn_zoo.data.preparation.steps import check_and_report, convert_labels
from icnn_zoo.data.voc2012 import VOC2012DataModule
from icnn_zoo.io.files import write_whole
from icnn_zoo.io.label_pictures import color_map


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
        convert_labels({key: (path, voc2012.LABEL_TABLE) for key, path in labels.items()}, folder, color_map(256))
        lines = (f"/JPEGImages/{key}.jpg /{voc2012.AUG_FOLDER}/{key}.png\n" for key in ids)
        write_whole(voc / voc2012.AUG_LIST, "".join(lines).encode())
    return check_and_report("voc2012", root, VOC2012DataModule(root), any_number)

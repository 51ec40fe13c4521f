"""Archives that may be fetched without a registration: where they are, and where their folders belong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from icnn_zoo.io import downloads


class Archive(NamedTuple):
    """An archive of a dataset.

    Attributes:
        name: For messages.
        url: Where it is.
        md5: Of its bytes.
        filename: To store it as.
        folder: The folder in it that is wanted, and that it gets below ``root``.
    """

    name: str
    url: str
    md5: str
    filename: str
    folder: str


def voc_archive(year: str) -> Archive:
    """PASCAL VOC of "2010" or "2012", from where torchvision says."""
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    entry = DATASET_YEAR_DICT[year]
    return Archive(f"PASCAL VOC {year}", entry["url"], entry["md5"], entry["filename"], entry["base_dir"])


def sbd_archive() -> Archive:
    """SBD, from where torchvision says."""
    from torchvision.datasets import SBDataset

    return Archive("SBD", SBDataset.url, SBDataset.md5, SBDataset.filename, "benchmark_RELEASE")


def fetch(archives: Sequence[Archive], root: Path, download: bool) -> None:
    """Downloads and unpacks archives; the folder of each appears below ``root`` when it is complete.

    Args:
        archives: What is missing.
        root: Folder that gets their folders. Archives that were put there by hand are taken, and kept.
        download: Whether to download; False says what to do instead.

    Raises:
        FileNotFoundError: One is missing and not to be downloaded; the message says what to fetch and where to put it.
        RuntimeError: Downloading failed, or what came is not the known archive.
        ValueError: Another folder is in its place, or the archive lacks the folder.
    """
    for archive in archives:
        if (root / archive.folder).exists():
            raise ValueError(
                f"{str(root / archive.folder)!r} is not complete: move it away, and {_by_hand(archive, root)}"
            )
    missing = [archive for archive in archives if not _is_there(root / archive.filename, archive.md5)]
    if missing and not download:
        steps = "".join(f"\n- {archive.name}: {_by_hand(archive, root)}" for archive in missing)
        raise FileNotFoundError(
            f"not all data are in {str(root)!r}. Run the command again with --download, or by hand:{steps}"
        )
    for archive in archives:
        file = root / archive.filename
        if archive in missing:
            print(f"Fetching {archive.name} from {archive.url}")
            try:
                downloads.download(archive.url, file, downloads.Promise(archive.md5, algorithm="md5"))
            except (OSError, RuntimeError, ValueError) as error:
                raise RuntimeError(
                    f"{archive.name} cannot be downloaded ({error}). By hand: {_by_hand(archive, root)}"
                ) from error
        _unpack(file, archive.folder, root)
        if archive in missing:
            file.unlink()


def _is_there(file: Path, md5: str) -> bool:
    return file.is_file() and downloads.Promise(md5, algorithm="md5").mismatch_of(file.resolve()) is None


def _by_hand(archive: Archive, root: Path) -> str:
    return (
        f"fetch {archive.url} (md5 {archive.md5}) and put it into {str(root)!r} as {archive.filename}, or unpack it "
        f"there, so that there is a folder {str(root / archive.folder)!r}."
    )


def _unpack(file: Path, folder: str, root: Path) -> None:
    """Moves a folder of an archive below ``root``, whole or not at all."""
    from torchvision.datasets.utils import extract_archive

    print(f"Unpacking {file}")
    partial = root / f"{file.name}.unpacked"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        extract_archive(str(file), str(partial))
        if not (partial / folder).is_dir():
            raise ValueError(f"{str(file)!r} must hold the folder {folder!r}.")
        (root / folder).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / folder, root / folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

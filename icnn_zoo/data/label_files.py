"""Images, label maps and lists as they lie on disk: read with care, written whole or not at all."""

from __future__ import annotations

import csv
import importlib.resources
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from icnn_zoo.data.voc_classes import color_map
from icnn_zoo.io.files import write_whole

_IMAGE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
_LABEL_MODES = ("1", "L", "P", "I;16", "I")


def read_image(path: Path) -> np.ndarray:
    """The pixels of a picture, uint8 [H, W, 3], RGB; orientation tags are not applied.

    Raises:
        ValueError: No readable picture, or one of more than 8 bits a channel.
    """
    picture = _open(path)
    if picture.mode not in _IMAGE_MODES:
        raise ValueError(f"{str(path)!r} must have 8 bits a channel; it has mode {picture.mode}. Convert it to RGB.")
    return np.asarray(picture.convert("RGB"))


def read_labels(path: Path) -> np.ndarray:
    """The values of a label file, [H, W]: a palette or grey picture, never its colours, or a ``.mat``.

    Returns:
        uint8, or int64 where a format holds more than 8 bits.

    Raises:
        ValueError: Not readable, or a picture of colours.
    """
    if path.suffix == ".mat":
        return _read_mat(path)
    picture = _open(path)
    if picture.mode not in _LABEL_MODES:
        raise ValueError(
            f"{str(path)!r} must be a label map, a palette or grey picture of class numbers; it is a colour picture "
            f"(mode {picture.mode}). Use the dataset's files of ids, not those made for viewing (as *_color.png)."
        )
    labels = np.asarray(picture)
    return labels.astype(np.int64 if picture.mode.startswith("I") else np.uint8)


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) of a picture, from its header.

    Raises:
        ValueError: No readable picture.
    """
    try:
        with Image.open(path) as picture:
            return picture.height, picture.width
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no readable picture: {error}") from error


def class_table(classes: Mapping[int, int]) -> np.ndarray:
    """What the values of label files mean, for :func:`read_classes`.

    Args:
        classes: Class index (or the ignore index), 0 to 255, of each value that may occur.

    Returns:
        int16 [256, or more for larger values]: the class index, or -1 for a value that must not occur.
    """
    table = np.full(max(256, *(value + 1 for value in classes)), -1, dtype=np.int16)
    for value, index in classes.items():
        table[value] = index
    return table


def read_classes(path: Path, table: np.ndarray) -> np.ndarray:
    """A label file as class indices.

    Args:
        path: What :func:`read_labels` reads.
        table: Of :func:`class_table`.

    Returns:
        uint8 [H, W].

    Raises:
        ValueError: As :func:`read_labels`, or it holds a value without a meaning; the message names file and values.
    """
    labels = read_labels(path)
    if labels.min() >= 0 and labels.max() < len(table):
        classes = table[labels]
        if classes.min() >= 0:
            return classes.astype(np.uint8)
    wrong = [value for value in np.unique(labels).tolist() if not 0 <= value < len(table) or table[value] < 0]
    raise ValueError(f"{str(path)!r}: label values must be {_ranges(table)}; got {wrong[:10]}.")


def read_list(path: Path, advice: str = "") -> list[tuple[str, str | None]]:
    """The entries of a list of images: an id a line, or DeepLab's two columns of an image's and a label file's path.

    Args:
        path: The list.
        advice: What to do if there is none, for the error.

    Returns:
        Ids (names without folder and ending), each once and in order, with the label file's path or None.

    Raises:
        FileNotFoundError: There is no such list.
        ValueError: It is empty, or a line is neither form.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no list {str(path)!r}. {advice}".rstrip())
    entries: dict[str, str | None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        columns = line.split()
        if not columns:
            continue
        if len(columns) > 2 or (len(columns) == 2 and "/" not in columns[1]):
            raise ValueError(
                f"{str(path)!r}, line {number}: expected an id, or paths of an image and a label file; got {line!r}."
            )
        image = Path(columns[0])
        name = image.stem if image.suffix in (".jpg", ".png") else image.name
        entries[name] = columns[1] if len(columns) > 1 else None
    if not entries:
        raise ValueError(f"the list {str(path)!r} is empty.")
    return list(entries.items())


def search_folder(root: Path, candidates: Iterable[str], holding: str) -> Path | None:
    """The first of ``candidates`` below ``root`` that holds a file or folder named ``holding``; None if none does."""
    return next((root / name for name in candidates if (root / name / holding).exists()), None)


def find_folder(root: Path, candidates: Sequence[str], holding: str, advice: str) -> Path:
    """As :func:`search_folder`, but not finding any is an error.

    Args:
        root: Folder that the user gave.
        candidates: Folders below it, in the order of looking.
        holding: What the folder must contain.
        advice: What to do, for the error.

    Raises:
        FileNotFoundError: None of them; the message lists the paths that were looked for.
    """
    found = search_folder(root, candidates, holding)
    if found is None:
        paths = ", ".join(repr(str(root / name / holding)) for name in candidates)
        raise FileNotFoundError(f"no dataset in `root` = {str(root)!r}: looked for {paths}. {advice}")
    return found


def files_in(folder: Path, suffix: str) -> dict[str, Path]:
    """The files of a folder that end in ``suffix``, by their names without it, sorted; empty without the folder."""
    if not folder.is_dir():
        return {}
    return {name.removesuffix(suffix): folder / name for name in sorted(os.listdir(folder)) if name.endswith(suffix)}


def missing_files(paths: Iterable[Path]) -> list[Path]:
    """Those of the paths that are no files. Reads every folder once: network drives answer slowly."""
    present: dict[Path, set[str]] = {}
    missing = []
    for path in paths:
        folder = path.parent
        if folder not in present:
            present[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
        if path.name not in present[folder]:
            missing.append(path)
    return missing


def write_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG that is there whole or not at all, making its folder."""
    data = io.BytesIO()
    picture.save(data, format="PNG")
    write_whole(path, data.getvalue())


def palette_picture(labels: np.ndarray, palette: np.ndarray) -> Image.Image:
    """A picture of a label map's values, uint8 [H, W], that viewers show in the colours of ``palette``, [n, 3].

    Values beyond the palette get PASCAL VOC's colours.
    """
    picture = Image.fromarray(np.ascontiguousarray(labels, dtype=np.uint8))
    # All 256 colours: with fewer, PNG stores fewer bits and a 255 comes back as another number.
    colors = np.concatenate([palette.astype(np.uint8), color_map(256)[len(palette) :]])
    picture.putpalette(colors.tobytes())
    return picture


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of a table of this package, ``<name>.tsv``, by column."""
    text = importlib.resources.files("icnn_zoo.data").joinpath(f"{name}.tsv").read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text), delimiter="\t"))


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()  # what is truncated fails here, where the file can be named
            return picture
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {str(path)!r}.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no readable picture: {error}") from error


def _read_mat(path: Path) -> np.ndarray:
    from scipy.io import loadmat

    try:
        content = loadmat(path)
        if "LabelMap" in content:  # PASCAL-Context
            return np.asarray(content["LabelMap"]).astype(np.int64)
        if "GTcls" in content:  # SBD
            return np.asarray(content["GTcls"][0]["Segmentation"][0]).astype(np.uint8)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {str(path)!r}.") from None
    except Exception as error:  # scipy raises whatever the bytes lead it to
        raise ValueError(f"{str(path)!r} is no readable .mat file: {error}") from error
    raise ValueError(f"{str(path)!r} must hold GTcls (SBD) or LabelMap (PASCAL-Context); it holds {sorted(content)}.")


def _ranges(table: np.ndarray) -> str:
    """The values with a meaning, as "0 to 20, 255"."""
    values = np.flatnonzero(table >= 0)
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)

"""Label maps as they lie on disk: the values of pictures and ``.mat`` files, and the classes that they mean."""

from __future__ import annotations

import csv
import importlib.resources
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from icnn_zoo.io.files import require_file
from icnn_zoo.io.images import read_upright

_LABEL_MODES = ("1", "L", "P", "I;16", "I;16B", "I")


def read_labels(path: Path, *, warn_pages: bool = True) -> np.ndarray:
    """The values of a label file, [H, W]: a palette or gray picture, never its colors, or a ``.mat``.

    Pictures are read by the policy of images: upright, the first of several pages.

    Args:
        path: The file.
        warn_pages: Whether to warn that a file has more pages than the one that is read.

    Returns:
        uint8, or int64 where a format holds more than 8 bits.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Not readable, or a picture of colors.
    """
    if path.suffix == ".mat":
        return _read_mat(path)
    picture = read_upright(path, warn_pages=warn_pages)
    if picture.mode not in _LABEL_MODES:
        raise ValueError(
            f"{str(path)!r} must be a label map, a palette or gray picture of class numbers; it is a color picture "
            f"(mode {picture.mode}). Use the dataset's files of ids, not those made for viewing (as *_color.png)."
        )
    labels = np.asarray(picture)
    return labels.astype(np.int64 if picture.mode.startswith("I") else np.uint8)


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


class ColorTable:
    """What the colors of label pictures mean, for :func:`read_classes`.

    Args:
        colors: Class index (or the ignore index) of each color, (R, G, B) in 0 to 255.
    """

    def __init__(self, colors: Mapping[tuple[int, int, int], int]) -> None:
        packed = {red << 16 | green << 8 | blue: index for (red, green, blue), index in colors.items()}
        self._values = np.array(sorted(packed), dtype=np.int64)
        self._classes = np.array([packed[value] for value in self._values.tolist()], dtype=np.uint8)

    def read(self, path: Path, *, warn_pages: bool = True) -> np.ndarray:
        """A label picture as class indices, uint8 [H, W].

        Raises:
            ValueError: It holds a color without a meaning; the message names file and colors.
        """
        pixels = np.asarray(read_upright(path, warn_pages=warn_pages).convert("RGB")).astype(np.int64)
        values = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
        places = np.searchsorted(self._values, values).clip(max=len(self._values) - 1)
        wrong = values[self._values[places] != values]
        if len(wrong):
            raise ValueError(
                f"{str(path)!r}: colors must be {_colors(self._values)}; got {_colors(np.unique(wrong))}. Masks with "
                "colors between those of classes were scaled or stored as JPEG."
            )
        return self._classes[places]


def read_classes(path: Path, table: np.ndarray | ColorTable, *, warn_pages: bool = True) -> np.ndarray:
    """A label file as class indices.

    Args:
        path: What :func:`read_labels` reads.
        table: Of :func:`class_table`, or of colors.
        warn_pages: As in :func:`read_labels`.

    Returns:
        uint8 [H, W].

    Raises:
        ValueError: As :func:`read_labels`, or it holds a value without a meaning; the message names file and values.
    """
    if isinstance(table, ColorTable):
        return table.read(path, warn_pages=warn_pages)
    labels = read_labels(path, warn_pages=warn_pages)
    if labels.min() >= 0 and labels.max() < len(table):
        classes = table[labels]
        if classes.min() >= 0:
            return classes.astype(np.uint8)
    wrong = [value for value in np.unique(labels).tolist() if not 0 <= value < len(table) or table[value] < 0]
    raise ValueError(f"{str(path)!r}: label values must be {_ranges(table)}; got {wrong[:10]}.")


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of a table of this package, ``<name>.tsv``, by column."""
    text = importlib.resources.files("icnn_zoo.data").joinpath(f"{name}.tsv").read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text), delimiter="\t"))


def _read_mat(path: Path) -> np.ndarray:
    from scipy.io import loadmat

    require_file(path)
    try:
        content = loadmat(path)
        if "LabelMap" in content:  # PASCAL-Context
            return np.asarray(content["LabelMap"]).astype(np.int64)
        if "GTcls" in content:  # SBD
            return np.asarray(content["GTcls"][0]["Segmentation"][0]).astype(np.uint8)
    except Exception as error:  # scipy raises whatever the bytes lead it to
        raise ValueError(f"{str(path)!r} is not a readable .mat file: {error}") from error
    raise ValueError(f"{str(path)!r} must hold GTcls (SBD) or LabelMap (PASCAL-Context); it holds {sorted(content)}.")


def _colors(values: np.ndarray, number: int = 8) -> str:
    shown = ", ".join(f"#{value:06x}" for value in values[:number].tolist())
    return f"{shown}, ..." if len(values) > number else shown


def _ranges(table: np.ndarray) -> str:
    """The values with a meaning, as "0 to 20, 255"."""
    values = np.flatnonzero(table >= 0)
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)

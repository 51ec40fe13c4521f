"""Looks at every file of a dataset once: how many pixels each class has, and what is wrong with which file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.progress import track

from icnn_zoo.data.file_datamodule import Item, check_sizes, read_as
from icnn_zoo.data.label_files import read_classes
from icnn_zoo.io.images import ImageHeader, read_header, require_white_level
from icnn_zoo.io.rasters import read_measured
from icnn_zoo.io.tables import text_table

SHOWN_PROBLEMS = 20  # on the screen; the report file has all


@dataclass
class Survey:
    """What was found in a dataset.

    Attributes:
        classes: Class names by index.
        images: Number of images by split.
        pixels: Labeled pixels by split, int64 [256]: of each class index, and at 255 of those without a class.
        problems: One line for each thing that is wrong, with the name of its file.
        notes: What may be wrong, and what was not read: photographs whose camera was turned, files of several pages.
    """

    classes: Sequence[str]
    images: dict[str, int] = field(default_factory=dict)
    pixels: dict[str, np.ndarray] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self, shown: int | None = None) -> str:
        """The report: images, classes, pixels per class, problems (the first ``shown``; None for all)."""
        splits = list(self.images)
        lines = [f"Images: {', '.join(f'{split} {number}' for split, number in self.images.items())}"]
        lines += [f"Classes: {len(self.classes)}. Labeled pixels of each, in thousands:"]
        rows = [["", *splits]]
        for index, name in [*enumerate(self.classes), (255, "no class")]:
            rows.append([name, *(f"{self.pixels[split][index] / 1000:,.1f}" for split in splits)])
        lines += [f"  {line}" for line in text_table(rows, right=range(1, len(splits) + 1)).splitlines()]
        lines += self.notes
        lines.append(f"Problems: {len(self.problems) or 'none'}")
        lines += [f"  {problem}" for problem in self.problems[:shown]]
        if shown is not None and len(self.problems) > shown:
            lines.append(f"  and {len(self.problems) - shown} more")
        return "\n".join(lines)


def survey(
    splits: Mapping[str, Sequence[Item]],
    classes: Sequence[str],
    *,
    whole_images: bool = True,
    white_level: float | None = None,
    channels: int | None = None,
) -> Survey:
    """Reads every label file, and every image or its header, with a progress bar.

    Args:
        splits: Items by the name of their split.
        classes: Class names by index.
        whole_images: Decodes images; False only reads their headers, which misses truncated ones.
        white_level: The value that is white in images of 16 bits; None counts them as problems.
        channels: Of images that are read as they are stored; None for photographs.

    Returns:
        What was found. Nothing that is wrong with a file is raised.
    """
    result = Survey(classes)
    turned: list[Path] = []
    several: list[Path] = []
    for split, items in splits.items():
        counts = np.zeros(256, dtype=np.int64)
        for item in track(items, f"Checking {split}"):
            try:
                if channels is not None:
                    size = read_measured(item.image, channels, white_level).shape[:2]
                    header = ImageHeader((size[0], size[1]), 1, 1, False)
                else:
                    header = read_header(item.image)
                if whole_images and channels is None:
                    read_as(item.image, None, white_level)
                elif header.deep:
                    require_white_level(repr(str(item.image)), None if white_level is None else int(white_level))
                several += [item.image] if header.pages > 1 else []
                if item.labels is not None:
                    labels = read_classes(item.labels, item.table, warn_pages=False)
                    check_sizes(item, header.size, labels.shape)
                    counts += np.bincount(labels.ravel(), minlength=256)
                    turned += [item.image] if _is_doubtful(header, item.labels) else []
            except (FileNotFoundError, ValueError) as error:
                result.problems.append(str(error))
        result.images[split], result.pixels[split] = len(items), counts
    if turned:
        result.notes.append(
            f"Of {len(turned)} photographs the camera was turned, such as {str(turned[0])!r}. They are read upright, "
            "and nothing tells whether their masks are upright too: look at one, and where they are not, remove the "
            "orientation from the photographs (exiftool -Orientation= FILE)."
        )
    if several:
        result.notes.append(
            f"{len(several)} image files hold more than one picture, such as {str(several[0])!r}: the first is read."
        )
    return result


def _is_doubtful(header: ImageHeader, labels: Path) -> bool:
    """Whether labels may be of the pixels before the camera's turn, though their size fits."""
    if header.orientation == 1 or (header.orientation > 4 and header.size[0] != header.size[1]):
        return False
    return labels.suffix == ".mat" or read_header(labels).orientation == 1

"""Looks at every file of a dataset once: how many pixels each class has, and what is wrong with which file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from rich.progress import track

from icnn_zoo.data.file_datamodule import Item, check_sizes
from icnn_zoo.data.label_files import picture_size, read_classes, read_image

T = TypeVar("T")
SHOWN_PROBLEMS = 20  # on the screen; the report file has all


@dataclass
class Survey:
    """What was found in a dataset.

    Attributes:
        classes: Class names by index.
        images: Number of images by split.
        pixels: Labelled pixels by split, int64 [256]: of each class index, and at 255 of those without a class.
        problems: One line for each thing that is wrong, with the name of its file.
    """

    classes: Sequence[str]
    images: dict[str, int] = field(default_factory=dict)
    pixels: dict[str, np.ndarray] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def text(self, shown: int | None = None) -> str:
        """The report: images, classes, pixels per class, problems (the first ``shown``; None for all)."""
        splits = list(self.images)
        width = max(len(name) for name in (*self.classes, "no class"))
        lines = [f"Images: {', '.join(f'{split} {number}' for split, number in self.images.items())}"]
        lines += [f"Classes: {len(self.classes)}. Labelled pixels of each, in thousands:"]
        lines += [f"  {'':<{width}}" + "".join(f"{split:>14}" for split in splits)]
        for index, name in [*enumerate(self.classes), (255, "no class")]:
            numbers = (self.pixels[split][index] / 1000 for split in splits)
            lines.append(f"  {name:<{width}}" + "".join(f"{number:>14,.1f}" for number in numbers))
        lines.append(f"Problems: {len(self.problems) or 'none'}")
        lines += [f"  {problem}" for problem in self.problems[:shown]]
        if shown is not None and len(self.problems) > shown:
            lines.append(f"  and {len(self.problems) - shown} more")
        return "\n".join(lines)


def survey(splits: Mapping[str, Sequence[Item]], classes: Sequence[str], *, whole_images: bool = True) -> Survey:
    """Reads every label file, and every image or its header, with a progress bar.

    Args:
        splits: Items by the name of their split.
        classes: Class names by index.
        whole_images: Decodes images; False only reads the size in their headers, which misses truncated ones.

    Returns:
        What was found. Nothing that is wrong with a file is raised.
    """
    result = Survey(classes)
    for split, items in splits.items():
        counts = np.zeros(256, dtype=np.int64)
        for item in progress(items, f"Checking {split}"):
            try:
                size = read_image(item.image).shape[:2] if whole_images else picture_size(item.image)
                if item.labels is not None:
                    labels = read_classes(item.labels, item.table)
                    check_sizes(item, size, labels.shape)
                    counts += np.bincount(labels.ravel(), minlength=256)
            except (FileNotFoundError, ValueError) as error:
                result.problems.append(str(error))
        result.images[split], result.pixels[split] = len(items), counts
    return result


def progress(things: Sequence[T], description: str) -> Iterable[T]:
    """Iterates with a progress bar."""
    return track(things, description=description, total=len(things))

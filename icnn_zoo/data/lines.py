"""Pages of glyphs in lines: a task where only a kernel's geometry helps, with nothing to download.

A line's class is told by its key glyphs alone, which are rare, and neighboring lines differ. So the context that a
pixel needs lies along its line, and what lies across misleads.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from icnn_zoo.data.datamodule import SegmentationDataModule, Split
from icnn_zoo.data.samples import Sample
from icnn_zoo.data.scenes import SPLIT_SEEDS
from icnn_zoo.data.transforms import Size, size_pair

_SIDE = 5  # of a glyph's pattern, in cells
_FILLERS = 14  # glyphs that every line may hold
_MOST_CLASSES = 26  # one letter each
# Cells of every glyph, the same in every scene: first the keys, one a class, then the fillers.
_FONT = np.random.default_rng(5).random((_MOST_CLASSES + _FILLERS, _SIDE, _SIDE)) > 0.5


class LinesDataModule(SegmentationDataModule):
    """Lines of glyphs on a page; a line has one of ``num_classes`` classes, which only its key glyphs tell.

    Each class has a key glyph; the other glyphs occur in lines of any class. Neighboring lines are never of one class.
    The mask holds the class from a line's first glyph to its last; between lines it is ``ignore_index``, so that the
    pixel accuracy of chance is 1 / ``num_classes``. Sample i of a split is a pure function of (seed, i) in training and
    of i alone in the other splits: runs with different seeds are evaluated on the same pages. Prediction runs on the
    validation pages.

    How anisotropic the task is can be chosen: within ``rotation=(0, 0)`` all context is horizontal, within
    ``(-90, 90)`` no direction is preferred, over all pages; with ``key_gap=(1, 1)`` every glyph is a key and no
    context is needed.

    Args:
        image_size: Pixels of a page: one number or (height, width).
        num_classes: Classes of lines: 2 to 26.
        num_train: Training pages.
        num_val: Validation pages.
        num_test: Test pages.
        rotation: Least and greatest angle of a page's lines, in degrees, drawn uniformly; counterclockwise.
        glyph_size: Side of a glyph in pixels, at least 5; a fifth of it, rounded up, is left blank behind each glyph.
        line_spacing: Least and greatest number of blank pixels between two lines.
        key_gap: Least and greatest distance from one key glyph of a line to the next, in glyphs; 1 for neighbors.
        noise: Standard deviation of the Gaussian noise, as a share of the difference of ink and paper.
        crop_size: Training crop; None for ``image_size``.
        scales: As in :class:`SegmentationDataModule`. Only 1 by default: the page decides the size of its glyphs.
        mirror: As there. Off by default, as mirrored glyphs are others.
        **kwargs: The others of :class:`SegmentationDataModule`.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> data = LinesDataModule(num_classes=3, num_workers=0)
        >>> data.classes
        ('line a', 'line b', 'line c')
        >>> data.make_dataset("val")[0]["image"].shape
        (65, 65, 3)
    """

    def __init__(
        self,
        *,
        image_size: Size = 65,
        num_classes: int = 4,
        num_train: int = 20000,
        num_val: int = 200,
        num_test: int = 500,
        rotation: tuple[float, float] = (0.0, 0.0),
        glyph_size: int = 5,
        line_spacing: tuple[int, int] = (2, 3),
        key_gap: tuple[int, int] = (3, 6),
        noise: float = 0.15,
        crop_size: Size | None = None,
        scales: Sequence[float] = (1.0,),
        mirror: bool = False,
        **kwargs: Any,
    ) -> None:
        if not 2 <= num_classes <= _MOST_CLASSES:
            raise ValueError(f"`num_classes` must be 2 to {_MOST_CLASSES}; got {num_classes}.")
        for split, length in {"train": num_train, "val": num_val, "test": num_test}.items():
            if length < 1:
                raise ValueError(f"`num_{split}` must be at least 1; got {length}.")
        _check_range("rotation", rotation, -180, 180)
        _check_range("line_spacing", line_spacing, 1)
        _check_range("key_gap", key_gap, 1)
        if noise < 0:
            raise ValueError(f"`noise` must not be negative; got {noise}.")
        self.image_size = size_pair("image_size", image_size)
        if glyph_size < _SIDE or _pitch(glyph_size) > min(self.image_size):
            raise ValueError(
                f"`glyph_size` must be at least {_SIDE}, and with its blank fit into `image_size`, whose shorter side "
                f"is {min(self.image_size)}; got {glyph_size}."
            )
        self._classes = tuple(f"line {chr(ord('a') + index)}" for index in range(num_classes))
        super().__init__(
            crop_size=self.image_size if crop_size is None else crop_size, scales=scales, mirror=mirror, **kwargs
        )
        self.lengths: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test, "predict": num_val}
        self.rotation = rotation
        self.glyph_size = glyph_size
        self.line_spacing = line_spacing
        self.key_gap = key_gap
        self.noise = noise

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    @property
    def palette(self) -> np.ndarray:
        hues = [colorsys.hsv_to_rgb(0.58 + index / self.num_classes, 0.65, 0.85) for index in range(self.num_classes)]
        return np.rint(255 * np.array(hues)).astype(np.uint8)

    def make_dataset(self, split: Split) -> LinesDataset:
        return LinesDataset(self, split)


class LinesDataset:
    """The pages of one split of a :class:`LinesDataModule`."""

    def __init__(self, data: LinesDataModule, split: Split) -> None:
        self.split = split
        self.length = data.lengths[split]
        self.seed = data.seed if split == "train" else 0
        self.num_classes = data.num_classes
        self.ignore_index = data.ignore_index
        self.image_size = data.image_size
        self.rotation = data.rotation
        self.line_spacing = data.line_spacing
        self.key_gap = data.key_gap
        self.noise = data.noise
        self.glyphs = np.zeros((len(_FONT), data.glyph_size, _pitch(data.glyph_size)), np.float32)
        for glyph, pattern in zip(self.glyphs, _FONT, strict=True):
            size = (data.glyph_size, data.glyph_size)
            glyph[:, : data.glyph_size] = cv2.resize(pattern.astype(np.float32), size, interpolation=cv2.INTER_NEAREST)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Sample:
        rng = np.random.default_rng((self.seed, SPLIT_SEEDS[self.split], index))
        page, mask = self._page(rng)
        page += rng.standard_normal(page.shape, dtype=np.float32) * np.float32(self.noise)
        # Room for the noise on both sides: ink at 0.75, paper at 0.25 of the range.
        image = np.clip(np.rint(255 * (0.25 + 0.5 * page)), 0, 255).astype(np.uint8)
        return {"image": image[..., None].repeat(3, axis=2), "mask": mask, "name": f"lines-{self.split}-{index:06d}"}

    def _page(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Ink, float32 0 to 1, and mask of a page without noise, both of ``image_size``."""
        height, width = self.image_size
        if not any(self.rotation):
            return self._upright(rng, height, width)
        # Large enough that the turned page covers the scene.
        side = math.ceil(math.hypot(height, width)) + 1
        ink, mask = self._upright(rng, side, side)
        matrix: np.ndarray = cv2.getRotationMatrix2D(((side - 1) / 2, (side - 1) / 2), rng.uniform(*self.rotation), 1)
        matrix[:, 2] += np.array([width - side, height - side]) / 2
        ink = cv2.warpAffine(ink, matrix, (width, height), flags=cv2.INTER_LINEAR)
        mask = cv2.warpAffine(
            mask, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=float(self.ignore_index)
        )
        return ink, mask

    def _upright(self, rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        _, size, pitch = self.glyphs.shape
        ink = np.zeros((height, width), np.float32)
        mask = np.full((height, width), self.ignore_index, np.uint8)
        label = int(rng.integers(self.num_classes))
        top = int(rng.integers(min(size + self.line_spacing[0], height - size + 1)))  # so that a line fits
        while top + size <= height:
            label = int(label + rng.integers(1, self.num_classes)) % self.num_classes  # never the last line's
            left = int(rng.integers(min(pitch, width - pitch + 1)))
            number = (width - left) // pitch
            text = rng.integers(_MOST_CLASSES, len(_FONT), number)
            place = int(rng.integers(min(self.key_gap[1], number)))
            while place < number:
                text[place] = label
                place += int(rng.integers(self.key_gap[0], self.key_gap[1] + 1))
            end = left + number * pitch
            ink[top : top + size, left:end] = self.glyphs[text].transpose(1, 0, 2).reshape(size, -1)
            mask[top : top + size, left:end] = label
            top += size + int(rng.integers(self.line_spacing[0], self.line_spacing[1] + 1))
        return ink, mask


def _pitch(glyph_size: int) -> int:
    return glyph_size + math.ceil(glyph_size / _SIDE)


def _check_range(name: str, ends: Sequence[float], least: float, greatest: float = math.inf) -> None:
    if len(ends) != 2 or not least <= ends[0] <= ends[1] <= greatest:
        limit = f"{least} to {greatest}" if greatest < math.inf else f"at least {least}"
        raise ValueError(f"`{name}` must be two numbers, {limit}, the smaller first; got {tuple(ends)}.")

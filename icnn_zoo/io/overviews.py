"""A large image and its labels in small, gathered while the rows of both pass by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from icnn_zoo.io.label_pictures import segmentation_picture
from icnn_zoo.io.rasters import visible


class Rows(Protocol):
    """An image whose rows are read when they are needed, such as :class:`icnn_zoo.io.rasters.Raster`."""

    shape: tuple[int, int, int]

    def rows(self, top: int, bottom: int, /) -> np.ndarray:
        """Rows ``top`` to ``bottom``, [n, W, C]."""


class Overview:
    """An image of which a small picture is left when all its rows were read and labeled.

    A pixel of the small image is the mean of a square of the large one, its label that of the square's middle. Shares
    of classes are counted over all pixels.

    Args:
        image: Values in 0 to 255; its rows are asked for from top to bottom, in bands that may overlap.
        num_classes: Classes.
        longest_side: The most pixels of the small image's longer side.
    """

    def __init__(self, image: Rows, num_classes: int, longest_side: int = 1600) -> None:
        self.shape = image.shape
        self._image = image
        step = -(-max(self.shape[:2]) // longest_side)
        squares = [np.arange(extent) // step for extent in self.shape[:2]]  # of each row, of each column
        self._squares = squares
        self._middles = [
            np.minimum(np.arange(at[-1] + 1) * step + step // 2, extent - 1)
            for at, extent in zip(squares, self.shape[:2], strict=True)
        ]
        self._sums = np.zeros((squares[0][-1] + 1, squares[1][-1] + 1, 3))
        self._labels: list[np.ndarray] = []
        self._counts = np.zeros(num_classes, np.int64)
        self._read = self._labeled = 0

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows ``top`` to ``bottom`` of the image, [n, W, C]."""
        pixels = self._image.rows(top, bottom)
        new = visible(pixels[self._read - top :])
        starts = np.searchsorted(self._squares[1], np.arange(self._sums.shape[1]))
        np.add.at(
            self._sums, self._squares[0][self._read : bottom], np.add.reduceat(new, starts, axis=1, dtype=np.uint32)
        )
        self._read = bottom
        return pixels

    def add(self, labels: np.ndarray) -> None:
        """Takes the next rows of the label map, uint8 [n, W]."""
        end = self._labeled + len(labels)
        middles = self._middles[0]
        here = middles[(middles >= self._labeled) & (middles < end)] - self._labeled
        self._labels.append(labels[here][:, self._middles[1]])
        self._counts += np.bincount(labels.ravel(), minlength=len(self._counts))
        self._labeled = end

    def picture(self, classes: Sequence[str], palette: np.ndarray) -> Image.Image:
        """The small image beside its labels, as :func:`icnn_zoo.io.label_pictures.segmentation_picture`."""
        rows, cols = (np.bincount(squares) for squares in self._squares)
        means = self._sums / (rows[:, None, None] * cols[:, None])
        shares = self._counts / self._counts.sum()
        image = means.round().astype(np.uint8)
        return segmentation_picture(image, np.concatenate(self._labels), classes, palette, shares=shares)

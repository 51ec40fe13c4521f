"""Rectangles on a page, in pixels: grouped, joined, cut and painted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

TOLERANCE = 2.0  # in pixels: ends of rules at one place


class Box(NamedTuple):
    """A rectangle in pixels of the rendered page, right and bottom exclusive."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top


def as_array(boxes: Sequence[Box]) -> np.ndarray:
    """Boxes as float32 [N, 4]."""
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)


def group_lines(boxes: np.ndarray, gap: float) -> list[np.ndarray]:
    """Groups of boxes that share most of their height and follow each other with no wider ``gap``."""
    top, bottom = boxes[:, 1], boxes[:, 3]
    overlap = np.minimum(bottom[:, None], bottom) - np.maximum(top[:, None], top)
    apart = np.maximum(boxes[:, None, 0], boxes[:, 0]) - np.minimum(boxes[:, None, 2], boxes[:, 2])
    least = np.minimum((bottom - top)[:, None], bottom - top)
    return linked_groups((overlap >= 0.4 * least) & (apart <= gap))


def group_near(boxes: np.ndarray, across: float, down: float) -> list[np.ndarray]:
    """Groups of boxes with gaps of at most so many pixels."""
    apart = np.maximum(boxes[:, None, :2], boxes[:, :2]) - np.minimum(boxes[:, None, 2:], boxes[:, 2:])
    return linked_groups((apart[..., 0] <= across) & (apart[..., 1] <= down))


def linked_groups(linked: np.ndarray) -> list[np.ndarray]:
    """Indices by connected component of a graph, given as bool [N, N]."""
    if not len(linked):
        return []
    number, labels = connected_components(coo_array(linked), directed=False)
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.searchsorted(labels[order], np.arange(1, number)))


def levels(values: Sequence[float], tolerance: float = TOLERANCE) -> list[float]:
    """Values without those that are nearly a smaller one."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value - kept[-1] > tolerance:
            kept.append(value)
    return kept


def union(boxes: Sequence[Box]) -> Box:
    """The box around boxes."""
    array = as_array(boxes)
    return Box(*array[:, :2].min(axis=0).tolist(), *array[:, 2:].max(axis=0).tolist())


def joined(boxes: Sequence[Box]) -> list[Box]:
    """Boxes, those that overlap as one."""
    result = list(boxes)
    while True:
        groups = group_near(as_array(result), 0.0, 0.0)
        if len(groups) == len(result):
            return result
        result = [union([result[i] for i in group]) for group in groups]


def cut(box: Box, by: Box) -> Box:
    """What two boxes have in common; of negative width or height if nothing."""
    return Box(max(box.left, by.left), max(box.top, by.top), min(box.right, by.right), min(box.bottom, by.bottom))


def area(box: Box) -> float:
    """Pixels in a box."""
    return max(box.width, 0.0) * max(box.height, 0.0)


def share_inside(box: Box, region: Box) -> float:
    """The share of a box that lies in a region."""
    return area(cut(box, region)) / max(area(box), 1e-6)


def is_inside(box: Box, region: Box, pad: float = 2.0) -> bool:
    """Whether a box lies in a region made larger by ``pad``."""
    return (
        box.left >= region.left - pad
        and box.right <= region.right + pad
        and box.top >= region.top - pad
        and box.bottom <= region.bottom + pad
    )


def fill(mask: np.ndarray, box: Box, value: int, pad: float = 0.0) -> None:
    """Paints every pixel that a box touches, made larger by ``pad``."""
    top, left = max(int(np.floor(box.top - pad)), 0), max(int(np.floor(box.left - pad)), 0)
    mask[top : int(np.ceil(box.bottom + pad)), left : int(np.ceil(box.right + pad))] = value


def close_gaps(layer: np.ndarray, across: int, down: int) -> None:
    """Fills gaps of less than so many pixels, along the lines first."""
    for shape in ((1, across), (down, 1)):
        cv2.morphologyEx(layer, cv2.MORPH_CLOSE, np.ones(shape, np.uint8), dst=layer)

"""Composing scenes: layers warped onto a canvas together with their mask, procedural textures, colors, noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


# Part of a scene's seed. Prediction shows validation scenes, so that the test artists stay unseen.
SPLIT_SEEDS = {"train": 0, "val": 1, "test": 2, "predict": 1}


class Scene:
    """A picture that grows by pasting objects, later ones over earlier ones, and its mask.

    Args:
        background: float32 [H, W, 3], RGB in 0..255. The scene takes it over.

    Attributes:
        image: float32 [H, W, 3].
        mask: uint8 [H, W], 0 where only background is seen.
    """

    def __init__(self, background: np.ndarray) -> None:
        self.image = background
        self.mask: np.ndarray = np.zeros(background.shape[:2], dtype=np.uint8)

    def paste(self, layer: np.ndarray, placement: Placement, colors: np.ndarray, label: int) -> None:
        """Draws a layer and writes its label where its alpha is above one half.

        Args:
            layer: uint8 [h, w, C]: coverages, such as premultiplied RGB and alpha.
            placement: Where its center goes, how long its longer side becomes, how it is turned.
            colors: float [4, C]: premultiplied R, G, B and alpha as linear functions of the channels.
            label: Class index, above 0.
        """
        height, width = self.mask.shape
        rows, cols = layer.shape[:2]
        matrix = placement.matrix(rows, cols)
        corners = matrix @ np.array([[0, cols, 0, cols], [0, 0, rows, rows], [1, 1, 1, 1]])
        left, top = (corners.min(axis=1).astype(int) - 1).tolist()
        right, bottom = (corners.max(axis=1).astype(int) + 2).tolist()
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        if right <= left or bottom <= top:
            return
        matrix[:, 2] -= (left, top)
        warped = cv2.warpAffine(layer, matrix, (right - left, bottom - top), flags=cv2.INTER_LINEAR)
        warped = cv2.transform(warped.astype(np.float32), np.asarray(colors, dtype=np.float32))
        alpha = np.clip(warped[..., 3:], 0, 255)
        image = self.image[top:bottom, left:right]
        image *= 1 - alpha / 255
        image += np.clip(warped[..., :3], 0, alpha)
        self.mask[top:bottom, left:right][alpha[..., 0] > 127.5] = label

    def finish(self, rng: np.random.Generator, noise: float) -> tuple[np.ndarray, np.ndarray]:
        """Adds Gaussian noise with a standard deviation of ``noise`` (of the range 0 to 1): uint8 image, and mask."""
        if noise > 0:
            self.image += rng.standard_normal(self.image.shape, dtype=np.float32) * np.float32(255 * noise)
        return np.clip(np.rint(self.image), 0, 255).astype(np.uint8), self.mask


@dataclass(frozen=True)
class Placement:
    """Where a layer goes: center and the longer side's length in pixels, degrees of rotation, mirrored or not."""

    row: float
    col: float
    side: float
    degrees: float
    mirror: bool

    def matrix(self, height: int, width: int) -> np.ndarray:
        """The 2x3 matrix that takes a layer's (x, y) to the scene's."""
        scale = self.side / max(height, width)
        cos, sin = scale * np.cos(np.radians(self.degrees)), scale * np.sin(np.radians(self.degrees))
        turn = np.array([[cos, -sin], [sin, cos]]) * ([-1, 1] if self.mirror else [1, 1])
        # Pixel centers lie at whole numbers.
        offset = np.array([self.col, self.row]) - turn @ np.array([(width - 1) / 2, (height - 1) / 2])
        return np.column_stack([turn, offset])


def draw_placement(
    rng: np.random.Generator, height: int, width: int, side: Sequence[float], degrees: float
) -> Placement:
    """A random placement with its center in the scene.

    Args:
        rng: Source of randomness.
        height: Of the scene.
        width: Of the scene.
        side: Least and greatest length of an object's longer side, as shares of the scene's shorter side; log-uniform.
        degrees: Greatest rotation to either side.
    """
    length = float(np.exp(rng.uniform(np.log(side[0]), np.log(side[1])))) * min(height, width)
    # Up to about a quarter of an object may leave the scene.
    margin = min(length / 4, height / 2, width / 2)
    return Placement(
        row=rng.uniform(margin, height - margin),
        col=rng.uniform(margin, width - margin),
        side=length,
        degrees=rng.uniform(-degrees, degrees),
        mirror=bool(rng.random() < 0.5),
    )


def check_scene_arguments(
    objects: Sequence[int], object_size: Sequence[float], noise: float, eval_seed: int, **lengths: int
) -> None:
    """Raises ValueError for what no scene can be composed of."""
    for split, length in lengths.items():
        if length < 1:
            raise ValueError(f"`num_{split}` must be at least 1; got {length}.")
    if len(objects) != 2 or not 0 <= objects[0] <= objects[1]:
        raise ValueError(f"`objects` must be the least and the greatest number of objects; got {tuple(objects)}.")
    if len(object_size) != 2 or not 0 < object_size[0] <= object_size[1]:
        raise ValueError(f"`object_size` must be two positive shares, the smaller first; got {tuple(object_size)}.")
    if noise < 0:
        raise ValueError(f"`noise` must not be negative; got {noise}.")
    if eval_seed < 0:
        raise ValueError(f"`eval_seed` must not be negative; got {eval_seed}.")


def pyramid(layer: np.ndarray, least: int = 16) -> list[np.ndarray]:
    """A layer and its halvings by area, down to ``least`` pixels: so that small objects are drawn without aliasing."""
    levels = [layer]
    while max(levels[-1].shape[:2]) >= 2 * least:
        height, width = (max((side + 1) // 2, 1) for side in levels[-1].shape[:2])
        levels.append(cv2.resize(levels[-1], (width, height), interpolation=cv2.INTER_AREA))
    return levels


def level(levels: Sequence[np.ndarray], side: float) -> np.ndarray:
    """The smallest layer of a pyramid that need not be enlarged by more than a quarter."""
    fitting = [layer for layer in levels if max(layer.shape[:2]) * 1.25 >= side]
    return fitting[-1] if fitting else levels[0]


def color_jitter(rng: np.random.Generator, strength: float) -> np.ndarray:
    """A random change of hue, saturation, contrast and brightness: float32 [4, 4] for premultiplied RGB and alpha.

    Args:
        rng: Source of randomness.
        strength: 0 changes nothing, 1 is as much as leaves most things recognizable.
    """
    hue = rng.uniform(-0.5, 0.5) * strength
    saturation, contrast = 1 + rng.uniform(-0.6, 0.6, 2) * strength
    brightness = rng.uniform(-0.25, 0.25) * strength
    cos, sin = np.cos(hue), np.sin(hue)
    third, root = (1 - cos) / 3, np.sqrt(1 / 3) * sin
    turn = np.array(
        [
            [cos + third, third - root, third + root],
            [third + root, cos + third, third - root],
            [third - root, third + root, cos + third],
        ]
    )
    mix = saturation * np.eye(3) + (1 - saturation) * _LUMA
    matrix = np.eye(4, dtype=np.float32)
    matrix[:3, :3] = contrast * mix @ turn
    matrix[:3, 3] = (1 - contrast) / 2 + brightness
    return matrix


def texture(rng: np.random.Generator, height: int, width: int, contrast: float = 1.0) -> np.ndarray:
    """A procedural picture of clouds, waves or cells in random colors: float32 [height, width, 3], RGB in 0..255.

    Args:
        rng: Source of randomness.
        height: Pixels.
        width: Pixels.
        contrast: 1 spans between colors drawn from all of RGB, 0 is one plain color.
    """
    field = _clouds(rng, height, width)
    kind = rng.integers(3)
    if kind == 1:
        rows, cols = np.mgrid[0:height, 0:width].astype(np.float32) / max(height, width)
        angle, waves, warp = rng.uniform(0, np.pi), rng.uniform(3, 25), rng.uniform(0.0, 4.0)
        phase = waves * (rows * np.float32(np.sin(angle)) + cols * np.float32(np.cos(angle)))
        field = 0.5 + 0.5 * np.sin(2 * np.pi * phase + warp * 4 * field)
    elif kind == 2:
        field = np.abs(field - _clouds(rng, height, width)) * 2
    colors = rng.uniform(0, 255, (3, 3)).astype(np.float32)
    colors = colors[0] + contrast * (colors - colors[0])
    lower, upper = np.clip(1 - 2 * field, 0, 1), np.clip(2 * field - 1, 0, 1)
    weights = np.stack([lower, 1 - lower - upper, upper], axis=-1).astype(np.float32)
    return cv2.transform(weights, np.ascontiguousarray(colors.T))


def _clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise summed over octaves: float32 [height, width], about 0 to 1."""
    total = np.zeros((height, width), dtype=np.float32)
    roughness, cells, weight, weights = rng.uniform(0.35, 0.75), int(rng.integers(2, 6)), 1.0, 0.0
    for _ in range(4):
        grid = rng.random((cells, cells), dtype=np.float32)
        total += np.float32(weight) * cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)
        weights += weight
        weight *= roughness
        cells *= 2
    return (total / np.float32(weights) - np.float32(0.5)) * np.float32(1.6) + np.float32(0.5)

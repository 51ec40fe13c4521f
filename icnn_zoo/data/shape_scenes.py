"""Procedural scenes of geometric shapes: nothing to download, any image size, any number of classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import cv2
import numpy as np

from icnn_zoo.data.datamodule import SegmentationDataModule, Split
from icnn_zoo.data.samples import Sample
from icnn_zoo.data.scenes import SPLIT_SEEDS, Scene, check_scene_arguments, draw_placement, level, pyramid, texture
from icnn_zoo.data.transforms import Size, size_pair

Form = Callable[[np.ndarray, np.ndarray], Any]  # x and y to where the form is
_TEMPLATE_SIDE = 256


def _polygon(sides: int) -> Form:
    def form(x: np.ndarray, y: np.ndarray) -> Any:
        sector = 2 * np.pi / sides
        angle = np.mod(np.arctan2(y, x), sector) - sector / 2
        return np.hypot(x, y) * np.cos(angle) < np.cos(sector / 2)

    return form


def _star(points: int, inner: float) -> Form:
    half = np.pi / points
    corner = inner * np.cos(half), inner * np.sin(half)

    def form(x: np.ndarray, y: np.ndarray) -> Any:
        angle = np.abs(np.mod(np.arctan2(y, x) + half, 2 * half) - half)  # from the nearest point
        along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
        return (1 - along) * corner[1] > across * (1 - corner[0])

    return form


def _lobes(number: int, depth: float) -> Form:
    return lambda x, y: np.hypot(x, y) < 1 - depth + depth * np.cos(number * np.arctan2(y, x))


def _box(x: np.ndarray, y: np.ndarray, left: float, right: float, top: float, bottom: float) -> Any:
    return (x > left) & (x < right) & (y > top) & (y < bottom)


# Each form is given on the square from -1 to 1. The first ones are the easiest to tell apart.
FORMS: dict[str, Form] = {
    "disk": lambda x, y: np.hypot(x, y) < 1,
    "triangle": _polygon(3),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.78) < 0.22,
    "star": _star(5, 0.42),
    "square": _polygon(4),
    "crescent": lambda x, y: (np.hypot(x, y) < 1) & (np.hypot(x - 0.5, y) > 0.8),
    "bowtie": lambda x, y: (abs(y) < 0.08 + 0.75 * abs(x)) & (abs(x) < 0.9),
    "arrow": lambda x, y: _box(x, y, -1, 0.1, -0.25, 0.25) | ((x > 0) & (abs(y) < 0.9 * (1 - x))),
    "corner": lambda x, y: _box(x, y, -0.8, 0.8, -0.8, 0.8) & ~_box(x, y, -0.2, 1, -0.2, 1),
    "tee": lambda x, y: _box(x, y, -0.9, 0.9, -0.9, -0.3) | _box(x, y, -0.28, 0.28, -0.9, 0.9),
    "heart": lambda x, y: (
        (1.3 * x) ** 2 + (1.25 * y - 0.1) ** 2 - 1 < np.cbrt((1.3 * x) ** 2 * np.clip(-1.25 * y + 0.1, -2, 2) ** 3)
    ),
    "drop": lambda x, y: (np.hypot(x, y - 0.35) < 0.62) | ((abs(x) < 0.517 * (y + 1)) & (y < 0.065)),
    "flower": _lobes(8, 0.2),
    "zed": lambda x, y: _box(x, y, -0.9, 0.25, -0.7, -0.1) | _box(x, y, -0.25, 0.9, -0.12, 0.5),
    "hexagon": _polygon(6),
}
_TEXTURES: dict[str, Form] = {
    "": lambda x, y: np.zeros(x.shape, dtype=bool),
    "striped ": lambda x, y: np.sin(11 * y) > 0,
    "checked ": lambda x, y: np.sin(9 * x) * np.sin(9 * y) > 0,
    "dotted ": lambda x, y: np.hypot(np.mod(x, 0.5) - 0.25, np.mod(y, 0.5) - 0.25) < 0.16,
}
_CORES = ("", " with a core")
_RIMS = ("", "rimmed ")
SHAPE_NAMES = tuple(
    f"{rim}{pattern}{form}{core}" for core in _CORES for rim in _RIMS for pattern in _TEXTURES for form in FORMS
)


class ShapesDataModule(SegmentationDataModule):
    """Scenes of shapes in random colors, sizes, rotations and order before a random texture.

    A class is a form (disk, triangle, cross, ...), beyond 16 of them a form and its pattern of two colors ("striped
    disk"). Colors are random, so only the form tells. Training scene i is a pure function of (seed, i), one of another
    split of (eval_seed, split, i); splits never share a scene's seed. Prediction runs on the validation scenes.

    Args:
        image_size: Pixels of a scene: one number or (height, width).
        num_classes: Classes, background included: 2 to 255.
        num_train: Training scenes.
        num_val: Validation scenes.
        num_test: Test scenes.
        objects: Least and greatest number of objects in a scene.
        object_size: Least and greatest diameter of an object as shares of the scene's shorter side.
        noise: Standard deviation of the Gaussian noise, of a range 0 to 1.
        background_contrast: 0 for one plain color behind the objects, 1 for the liveliest textures.
        crop_size: Training crop; None for ``image_size``.
        eval_seed: Decides the scenes of validation and testing, which are the same whatever ``seed`` a training has.
        **kwargs: Those of :class:`SegmentationDataModule`.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> data = ShapesDataModule(image_size=64, num_classes=6, num_workers=0)
        >>> data.classes
        ('background', 'disk', 'triangle', 'cross', 'ring', 'star')
    """

    def __init__(
        self,
        *,
        image_size: Size = 96,
        num_classes: int = 6,
        num_train: int = 2000,
        num_val: int = 100,
        num_test: int = 100,
        objects: tuple[int, int] = (1, 3),
        object_size: tuple[float, float] = (0.35, 0.7),
        noise: float = 0.03,
        background_contrast: float = 0.3,
        crop_size: Size | None = None,
        eval_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if not 2 <= num_classes <= 255:
            raise ValueError(
                f"`num_classes` must be 2 to 255, background included (255 is not a label); got {num_classes}."
            )
        check_scene_arguments(objects, object_size, noise, eval_seed, train=num_train, val=num_val, test=num_test)
        if not 0 <= background_contrast <= 1:
            raise ValueError(f"`background_contrast` must be 0 to 1; got {background_contrast}.")
        self.image_size = size_pair("image_size", image_size)
        self._classes = ("background", *SHAPE_NAMES[: num_classes - 1])
        super().__init__(crop_size=self.image_size if crop_size is None else crop_size, **kwargs)
        self.lengths: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test, "predict": num_val}
        self.eval_seed = eval_seed
        self.objects = objects
        self.object_size = object_size
        self.noise = noise
        self.background_contrast = background_contrast

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    def make_dataset(self, split: Split) -> ShapesDataset:
        return ShapesDataset(self, split)


class ShapesDataset:
    """The scenes of one split of a :class:`ShapesDataModule`."""

    def __init__(self, data: ShapesDataModule, split: Split) -> None:
        self.split = split
        self.length = data.lengths[split]
        self.seed = data.seed if split == "train" else data.eval_seed
        self.num_classes = data.num_classes
        self.image_size = data.image_size
        self.objects = data.objects
        self.object_size = data.object_size
        self.noise = data.noise
        self.background_contrast = data.background_contrast

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Sample:
        rng = np.random.default_rng((self.seed, SPLIT_SEEDS[self.split], index))
        height, width = self.image_size
        scene = Scene(texture(rng, height, width, self.background_contrast))
        for _ in range(rng.integers(self.objects[0], self.objects[1] + 1)):
            label = int(rng.integers(1, self.num_classes))
            placement = draw_placement(rng, height, width, self.object_size, degrees=180)
            colors = np.ones((4, 2))
            colors[:3, 0] = _contrasting(rng, scene.image.mean(axis=(0, 1)))
            colors[:3, 1] = _contrasting(rng, 255 * colors[:3, 0])
            scene.paste(level(_template(label - 1), placement.side), placement, colors, label)
        image, mask = scene.finish(rng, self.noise)
        return {"image": image, "mask": mask, "name": f"shapes-{self.split}-{index:06d}"}


def _contrasting(rng: np.random.Generator, color: np.ndarray) -> np.ndarray:
    """Of four random RGB colors in 0..1 the one farthest from a given one in 0..255."""
    colors: np.ndarray = rng.random((4, 3))
    farthest: np.ndarray = colors[np.linalg.norm(colors - color / 255, axis=1).argmax()]
    return farthest


@cache
def _template(index: int) -> list[np.ndarray]:
    """A shape's pyramid of uint8 [h, w, 2]: how far each of its two colors covers a pixel."""
    index, form = divmod(index, len(FORMS))
    index, pattern = divmod(index, len(_TEXTURES))
    core, rim = divmod(index, len(_RIMS))
    # One pixel of margin keeps the silhouette's border inside the layer.
    axis = (np.arange(_TEMPLATE_SIDE) - (_TEMPLATE_SIDE - 1) / 2) / (_TEMPLATE_SIDE / 2 - 2)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    inside = list(FORMS.values())[form](x, y)
    second = list(_TEXTURES.values())[pattern](x, y)
    if rim:
        kernel = np.ones((31, 31), np.uint8)
        second ^= cv2.erode(inside.astype(np.uint8), kernel, borderValue=0) == 0
    if core:
        # The point deepest inside, since not every form holds its middle.
        depth = cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 5)
        row, col = np.unravel_index(int(depth.argmax()), depth.shape)
        second ^= np.hypot(y - axis[row], x - axis[col]) < 0.75 * depth.max() / (_TEMPLATE_SIDE / 2)
    return pyramid(np.stack([inside & ~second, inside & second], axis=-1).astype(np.uint8) * 255)

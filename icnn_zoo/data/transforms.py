"""The paper's training augmentation: scale, pad right and bottom, crop at random, mirror; built on albumentations."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing it would ask the network for newer versions

import albumentations as A
import cv2

from icnn_zoo.io.files import require_file

Size = int | Sequence[int]
IMAGENET_FILL = (124, 116, 104)  # the ImageNet mean in 8 bits, RGB


def size_pair(name: str, size: Size) -> tuple[int, int]:
    """(height, width) of a size given as one number or as a pair.

    Args:
        name: The argument's name, for the error.
        size: Pixels: one number for a square, or (height, width).

    Raises:
        ValueError: Not one or two positive integers.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(not isinstance(side, int) or side < 1 for side in pair):
        raise ValueError(f"`{name}` must be a positive number of pixels or a pair (height, width); got {size!r}.")
    return pair[0], pair[1]


class TrainTransform:
    """Scales, pads, crops and mirrors an image and its mask: a pure function of the sample and a seed.

    The image is scaled bilinearly and the mask by nearest neighbor, to ``int(side * scale)``. Where the result is
    smaller than the crop, it is padded at the right and the bottom, the image with ``fill`` and the mask with
    ``ignore_index``.

    Args:
        crop_size: Pixels of the crop: one number or (height, width).
        scales: Factors to choose from; for ``scale_mode="uniform"`` the two ends of the range.
        scale_mode: "choice" draws one of ``scales``, "uniform" any factor between two.
        mirror: Mirrors left to right with probability 0.5.
        fill: Value of each channel, 0 to 255, of padded pixels. The default is the ImageNet mean.
        ignore_index: Label of padded pixels.
        augmentations: A file of albumentations' own (``A.save``, JSON or YAML) to apply first; None for none. Float
            images are given to them in 0 to 1, beyond which many of them cut off.

    Attributes:
        fill: As given.

    Raises:
        ValueError: A size that is not positive, no scale, a scale that is not positive, or an unknown mode.

    Example:
        >>> transform = TrainTransform(crop_size=321)
        >>> image, mask = np.zeros((100, 200, 3), np.uint8), np.zeros((100, 200), np.uint8)
        >>> image, mask = transform(image, mask, seed=7)
        >>> image.shape, mask.shape
        ((321, 321, 3), (321, 321))
    """

    def __init__(
        self,
        crop_size: Size,
        scales: Sequence[float] = (0.5, 0.75, 1.0, 1.25, 1.5),
        scale_mode: Literal["choice", "uniform"] = "choice",
        mirror: bool = True,
        fill: Sequence[int] = IMAGENET_FILL,
        ignore_index: int = 255,
        augmentations: str | Path | None = None,
    ) -> None:
        height, width = size_pair("crop_size", crop_size)
        if not scales or min(scales) <= 0:
            raise ValueError(f"`scales` must be one or more positive factors; got {tuple(scales)}.")
        if scale_mode not in ("choice", "uniform"):
            raise ValueError(f"`scale_mode` must be choice or uniform; got {scale_mode!r}.")
        if scale_mode == "uniform" and len(scales) != 2:
            raise ValueError(f"`scales` must be the range's two ends for scale_mode uniform; got {tuple(scales)}.")
        if not len(fill) or min(fill) < 0 or max(fill) > 255:
            raise ValueError(f"`fill` must be one number for each channel, 0 to 255; got {tuple(fill)}.")
        self.fill = tuple(fill)
        self._own = A.Compose([] if augmentations is None else [read_augmentations(augmentations)])
        self._compose = A.Compose(
            [
                _scale(scales) if scale_mode == "uniform" else A.OneOf([_scale((s, s)) for s in scales], p=1.0),
                _padding((height, width), tuple(fill), ignore_index),
                A.RandomCrop(height, width),
                A.HorizontalFlip(p=0.5 if mirror else 0.0),
            ]
        )

    def __call__(self, image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Augments one sample.

        Args:
            image: uint8 or float32 [H, W, C], 0 to 255.
            mask: uint8 [H, W], class indices.
            seed: Decides everything that is random; at least 0 and below 2**32.

        Returns:
            Image [crop height, crop width, C] and mask [crop height, crop width].
        """
        # One generator for all: set_random_seed would give each augmentation its own, all from this one seed, so that
        # a crop in the upper half would always be mirrored.
        generators = np.random.default_rng(seed), random.Random(seed)
        sample = {"image": image, "mask": mask}
        if self._own.transforms:
            # Albumentations takes floats to be in 0 to 1.
            scale = np.float32(255) if image.dtype == np.float32 else None
            self._own.set_random_state(*generators)
            sample = self._own(image=image if scale is None else image / scale, mask=mask)
            if scale is not None:
                sample["image"] = sample["image"] * scale
        self._compose.set_random_state(*generators)
        sample = self._compose(**sample)
        return sample["image"], sample["mask"]


def read_augmentations(path: str | Path) -> A.BasicTransform | A.BaseCompose:
    """Augmentations from a file that ``albumentations.save`` wrote, JSON or YAML.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else; the message says what albumentations says of it.
    """
    try:
        file = require_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"`augmentations`: {error}") from None
    try:
        found = A.load(file, "json" if file.suffix == ".json" else "yaml")
        if not isinstance(found, (A.BasicTransform, A.BaseCompose)):
            raise TypeError(f"it holds a {type(found).__name__}")
    except Exception as error:  # of many kinds, whatever the file leads to
        raise ValueError(
            f"`augmentations`: {str(path)!r} is not a file of albumentations.save (.json or .yaml): {error}"
        ) from error
    return found


def _padding(size: tuple[int, int], fill: tuple[int, ...], ignore_index: int) -> A.BasicTransform:
    if len(fill) <= 4:
        return A.PadIfNeeded(
            min_height=size[0],
            min_width=size[1],
            position="top_left",
            border_mode=cv2.BORDER_CONSTANT,
            fill=fill,
            fill_mask=ignore_index,
        )
    # OpenCV knows colors of four channels at most.
    image, mask = partial(_padded, size=size, fill=fill), partial(_padded, size=size, fill=ignore_index)
    return A.Lambda(image=image, mask=mask, name="padding", p=1.0)


def _padded(values: np.ndarray, *, size: tuple[int, int], fill: int | tuple[int, ...], **_: object) -> np.ndarray:
    rows, cols = values.shape[:2]
    padded = np.empty((max(rows, size[0]), max(cols, size[1]), *values.shape[2:]), values.dtype)
    padded[:] = np.asarray(fill, values.dtype)
    padded[:rows, :cols] = values
    return padded


def _scale(ends: Sequence[float]) -> A.RandomScale:
    return A.RandomScale(
        scale_limit=(min(ends) - 1, max(ends) - 1),
        interpolation=cv2.INTER_LINEAR,
        mask_interpolation=cv2.INTER_NEAREST,
        p=1.0,
    )

"""PASCAL VOC's 20 classes drawn by eight open icon sets, composed on photographs: unseen artists are unseen domains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from icnn_zoo.data.datamodule import SegmentationDataModule, Split
from icnn_zoo.data.folders import files_in, read_manifest
from icnn_zoo.data.samples import Sample
from icnn_zoo.data.scenes import (
    SPLIT_SEEDS,
    Scene,
    check_scene_arguments,
    color_jitter,
    draw_placement,
    level,
    pyramid,
)
from icnn_zoo.data.transforms import Size, size_pair
from icnn_zoo.data.voc_classes import VOC_CLASSES
from icnn_zoo.io.files import user_path

FOLDER = "drawn-voc"
FORMAT = 1
_SPLIT_FOLDERS: dict[Split, str] = {"train": "train", "val": "val", "test": "test", "predict": "val"}


class DrawnVOCDataModule(SegmentationDataModule):
    """Scenes of drawn objects of the 20 PASCAL VOC classes on photographs.

    Six icon sets are for training, noto-v1 is for validation and openmoji for testing: every split has its own artists
    and its own photographs. Objects vary in size, rotation, mirror image and color, and hide each other. Training
    scene i is a pure function of (seed, i), one of another split of (eval_seed, split, i), and of the prepared files.
    Prediction runs on the validation scenes.

    Make the files once with ``icnn-zoo prepare drawn-voc --root data``.

    Args:
        root: The folder given to ``icnn-zoo prepare drawn-voc``.
        image_size: Pixels of a scene: one number or (height, width).
        num_train: Training scenes.
        num_val: Validation scenes.
        num_test: Test scenes.
        objects: Least and greatest number of objects in a scene.
        object_size: Least and greatest length of an object's longer side as shares of the scene's shorter side;
            log-uniform.
        rotation: Greatest rotation to either side, in degrees.
        jitter: Strength of the random color changes of objects and backgrounds: 0 for none, 1 for as much as leaves
            most things recognizable.
        noise: Greatest standard deviation of the Gaussian noise, of a range 0 to 1.
        crop_size: Training crop; None for ``image_size``.
        eval_seed: Decides the scenes of validation and testing, which are the same whatever ``seed`` a training has.
        **kwargs: Those of :class:`SegmentationDataModule`.

    Raises:
        ValueError: An argument out of its range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] = "data",
        *,
        image_size: Size = 160,
        num_train: int = 10000,
        num_val: int = 400,
        num_test: int = 400,
        objects: tuple[int, int] = (1, 4),
        object_size: tuple[float, float] = (0.25, 0.9),
        rotation: float = 25.0,
        jitter: float = 0.5,
        noise: float = 0.04,
        crop_size: Size | None = None,
        eval_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_scene_arguments(objects, object_size, noise, eval_seed, train=num_train, val=num_val, test=num_test)
        for name, value, greatest in (("rotation", rotation, 180), ("jitter", jitter, 1)):
            if not 0 <= value <= greatest:
                raise ValueError(f"`{name}` must be 0 to {greatest}; got {value}.")
        self.image_size = size_pair("image_size", image_size)
        super().__init__(crop_size=self.image_size if crop_size is None else crop_size, **kwargs)
        self.folder = user_path(root) / FOLDER
        self.lengths: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test, "predict": num_val}
        self.eval_seed = eval_seed
        self.objects = objects
        self.object_size = object_size
        self.rotation = rotation
        self.jitter = jitter
        self.noise = noise

    @property
    def classes(self) -> tuple[str, ...]:
        return VOC_CLASSES

    def prepare_data(self) -> None:
        """Checks that the prepared files are there and complete; it never downloads.

        Raises:
            FileNotFoundError: They are not there, or some are missing; the message names the command that makes them.
            ValueError: They were made by another version of this package.
        """
        check_folder(self.folder)

    def make_dataset(self, split: Split) -> DrawnVOCDataset:
        check_folder(self.folder)
        return DrawnVOCDataset(self, split)


class DrawnVOCDataset:
    """The scenes of one split of a :class:`DrawnVOCDataModule`; icons and photographs are held in memory."""

    def __init__(self, data: DrawnVOCDataModule, split: Split) -> None:
        self.split = split
        self.length = data.lengths[split]
        self.seed = data.seed if split == "train" else data.eval_seed
        self.image_size = data.image_size
        self.objects = data.objects
        self.object_size = data.object_size
        self.rotation = data.rotation
        self.jitter = data.jitter
        self.noise = data.noise
        folder = _SPLIT_FOLDERS[split]
        largest = self.object_size[1] * min(self.image_size)
        self.icons = [
            [_read_icon(path, largest) for path in files_in(data.folder / "icons" / folder / name, ".png").values()]
            for name in VOC_CLASSES[1:]
        ]
        self.photographs, self.textures = (
            [
                pyramid(_read(path))
                for name, path in files_in(data.folder / "backgrounds" / folder, ".png").items()
                if name.startswith(f"{kind}-")
            ]
            for kind in ("photograph", "texture")
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Sample:
        rng = np.random.default_rng((self.seed, SPLIT_SEEDS[self.split], index))
        height, width = self.image_size
        scene = Scene(self._background(rng))
        for _ in range(rng.integers(self.objects[0], self.objects[1] + 1)):
            label = int(rng.integers(1, len(VOC_CLASSES)))
            icons = self.icons[label - 1]
            icon = icons[rng.integers(len(icons))]
            placement = draw_placement(rng, height, width, self.object_size, self.rotation)
            scene.paste(level(icon, placement.side), placement, color_jitter(rng, self.jitter), label)
        image, mask = scene.finish(rng, rng.uniform(0, self.noise))
        return {"image": image, "mask": mask, "name": f"drawn-voc-{self.split}-{index:06d}"}

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        """A random part of a picture, a photograph two times of three, mirrored and recolored: float32 [H, W, 3]."""
        height, width = self.image_size
        pictures = self.textures if rng.random() < 1 / 3 else self.photographs
        levels = pictures[rng.integers(len(pictures))]
        share = min(levels[0].shape[0] / height, levels[0].shape[1] / width) * rng.uniform(0.4, 1.0)
        halvings = min(max(int(np.log2(share)), 0), len(levels) - 1)
        picture, share = levels[halvings], share / 2**halvings
        rows, cols = max(int(height * share), 1), max(int(width * share), 1)
        top = rng.integers(picture.shape[0] - rows + 1)
        left = rng.integers(picture.shape[1] - cols + 1)
        part = picture[top : top + rows, left : left + cols]
        if rng.random() < 0.5:
            part = part[:, ::-1]
        part = cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.float32)
        matrix = color_jitter(rng, self.jitter)[:3]
        matrix[:, 3] *= 255  # of an opaque picture
        return np.clip(cv2.transform(part, matrix), 0, 255)


def check_folder(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder, after checking that the files it counts are there.

    Raises:
        FileNotFoundError: The folder or files of it are missing.
        ValueError: It has another format than this version of the package makes.
    """
    command = f"icnn-zoo prepare {FOLDER} --root {folder.parent}"
    manifest = read_manifest(folder, FORMAT, command)
    wanted = {f"icons/{split}/{name}": n for split, counts in manifest["icons"].items() for name, n in counts.items()}
    wanted |= {f"backgrounds/{split}": number for split, number in manifest["backgrounds"].items()}
    for part, number in wanted.items():
        found = len(files_in(folder / part, ".png"))
        if found != number:
            raise FileNotFoundError(
                f"{str(folder / part)!r} must hold {number} pictures and holds {found}. "
                f"Remove {str(folder)!r} and run: {command}"
            )
    return manifest


def _read(path: Path) -> np.ndarray:
    # Not cv2.imread, which warns instead of failing.
    picture = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if picture is None:
        raise ValueError(f"{str(path)!r} is not a readable image: remove its dataset and prepare it again.")
    order = cv2.COLOR_BGRA2RGBA if picture.shape[2] == 4 else cv2.COLOR_BGR2RGB
    return cv2.cvtColor(picture, order)


def _read_icon(path: Path, largest: float) -> list[np.ndarray]:
    """An icon's pyramid in premultiplied RGBA, without the levels that are larger than needed."""
    icon = _read(path)
    alpha = icon[..., 3:].astype(np.uint16)
    icon[..., :3] = (icon[..., :3] * alpha + 127) // 255
    levels = pyramid(icon)
    needed = next(place for place, layer in enumerate(levels) if layer is level(levels, largest))
    return levels[needed:]

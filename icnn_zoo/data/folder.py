"""Your own images and masks; every file is checked before training."""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from icnn_zoo.data.datamodule import Split
from icnn_zoo.data.file_datamodule import FileDataModule, Item
from icnn_zoo.data.folders import files_below
from icnn_zoo.data.inspection import SHOWN_PROBLEMS, survey
from icnn_zoo.data.label_files import ColorTable, class_table, read_labels
from icnn_zoo.data.layouts import FilePatterns, is_pattern, read_colors
from icnn_zoo.data.transforms import Size
from icnn_zoo.io.files import read_text, user_path

_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_MASK_ENDINGS = (".png", ".bmp", ".tif", ".tiff")
_LIKE_ANY = {"train": 0, "val": 0, "test": 0}  # no number is official


class FolderDataModule(FileDataModule):
    """Images in one folder, masks of the same names in another.

    A split is a subfolder of both (``images/train``, ``masks/train``, with folders below if you like, links too) or,
    where ``root/train.txt`` exists, a list of names in them, one a line, without ending. Names that begin with a dot
    are left out. A mask is a PNG, BMP or TIFF of class numbers, as palette or gray picture; 255 is ignored. Both may
    lie in one folder: masks are then told by ``mask_suffix``, or as a.png beside a.jpg. ``fit`` needs train and val;
    ``test`` takes val where there is no test.

    Before anything runs, every image that the run needs must have a mask and every mask an image, and sizes and values
    of all these masks are checked, some milliseconds a file.

    Args:
        root: Folder that holds both.
        class_names: Names by class index, background first. At least 2.
        images: Folder of images, relative to ``root``; or a pattern such as "{split}/*_image.tif", with one "*" in
            the file's name: what image and mask have in common.
        masks: Folder of masks, relative to ``root``; or a pattern such as "{split}/{stem}_mask.png", in which "{stem}"
            is that common part. A pattern without folders is beside the image.
        mask_suffix: What a mask's name has between the image's name and its ending, such as "_mask".
        mask_values: The value that a mask has for each class, where that is not its index: [0, 255] for masks of
            black and white.
        mask_colors: The color that a mask has for each class, "#rrggbb" or (R, G, B), for masks that are color
            pictures; None for masks of numbers. Black is no class if none has it.
        ignore_value: The value of masks that is not a class; None if there is none.
        white_level: The value that is white in images of 16 bits a channel, such as 65535, 4095 for 12 bits, or of
            floats; None refuses them.
        channels: Channels of images that are read as they are stored, with all their bits, neither turned upright nor
            flattened: TIFFs of any number of channels, PNGs of 16 bits. None for photographs, read in RGB of 8 bits.
        check: Whether to look at all files first. False leaves it to the moment that a sample is read.
        predict_split: "val", "train" or "test". Masks are not read.
        crop_size: Training crop in pixels: one number or (height, width).
        eval_size: Size that images are padded to in evaluation; None for native sizes.
        **kwargs: Those of :class:`SegmentationDataModule`.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> data = FolderDataModule("leaves", class_names=["background", "leaf"], mask_values=[0, 255], crop_size=257)
        >>> data.num_classes
        2
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        class_names: Sequence[str],
        images: str = "images",
        masks: str = "masks",
        mask_suffix: str = "",
        mask_values: Sequence[int] | None = None,
        ignore_value: int | None = 255,
        mask_colors: Sequence[str | Sequence[int]] | None = None,
        white_level: float | None = None,
        channels: int | None = None,
        check: bool = True,
        predict_split: Literal["train", "val", "test"] = "val",
        crop_size: Size = 321,
        eval_size: Size | None = None,
        **kwargs: Any,
    ) -> None:
        self._classes = tuple(class_names)
        values = tuple(range(len(self._classes)) if mask_values is None else mask_values)
        if (
            len(values) != len(self._classes)
            or len(set(values)) != len(values)
            or not all(0 <= v < 2**16 for v in values)
        ):
            raise ValueError(
                f"`mask_values` must be {len(self._classes)} different numbers, 0 to 65535, one for each of "
                f"class_names; got {list(values)}."
            )
        if channels is not None and channels < 1:
            raise ValueError(f"`channels` must be at least 1, or null for photographs; got {channels}.")
        self.root = user_path(root)
        self.images = self.root / images
        self.masks = self.root / masks
        self.patterns = FilePatterns(self.root, images, masks) if is_pattern(images) or is_pattern(masks) else None
        self.colors = None if mask_colors is None else read_colors(mask_colors, self._classes)
        self.channels, self.stored_channels = channels or 3, channels
        self.mask_suffix = mask_suffix
        self.mask_values = values
        self.ignore_value = None if ignore_value in values else ignore_value
        self.white_level = white_level
        self.check = check
        super().__init__(
            num_train="any",
            num_val="any",
            num_test="any",
            predict_split=predict_split,
            official=_LIKE_ANY,
            crop_size=crop_size,
            eval_size=eval_size,
            **kwargs,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    @property
    def advice(self) -> str:
        if self.patterns is not None:
            return (
                f"`images` and `masks` are the patterns {self.patterns.images!r} and {self.patterns.masks!r} below "
                f"{str(self.root)!r}; {{split}} is train, val or test, {{stem}} what the * stands for."
            )
        return (
            f"Put images into {str(self.images / 'train')!r} and {str(self.images / 'val')!r} and masks of the same "
            f"names (name{self.mask_suffix}.png) into {str(self.masks / 'train')!r} and {str(self.masks / 'val')!r}, "
            f"or give lists of names {str(self.root / 'train.txt')!r} and {str(self.root / 'val.txt')!r}."
        )

    def disk_split(self, split: Split) -> str:
        if split == "test" and not self._exists("test"):
            return "val"
        return super().disk_split(split)

    def prepare_data(self) -> None:
        """Looks at all files, once and in one process: pairs, sizes, values.

        Raises:
            FileNotFoundError: A folder or list is missing.
            ValueError: What is wrong with which files.
        """
        items: dict[str, list[Item]] = {split: self.items(split) for split in self._needed()}
        if not self.check or not items:
            return
        found = survey(
            items, self.classes, whole_images=False, white_level=self.white_level, channels=self.stored_channels
        )
        for note in found.notes:
            warnings.warn(note, stacklevel=2)
        if found.problems:
            hint = _two_values_hint([item for split in items.values() for item in split], self.mask_values)
            raise ValueError(
                f"{len(found.problems)} files of {str(self.root)!r} cannot be used.{hint}\n"
                + "\n".join(found.problems[:SHOWN_PROBLEMS])
            )
        if all(pixels[: self.num_classes].sum() == pixels[0] for pixels in found.pixels.values()):
            hint = _two_values_hint([item for split in items.values() for item in split], self.mask_values)
            raise ValueError(f"all masks of {str(self.masks)!r} hold {self.classes[0]} and nothing else.{hint}")

    def _needed(self) -> list[Split]:
        """The splits whose masks the trainer's stage needs; without a trainer all that are there and have masks."""
        stage = None if self.trainer is None else self.trainer.state.fn
        if stage is not None:
            splits: dict[str, list[Split]] = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}
            return splits.get(stage.value, [])
        known: list[Split] = ["train", "val", "test"]
        # What is only predicted needs no masks.
        free = {"test", self.predict_split}
        there = [split for split in known if self._exists(split) and (split not in free or self._files(split)[1])]
        return there or known[:1]

    def items(self, split: Split) -> list[Item]:
        name = self.disk_split(split)
        images, masks = self._files(name)
        if not images:
            place = "" if self.patterns is not None else f": looked in {str(self.images)!r}"
            raise FileNotFoundError(f"no images of the split {name}{place}. {self.advice}")
        alone = sorted(set(images) - set(masks)), sorted(set(masks) - set(images))
        if split == "predict":
            masks, alone = {}, ([], [])
        for names, kind, other in ((alone[0], "images", "mask"), (alone[1], "masks", "image")):
            if names:
                predict = "" if masks else f"Without masks, they can be predicted: `predict_split` = {name}. "
                raise ValueError(
                    f"{len(names)} {kind} of the split {name} have no {other} of the same name, such as "
                    f"{', '.join(names[:3])}. {predict}{self.advice}"
                )
        meanings = {value: index for index, value in enumerate(self.mask_values)}
        if self.ignore_value is not None:
            meanings[self.ignore_value] = self.ignore_index
        table = class_table(meanings) if self.colors is None else ColorTable(self.colors)
        return [Item(key, path, masks.get(key), table) for key, path in images.items()]

    def _exists(self, name: str) -> bool:
        if (self.root / f"{name}.txt").is_file():
            return True
        return (self.images / name).is_dir() if self.patterns is None else bool(self.patterns.find(name)[0])

    def _files(self, name: str) -> tuple[dict[str, Path], dict[str, Path]]:
        """Images and masks of a split by name."""
        file = self.root / f"{name}.txt"
        if not file.is_file():
            return self._pairs(name)
        listed = dict.fromkeys(_key(line.strip()) for line in read_text(file).splitlines() if line.strip())
        images, masks = self._pairs(".")
        unknown = [entry for entry in listed if entry not in images]
        if unknown:
            raise FileNotFoundError(
                f"{len(unknown)} names in {str(file)!r} are not images in {str(self.images)!r}, such as "
                f"{', '.join(unknown[:3])}: a line is a name without ending."
            )
        return {key: images[key] for key in listed}, {key: masks[key] for key in listed if key in masks}

    def _pairs(self, below: str) -> tuple[dict[str, Path], dict[str, Path]]:
        """Images and masks by name in a folder below the folders of both."""
        if self.patterns is not None:
            return self.patterns.find(below)
        images = files_below(self.images / below, _IMAGE_ENDINGS)
        masks = files_below(self.masks / below, _MASK_ENDINGS)
        if self.images.resolve() == self.masks.resolve():
            photographs = {path.with_suffix("") for path in images if path.suffix.lower() not in _MASK_ENDINGS}
            masks = [path for path in masks if self.mask_suffix or path.with_suffix("") in photographs]
            masks = [path for path in masks if path.stem.endswith(self.mask_suffix)]
            images = sorted(set(images) - set(masks))
        hint = f" If one of them is a mask, it belongs below {str(self.masks)!r}."
        return (
            _by_name(images, self.images / below, hint=hint),
            _by_name(masks, self.masks / below, suffix=self.mask_suffix),
        )


def _by_name(paths: Sequence[Path], folder: Path, *, suffix: str = "", hint: str = "") -> dict[str, Path]:
    """Files below a folder by their path in it without suffix and ending.

    Raises:
        ValueError: Two files have one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.stem.endswith(suffix):
            continue
        name = _key(path.relative_to(folder).with_suffix("").as_posix().removesuffix(suffix))
        if name in found:
            raise ValueError(
                f"{str(found[name])!r} and {str(path)!r} are both called {name!r}, and a name means one image and its "
                f"mask: rename one, or move it elsewhere.{hint}"
            )
        found[name] = path
    return found


def _key(name: str) -> str:
    # A Mac writes letters with accents in two parts, other systems and editors in one.
    return unicodedata.normalize("NFC", name)


def _two_values_hint(items: Sequence[Item], values: Sequence[int], number: int = 20) -> str:
    """What to set if masks are black and white, which most programs store as 0 and 255."""
    seen: set[int] = set()
    for item in items[:number]:
        try:
            seen.update(np.unique(read_labels(item.labels)).tolist() if item.labels is not None else [])
        except ValueError:
            return ""
    if len(values) != 2 or len(seen) != 2 or seen == set(values):
        return ""
    found = sorted(seen)
    return f" Masks hold the two values {found}: set `mask_values` to {found}, or store them as {list(values)}."

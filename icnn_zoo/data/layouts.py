"""Layouts of one's own: patterns of file names, and colors of classes."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_SIGNS = re.compile(r"\*|\{")
_KNOWN = ("{split}", "{stem}")


def is_pattern(text: str) -> bool:
    """Whether a folder's name is a pattern of files."""
    return bool(_SIGNS.search(text))


class FilePatterns:
    """Images that a pattern finds and masks whose names follow from theirs.

    Args:
        root: Folder that holds both.
        images: Pattern such as "{split}/*_image.tif": one "*" in the file's name, which is the stem.
        masks: Such as "{split}/{stem}_mask.png"; without a folder, beside the image.

    Raises:
        ValueError: A pattern without what it needs.
    """

    def __init__(self, root: Path, images: str, masks: str) -> None:
        for name, pattern in (("images", images), ("masks", masks)):
            if unknown := set(re.findall(r"\{[^}]*\}?", pattern)) - set(_KNOWN):
                raise ValueError(f"`{name}` may hold {' and '.join(_KNOWN)}; got {', '.join(sorted(unknown))}.")
        if "{stem}" not in masks:
            raise ValueError(f"`masks` must hold {{stem}}, such as '{{stem}}_mask.png', with a pattern; got {masks!r}.")
        if Path(images).name.count("*") != 1:
            raise ValueError(
                f"`images` must be a pattern with one * in the file's name, such as '*.png'; got {images!r}."
            )
        self.root, self.images, self.masks = root, images, masks

    def find(self, split: str) -> tuple[dict[str, Path], dict[str, Path]]:
        """Images and masks of a split by stem; of all for "."."""
        if split == "." and "{split}" in Path(self.images).name:
            raise ValueError(
                f"`images`={self.images!r} has {{split}} in the file's name, and train.txt says what splits are of: "
                "leave one of them out, or put {split} into a folder's name."
            )
        pattern = self.images.replace("{split}", "*" if split == "." else split)
        before, after = Path(pattern).name.split("*")
        pairs: list[tuple[str, Path, Path]] = []
        for text in sorted(glob.glob(str(Path(glob.escape(str(self.root))) / pattern), recursive=True)):
            path = Path(text)
            stem = path.name[len(before) : len(path.name) - len(after)]
            place = self._split_of(path) if split == "." else split
            mask = self.masks.replace("{stem}", stem).replace("{split}", place)
            found = path.parent / mask if "/" not in mask else self.root / mask
            pairs.append((stem, path, found))
        images: dict[str, Path] = {}
        masks: dict[str, Path] = {}
        taken = {mask for _, _, mask in pairs}
        for stem, path, found in pairs:
            if path in taken:  # the pattern of images finds masks too
                continue
            folder = path.parent.relative_to(self.root).as_posix()
            name = stem if stem not in images else f"{folder}/{stem}"
            images[name] = path
            if found.is_file():
                masks[name] = found
        return images, masks

    def _split_of(self, path: Path) -> str:
        """What stands in the place of {split} in an image's path; its folder's name where nothing does."""
        parts = Path(self.images).parts
        index = next((index for index, part in enumerate(parts) if "{split}" in part), None)
        if index is None:
            return path.parent.name
        before, _, after = parts[index].partition("{split}")
        found = path.relative_to(self.root).parts[index - len(parts) if "**" in parts[:index] else index]
        return found[len(before) : len(found) - len(after)]


def read_colors(colors: Sequence[str | Sequence[int]], classes: Sequence[str]) -> Mapping[tuple[int, int, int], int]:
    """Class index by color; black, if it is no class's, is 255, no class.

    Raises:
        ValueError: Not one color for each class, one that is no color, or one twice.
    """
    found: dict[tuple[int, int, int], int] = {}
    for index, color in enumerate(colors):
        values = list(bytes.fromhex(color[1:])) if isinstance(color, str) and _is_hex(color) else color
        if isinstance(values, str) or len(values) != 3 or not all(0 <= int(value) <= 255 for value in values):
            raise ValueError(f"`mask_colors` must be '#rrggbb' or (R, G, B) in 0 to 255; got {color!r}.")
        red, green, blue = (int(value) for value in values)
        if (red, green, blue) in found:
            raise ValueError(f"`mask_colors` must differ; got {color!r} twice.")
        found[red, green, blue] = index
    if len(found) != len(classes):
        raise ValueError(f"`mask_colors` must be {len(classes)} colors, one for each of class_names; got {len(found)}.")
    return {(0, 0, 0): 255, **found}


def _is_hex(color: str) -> bool:
    return re.fullmatch("#[0-9a-fA-F]{6}", color) is not None

"""Label maps in colors: the palette, pictures of classes, overlays on photographs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

NO_CLASS = (224, 224, 224)  # light gray, RGB


def check_classes(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    """Checks names of classes: by them scores are logged, tables made and classes found.

    Args:
        argument: The caller's argument, for the error.
        names: By class index.

    Returns:
        The names.

    Raises:
        TypeError: One is not a string.
        ValueError: One comes twice, is empty, or holds a character that cannot be printed.
    """
    for index, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"`{argument}` must be strings; got {name!r} at {index}: put it in quotes.")
        if not name.strip() or not name.isprintable():
            raise ValueError(f"`{argument}` must be names that can be printed; got {name!r} at {index}.")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(f"`{argument}` must differ, as scores go by them; got more than once: {', '.join(twice)}.")
    return tuple(names)


def color_map(num_classes: int) -> np.ndarray:
    """PASCAL VOC's colors, which go on for any number of classes: the bits of an index, dealt to R, G and B in turn.

    Args:
        num_classes: How many, 1 to 256.

    Returns:
        uint8 [num_classes, 3], RGB.
    """
    index = np.arange(num_classes)
    colors = np.zeros((num_classes, 3), dtype=np.uint8)
    for level in range(8):
        for channel in range(3):
            colors[:, channel] |= ((index >> (3 * level + channel) & 1) << (7 - level)).astype(np.uint8)
    return colors


def palette_picture(labels: np.ndarray, palette: np.ndarray) -> Image.Image:
    """A picture of a label map's values, uint8 [H, W], that viewers show in the colors of ``palette``, [n, 3].

    Values beyond the palette get PASCAL VOC's colors.
    """
    picture = Image.fromarray(np.ascontiguousarray(labels, dtype=np.uint8))
    picture.putpalette(full_palette(palette).tobytes())
    return picture


def full_palette(palette: np.ndarray) -> np.ndarray:
    """All 256 colors of a file, uint8: ``palette``, then PASCAL VOC's.

    With fewer, PNG stores fewer bits and a 255 comes back as another number.
    """
    return np.concatenate([palette.astype(np.uint8), color_map(256)[len(palette) :]])


def colored(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """A label map [H, W] in the colors of ``palette``, RGB uint8 [H, W, 3]; what is not a class is light gray."""
    picture = np.full((*labels.shape, 3), NO_CLASS, dtype=np.uint8)
    known = (labels >= 0) & (labels < len(palette))
    picture[known] = palette[labels[known]]
    return picture


def overlay(image: np.ndarray, labels: np.ndarray, palette: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """An image, RGB uint8 [H, W, 3], under the colors of its labels [H, W]; class 0, the background, stays as it is."""
    mixed = (1 - opacity) * image + opacity * colored(labels, palette)
    return np.where(labels[..., None] > 0, mixed, image).astype(np.uint8)


def segmentation_picture(
    image: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    palette: np.ndarray,
    opacity: float = 0.6,
    *,
    shares: np.ndarray | None = None,
) -> Image.Image:
    """The image, beside it the image under the colors of its labels, and a legend of the classes that occur.

    Args:
        image: uint8 [H, W, 3].
        labels: uint8 [H, W].
        classes: Names by index.
        palette: uint8 [number of classes, 3], RGB.
        opacity: Of the colors, 0 to 1; class 0, the background, stays as it is.
        shares: Of the classes, 0 to 1, where those in ``labels`` are not what the legend is to say.

    Returns:
        RGB picture.
    """
    height, width = labels.shape
    if shares is None:
        shares = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
    present = [index for index in np.argsort(-shares, kind="stable") if shares[index]]
    gap = 8
    text = max(12, min(32, height // 24))
    font = ImageFont.load_default(size=text)
    entries = [f"{classes[index]}  {shares[index]:.1%}" for index in present]
    line = text * 3 // 2
    legend = int(max(font.getlength(entry) for entry in entries)) + line + 3 * gap
    picture = Image.new("RGB", (2 * width + legend + 2 * gap, max(height, line * len(entries) + gap)), "white")
    picture.paste(Image.fromarray(image), (0, 0))
    picture.paste(Image.fromarray(overlay(image, labels, palette, opacity)), (width + gap, 0))
    draw = ImageDraw.Draw(picture)
    left = 2 * (width + gap)
    for place, (index, entry) in enumerate(zip(present, entries, strict=True)):
        top = place * line + gap // 2
        box = (left, top, left + line - 6, top + line - 6)
        draw.rectangle(box, fill=tuple(int(value) for value in palette[index]), outline="black")
        draw.text((left + line + gap, top), entry, fill="black", font=font)
    return picture

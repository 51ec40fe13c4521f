"""Reading images and writing pictures: complete files or none."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps

FIGURE_SUFFIXES = (".png", ".svg")


def check_target(path: str | Path, suffixes: Sequence[str]) -> Path:
    """Checks a file that is to be written, before the work of hours that makes it.

    Args:
        path: The file.
        suffixes: Endings that are known.

    Returns:
        The path.

    Raises:
        ValueError: Another suffix, or a folder of that name.
        FileNotFoundError: The folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        example = (path.stem or "picture") + suffixes[0]
        raise ValueError(f"the file to write must end in {' or '.join(suffixes)}; got {str(path)!r}. Try {example!r}.")
    if path.is_dir():
        raise ValueError(f"the file to write, {str(path)!r}, is a folder; choose another name.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} to write {path.name!r} into; make it first.")
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary file that takes the place of ``path`` at the end, unless there was an error."""
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    # As open() makes a file, by the user's mask; to ask for the mask would change it for all threads for a moment.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG or SVG, by its suffix.

    Raises:
        ValueError: Another suffix.
        FileNotFoundError: The folder does not exist.
    """
    path = check_target(path, FIGURE_SUFFIXES)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def read_image(path: str | Path) -> np.ndarray:
    """Reads an image as RGB uint8 [H, W, 3], turned upright as its camera says.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no image that Pillow reads.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`image`: there is no file {str(path)!r}.")
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: broken PNGs
        raise ValueError(
            f"`image`: {str(path)!r} is no image that can be read (JPEG, PNG, WebP, ...): {error}"
        ) from error

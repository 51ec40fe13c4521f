"""Reading images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


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

"""One policy for reading images, the same for training, prediction, heatmaps, the page and ``segment``."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import TiffImageFile

from icnn_zoo.io.files import require_file, write_whole

ImageLike = str | Path | Image.Image | np.ndarray

_NOT_A_PAGE = 0b101  # TIFF's NewSubfileType: a smaller version of another page, or a transparency mask
_ONE_PICTURE = ("MPO", "PSD")  # their further "frames" are previews and layers


class ImageHeader(NamedTuple):
    """What an image file says of itself, before its pixels are decoded.

    Attributes:
        size: (height, width), upright.
        orientation: EXIF orientation, 1 to 8; 1 is upright as stored, 5 to 8 swap height and width.
        pages: How many pictures it holds.
        deep: Whether it has more than 8 bits a channel.
    """

    size: tuple[int, int]
    orientation: int
    pages: int
    deep: bool


def read_image(image: ImageLike, *, white_level: int | None = None, warn_pages: bool = True) -> np.ndarray:
    """Reads an image as RGB uint8 [H, W, 3].

    It is turned upright as its EXIF orientation says, and what is transparent lies on white. Of a file with several
    pages or frames the first one is read. Pillow's limit on pixels holds.

    Args:
        image: A file, a PIL image, or an array [H, W, 3] (RGB) or [H, W] (gray) of uint8, or uint16 with
            ``white_level``.
        white_level: The value of a 16-bit image that is white, such as 65535, or 4095 for 12 bits; what is above is
            white too. None refuses images of 16 bits, as nothing in them says so. Others do not need it.
        warn_pages: Whether to warn that a file has more pages than the one that is read.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: Not an image: another type, or an array of another dtype.
        ValueError: A file that is not an image or is too large, more than 8 bits without ``white_level``, more than
            16, an empty image, or an array of another shape.
    """
    if white_level is not None and not 1 <= white_level < 2**16:
        raise ValueError(f"`white_level` must be from 1 to 65535; got {white_level}.")
    if isinstance(image, np.ndarray):
        return _checked_array(image, white_level)
    if isinstance(image, Image.Image):
        if _is_deep(image):
            image = _eight_bits(image, None, require_white_level("`image`", white_level))
        return _rgb(image)
    if not isinstance(image, (str, Path)):
        raise TypeError(f"`image` must be a path, a PIL image or an array; got {type(image).__name__}.")
    path = Path(image)
    with _opened(path) as picture:
        header = _header(picture)
        picture.load()  # what is truncated fails here
    if warn_pages:
        warn_of_pages(path, header)
    white = require_white_level(repr(str(path)), white_level) if header.deep else 255
    with _naming(path):
        if header.deep:
            picture = _eight_bits(picture, path, white)
        return _rgb(picture)


def read_header(path: str | Path) -> ImageHeader:
    """What an image file says of itself.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not an image, or too large.
    """
    with _opened(Path(path)) as picture:
        return _header(picture)


def read_upright(path: str | Path, *, warn_pages: bool = True) -> Image.Image:
    """A picture in the mode that it is stored in, for label maps; turned upright, and the first of several pages.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not an image, or too large.
    """
    path = Path(path)
    with _opened(path) as picture:
        header = _header(picture)
        upright = ImageOps.exif_transpose(picture)
    if warn_pages:
        warn_of_pages(path, header)
    return upright


def warn_of_pages(path: Path, header: ImageHeader) -> None:
    """Warns of a file that holds more than the picture that is read."""
    if header.pages > 1:
        warnings.warn(f"{str(path)!r} holds {header.pages} pictures: the first one is read.", stacklevel=3)


def require_white_level(name: str, white_level: int | None) -> int:
    """The value that is white in an image of 16 bits.

    Raises:
        ValueError: It is None.
    """
    if white_level is None:
        raise ValueError(
            f"{name} has 16 bits a channel, and nothing says which value is white: set `white_level` (65535 for the "
            "whole range, 4095 for 12 bits), or store it with 8 bits a channel."
        )
    return white_level


def write_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG that is there whole or not at all, making its folder."""
    data = io.BytesIO()
    picture.save(data, format="PNG")
    write_whole(path, data.getvalue())


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    require_file(path)
    # Of a path, Pillow maps uncompressed TIFFs into memory, and garbles those that are to be turned by 90 degrees.
    with _naming(path), path.open("rb") as file, Image.open(file) as picture:
        yield picture


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Gives errors of decoding the name of the file."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"{str(path)!r} is too large: {error} Cut it into tiles, or scale it down.") from error
    except Exception as error:  # Pillow raises whatever the bytes lead it to
        reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise ValueError(f"{str(path)!r} is not a readable image (JPEG, PNG, TIFF, WebP, ...){reason}") from error


def _header(picture: Image.Image) -> ImageHeader:
    deep = _is_deep(picture)  # first, as to ask for EXIF loads a PNG, and to count pages starts a picture anew
    orientation = picture.getexif().get(Base.Orientation, 1)
    width, height = picture.size
    if isinstance(picture, TiffImageFile):  # some versions of Pillow turn its size already
        width, height = picture.tag_v2[Base.ImageWidth], picture.tag_v2[Base.ImageLength]
    if orientation in (5, 6, 7, 8):
        width, height = height, width
    return ImageHeader((height, width), orientation if orientation in range(1, 9) else 1, _count_pages(picture), deep)


def _is_deep(picture: Image.Image) -> bool:
    # Pillow gives 16-bit colors the mode RGB and drops their lower bits; only the decoder's name of the layout tells.
    layouts = [str(tile[3]) for tile in getattr(picture, "tile", [])]  # its arguments; before Pillow 11 a plain tuple
    return picture.mode.startswith(("I", "F")) or any(";16" in layout for layout in layouts)


def _count_pages(picture: Image.Image) -> int:
    frames = 1 if picture.format in _ONE_PICTURE else getattr(picture, "n_frames", 1)
    if frames == 1 or not isinstance(picture, TiffImageFile):
        return frames
    pages = 0
    for frame in range(frames):
        picture.seek(frame)
        pages += not picture.tag_v2.get(Base.NewSubfileType, 0) & _NOT_A_PAGE
    picture.seek(0)
    return pages


def _rgb(picture: Image.Image) -> np.ndarray:
    # Each of these steps copies the pixels, and most images need none of them.
    if picture.getexif().get(Base.Orientation, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _eight_bits(picture: Image.Image, path: Path | None, white_level: int) -> Image.Image:
    """A picture of 16 bits a channel with 8, its orientation kept."""
    if picture.mode in ("RGB", "RGBA") and path is not None:
        import cv2

        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None or pixels.dtype != np.uint16 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4):
            raise ValueError("its 16 bits a channel cannot be decoded")
        values = _scaled(pixels[..., 2::-1], white_level)
        if pixels.shape[2] == 4:
            values = np.dstack([values, _scaled(pixels[..., 3], 2**16 - 1)])
    elif picture.mode.startswith("I"):
        values = _scaled(np.asarray(picture), white_level)
    else:
        raise ValueError(f"of more than 8 bits a channel only gray and RGB of 16 are read, not mode {picture.mode}")
    result = Image.fromarray(values)
    result.getexif()[Base.Orientation] = picture.getexif().get(Base.Orientation, 1)
    return result


def _scaled(values: np.ndarray, white_level: int) -> np.ndarray:
    if values.min() < 0 or values.max() >= 2**16:
        raise ValueError("it has more than 16 bits a channel")
    return (np.minimum(values, white_level) * (255 / white_level)).round().astype(np.uint8)


def _checked_array(image: np.ndarray, white_level: int | None) -> np.ndarray:
    if image.dtype not in (np.uint8, np.uint16):
        raise TypeError(f"`image` must be uint8, 0 to 255, or uint16; got {image.dtype}.")
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        hint = " Channels come last: image.transpose(1, 2, 0)." if image.ndim == 3 and image.shape[0] == 3 else ""
        raise ValueError(f"`image` must be [H, W, 3] or [H, W] and not empty; got {list(image.shape)}.{hint}")
    return image if image.dtype == np.uint8 else _scaled(image, require_white_level("`image`", white_level))

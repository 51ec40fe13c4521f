"""TIFFs of any number of channels, 8 or 16 bits or floats, read whole or in bands of rows."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from icnn_zoo.io.files import require_file
from icnn_zoo.io.images import read_image

TIFF_ENDINGS = (".tif", ".tiff")


class Raster:
    """The first image of a TIFF, [H, W, C], whose rows are decoded when they are asked for; a context.

    Channels may come last, first, or each as a page of its own (as microscopes store them). Rows of what is stored in
    strips or tiles are read without the rest; of channels first or in pages, all is read at once.

    Args:
        path: The file.

    Attributes:
        shape: (height, width, channels).
        dtype: Of the stored numbers.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a TIFF that can be read, or not an image with at most one axis of channels.
    """

    def __init__(self, path: str | Path) -> None:
        import tifffile

        self.path = require_file(path)
        try:
            self._file = tifffile.TiffFile(self.path)
            series: Any = self._file.series[0]
        except Exception as error:  # of many kinds, whatever the bytes lead to
            raise ValueError(f"{str(path)!r} is not a readable TIFF: {error}") from error
        axes, shape = series.axes, series.shape
        kept = [place for place, extent in enumerate(shape) if extent > 1 or axes[place] in "YX"]
        self._axes = "".join(axes[place] for place in kept)
        self._page: Any = series.pages[0]
        if not {"Y", "X"} <= set(self._axes) or len(self._axes) > 3:
            self._file.close()
            raise ValueError(f"{str(path)!r} must be one image with one axis of channels; it has {axes} {shape}.")
        sizes = {axes[place]: shape[place] for place in kept}
        channels = [extent for axis, extent in sizes.items() if axis not in "YX"]
        self.shape = (sizes["Y"], sizes["X"], channels[0] if channels else 1)
        self.dtype = np.dtype(series.dtype)
        self._banded = self._axes in ("YX", "YXS") and len(series.pages) == 1
        self._whole: np.ndarray | None = None
        self._series = series

    @property
    def is_photograph(self) -> bool:
        """Whether its rows are what a person sees: red, green and blue of 8 or 16 bits, upright, and decodable."""
        orientation = self._page.tags.get("Orientation")
        if not (self._banded and self.shape[2] == 3 and self.dtype in (np.uint8, np.uint16)):
            return False
        if int(self._page.photometric) != 2 or (orientation is not None and orientation.value != 1):
            return False
        try:
            self.rows(0, 1)
        except ValueError:  # of a compression that needs imagecodecs
            return False
        return True

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Rows ``top`` to ``bottom``, [n, W, C].

        Raises:
            ValueError: They cannot be decoded.
        """
        try:
            return self._decode(top, bottom) if self._banded else self._all()[top:bottom]
        except Exception as error:  # of many kinds, such as a compression that needs imagecodecs
            raise ValueError(f"{str(self.path)!r} cannot be decoded: {error}") from error

    def __enter__(self) -> Raster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _all(self) -> np.ndarray:
        if self._whole is None:
            values = np.squeeze(self._series.asarray()).reshape(
                [extent for axis, extent in zip(self._axes, self._kept_shape(), strict=True)]
            )
            order = [self._axes.index("Y"), self._axes.index("X")]
            order += [place for place in range(len(self._axes)) if place not in order]
            self._whole = values.transpose(order).reshape(self.shape)
        return self._whole

    def _kept_shape(self) -> list[int]:
        return [{"Y": self.shape[0], "X": self.shape[1]}.get(axis, self.shape[2]) for axis in self._axes]

    def _decode(self, top: int, bottom: int) -> np.ndarray:
        page, handle = self._page, self._file.filehandle
        found = np.zeros((bottom - top, *self.shape[1:]), self.dtype)
        length = page.tilelength if page.is_tiled else page.rowsperstrip
        across = -(-page.imagewidth // page.tilewidth) if page.is_tiled else 1
        first, last = top // length, -(-bottom // length)
        for index in range(first * across, min(last * across, len(page.dataoffsets))):
            handle.seek(page.dataoffsets[index])
            data = handle.read(page.databytecounts[index]) if page.databytecounts[index] else None
            segment, place, _ = page.decode(data, index, jpegtables=page.jpegtables)
            if segment is None:  # a tile without data is empty
                continue
            row, col = place[2], place[3]
            tile = segment[0]  # [rows, cols, samples]
            tile = tile[: self.shape[0] - row, : self.shape[1] - col]
            start, stop = max(row, top), min(row + len(tile), bottom)
            found[start - top : stop - top, col : col + tile.shape[1]] = tile[start - row : stop - row]
        return found


def read_raster(path: str | Path) -> np.ndarray:
    """The first image of a TIFF, [H, W, C], in its own dtype.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: As :class:`Raster`.
    """
    with Raster(path) as raster:
        return raster.rows(0, raster.shape[0])


def read_measured(path: str | Path, channels: int, white_level: float | None) -> np.ndarray:
    """An image as it is stored: all channels and bits, neither turned nor flattened; scaled so that white is 255.

    Args:
        path: A TIFF, or what else OpenCV reads (PNG of 8 and 16 bits).
        channels: How many it must have.
        white_level: The value that becomes 255: 4095 for 12 bits, 1.0 for floats in 0 to 1. Images of 8 bits do not
            need it and stay as they are.

    Returns:
        float32 [H, W, C].

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not an image, has another number of channels, more than 8 bits without ``white_level``, or
            numbers that are not finite.
    """
    path = require_file(path)
    values = read_raster(path) if path.suffix.lower() in TIFF_ENDINGS else _decoded(path)
    _check_measured(path, values.shape[2], values.dtype, channels, white_level)
    return _scaled(path, values, white_level)


def read_pixels(path: str | Path, channels: int, white_level: float | None) -> np.ndarray:
    """An image as a network of so many channels takes it: a photograph by :func:`read_image`, else as it is stored.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: As :func:`read_image` for three channels, else as :func:`read_measured`.
    """
    if channels != 3:
        return read_measured(path, channels, white_level)
    return read_image(path, white_level=None if white_level is None else int(white_level))


class MeasuredRaster(Raster):
    """A TIFF whose rows are read as :func:`read_measured` reads the whole, white 255: float32, or uint8 as stored.

    Args:
        path: The file.
        channels: How many it must have.
        white_level: The value that becomes 255; 8 bits stay as they are.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: As :func:`read_measured`.
    """

    def __init__(self, path: str | Path, channels: int, white_level: float | None) -> None:
        super().__init__(path)
        self._white_level = white_level
        try:
            _check_measured(self.path, self.shape[2], self.dtype, channels, white_level)
        except ValueError:
            self._file.close()
            raise

    def rows(self, top: int, bottom: int) -> np.ndarray:
        values = super().rows(top, bottom)
        return values if self.dtype == np.uint8 else _scaled(self.path, values, self._white_level)


def _check_measured(path: Path, stored: int, dtype: np.dtype[Any], channels: int, white_level: float | None) -> None:
    if stored != channels:
        raise ValueError(f"{str(path)!r} has {stored} channels; the network (`channels`) takes {channels}.")
    if white_level is not None and not white_level > 0:
        raise ValueError(f"`white_level` must be positive; got {white_level}.")
    if dtype != np.uint8 and white_level is None:
        raise ValueError(
            f"{str(path)!r} holds {dtype}, and nothing says which value is white: set `white_level` (4095 for "
            "12 bits, 65535 for 16, 1.0 for floats in 0 to 1)."
        )


def _scaled(path: Path, values: np.ndarray, white_level: float | None) -> np.ndarray:
    white = 255 if values.dtype == np.uint8 or white_level is None else white_level
    image = values.astype(np.float32) * np.float32(255 / white)
    if not np.isfinite(image).all():
        raise ValueError(f"{str(path)!r} holds numbers that are not finite.")
    return image


def visible(image: np.ndarray) -> np.ndarray:
    """An image of any channels, [H, W, C] in 0..255, to look at: uint8 [H, W, 3], of the first three or one."""
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return image
    shown = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
    return shown.clip(0, 255).astype(np.uint8)


def _decoded(path: Path) -> np.ndarray:
    import cv2

    values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise ValueError(f"{str(path)!r} is not a readable image (TIFF, PNG, ...).")
    if values.ndim == 2:
        return values[..., None]
    return values[..., [2, 1, 0, *range(3, values.shape[2])]]  # OpenCV has blue first

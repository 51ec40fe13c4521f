"""Palette PNGs written row by row, for label maps that are larger than memory."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from types import TracebackType

import numpy as np

from icnn_zoo.io.label_pictures import full_palette


class LabelWriter:
    """Writes a label map as a palette PNG, in bands of rows; a context, after which the file is whole.

    Args:
        path: The file.
        size: Height and width.
        palette: Colors of the classes, uint8 [n, 3].

    Raises:
        ValueError: At the end, if there were fewer or more rows than the height.
    """

    def __init__(self, path: Path, size: tuple[int, int], palette: np.ndarray) -> None:
        self.height, self.width = size
        self._rows = 0
        self._squeeze = zlib.compressobj(6)
        self._file = path.open("wb")
        self._file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", self.width, self.height, 8, 3, 0, 0, 0))
        self._chunk(b"PLTE", full_palette(palette).tobytes())

    def write(self, rows: np.ndarray) -> None:
        """Adds rows, uint8 [n, width]."""
        plain = np.zeros((len(rows), self.width + 1), np.uint8)  # each row begins with its filter, 0 for none
        plain[:, 1:] = rows
        self._rows += len(rows)
        self._chunk(b"IDAT", self._squeeze.compress(plain.tobytes()))

    def __enter__(self) -> LabelWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._chunk(b"IDAT", self._squeeze.flush())
            self._chunk(b"IEND", b"")
        self._file.close()
        if kind is None and self._rows != self.height:
            raise ValueError(f"a label map of {self.height} rows was given {self._rows}.")

    def _chunk(self, name: bytes, data: bytes) -> None:
        if data or name == b"IEND":
            self._file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))

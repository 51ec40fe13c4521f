"""PDFs through pypdfium2: opened with errors that name the file, pages rendered to pixels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from icnn_zoo.io.files import require_file

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument, PdfPage

METRE = 72 / 0.0254  # in points, the unit of PDFs


def open_pdf(path: Path) -> PdfDocument:
    """An open PDF; close it with ``close()``.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: pypdfium2 is not installed; the message names the extra.
        ValueError: It is encrypted, broken or without pages.
    """
    require_file(path)
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError('PDFs need pypdfium2: pip install "icnn-zoo[documents]"') from error
    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        reason = (
            "encrypted: remove its password first"
            if "password" in str(error).lower()
            else f"broken or without pages: {error}"
        )
        raise ValueError(f"{str(path)!r} is {reason}") from error
    if not len(document):
        document.close()
        raise ValueError(f"{str(path)!r} has no pages")
    return document


def page_scale(page: PdfPage, longest_side: int) -> float:
    """Pixels per point that give a page's longer side ``longest_side`` pixels.

    Raises:
        ValueError: The page is empty, or a metre long or longer: a poster, whose text would be too small to be seen.
    """
    width, height = page.get_size()
    if not min(width, height) > 0:
        raise ValueError(f"the page measures {width:.0f} x {height:.0f} points")
    if max(width, height) >= METRE:
        raise ValueError(f"the page is {max(width, height) / METRE:.1f} m long; pages must be shorter than a metre")
    return longest_side / max(width, height)


def render_page(page: PdfPage, longest_side: int) -> np.ndarray:
    """The pixels of a page on white, without annotations: uint8 [H, W, 3], RGB.

    Args:
        page: Of an open document.
        longest_side: Pixels of the longer side.

    Raises:
        ValueError: As :func:`page_scale`.
    """
    bitmap = page.render(scale=page_scale(page, longest_side), rev_byteorder=True, draw_annots=False)
    pixels = np.array(bitmap.to_numpy())
    bitmap.close()
    return pixels[..., :3]

"""Pages of one document with their labels, and the reasons for pages and documents whose labels would be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from icnn_zoo.data.preparation.document_sources import Document
from icnn_zoo.data.preparation.page_labels import CODE, FORMULA, HEADING, TEXT, label_pages
from icnn_zoo.data.preparation.page_structure import PageStructure, read_structure
from icnn_zoo.io.pdf import open_pdf, render_page

LONGEST_SIDE = 800  # pixels: lines of a page of A4 are 11 apart, and their letters 4 to 5 high

_INK = 48  # of 255: how far from the paper's gray
_LEAST_LETTERS = 60  # on a page
_MOST_UNEXPLAINED = 0.05  # of the ink
_LEAST_DRAWN = 0.03  # of the area of text
_SCAN = 0.6  # of the page's area
_MOST_NAMELESS = 0.3  # of the width of text
_WORDS = np.isin(np.arange(256), (TEXT, HEADING, CODE, FORMULA))


@dataclass
class LabeledPage:
    """A page's picture and labels.

    Attributes:
        number: From 0.
        image: uint8 [H, W, 3], RGB.
        labels: uint8 [H, W], class indices.
    """

    number: int
    image: np.ndarray
    labels: np.ndarray


@dataclass
class LabeledDocument:
    """The pages of a document that can be learned from.

    Attributes:
        pages: In order.
        skipped: Why other chosen pages are not among them, by number.
    """

    pages: list[LabeledPage] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)


def label_document(document: Document) -> LabeledDocument:
    """Renders and labels the chosen pages of a document."""
    result = LabeledDocument()
    pictures: dict[int, np.ndarray] = {}
    structures: dict[int, PageStructure] = {}
    pdf = open_pdf(document.source.path)
    try:
        for number in document.pages:
            try:
                page = pdf[number]
                image = render_page(page, LONGEST_SIDE)
                structure = read_structure(page, *image.shape[:2])
                _check_structure(structure)
                pictures[number], structures[number] = image, structure
            except Exception as error:  # a broken page is whatever pdfium makes of it
                result.skipped[number] = str(error) or type(error).__name__
    finally:
        pdf.close()
    lie = _document_lie(list(structures.values()))
    if lie:
        result.skipped |= dict.fromkeys(structures, lie)
        return result
    for number, labels in zip(structures, label_pages(list(structures.values())), strict=True):
        problem = picture_problem(pictures[number], labels, structures[number])
        if problem:
            result.skipped[number] = problem
        else:
            result.pages.append(LabeledPage(number, pictures[number], labels))
    return result


def _check_structure(page: PageStructure) -> None:
    """Raises ValueError where a page's text or fonts say nothing."""
    letters = sum(2 * run.box.width / max(run.size, 1.0) for run in page.texts)
    if letters < _LEAST_LETTERS:
        pictures = sum(entry.box.width * entry.box.height for entry in page.drawings if entry.shape == "image")
        is_scan = pictures > _SCAN * page.height * page.width
        raise ValueError("a scan: a picture of a page without text" if is_scan else "little text")
    total = sum(run.box.width for run in page.texts)
    if sum(run.box.width for run in page.texts if not run.font) > _MOST_NAMELESS * total:
        raise ValueError("fonts without names, which do not tell text from code and formulas")


def _document_lie(pages: Sequence[PageStructure]) -> str | None:
    """Why the fonts of a document cannot tell classes, if so."""
    runs = [run for page in pages for run in page.texts]
    if len(pages) < 2 or not runs:
        return None
    if len({(run.font, round(run.size, 1)) for run in runs}) == 1:
        return "one font of one size for everything"
    if sum(run.box.width for run in runs if run.mono) > 0.95 * sum(run.box.width for run in runs):
        return "everything in typewriter fonts"
    return None


def picture_problem(image: np.ndarray, labels: np.ndarray, page: PageStructure | None = None) -> str | None:
    """How a page's picture contradicts its labels; None if it does not.

    Args:
        image: uint8 [H, W, 3].
        labels: uint8 [H, W].
        page: To name fonts that the file does not hold.
    """
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    paper = int(cv2.calcHist([gray], [0], None, [256], [0, 256]).argmax())
    ink = cv2.absdiff(gray, np.full_like(gray, paper)) > _INK
    words = _WORDS[labels]
    if not labels.any():
        return "no region"
    if words.any() and ink[words].mean() < _LEAST_DRAWN:
        fonts = ", ".join(sorted(page.not_embedded)[:3]) if page is not None else ""
        return "text that is not drawn" + (f": the file does not hold the fonts {fonts}" if fonts else "")
    if np.count_nonzero(ink & (labels == 0)) > _MOST_UNEXPLAINED * np.count_nonzero(ink):
        return "much ink that the structure does not explain"
    return None

"""What a PDF's page consists of: runs of text with their fonts, rules, boxes, curves and pictures, in pixels."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from icnn_zoo.data.preparation.boxes import Box

MAX_OBJECTS = 4000  # of a page; more is a map or a plot, and slow
_MAX_DEPTH = 8  # of forms in forms
_MAX_SEGMENTS = 200  # of a path that are looked at
_FIXED_PITCH = 1  # bit of a font's flags
_INVISIBLE = 3  # rendering mode of text, as under scans

# Typewriter and mathematical fonts by their PostScript names, without the prefix of a subset.
_MONO = re.compile(
    r"mono|cmtt|cmvtt|cmsltt|cmitt|cmtcsc|courier|cursor|typewriter|lmtt|lmvtt|^cstt|ectt|(sf|ec|la|rx)(tt|it|vt|st)\d|"
    r"^tt-|[tp]xb?tt|1xb?tt|nimbusmon|consol|menlo|inconsol|pcr[rb]|zi4|^hack-|sourcecode|libertinem|anonymous|"
    r"lettergothic|firacode|^ocr",
    re.IGNORECASE,
)
_MATH = re.compile(
    r"cmmi|cmsy|cmbsy|cmex|msam|msbm|math|lmmi|lmsy|lmex|eufm|eufb|eusm|eurm|eurb|euex|rsfs|^symbol|standardsym|"
    r"^lasy|[tp]xb?sy|[tp]xb?mi|[tp]xb?ex|bsys?$|mdsymbol|mnsymbol|stmary|wasy|esint|zplm|futm|^mt(mi|sy|ex)|^mt2|^rmtmi|"
    r"cochmi|zsfmi|kp-.*-m-|boondox|^bbold|^bbm|dsrom|-symbol-",
    re.IGNORECASE,
)
_BOLD = re.compile(
    r"bold|cmb|cmssbx|cmssdc|bx$|black|heavy|demi|(sf|ec|la)(bx|sx|rb|xc)\d|-bd|-bo?l?$|medi$|-medium|"
    r"(libertine|biolinum)[to]?z?b|^[tp]xb$|simhei|fandolhei|stheiti",
    re.IGNORECASE,
)
_PROPORTIONAL = re.compile(r"^(helvetica|times|arial)", re.IGNORECASE)  # whatever their flags say

Shape = Literal["rule", "box", "curve", "image"]


class TextRun(NamedTuple):
    """Glyphs that the page draws at once, of one font.

    Attributes:
        box: Around them.
        size: Of the font, in pixels.
        font: PostScript name, without the prefix of a subset; empty if there is none.
        mono: Whether all glyphs are of one width.
        math: Whether the font is one of mathematics.
        bold: Whether it is bold.
    """

    box: Box
    size: float
    font: str
    mono: bool
    math: bool
    bold: bool


class Drawing(NamedTuple):
    """A path or picture.

    Attributes:
        box: Around it.
        shape: "rule": a thin axis-parallel line; "box": of other axis-parallel lines; "curve"; "image".
        outlined: Whether a line is drawn along it.
    """

    box: Box
    shape: Shape
    outlined: bool = False


@dataclass
class PageStructure:
    """What a page draws.

    Attributes:
        height: Of the page in pixels.
        width: Likewise.
        texts: Visible runs of text.
        drawings: Visible paths and pictures.
        not_embedded: Names of fonts that the file refers to and does not hold.
    """

    height: int
    width: int
    texts: list[TextRun] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    not_embedded: set[str] = field(default_factory=set)


def read_structure(page: Any, height: int, width: int) -> PageStructure:
    """Reads what a page draws.

    Args:
        page: A ``pypdfium2.PdfPage``.
        height: Of the rendered page, in pixels.
        width: Likewise.

    Raises:
        ValueError: There are more than ``MAX_OBJECTS`` objects.
    """
    import pypdfium2.raw as pdfium

    structure = PageStructure(height, width)
    total = pdfium.FPDFPage_CountObjects(page.raw)
    objects = (pdfium.FPDFPage_GetObject(page.raw, place) for place in range(total))
    for number, (entry, matrix) in enumerate(_flat(objects, _page_matrix(page, height, width), 0)):
        if number >= MAX_OBJECTS:
            raise ValueError(f"the page draws more than {MAX_OBJECTS} objects")
        box = _box(entry, matrix)
        if box.right <= 0 or box.bottom <= 0 or box.left >= width or box.top >= height:
            continue
        box = Box(max(box.left, 0), max(box.top, 0), min(box.right, width), min(box.bottom, height))
        kind = pdfium.FPDFPageObj_GetType(entry)
        if kind == pdfium.FPDF_PAGEOBJ_TEXT:
            _add_text(structure, entry, box, matrix)
        elif kind == pdfium.FPDF_PAGEOBJ_PATH:
            structure.drawings += _path(entry, box)
        elif kind in (pdfium.FPDF_PAGEOBJ_IMAGE, pdfium.FPDF_PAGEOBJ_SHADING):
            structure.drawings.append(Drawing(box, "image" if kind == pdfium.FPDF_PAGEOBJ_IMAGE else "curve"))
    return structure


def _flat(objects: Iterator[Any], matrix: np.ndarray, depth: int) -> Iterator[tuple[Any, np.ndarray]]:
    """Objects, those of forms in the place of the forms, each with the matrix [2, 3] from its space to pixels."""
    import pypdfium2.raw as pdfium

    for entry in objects:
        if pdfium.FPDFPageObj_GetType(entry) != pdfium.FPDF_PAGEOBJ_FORM:
            yield entry, matrix
        elif depth < _MAX_DEPTH:
            own = _object_matrix(entry)
            inner = np.concatenate([matrix[:, :2] @ own[:, :2], matrix[:, :2] @ own[:, 2:] + matrix[:, 2:]], axis=1)
            total = pdfium.FPDFFormObj_CountObjects(entry)
            yield from _flat((pdfium.FPDFFormObj_GetObject(entry, place) for place in range(total)), inner, depth + 1)


def _page_matrix(page: Any, height: int, width: int) -> np.ndarray:
    """The matrix [2, 3] from a page's space to pixels of its picture, cropping and rotation included."""
    import pypdfium2.raw as pdfium

    fine = 256  # the function answers in whole pixels
    far = 1000
    corners = []
    for x, y in ((0, 0), (far, 0), (0, far)):
        col, row = ctypes.c_int(), ctypes.c_int()
        pdfium.FPDF_PageToDevice(page.raw, 0, 0, width * fine, height * fine, 0, x, y, col, row)
        corners.append(np.array([col.value, row.value]) / fine)
    origin, right, up = corners
    return np.stack([(right - origin) / far, (up - origin) / far, origin], axis=1)


def _object_matrix(entry: Any) -> np.ndarray:
    import pypdfium2.raw as pdfium

    found = pdfium.FS_MATRIX()
    pdfium.FPDFPageObj_GetMatrix(entry, found)
    return np.array([[found.a, found.c, found.e], [found.b, found.d, found.f]])


def _box(entry: Any, matrix: np.ndarray) -> Box:
    import pypdfium2.raw as pdfium

    left, bottom, right, top = (ctypes.c_float() for _ in range(4))
    pdfium.FPDFPageObj_GetBounds(entry, left, bottom, right, top)
    xs, ys = (left.value, right.value), (bottom.value, top.value)
    corners = np.array([[x, y, 1] for x in xs for y in ys]) @ matrix.T
    least, most = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    return Box(least[0], least[1], most[0], most[1])


def _add_text(structure: PageStructure, entry: Any, box: Box, matrix: np.ndarray) -> None:
    import pypdfium2.raw as pdfium

    if pdfium.FPDFTextObj_GetTextRenderMode(entry) == _INVISIBLE or box.width < 0.5 or box.height < 0.2:
        return
    font = pdfium.FPDFTextObj_GetFont(entry)
    buffer = ctypes.create_string_buffer(128)
    pdfium.FPDFFont_GetBaseFontName(font, buffer, len(buffer))
    name = buffer.value.decode("utf-8", "replace").split("+")[-1]
    size = ctypes.c_float()
    pdfium.FPDFTextObj_GetFontSize(entry, size)
    scale = np.linalg.norm((matrix[:, :2] @ _object_matrix(entry)[:, :2])[:, 1])
    flags = pdfium.FPDFFont_GetFlags(font)
    math = bool(_MATH.search(name))
    structure.texts.append(
        TextRun(
            box=box,
            size=abs(size.value) * float(scale),
            font=name,
            mono=not math and bool(_MONO.search(name) or (flags & _FIXED_PITCH and not _PROPORTIONAL.search(name))),
            math=math,
            bold=bool(_BOLD.search(name)),
        )
    )
    if name and not pdfium.FPDFFont_GetIsEmbedded(font):
        structure.not_embedded.add(name)


def _path(entry: Any, box: Box) -> list[Drawing]:
    """A path, or nothing if it is not drawn."""
    import pypdfium2.raw as pdfium

    fill, stroke = ctypes.c_int(), ctypes.c_int()
    pdfium.FPDFPath_GetDrawMode(entry, fill, stroke)
    if not fill.value and not stroke.value:
        return []
    return [Drawing(box, _shape(entry, box), bool(stroke.value))]


def _shape(entry: Any, box: Box) -> Shape:
    import pypdfium2.raw as pdfium

    last: tuple[float, float] | None = None
    for place in range(min(pdfium.FPDFPath_CountSegments(entry), _MAX_SEGMENTS)):
        segment = pdfium.FPDFPath_GetPathSegment(entry, place)
        kind = pdfium.FPDFPathSegment_GetType(segment)
        if kind == pdfium.FPDF_SEGMENT_BEZIERTO:
            return "curve"
        x, y = ctypes.c_float(), ctypes.c_float()
        pdfium.FPDFPathSegment_GetPoint(segment, x, y)
        if kind == pdfium.FPDF_SEGMENT_LINETO and last is not None:
            aside, along = sorted((abs(x.value - last[0]), abs(y.value - last[1])))
            if aside > 0.1 + 0.01 * along:
                return "curve"
        last = x.value, y.value
    thin, long = sorted((box.width, box.height))
    return "rule" if thin < 4 and long > 3 * thin else "box"

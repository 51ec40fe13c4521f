"""Pixel labels of a page from what it draws: pieces of lines vote for a class, pieces of one class join to regions.

Nothing here looks at the rendered picture, so that the picture can be held against the labels as an independent check.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from icnn_zoo.data.documents import DOCUMENT_CLASSES
from icnn_zoo.data.preparation.boxes import (
    TOLERANCE,
    Box,
    area,
    as_array,
    close_gaps,
    cut,
    fill,
    group_lines,
    group_near,
    is_inside,
    joined,
    levels,
    linked_groups,
    share_inside,
    union,
)
from icnn_zoo.data.preparation.page_structure import Drawing, PageStructure, TextRun

BACKGROUND, TEXT, HEADING, CODE, FORMULA, FIGURE, TABLE, RULE, MARGIN = range(len(DOCUMENT_CLASSES))

_PITCH = 1.2  # distance of lines in sizes of the body's font
_WORD_GAP = 0.9  # in sizes of the body's font: what separates words, and does not columns
_LARGE = 1.12  # a heading's size in sizes of the body's font
_SMALL = 0.8  # in sizes of the body's font: of numbers of lines
_CODE_SHARE = 0.6  # of a piece's width
_FORMULA_SHARE = 0.25
_SYMBOL = 2.5  # in sizes of the body's font: narrower mathematics is a sign
_WORDS = 4.0  # in sizes of the body's font: plain glyphs drawn at once that are this long are words and no formula
_PROSE = 10.0  # in sizes of the body's font: a piece this long in a drawing is prose in a frame and no inscription
_PROSE_LINES = 3  # as wide as the rules around them: lines of text and not of a table
_INSCRIPTION = 5.0  # in sizes of the body's font: the longest word that is taken to belong to a drawing beside it
_MARGIN_ZONE = 0.15  # of the page's height at either end
_NUMBER_ZONE = 0.2  # likewise, of what is as short as a page's number
_SAME_HEIGHT = 0.004  # of the page's height: lines of two pages at the same place


class Piece(NamedTuple):
    """A part of a line: runs of text with no gap wider than one between words.

    Attributes:
        box: Around the runs.
        label: Class index.
        runs: Number of runs.
        size: Of most of its glyphs, in pixels.
    """

    box: Box
    label: int
    runs: int
    size: float


def body_size(pages: Sequence[PageStructure]) -> float:
    """The font size of most of the text of some pages, as a share of the page's longer side; 0 without text."""
    widths: dict[float, float] = defaultdict(float)
    for page in pages:
        for run in page.texts:
            if not run.math and run.size > 0:
                widths[round(run.size / max(page.height, page.width), 4)] += run.box.width / run.size
    return max(widths, key=lambda size: widths[size], default=0.0)


def label_pages(pages: Sequence[PageStructure]) -> list[np.ndarray]:
    """Labels pages of one document, which share the size of the body's font and the place of headers and footers.

    Args:
        pages: In any order.

    Returns:
        Class indices, uint8 [H, W], of each page.
    """
    size = body_size(pages)
    layouts = [_Layout(page, size * max(page.height, page.width)) for page in pages]
    _mark_margins(layouts)
    return [layout.paint() for layout in layouts]


class _Layout:
    """The pieces, tables, figures and rules of a page."""

    def __init__(self, page: PageStructure, body: float) -> None:
        self.page = page
        self.body = max(body, 2.0)
        self.pitch = _PITCH * self.body
        rules = [entry for entry in page.drawings if entry.shape == "rule"]
        bars, self.rules = _split_bars(rules, page.texts, self.body)
        runs = [*page.texts, *(TextRun(bar, self.body, "", False, True, False) for bar in bars)]
        self.pieces = self._undo_bold_paragraphs(_pieces(runs, self.body))
        self._undo_symbols()
        self._follow_rows()
        self.rules += [
            edge for entry in page.drawings if entry.outlined and self._is_frame(entry) for edge in _edges(entry.box)
        ]
        curves = [entry.box for entry in page.drawings if entry.shape == "curve" and not self._is_frame(entry)]
        self.tables = _tables(self.rules, curves, self.pieces, self.pitch)
        self.figures = self._figures()

    def _undo_bold_paragraphs(self, pieces: list[Piece]) -> list[Piece]:
        """Bold lines of the body's size that follow each other more than three times are a paragraph, not a heading."""
        bold = [i for i, piece in enumerate(pieces) if piece.label == HEADING and piece.size <= _LARGE * self.body]
        boxes = as_array([pieces[i].box for i in bold])
        near = group_near(boxes, 0.0, 0.9 * self.pitch)
        for group in near:
            members = [bold[i] for i in group]
            if len({round(pieces[i].box.top / self.body) for i in members}) > 3:
                for i in members:
                    pieces[i] = pieces[i]._replace(label=TEXT)
        return pieces

    def _undo_symbols(self) -> None:
        """Symbols that stand alone are bullets, check boxes and signs of text, not formulas."""
        places = [i for i, piece in enumerate(self.pieces) if piece.label == FORMULA]
        boxes = as_array([self.pieces[i].box for i in places])
        for group in group_near(boxes, 2 * self.body, 0.8 * self.pitch):
            # Symbols below each other are no wider together.
            if union([Box(*boxes[i].tolist()) for i in group]).width < _SYMBOL * self.body:
                for i in group:
                    self.pieces[places[i]] = self.pieces[places[i]]._replace(label=TEXT)

    def _follow_rows(self) -> None:
        """Gives short pieces the class of their row: numbers of equations and lines of code; contents in bold."""
        boxes = as_array([piece.box for piece in self.pieces])
        for row in group_lines(boxes, np.inf):
            if len(row) < 2:
                continue
            members = [self.pieces[i] for i in row]
            short = [piece.box.width < _WORDS * self.body for piece in members]
            long_labels = {piece.label for piece, is_short in zip(members, short, strict=True) if not is_short}
            others = {piece.label for piece in members} - {TEXT}
            if len(others) == 1 and others <= {FORMULA, CODE} and not long_labels - others:
                (label,) = others
            elif (
                long_labels == {HEADING}
                and members[int(np.argmax([p.box.right for p in members]))].box.width < (2 * self.body)
                and max(piece.size for piece in members) <= 1.3 * self.body
            ):
                label = TEXT
            else:
                continue
            for i in row:
                self.pieces[i] = self.pieces[i]._replace(label=label)

    def _figures(self) -> list[Box]:
        """Boxes around pictures and drawings."""
        page, found = self.page, []
        drawn = [entry for entry in page.drawings if entry.shape != "rule" and not self._is_frame(entry)]
        lines = [Drawing(box, "rule") for box in self.rules if not any(is_inside(box, table) for table in self.tables)]
        entries = drawn + lines
        for group in group_near(as_array([entry.box for entry in entries]), 0.8 * self.body, 0.8 * self.body):
            cluster = [entries[i] for i in group]
            box = union([entry.box for entry in cluster])
            if all(entry.shape in ("rule", "box") for entry in cluster):
                # Bars of a chart are many and hold little text; a frame, a grid and a bar of color are no figures.
                filled = sum(entry.shape == "box" for entry in cluster)
                inscribed = sum(area(cut(piece.box, box)) for piece in self.pieces)
                if filled < 4 or inscribed > 0.25 * area(box):
                    continue
            if min(box.width, box.height) < 1.5 * self.body or self._holds_prose(box):
                continue
            is_picture = any(entry.shape == "image" for entry in cluster)
            found.append(box if is_picture else self._with_inscriptions(box))
        return joined(found)

    def _with_inscriptions(self, box: Box) -> Box:
        """A drawing's box with the short words at its edge, as beside an axis."""
        pad = 0.6 * self.body
        around = Box(box.left - pad, box.top - pad, box.right + pad, box.bottom + pad)
        short = [
            piece.box
            for piece in self.pieces
            if piece.box.width < _INSCRIPTION * self.body
            and piece.label in (TEXT, FORMULA)
            and area(cut(piece.box, around)) > 0
        ]
        return union([box, *short])

    def _is_frame(self, entry: Drawing) -> bool:
        """Whether a drawing is a frame or ground of text, or covers the page."""
        box = entry.box
        if area(box) > 0.8 * self.page.height * self.page.width:
            return True
        if entry.shape in ("image", "rule"):
            return False
        return self._holds_prose(box)

    def _holds_prose(self, box: Box) -> bool:
        inner = [
            piece
            for piece in self.pieces
            if piece.box.width >= max(_PROSE * self.body, 0.4 * box.width) and share_inside(piece.box, box) > 0.8
        ]
        return len(inner) >= 2 or any(piece.box.width > 0.7 * box.width for piece in inner) or self._holds_code(box)

    def _holds_code(self, box: Box) -> bool:
        return any(piece.label == CODE and share_inside(piece.box, box) > 0.8 for piece in self.pieces)

    def paint(self) -> np.ndarray:
        height, width = self.page.height, self.page.width
        mask = np.zeros((height, width), np.uint8)
        regions = [*self.tables, *self.figures]
        free = [piece for piece in self.pieces if not any(share_inside(piece.box, box) > 0.6 for box in regions)]
        for label in (TEXT, CODE, HEADING, FORMULA, MARGIN):
            layer = np.zeros((height, width), np.uint8)
            for piece in free:
                if piece.label == label:
                    fill(layer, piece.box, 1, pad=0.1 * self.body)
            close_gaps(layer, round(_WORD_GAP * self.body), round(0.9 * self.pitch))
            mask[(layer > 0) & (mask == BACKGROUND)] = label
            for piece in free:  # a region that closes over another's line leaves it
                if piece.label == label:
                    fill(mask, piece.box, label, pad=0.1 * self.body)
        for box in self.rules:
            if not any(share_inside(box, region) > 0.6 for region in regions):
                extra = max(0.0, 0.3 * self.pitch - min(box.width, box.height)) / 2
                fill(mask, box, RULE, pad=extra)
        for box in self.tables:
            fill(mask, box, TABLE)
        for box in self.figures:
            fill(mask, box, FIGURE)
        return mask


def _edges(box: Box) -> list[Box]:
    """The four lines of a frame."""
    left, top, right, bottom = box
    return [
        Box(left, top, right, top + 1),
        Box(left, bottom - 1, right, bottom),
        Box(left, top, left + 1, bottom),
        Box(right - 1, top, right, bottom),
    ]


def _split_bars(rules: Sequence[Drawing], texts: Sequence[TextRun], body: float) -> tuple[list[Box], list[Box]]:
    """Bars of fractions and roots, which touch mathematics above and below, and the other rules."""
    maths = as_array([run.box for run in texts if run.math])
    bars, others = [], []
    for rule in rules:
        box = rule.box
        if box.width > box.height and len(maths):
            over = (maths[:, 0] < box.right) & (maths[:, 2] > box.left)
            above = over & (np.abs(maths[:, 3] - box.top) < 0.6 * body)
            below = over & (np.abs(maths[:, 1] - box.bottom) < 0.6 * body)
            if (above.any() and below.any()) or (below.any() and box.width < 3 * body):
                bars.append(box)
                continue
        if max(box.width, box.height) >= 3 * body:
            others.append(box)
    return bars, others


def _pieces(runs: Sequence[TextRun], body: float) -> list[Piece]:
    """Runs joined to pieces of lines, each with the class that its runs vote for."""
    boxes = as_array([run.box for run in runs])
    pieces = []
    for group in group_lines(boxes, _WORD_GAP * body):
        members = [runs[i] for i in group]
        pieces.append(Piece(union([run.box for run in members]), _vote(members, body), len(members), _size(members)))
    return pieces


def _vote(runs: Sequence[TextRun], body: float) -> int:
    total = sum(run.box.width for run in runs)
    plain = [run for run in runs if not run.math and not run.mono]
    words = max((run.box.width for run in plain), default=0.0)
    # Of lines, in front of code.
    numbers = sum(run.box.width for run in plain if run.size < _SMALL * body and run.box.width < 2 * body)
    if sum(run.box.width for run in runs if run.mono) >= max(_CODE_SHARE * (total - numbers), 0.1 * body):
        return CODE if _size(runs) <= 1.4 * body else HEADING
    if sum(run.box.width for run in runs if run.math) >= _FORMULA_SHARE * total and words < _WORDS * body:
        return FORMULA
    strong = sum(run.box.width for run in runs if run.size > _LARGE * body or (run.bold and run.size > 0.95 * body))
    if strong > 0.6 * total:
        return HEADING
    return TEXT


def _size(runs: Sequence[TextRun]) -> float:
    return max(runs, key=lambda run: run.box.width).size


def _tables(rules: Sequence[Box], curves: Sequence[Box], pieces: Sequence[Piece], pitch: float) -> list[Box]:
    """Boxes from the first to the last of rules that hold rows of several columns between them."""
    found = []
    across = [box for box in rules if box.width > box.height]
    # Rules of one extent below each other, as books set tables.
    ends = np.array([(box.left, box.right) for box in across]).reshape(-1, 2)
    candidates = []
    for group in linked_groups((np.abs(ends[:, None] - ends) <= TOLERANCE).all(axis=-1)):
        for members in _unbroken([across[i] for i in group], pieces):
            box = union(members)
            if len(levels([rule.top for rule in across if is_inside(rule, box)])) >= 3:
                candidates.append(box)
    # Rules that touch, as in a grid.
    for group in group_near(as_array(rules), 0.3 * pitch, 0.3 * pitch):
        members = [rules[i] for i in group]
        rows = levels([box.top for box in members if box.width > box.height])
        cols = levels([box.left for box in members if box.width <= box.height])
        if len(rows) >= 2 and len(cols) >= 2 and len(rows) + len(cols) >= 5:
            candidates.append(union(members))
    for box in joined(candidates):
        inner = [piece for piece in pieces if share_inside(piece.box, box) > 0.8]
        rows = [len(row) for row in group_lines(as_array([piece.box for piece in inner]), np.inf)]
        is_drawing = any(is_inside(curve, box) for curve in curves)
        if not is_drawing and len(rows) >= 2 and sum(number >= 2 for number in rows) >= 0.5 * len(rows):
            found.append(box)
    return found


def _unbroken(rules: Sequence[Box], pieces: Sequence[Piece]) -> list[list[Box]]:
    """Rules of one extent, in groups with no prose between them, nor a line that sticks out."""
    groups: list[list[Box]] = []
    for rule in sorted(rules, key=lambda box: box.top):
        last = groups[-1][-1] if groups else rule
        between = [piece.box for piece in pieces if last.bottom <= piece.box.bottom and piece.box.top <= rule.top]
        common = [cut(box, rule).width for box in between]
        wide = sum(width > 0.6 * rule.width for width in common)
        out = any(0 < width < box.width - 3 * TOLERANCE for width, box in zip(common, between, strict=True))
        if not groups or wide >= _PROSE_LINES or out:
            groups.append([rule])
        else:
            groups[-1].append(rule)
    return groups


def _mark_margins(layouts: Sequence[_Layout]) -> None:
    """Gives the class of headers and footers to first and last lines that stand apart, or at one height on pages."""
    found: list[tuple[_Layout, bool, float, list[int], bool]] = []
    for layout in layouts:
        height = layout.page.height
        for is_header in (True, False):
            inside = [
                i
                for i, piece in enumerate(layout.pieces)
                if (piece.box.bottom if is_header else height - piece.box.top)
                < (_NUMBER_ZONE if piece.box.width < 3 * layout.body else _MARGIN_ZONE) * height
            ]
            if not inside:
                continue
            edge = (
                min(layout.pieces[i].box.bottom for i in inside)
                if is_header
                else max(layout.pieces[i].box.top for i in inside)
            )
            line = [
                i
                for i in inside
                if abs((layout.pieces[i].box.bottom if is_header else layout.pieces[i].box.top) - edge)
                < 0.8 * layout.body
            ]
            box = union([layout.pieces[i].box for i in line])
            others = [piece.box for i, piece in enumerate(layout.pieces) if i not in line]
            gap = min(
                ((other.top - box.bottom) if is_header else (box.top - other.bottom) for other in others),
                default=np.inf,
            )
            if gap < 0.45 * layout.pitch:
                continue
            is_number = box.width < 3 * layout.body
            apart = gap > (0.8 if is_number else 1.5) * layout.pitch and (
                is_number or edge < 0.07 * height or edge > 0.93 * height
            )
            found.append((layout, is_header, edge / height, line, apart))
    for layout, is_header, place, line, apart in found:
        same = sum(
            other is not layout and way == is_header and abs(place - there) < _SAME_HEIGHT
            for other, way, there, _, _ in found
        )
        if apart or (same >= 1 and same >= 0.25 * (len(layouts) - 1)):
            for i in line:
                layout.pieces[i] = layout.pieces[i]._replace(label=MARGIN)

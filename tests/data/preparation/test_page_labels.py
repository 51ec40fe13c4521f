"""Labels of pages whose every mark was placed by the test."""

import numpy as np
import pytest
from pdf_cases import HEIGHT, WIDTH, disk, paragraph, rectangle, text, write_pdf

from icnn_zoo.data.documents import DOCUMENT_CLASSES
from icnn_zoo.data.preparation.document_pages import label_document, picture_problem
from icnn_zoo.data.preparation.document_sources import Document, Source

CODES = {name: index for index, name in enumerate(DOCUMENT_CLASSES)}


def label(path, contents, **kwargs):
    """The labeled pages of a PDF with these contents, of one pixel a point."""
    pdf = write_pdf(path / "test.pdf", contents, **kwargs)
    source = Source(pdf, "test", "test.pdf")
    return label_document(Document(source, "test", tuple(range(len(contents))), frozenset()))


def ink(image):
    return image.min(axis=-1) < 128


def band(baseline, size, lines=1, pitch=12):
    """Rows of lines with their first baseline so many points above the page's bottom."""
    return slice(round(HEIGHT - baseline - 0.75 * size), round(HEIGHT - baseline + (lines - 1) * pitch + 0.25 * size))


def share(page, name, rows, cols=slice(None)):
    """The share of the ink in a window that has the class."""
    there = ink(page.image)[rows, cols]
    assert there.sum() > 5, "nothing is drawn there"
    return (page.labels[rows, cols] == CODES[name])[there].mean()


def test_ink_has_the_class_of_what_was_written_there(tmp_path):
    content = (
        text("Header of the page", 72, 775)
        + text("A heading", 72, 730, "bold", 14)
        + paragraph(700, 8)
        + "".join(text(f"code = call{line}(argument)", 90, 590 - 12 * line, "mono") for line in range(5))
        + text("abcdefghijk", 250, 500, "math", 12)
        + paragraph(470, 6)
        + text("17", 300, 30)
    )
    (page,) = label(tmp_path, [content]).pages
    assert page.labels.shape == (HEIGHT, WIDTH)
    expected = {
        "header_footer": [band(775, 10), band(30, 10)],
        "heading": [band(730, 14)],
        "text": [band(700, 10, 8), band(470, 10, 6)],
        "code": [band(590, 10, 5)],
        "formula": [band(500, 12)],
    }
    for name, bands in expected.items():
        for rows in bands:
            assert share(page, name, rows) > 0.98, name
    covered = np.zeros(HEIGHT, bool)
    for bands in expected.values():
        for rows in bands:
            covered[rows.start - 3 : rows.stop + 3] = True
    assert (page.labels[~covered] == 0).all()


def test_a_region_is_whole_between_its_lines_and_ends_with_them(tmp_path):
    (page,) = label(tmp_path, [paragraph(700, 8) + paragraph(400, 8)]).pages
    for top in (700, 400):
        assert (page.labels[band(top, 10, 8), 80:200] == CODES["text"]).all()
    gap = slice(HEIGHT - 700 + 7 * 12 + 8, HEIGHT - 400 - 14)
    assert (page.labels[gap] == 0).all()


def test_columns_stay_apart(tmp_path):
    columns = "".join(text("Words of one column of them", x, 700 - 12 * line) for line in range(20) for x in (72, 230))
    (page,) = label(tmp_path, [columns]).pages
    inside = page.labels[band(700, 10, 20)]
    right_end = np.flatnonzero(inside[:, :225].any(axis=0)).max()
    assert (inside[:, right_end + 1 : 228] == 0).all()
    assert right_end < 222


def test_rules_tables_and_figures(tmp_path):
    rows = "".join(text(f"cell {row}", x, 480 - 14 * row) for row in range(4) for x in (110, 210, 310))
    content = (
        paragraph(700, 8)
        + rectangle(72, 570, 300, 0.6)
        + "".join(rectangle(100, y, 300, 0.8) for y in (495, 475, 430))
        + rows
        + disk(300, 300, 60)
        + text("label", 280, 300)
        + paragraph(200, 6)
    )
    (page,) = label(tmp_path, [content]).pages
    assert (page.labels[HEIGHT - 571 : HEIGHT - 569, 74:370] == CODES["rule"]).all()
    table = page.labels[HEIGHT - 495 : HEIGHT - 431, 101:399]
    assert (table == CODES["table"]).all()
    figure = page.labels[HEIGHT - 359 : HEIGHT - 241, 241:359]
    assert (figure == CODES["figure"]).all()
    assert (page.labels == CODES["figure"]).sum() < 1.05 * 120**2
    assert (page.labels == CODES["table"]).sum() < 1.05 * 300 * 66


def test_a_frame_around_prose_is_no_figure(tmp_path):
    frame = "60 560 m 60 720 l 520 720 l 520 560 l h S\n"
    rounded = "60 300 m 60 480 l 60 490 70 490 80 490 c 520 490 l 520 300 l h S\n"
    (page,) = label(tmp_path, [frame + paragraph(700, 8) + rounded + paragraph(470, 8)]).pages
    assert not (page.labels == CODES["figure"]).any()
    for top in (700, 470):
        assert share(page, "text", band(top, 10, 8), slice(70, 400)) > 0.98
    assert (page.labels[HEIGHT - 720 + 3 : HEIGHT - 700 - 9, 59:62] == CODES["rule"]).any(axis=1).all()


def test_a_bold_paragraph_is_text_and_a_bold_line_a_heading(tmp_path):
    (page,) = label(
        tmp_path, [paragraph(700, 6, font="bold") + text("One line", 72, 600, "bold") + paragraph(570, 12)]
    ).pages
    assert share(page, "text", band(700, 10, 6)) > 0.98
    assert share(page, "heading", band(600, 10)) > 0.98


def test_code_among_words_is_text_and_symbols_among_words_too(tmp_path):
    line = "BT /plain 10 Tf 72 500 Td (Words before the ) Tj /mono 10 Tf (code) Tj /math 10 Tf (abc) Tj " + (
        "/plain 10 Tf ( and words after all of it) Tj ET\n"
    )
    (page,) = label(tmp_path, [paragraph(700, 8) + line]).pages
    assert share(page, "text", band(500, 10)) > 0.98


def test_lines_at_one_height_of_pages_are_headers(tmp_path):
    pages = [text(f"Chapter {n}", 72, 730) + paragraph(705, 40) for n in range(3)]
    for page in label(tmp_path, pages).pages:
        assert share(page, "header_footer", band(730, 10)) > 0.98


def test_tables_below_each_other_stay_apart(tmp_path):
    def table(top):
        rules = "".join(rectangle(150, top - down, 200, 0.8) for down in (0, 20, 50))
        cells = "".join(text(f"cell {x}", x, top - 14 - 15 * row) for row in range(3) for x in (160, 270))
        return rules + cells

    content = table(700) + text("A heading on the left", 72, 620, "bold", 12) + table(600) + paragraph(500, 8)
    (page,) = label(tmp_path, [content]).pages
    for top in (700, 600):
        assert (page.labels[HEIGHT - top : HEIGHT - top + 49, 151:349] == CODES["table"]).all()
    assert share(page, "heading", band(620, 12)) > 0.98


def test_numbers_of_code_lines_and_equations_follow_their_row(tmp_path):
    content = paragraph(700, 10) + "".join(
        text(str(line), 72, 500 - 12 * line, "plain", 6) + text("call(argument, more)", 100, 500 - 12 * line, "mono")
        for line in range(4)
    )
    content += text("15", 72, 452, "plain", 6) + text("}", 81, 452, "mono")
    content += text("abcdefghijk", 200, 400, "math", 12) + text("\\(3\\)", 500, 400)
    (page,) = label(tmp_path, [content]).pages
    assert share(page, "code", band(500, 10, 5)) > 0.98
    assert share(page, "formula", band(400, 12)) > 0.98


@pytest.mark.parametrize(
    ("contents", "options", "reason"),
    [
        (["0.5 g " + rectangle(0, 0, 600, 800)], {}, "little text"),
        ([paragraph(700, 10)], {"size": (3000, 800)}, "the page is 1.1 m long; pages must be shorter than a metre"),
        (["1 g " + paragraph(700, 10)], {}, "text that is not drawn"),
        ([paragraph(700, 10)] * 2, {}, "one font of one size for everything"),
        (
            [paragraph(700, 10, font="mono") + text("Title", 72, 720, "mono", 14)] * 2,
            {},
            "everything in typewriter fonts",
        ),
        ([paragraph(700, 5) + "".join(rectangle(72 + 30 * n, 100, 20, 20) for n in range(3))], {}, "much ink"),
    ],
)
def test_pages_that_cannot_be_learned_from_are_named(contents, options, reason, tmp_path):
    result = label(tmp_path, contents, **options)
    assert result.pages == []
    assert set(result.skipped) == set(range(len(contents)))
    assert all(found.startswith(reason) for found in result.skipped.values()), result.skipped


def test_a_picture_of_a_page_is_a_scan(tmp_path):
    inline = "q 600 0 0 800 0 0 cm BI /W 1 /H 1 /BPC 8 /CS /G ID \x80 EI Q\n"
    assert label(tmp_path, [inline]).skipped == {0: "a scan: a picture of a page without text"}


def test_text_that_is_not_drawn_names_fonts_that_the_file_lacks():
    from icnn_zoo.data.preparation.page_structure import PageStructure

    image = np.full((50, 50, 3), 255, np.uint8)
    labels = np.ones((50, 50), np.uint8)
    structure = PageStructure(50, 50, not_embedded={"SimSun"})
    problem = picture_problem(image, labels, structure)
    assert problem == "text that is not drawn: the file does not hold the fonts SimSun"

"""icnn-zoo segment on PDFs: every page, whole or not at all."""

import sys

import numpy as np
import pytest
from pdf_cases import article, write_pdf
from PIL import Image, ImageSequence

import icnn_zoo
from icnn_zoo.cli.programs import zoo_main
from icnn_zoo.io.pdf import open_pdf, render_page

NAME = "tf_efficientnet_lite0.drawn_voc_regular"  # comes with the package

pytest.importorskip("pypdfium2")


def segment(pdf, *arguments):
    zoo_main(["segment", NAME, str(pdf), "--longest-side", "200", *map(str, arguments)])


def test_every_page_is_labeled(tmp_path, capsys):
    pdf = write_pdf(tmp_path / "two.pdf", [article(), article(1)], size=(600, 800))
    segment(pdf, "--to", tmp_path / "seen.pdf", "--labels", tmp_path / "labels.tif")
    assert capsys.readouterr().out.count("2 pages") == 2
    model = icnn_zoo.load_checkpoint(NAME)
    document = open_pdf(pdf)
    with Image.open(tmp_path / "labels.tif") as labels:
        maps = [np.asarray(page) for page in ImageSequence.Iterator(labels)]
        assert labels.mode == "P"
    assert len(maps) == len(document) == 2
    for number, labels in enumerate(maps):
        image = render_page(document[number], 200)
        assert image.shape == (200, 150, 3)
        assert np.array_equal(labels, model.predict(image))
    document.close()
    seen = open_pdf(tmp_path / "seen.pdf")
    assert len(seen) == 2
    seen.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{pdf}", "--to", "out.png"], r"must end in \.pdf"),
        (["{pdf}", "--to", "out.pdf", "--labels", "out.png"], r"must end in \.tif or \.tiff"),
        (["{pdf}", "--to", "{pdf}"], "exists; choose another name, or --force"),
        (["none.pdf", "--to", "out.pdf"], "there is no file 'none.pdf'"),
        (["{broken}", "--to", "out.pdf"], "is broken or without pages"),
        (["{poster}", "--to", "out.pdf"], r"page 2 of '.*poster\.pdf' cannot be rendered: the page is 1\.2 m long"),
        (["{pdf}", "--to", "out.pdf", "--longest-side", "0"], "--longest-side must be at least 1 pixel; got 0"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.pdf").write_bytes(b"no PDF")
    poster = write_pdf(tmp_path / "poster.pdf", [article(), article()])
    data = poster.read_bytes()
    place = data.rindex(b"/MediaBox [0 0 600 800]")
    poster.write_bytes(data[:place] + b"/MediaBox [0 0 99 3300]" + data[place + 23 :])
    files = {"pdf": write_pdf(tmp_path / "one.pdf", [article()]), "broken": "broken.pdf", "poster": poster}
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match=message):
        segment(*[word.format(**files) for word in arguments])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_the_extra_its_name_is_told(tmp_path, monkeypatch):
    pdf = write_pdf(tmp_path / "one.pdf", [article()])
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(SystemExit, match=r'PDFs need pypdfium2: pip install "icnn-zoo\[documents\]"'):
        segment(pdf, "--to", tmp_path / "seen.pdf")
    assert not (tmp_path / "seen.pdf").exists()

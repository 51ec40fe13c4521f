"""icnn-zoo segment on images: nothing replaces anything unasked, and every way of reading gives the same pixels."""

from argparse import Namespace
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import tifffile
from PIL import Image

from icnn_zoo.cli.programs import zoo_main
from icnn_zoo.cli.segment_inputs import _rows, find_inputs, is_large
from icnn_zoo.io.rasters import read_pixels
from icnn_zoo.training.task import SegmentationTask

NAME = "plain5.lines_regular"  # the smallest that comes with the package
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def picture(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS).save(path, **options)
    return path


def refused(*arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        zoo_main(["segment", NAME, *map(str, arguments)])
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "options", "clash"),
    [
        (["y.jpg", "y_picture.png"], ["--pictures"], "y_picture.png"),
        (["x.pdf", "x_page1.jpg"], [], "x_page1.png"),
    ],
)
def test_results_that_would_take_each_others_names_are_refused(names, options, clash, tmp_path):
    for name in names:
        picture(tmp_path / "in" / name)
    said = refused(tmp_path / "in", "--to", tmp_path / "out", *options)
    assert f"would both be written as {clash!r}" in said
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("there", ["y.png", "y_picture.png", "y_probabilities.npz"])
def test_nothing_is_replaced_without_force(there, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / there).write_text("precious")
    image = picture(tmp_path / "y.jpg")
    said = refused(image, "--to", tmp_path / "out", "--pictures", "--probabilities")
    assert "exists; choose another folder, or --force" in said
    assert (tmp_path / "out" / there).read_text() == "precious"


def test_the_picture_and_the_labels_are_two_files(tmp_path):
    image, both = picture(tmp_path / "y.jpg"), tmp_path / "same.png"
    assert "must be two files" in refused(image, "--to", both, "--labels", both)


def test_an_empty_name_is_not_the_current_folder(tmp_path):
    assert "an image's name is empty" in refused("", "--to", tmp_path / "out")


def test_results_of_the_last_time_are_not_images_of_the_next(tmp_path):
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "labels" / "a.png")
    assert [each.path.name for each in find_inputs([str(tmp_path)], tmp_path / "labels")] == ["a.jpg"]
    for beside in ("labels", "."):  # where results go beside the images, or above them, all are taken
        assert len(find_inputs([str(tmp_path / "labels")], tmp_path / beside)) == 1


def tiffs(folder):
    """TIFFs by what a reader may miss in them."""
    exif = Image.Exif()
    exif[274] = 6
    yield "turned", picture(folder / "turned.tif", exif=exif), None
    for mode in ("L", "RGBA", "CMYK", "P", "1"):
        Image.fromarray(PIXELS).convert(mode).save(folder / f"{mode}.tif")
        yield mode, folder / f"{mode}.tif", None
    yield "8 bits beside 16", picture(folder / "rgb.tif"), 65535
    tifffile.imwrite(folder / "deep.tif", PIXELS.astype(np.uint16) * 257, photometric="rgb")
    yield "16 bits", folder / "deep.tif", 65535
    yield "compressed", picture(folder / "lzw.tif", compression="tiff_lzw"), None
    with Image.open(folder / "rgb.tif") as first:
        first.save(folder / "two.tif", save_all=True, append_images=[Image.fromarray(PIXELS[::-1])])
    yield "two pages", folder / "two.tif", None


@pytest.mark.filterwarnings("ignore:.*holds 2 pictures")
def test_large_tiffs_are_read_as_small_ones(tmp_path, monkeypatch):
    network = SimpleNamespace(model=SimpleNamespace(in_channels=3))
    monkeypatch.setattr("icnn_zoo.cli.segment_inputs.BIG", 1000)
    for name, path, white_level in tiffs(tmp_path):
        options = Namespace(white_level=white_level, longest_side=None)
        assert is_large(path, options), name
        small = read_pixels(path, 3, white_level)
        with _rows(network, path, options) as image:
            large = image.rows(0, image.shape[0])
        assert large.shape == small.shape, name
        assert np.abs(large.astype(float) - small).max() <= 1, name


def test_one_image_of_one_channel_is_labeled_as_a_folder_of_them_is(tmp_path):
    task = SegmentationTask("plain5", 2, in_channels=1, output_stride=2, head_dilation=1, mean=[0.5], std=[0.25])
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(task)
    run = tmp_path / "run" / "checkpoints" / "last.ckpt"
    trainer.save_checkpoint(run)
    image = tmp_path / "in" / "gray.png"
    image.parent.mkdir()
    Image.fromarray(PIXELS[..., 0]).save(image)
    zoo_main(["segment", str(run), str(image), "--to", str(tmp_path / "p.png"), "--labels", str(tmp_path / "l.png")])
    zoo_main(["segment", str(run), str(image.parent), "--to", str(tmp_path / "many")])
    one, many = (np.asarray(Image.open(file)) for file in (tmp_path / "l.png", tmp_path / "many" / "gray.png"))
    assert np.array_equal(one, many)
    zoo_main(["heatmap", str(run), str(image), "--pixel", "3", "4", "--to", str(tmp_path / "h.png")])
    assert (tmp_path / "h.png").is_file()

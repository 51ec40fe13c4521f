"""Many images and images larger than memory: batches, windows, bands of rows, and the files that are written."""

import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from icnn_zoo.cli import segment_inputs
from icnn_zoo.cli.programs import zoo_main
from icnn_zoo.io.label_pictures import color_map, segmentation_picture
from icnn_zoo.io.overviews import Overview
from icnn_zoo.io.png import LabelWriter
from icnn_zoo.io.rasters import Raster, read_raster
from icnn_zoo.models import SegmentationModel
from icnn_zoo.models.evaluation import Evaluation
from icnn_zoo.training.network_sources import load_task
from icnn_zoo.training.task import SegmentationTask
from icnn_zoo.zoo.segmenting import label_bands, segment_images


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = {"class_path": "torch.nn.Conv2d", "init_args": {"out_channels": 3, "kernel_size": 3, "padding": 1}}
    return SegmentationModel(None, 3, network=network).eval()  # sees a pixel's neighbors, and no farther


class Held(NamedTuple):
    pixels: np.ndarray

    @property
    def shape(self):
        return self.pixels.shape

    def rows(self, top, bottom):
        return self.pixels[top:bottom]


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_batches_and_windows_label_as_single_images_do(model):
    images = [picture(20, 33, seed) for seed in range(3)] + [picture(31, 18)]
    single = [result.labels for result in segment_images(model, images)]
    together = list(segment_images(model, iter(images), batch=2, probabilities=True))
    for labels, result in zip(single, together, strict=True):
        assert (labels == result.labels).all()
        assert result.probabilities is not None
        np.testing.assert_allclose(result.probabilities.sum(0), 1, rtol=1e-5)
        assert (result.probabilities.argmax(0) == labels).all()
    slid = segment_images(model, images, evaluation=Evaluation("sliding", 16))
    assert all((labels == result.labels).mean() > 0.8 for labels, result in zip(single, slid, strict=True))


@pytest.mark.parametrize("size", [(50, 71), (16, 40), (9, 11)])
@pytest.mark.parametrize("batch", [1, 3])
def test_bands_are_the_whole_image_where_windows_see_enough(model, size, batch, tmp_path):
    image = picture(*size)
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(16, 32), compression="zlib")
    with Raster(tmp_path / "a.tif") as raster:
        found = np.concatenate(list(label_bands(model, raster, window=16, batch=batch)))
    whole = next(segment_images(model, [image])).labels
    assert found.shape == size
    assert (found == whole).all()


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (32, 48), "compression": "zlib", "planarconfig": "contig"},
        {"rowsperstrip": 10, "planarconfig": "contig"},
        {"planarconfig": "separate", "first": True},
        {"imagej": True, "metadata": {"axes": "CYX"}, "first": True},
    ],
    ids=["tiles", "strips", "planes", "pages"],
)
def test_channels_lie_where_a_tiff_has_them(options, tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (77, 101, 5), dtype=np.uint16)
    stored = values.transpose(2, 0, 1) if options.pop("first", False) else values
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", **options)
    assert (read_raster(tmp_path / "a.tif") == values).all()
    with Raster(tmp_path / "a.tif") as raster:
        assert (raster.rows(31, 70) == values[31:70]).all()


def test_a_label_map_is_written_in_bands(tmp_path):
    labels = np.random.default_rng(0).integers(0, 21, (50, 33), dtype=np.uint8)
    with LabelWriter(tmp_path / "a.png", labels.shape, np.full((21, 3), 7, np.uint8)) as writer:
        writer.write(labels[:20])
        writer.write(labels[20:])
    with Image.open(tmp_path / "a.png") as image:
        assert (image.mode, image.getpalette()[:3]) == ("P", [7, 7, 7])
        assert (np.asarray(image) == labels).all()


def test_a_folder_a_pattern_and_a_run_are_segmented(tmp_path, monkeypatch, capsys, zoo_run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "below").mkdir(parents=True)
    for place, name in enumerate(("a.png", "b.jpg", "below/c.png")):
        Image.fromarray(picture(40, 50, place)).save(tmp_path / "in" / name)
    zoo_main(["segment", str(zoo_run), "in", "--to", "out", "--batch", "2", "--pictures", "--probabilities"])
    assert "Written: 3 label maps in out" in capsys.readouterr().out
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert {"a.png", "b.png", "below/c.png", "a_picture.png", "a_probabilities.npz"} <= written
    with Image.open("out/a.png") as image:
        labels = np.asarray(image)
    assert labels.shape == (40, 50)
    assert (np.load("out/a_probabilities.npz")["probabilities"].argmax(0) == labels).mean() > 0.99  # half precision
    zoo_main(["segment", str(zoo_run / "checkpoints" / "last.ckpt"), "in/*.png", "--to", "again", "--window", "33"])
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in", "--to", "out.png"], "--to must be a folder for more than one image, such as out"),
        (["in", "--to", "out", "--labels", "a.png"], "--labels is for one image"),
        (["in/*.gif", "--to", "out"], r"no file matches 'in/\*.gif'"),
        (["empty", "--to", "out"], "holds no image"),
        (["in", "other", "--to", "out"], "would both be written as 'a'"),
        (["bad", "--to", "out"], r"'bad/notes\.png' is not a readable image"),
        (["in/a.png", "--to", "a.png", "--pictures"], "are for a folder"),
        (["in", "--to", "out", "--window", "0"], "--window must be at least 1 pixel; got 0"),
        (["in", "--to", "taken"], r"'taken/a\.png' exists"),
    ],
)
def test_mistakes_are_named_before_the_network_is_fetched(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "other", "empty", "bad", "taken"):
        (tmp_path / folder).mkdir()
    for file in ("in/a.png", "in/b.png", "other/a.png", "taken/a.png"):
        Image.fromarray(picture(8, 8)).save(tmp_path / file)
    (tmp_path / "bad" / "notes.png").write_text("no image")
    with pytest.raises(SystemExit, match=message):
        zoo_main(["segment", "no_such.network", *arguments])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["out", "a.png"])
def test_a_place_that_cannot_be_written_is_told_before_the_network_is_fetched(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(8, 8)).save("image.png")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(SystemExit, match=r"must be in a folder that can be written; '.*' cannot"):
        zoo_main(["segment", "no_such.network", "image.png", "--to", target])


@pytest.mark.parametrize(
    ("dtype", "arguments", "message"),
    [
        (np.uint8, ["--probabilities"], "'in/big.tif' is too large for --probabilities"),
        (np.uint16, [], "'in/big.tif' holds uint16, and nothing says which value is white"),
    ],
)
def test_what_a_large_image_cannot_have_is_said_before_anything_is_written(
    dtype, arguments, message, tmp_path, monkeypatch, zoo_run
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(segment_inputs, "BIG", 2000)
    (tmp_path / "in").mkdir()
    Image.fromarray(picture(20, 30)).save("in/a.png")
    tifffile.imwrite("in/big.tif", picture(50, 71).astype(dtype))
    with pytest.raises(SystemExit, match=message):
        zoo_main(["segment", str(zoo_run), "in", "--to", "out", *arguments])
    assert not (tmp_path / "out").exists()


def test_an_overview_has_means_of_squares_and_shares_of_all_pixels(tmp_path):
    image, labels = picture(50, 71), np.random.default_rng(1).integers(0, 3, (50, 71), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image)
    with Raster(tmp_path / "a.tif") as raster:
        overview = Overview(raster, 3, longest_side=24)  # squares of 3
        assert (overview.rows(0, 32) == image[:32]).all()
        overview.add(labels[:21])
        overview.rows(18, 50)
        overview.add(labels[21:])
    means = [image[3 * row : 3 * row + 3, 3 * col : 3 * col + 3].mean((0, 1)) for row in range(17) for col in range(24)]
    middles = labels[np.minimum(np.arange(17) * 3 + 1, 49)][:, np.minimum(np.arange(24) * 3 + 1, 70)]
    wanted = segmentation_picture(
        np.array(means).round().astype(np.uint8).reshape(17, 24, 3),
        middles,
        "abc",
        color_map(3),
        shares=np.bincount(labels.ravel()) / labels.size,
    )
    assert overview.picture("abc", color_map(3)).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("ending", ["tif", "png"])
@pytest.mark.parametrize("single", [True, False])
def test_a_large_image_is_labeled_in_windows_and_drawn_small(ending, single, tmp_path, monkeypatch, zoo_run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(segment_inputs, "BIG", 2000)
    image = picture(50, 71)
    Image.fromarray(image).save(f"big.{ending}")
    where = ["--to", "small.png", "--labels", "big_labels.png"] if single else ["--to", "out", "--pictures"]
    zoo_main(["segment", str(zoo_run), f"big.{ending}", "--window", "33", *where])
    model = load_task(zoo_run).model
    names = ("big_labels.png", "small.png") if single else ("out/big.png", "out/big_picture.png")
    with Image.open(names[0]) as labels, Image.open(names[1]) as drawn:
        assert (np.asarray(labels) == np.concatenate(list(label_bands(model, Held(image), window=33)))).all()
        assert (np.asarray(drawn)[:50, :71] == image).all()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_image_of_20000_by_20000_takes_less_than_2_gb(tmp_path):
    """Of a network of one layer, as memory is what is looked at: windows of any network are of one size."""
    spec = {"class_path": "torch.nn.Conv2d", "init_args": {"out_channels": 2, "kernel_size": 3, "stride": 16}}
    task = SegmentationTask(None, 2, network=spec)
    torch.save({"hyper_parameters": dict(task.hparams), "state_dict": task.state_dict()}, tmp_path / "tiny.ckpt")
    program = """
import resource, numpy as np, tifffile
from icnn_zoo.cli.programs import zoo_main
tile = np.add.outer(np.arange(1024), np.arange(3072)).reshape(1024, 1024, 3).astype(np.uint8)
tifffile.imwrite("big.tif", (tile for _ in range(400)), shape=(20000, 20000, 3), dtype=np.uint8, tile=(1024, 1024),
                 photometric="rgb", compression="zlib", compressionargs={"level": 1})
zoo_main(["segment", "tiny.ckpt", "big.tif", "--to", "out", "--pictures", "--allow", "torch.nn.Conv2d"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 2_000_000  # KB
    with (tmp_path / "out" / "big.png").open("rb") as file:  # more pixels than Pillow opens
        assert file.read(24)[16:] == (20000).to_bytes(4, "big") * 2
    with Image.open(tmp_path / "out" / "big_picture.png") as drawn:
        assert drawn.height == 1539  # squares of 13

"""icnn-zoo prepare for the paper's datasets: converted once, whole or not at all, with a report."""

import hashlib
import shutil
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import miniature
import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import SBDataset
from torchvision.datasets.voc import DATASET_YEAR_DICT

from icnn_zoo.cli.programs import zoo_main
from icnn_zoo.data import CityscapesDataModule, PascalContextDataModule, VOC2012DataModule

ANY = {"num_train": "any", "num_val": "any"}


def prepare(name: str, root: Path, *options: str) -> None:
    zoo_main(["prepare", name, "--root", str(root), "--any-number", *options])


def masks(data, split: str = "train") -> list[np.ndarray]:
    dataset = data.make_dataset(split)
    return [dataset[index]["mask"] for index in range(len(dataset))]


def assert_same(first, second) -> None:
    for split in ("train", "val"):
        assert all(np.array_equal(*pair) for pair in zip(masks(first, split), masks(second, split), strict=True))


def test_sbd_becomes_deeplabs_folder_with_a_list_and_a_report(tmp_path, capsys):
    voc = miniature.write_voc2012(tmp_path / "data")
    shutil.copytree(tmp_path / "data", tmp_path / "raw")
    prepare("voc2012", tmp_path / "data")
    output = capsys.readouterr().out
    assert "Images: train 6, val 2" in output
    assert "Problems: none" in output
    assert output.count("aeroplane") == 1
    shutil.rmtree(tmp_path / "data" / "benchmark_RELEASE")  # no longer needed
    assert_same(VOC2012DataModule(tmp_path / "raw", **ANY), VOC2012DataModule(tmp_path / "data", **ANY))
    made = sorted(path.stem for path in (voc / "SegmentationClassAug").iterdir())
    assert made == sorted({*miniature.TRAIN_AUG, *miniature.VOC_VAL})
    for name in made:  # VOC's own images keep their borders
        border = 255 if name in miniature.VOC_TRAIN + miniature.VOC_VAL else 0
        with Image.open(voc / "SegmentationClassAug" / f"{name}.png") as picture:
            assert picture.mode == "P"
            assert np.array_equal(np.asarray(picture), miniature.voc_labels(name, border))
    lines = (voc / "ImageSets" / "SegmentationAug" / "train_aug.txt").read_text().splitlines()
    assert lines[0] == "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png"
    assert "Problems: none" in (tmp_path / "data" / "prepare-voc2012.txt").read_text()


def test_the_report_counts_the_pixels_of_each_class(tmp_path):
    miniature.write_voc2012(tmp_path)
    prepare("voc2012", tmp_path)
    rows = [line.split() for line in (tmp_path / "prepare-voc2012.txt").read_text().splitlines()]
    counted = {
        row[0]: [float(number) for number in row[1:]] for row in rows if len(row) == 3 and row[0] == "background"
    }
    for place, split in enumerate(("train", "val")):
        expected = sum((mask == 0).sum() for mask in masks(VOC2012DataModule(tmp_path, **ANY), split)) / 1000
        assert counted["background"][place] == pytest.approx(expected, abs=0.06)


def test_an_interrupted_conversion_goes_on_and_shows_nothing_half_done(tmp_path):
    voc = miniature.write_voc2012(tmp_path)
    broken = tmp_path / "benchmark_RELEASE" / "dataset" / "cls" / "2011_000010.mat"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40])
    with pytest.raises(SystemExit, match=r"1 label files cannot be converted:\n.*2011_000010.mat"):
        prepare("voc2012", tmp_path)
    assert not (voc / "SegmentationClassAug").exists()
    done = {path: path.stat().st_mtime_ns for path in (voc / "SegmentationClassAug.partial").iterdir()}
    assert len(done) == 7
    broken.write_bytes(whole)
    prepare("voc2012", tmp_path)
    assert not (voc / "SegmentationClassAug.partial").exists()
    for path, time in done.items():
        assert (voc / "SegmentationClassAug" / path.name).stat().st_mtime_ns == time


def test_problems_are_reported_by_file_and_make_the_command_fail(tmp_path):
    voc = miniature.write_voc2012(tmp_path)
    prepare("voc2012", tmp_path)
    (voc / "JPEGImages" / "2007_000032.jpg").unlink()
    (voc / "JPEGImages" / "2007_000039.jpg").write_bytes(b"no picture")
    Image.fromarray(np.full((5, 5), 99, np.uint8)).save(voc / "SegmentationClass" / "2007_000033.png")
    with pytest.raises(SystemExit) as caught:
        prepare("voc2012", tmp_path)
    report = (tmp_path / "prepare-voc2012.txt").read_text()
    for text in (str(caught.value), report):
        assert "Problems: 3" in text
        assert all(name in text for name in ("2007_000032.jpg", "2007_000039.jpg", "2007_000033.png", "[99]"))


def test_other_numbers_than_the_official_ones_are_a_problem(tmp_path):
    miniature.write_voc2012(tmp_path)
    with pytest.raises(SystemExit, match="train must have 10582 images and has 6"):
        zoo_main(["prepare", "voc2012", "--root", str(tmp_path)])


def test_label_maps_become_pngs_in_the_official_order(tmp_path):
    voc = miniature.write_pascal_context(tmp_path / "data")
    shutil.copytree(tmp_path / "data", tmp_path / "raw")
    prepare("pascal-context", tmp_path / "data")
    assert (voc / "SegmentationClassContext59" / "class_order.txt").read_text() == "official\n"
    shutil.rmtree(tmp_path / "data" / "trainval")
    assert_same(PascalContextDataModule(tmp_path / "raw", **ANY), PascalContextDataModule(tmp_path / "data", **ANY))
    prepare("pascal-context", tmp_path / "data")  # once more: only checked


def test_missing_label_maps_say_what_to_fetch_and_where_to_put_it(tmp_path):
    miniature.write_pascal_context(tmp_path)
    shutil.rmtree(tmp_path / "trainval")
    with pytest.raises(SystemExit, match=r"Fetch trainval.tar.gz .*unpack it in .*trainval/<id>.mat"):
        prepare("pascal-context", tmp_path)


def test_train_ids_are_those_of_the_official_tool(tmp_path):
    official = pytest.importorskip("cityscapesscripts.preparation.json2labelImg")
    miniature.write_cityscapes(tmp_path, number=1)
    prepare("cityscapes", tmp_path)
    assert not list(tmp_path.rglob("*labelTrainIds.png"))
    prepare("cityscapes", tmp_path, "--train-ids")
    made = sorted(tmp_path.rglob("*labelTrainIds.png"))
    assert len(made) == 3  # of train and val
    for path in made:
        polygons = str(path).replace("labelTrainIds.png", "polygons.json")
        official.json2labelImg(polygons, str(tmp_path / "official.png"), "trainIds")
        assert np.array_equal(miniature.values_of(path), miniature.values_of(tmp_path / "official.png"))
    data = CityscapesDataModule(tmp_path, **ANY)
    assert all(item.labels in made for item in data.items("train"))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """VOC 2012 and SBD in small, as archives on a local server that torchvision believes in."""
    miniature.write_voc2012(tmp_path / "source")
    folder = tmp_path / "served"
    folder.mkdir()
    md5 = {}
    for name, part in {"voc.tar": "VOCdevkit", "benchmark.tgz": "benchmark_RELEASE"}.items():
        with tarfile.open(folder / name, "w:gz" if name.endswith("tgz") else "w") as archive:
            archive.add(tmp_path / "source" / part, part)
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{running.server_port}"
    entry = {"url": f"{address}/voc.tar", "filename": "voc.tar", "md5": md5["voc.tar"], "base_dir": "VOCdevkit/VOC2012"}
    monkeypatch.setitem(DATASET_YEAR_DICT, "2012", entry)
    monkeypatch.setattr(SBDataset, "url", f"{address}/benchmark.tgz")
    monkeypatch.setattr(SBDataset, "md5", md5["benchmark.tgz"])
    yield folder
    running.shutdown()
    running.server_close()


@pytest.mark.filterwarnings("ignore")
def test_download_fetches_what_is_missing_and_leaves_no_archives(server, tmp_path):
    root = tmp_path / "data"
    prepare("voc2012", root, "--download")
    assert sorted(path.name for path in root.iterdir()) == ["VOCdevkit", "benchmark_RELEASE", "prepare-voc2012.txt"]
    assert len(VOC2012DataModule(root, **ANY).make_dataset("train")) == 6


def test_without_download_both_archives_and_their_places_are_named(server, tmp_path):
    with pytest.raises(SystemExit) as caught:
        prepare("voc2012", tmp_path / "data")
    text = str(caught.value)
    for part in ("--download", "/voc.tar", "/benchmark.tgz", "md5", "data/VOCdevkit/VOC2012", "data/benchmark_RELEASE"):
        assert part in text
    assert not (tmp_path / "data").exists()


def test_archives_put_there_by_hand_are_unpacked_and_kept(server, tmp_path):
    shutil.copytree(server, tmp_path / "data")
    prepare("voc2012", tmp_path / "data")
    assert (tmp_path / "data" / "voc.tar").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", ["gone", "other"])
def test_a_failing_download_says_what_to_do_by_hand(server, tmp_path, damage):
    file = server / "voc.tar"
    file.unlink() if damage == "gone" else file.write_bytes(b"other")
    with pytest.raises(
        SystemExit, match=r"PASCAL VOC 2012 cannot be downloaded .* By hand: fetch http.*voc.tar \(md5 "
    ):
        prepare("voc2012", tmp_path / "data", "--download")
    assert not (tmp_path / "data" / "VOCdevkit").exists()


def test_options_of_other_things_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="--download does not apply to cityscapes, only to pascal-context, voc2012"):
        prepare("cityscapes", tmp_path, "--download")

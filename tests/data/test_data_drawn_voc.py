"""The drawn PASCAL VOC: a function of its seed and files, masks that fit, and clear errors when files are missing."""

import re
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from icnn_zoo.data import VOC_CLASSES, DrawnVOCDataModule, color_map
from icnn_zoo.data.preparation import drawn_voc as prepare
from icnn_zoo.data.preparation.backgrounds import PHOTOGRAPHS, write_backgrounds

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10">'
    '<rect x="2" y="4" width="4" height="2" fill="red"/></svg>'
)


@pytest.fixture
def root(drawn_voc_root) -> Path:
    return drawn_voc_root


def drawn(root: Path, **kwargs) -> DrawnVOCDataModule:
    return DrawnVOCDataModule(root, **{"image_size": 64, "num_workers": 0, **kwargs})


def test_classes_and_colors_are_pascal_vocs():
    data = drawn(Path("nowhere"))
    assert data.num_classes == 21
    assert data.classes[15] == "person"
    assert data.palette[[1, 15, 20]].tolist() == [[128, 0, 0], [192, 128, 128], [0, 64, 128]]
    assert color_map(256)[255].tolist() == [224, 224, 192]


def test_scenes_are_a_function_of_seed_split_and_index(root):
    first, again = (drawn(root).make_dataset("train")[5] for _ in range(2))
    assert np.array_equal(first["image"], again["image"])
    assert np.array_equal(first["mask"], again["mask"])
    for other in (drawn(root).make_dataset("val")[5], drawn(root, seed=1).make_dataset("train")[5]):
        assert not np.array_equal(first["image"], other["image"])


@pytest.mark.parametrize("size", [50, (64, 96), (200, 150)])
def test_scenes_have_any_size(root, size):
    sample = drawn(root, image_size=size).make_dataset("train")[0]
    height, width = (size, size) if isinstance(size, int) else size
    assert sample["image"].shape == (height, width, 3)
    assert sample["mask"].shape == (height, width)


def test_masks_are_where_objects_are(root):
    dataset = drawn(root, jitter=0, noise=0, rotation=0).make_dataset("train")
    for index in range(10):
        sample = dataset[index]
        changed = np.abs(sample["image"].astype(int) - 20).max(axis=-1) > 0
        assert changed[sample["mask"] > 0].all()
        assert (changed != (sample["mask"] > 0)).mean() < 0.1


def test_every_class_occurs(root):
    dataset = drawn(root, num_train=100).make_dataset("train")
    assert set().union(*(np.unique(dataset[index]["mask"]) for index in range(100))) == set(range(21))


def test_a_missing_folder_names_the_command(tmp_path):
    expected = re.escape(f"icnn-zoo prepare drawn-voc --root {tmp_path}")
    for attempt in (drawn(tmp_path).prepare_data, lambda: drawn(tmp_path).setup("fit")):
        with pytest.raises(FileNotFoundError, match=expected):
            attempt()


def test_hidden_files_beside_the_pictures_are_no_part_of_them(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    for path in list((copy / "drawn-voc").rglob("*.png")):
        path.with_name(f"._{path.name}").write_bytes(b"of a Mac")
    assert np.array_equal(drawn(copy).make_dataset("val")[0]["image"], drawn(root).make_dataset("val")[0]["image"])


def test_a_damaged_manifest_is_named(tmp_path):
    (tmp_path / "drawn-voc").mkdir()
    (tmp_path / "drawn-voc/manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json' is damaged .* Remove .* and run: icnn-zoo prepare"):
        drawn(tmp_path).prepare_data()


def test_an_incomplete_folder_is_refused(root, tmp_path):
    folder = tmp_path / "drawn-voc"
    folder.mkdir()
    (folder / "manifest.json").write_text((root / "drawn-voc" / "manifest.json").read_text())
    with pytest.raises(FileNotFoundError, match="must hold 2 pictures and holds 0"):
        drawn(tmp_path).prepare_data()
    (folder / "manifest.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="has format 0, this version of icnn_zoo reads"):
        prepare.prepare_drawn_voc(tmp_path)


def test_without_npm_nothing_is_left_half_written(tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    monkeypatch.setattr(prepare.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"npm is needed .* icnn-zoo prepare drawn-voc --root"):
        prepare.prepare_drawn_voc(tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "icnn-zoo\[drawn-voc\]"'):
        prepare.prepare_drawn_voc(tmp_path)


def test_the_icon_table_covers_every_class_in_every_split():
    counts = Counter((prepare.SETS[name][0], category) for category, _, names in prepare.icon_table() for name in names)
    assert all(counts[split, category] for split in ("train", "val", "test") for category in VOC_CLASSES[1:])
    assert sum(counts.values()) == 798


def test_icons_are_cropped_to_what_is_seen():
    pytest.importorskip("resvg_py")
    png = cv2.imdecode(np.frombuffer(prepare.render_icon(SVG, 100), np.uint8), cv2.IMREAD_UNCHANGED)
    assert png.shape == (20, 40, 4)
    assert png[10, 20].tolist() == [0, 0, 255, 255]
    with pytest.raises(ValueError, match="nothing visible"):
        prepare.render_icon(SVG.replace("red", "none"), 100)


def test_backgrounds_are_enough_and_no_photograph_is_in_two_splits(tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    counts = write_backgrounds(tmp_path)
    assert counts["train"] >= 20
    assert min(counts["val"], counts["test"]) >= 5
    assert len({photograph.name for photograph in PHOTOGRAPHS}) == len(PHOTOGRAPHS)
    pictures = [file.read_bytes() for file in tmp_path.rglob("*.png")]
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize(("name", "value"), [("rotation", 200.0), ("jitter", 1.5)])
def test_impossible_arguments_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be 0 to"):
        drawn(Path("nowhere"), **{name: value})


@pytest.mark.slow
def test_preparing_fetches_and_completes(tmp_path):
    pytest.importorskip("resvg_py")
    if prepare.shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = prepare.prepare_drawn_voc(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn-voc"]
    assert "CC-BY-SA-4.0" in (folder / "LICENSES.md").read_text()
    assert prepare.prepare_drawn_voc(tmp_path) == folder
    sample = drawn(tmp_path).make_dataset("test")[0]
    assert sample["mask"].max() > 0

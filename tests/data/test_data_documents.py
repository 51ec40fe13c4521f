"""Pages of documents as samples: fixed crops for evaluation, scans, and clear errors when files are missing."""

import json
import re
import shutil

import numpy as np
import pytest

from icnn_zoo.data import DocumentsDataModule
from icnn_zoo.data.documents import DOCUMENT_CLASSES, scan


def documents(root, **kwargs):
    return DocumentsDataModule(root, **{"crop_size": 97, "eval_crop": 97, "num_workers": 0, "batch_size": 2, **kwargs})


def test_classes_and_colors(tmp_path):
    data = documents(tmp_path)
    assert data.classes == DOCUMENT_CLASSES
    assert data.palette.shape == (9, 3)
    assert len({tuple(color) for color in data.palette.tolist()}) == 9


def test_evaluation_sees_one_crop_of_each_page_and_always_the_same(documents_root):
    first, again = (documents(documents_root, seed=seed).make_dataset("test") for seed in (0, 1))
    whole = documents(documents_root, eval_crop=None).make_dataset("test")
    for index in range(len(first)):
        one, two, page = first[index], again[index], whole[index]
        assert one["mask"].shape == (97, 97)
        assert page["mask"].shape == (800, 600)
        assert np.array_equal(one["image"], two["image"])
        assert np.array_equal(one["mask"], two["mask"])
        windows = np.lib.stride_tricks.sliding_window_view(page["mask"], (97, 97))
        assert (windows == one["mask"]).all(axis=(2, 3)).any()


def test_crops_of_evaluation_hold_something(documents_root):
    dataset = documents(documents_root).make_dataset("val")
    assert all(dataset[index]["mask"].any() for index in range(len(dataset)))


def test_training_sees_pages_without_their_empty_edges(documents_root):
    sample = documents(documents_root).make_dataset("train")[0]
    assert sample["mask"].shape[0] < 800
    assert sample["mask"].shape[1] < 600
    assert not sample["mask"][:, :24].any()
    assert sample["mask"][:, 24].any()


def test_scans_change_pictures_and_keep_what_is_where(documents_root):
    clean = documents(documents_root, eval_crop=None).make_dataset("test")
    scanned, again = (documents(documents_root, eval_crop=None, scans=True).make_dataset("test") for _ in range(2))
    for index in range(len(clean)):
        page, copy = clean[index], scanned[index]
        assert np.array_equal(copy["image"], again[index]["image"])
        assert np.abs(copy["image"].astype(int) - page["image"]).mean() > 3
        text = copy["mask"] == 1
        # Ink is where the tilted mask says: text is darker than paper.
        assert copy["image"][text].mean() < copy["image"][copy["mask"] == 0].mean() - 20
        assert 0.9 < text.sum() / (page["mask"] == 1).sum() < 1.1
    assert np.array_equal(
        documents(documents_root, scans=True).make_dataset("train")[0]["image"],
        documents(documents_root).make_dataset("train")[0]["image"],
    )


def test_some_training_pages_are_scans_and_always_the_same(documents_root):
    clean, mixed, again = (
        documents(documents_root, train_scans=share).make_dataset("train") for share in (0.0, 0.5, 0.5)
    )
    changed = [not np.array_equal(clean[index]["image"], mixed[index]["image"]) for index in range(len(clean))]
    assert 0 < sum(changed) < len(changed)
    assert all(np.array_equal(mixed[index]["image"], again[index]["image"]) for index in range(len(clean)))
    with pytest.raises(ValueError, match="`train_scans` must be a share of the pages, 0 to 1; got 2"):
        documents(documents_root, train_scans=2)


def test_a_scan_tilts_the_mask_as_the_picture():
    image = np.full((101, 101, 3), 255, np.uint8)
    image[40:60, 20:80] = 0
    mask = (image[..., 0] == 0).astype(np.uint8)
    for seed in range(5):
        tilted, labels = scan(image, mask, np.random.default_rng(seed))
        dark = tilted[..., 0] < (int(tilted.min()) + int(tilted.max())) / 2
        assert (dark & (labels == 1)).sum() / (dark | (labels == 1)).sum() > 0.9


def test_numbers_of_pages_can_be_fewer_and_not_more(documents_root):
    assert len(documents(documents_root, num_train=3).make_dataset("train")) == 3
    with pytest.raises(ValueError, match=r"`num_train` must be at most \d+, the pages prepared; got 1000"):
        documents(documents_root, num_train=1000).make_dataset("train")
    with pytest.raises(ValueError, match="`num_val` must be at least 1, or None for all; got 0"):
        documents(documents_root, num_val=0)
    with pytest.raises(ValueError, match="`predict_split` must be one of train, val, test; got 'all'"):
        documents(documents_root, predict_split="all")


def test_crops_of_training_have_their_size_and_white_padding(documents_root):
    data = documents(documents_root, crop_size=(401, 601), scales=[0.5])
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 401, 601)
    padded = batch["mask"] == 255
    assert padded.any()
    assert (batch["image"].permute(0, 2, 3, 1)[padded] == 255).all()


def test_a_missing_folder_names_the_command(tmp_path):
    expected = re.escape(f"icnn-zoo prepare documents --root {tmp_path}")
    for attempt in (documents(tmp_path).prepare_data, lambda: documents(tmp_path).setup("fit")):
        with pytest.raises(FileNotFoundError, match=expected):
            attempt()


def test_an_incomplete_folder_is_refused(documents_root, tmp_path):
    folder = shutil.copytree(documents_root / "documents", tmp_path / "documents")
    next((folder / "labels" / "train").glob("*.png")).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of \d+ files are missing"):
        documents(tmp_path).prepare_data()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "pages": {"train": 1}}))
    with pytest.raises(ValueError, match="do not agree"):
        documents(tmp_path).prepare_data()
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json' is damaged .* and run: icnn-zoo prepare documents"):
        documents(tmp_path).prepare_data()
    (folder / "manifest.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="has format 0, this version of icnn_zoo reads"):
        documents(tmp_path).prepare_data()

"""PASCAL-Context: LabelMaps and PNGs of either class order are the same dataset; 60 classes or 59."""

from pathlib import Path

import miniature
import numpy as np
import pytest
from PIL import Image

from icnn_zoo.data import PascalContextDataModule, color_map


def context(root: Path, **kwargs) -> PascalContextDataModule:
    return PascalContextDataModule(root, **{"num_train": "any", "num_val": "any", "num_workers": 0, **kwargs})


def assert_labels(data: PascalContextDataModule, first_row_is_background: bool = False) -> None:
    for split, names in {"train": miniature.CONTEXT_TRAIN, "val": miniature.CONTEXT_VAL}.items():
        dataset = data.make_dataset(split)
        for name, sample in zip(names, (dataset[index] for index in range(len(dataset))), strict=True):
            expected = miniature.context_labels(name)
            if first_row_is_background:
                expected[0, :5] = 0
            assert sample["name"] == name
            assert np.array_equal(sample["mask"], expected)


def test_label_maps_of_459_classes_become_59_and_background(tmp_path):
    miniature.write_pascal_context(tmp_path)
    assert_labels(context(tmp_path), first_row_is_background=True)


@pytest.mark.parametrize("order", ["official", "alphabetical"])
def test_pngs_of_either_order_are_the_same_classes(tmp_path, order):
    miniature.write_pascal_context(tmp_path, order)
    assert_labels(context(tmp_path, class_order=order))


@pytest.mark.parametrize("order", ["official", "alphabetical"])
def test_the_order_is_recognized_from_vocs_own_labels_or_a_note(tmp_path, order):
    voc = miniature.write_pascal_context(tmp_path / "voc", order, voc_labels=True)
    assert_labels(context(tmp_path / "voc"))
    voc = miniature.write_pascal_context(tmp_path / "note", order)
    (voc / "SegmentationClassContext" / "class_order.txt").write_text(f"{order}\n")
    assert_labels(context(tmp_path / "note"))


def test_an_order_that_cannot_be_told_is_never_guessed(tmp_path):
    voc = miniature.write_pascal_context(tmp_path, "alphabetical")
    with pytest.raises(ValueError, match=r"cannot tell in which class order .* Set `class_order` to official"):
        context(tmp_path).make_dataset("train")
    (voc / "SegmentationClassContext" / "class_order.txt").write_text("mine")
    with pytest.raises(ValueError, match="must say official or alphabetical; it says 'mine'"):
        context(tmp_path).make_dataset("train")


def test_59_classes_ignore_background_and_shift_by_one(tmp_path):
    miniature.write_pascal_context(tmp_path, "alphabetical")
    both = (context(tmp_path, class_order="alphabetical", background=value) for value in (True, False))
    sixty, fifty_nine = both
    assert (sixty.num_classes, fifty_nine.num_classes) == (60, 59)
    assert sixty.classes[1:] == fifty_nine.classes
    assert sixty.classes[:4] == ("background", "aeroplane", "bicycle", "bird")
    assert np.array_equal(fifty_nine.palette, color_map(60)[1:])
    mask, shifted = (data.make_dataset("val")[0]["mask"].astype(int) for data in (sixty, fifty_nine))
    assert np.array_equal(shifted, np.where(mask == 0, 255, mask - 1))


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("order", ["official", "alphabetical"])
def test_predictions_are_written_in_the_order_of_the_label_files(tmp_path, order, background):
    voc = miniature.write_pascal_context(tmp_path, order)
    data = context(tmp_path, class_order=order, background=background)
    sample = data.make_dataset("val")[0]
    file = miniature.values_of(voc / "SegmentationClassContext" / f"{sample['name']}.png")
    mask = np.where(sample["mask"] == 255, 0, sample["mask"]).astype(np.uint8)
    picture = data.encode_labels(mask)
    known = sample["mask"] != 255
    assert np.array_equal(np.asarray(picture)[known], file[known])
    assert data.prediction_file(sample["name"]) == f"{sample['name']}.png"
    colors = np.array(picture.getpalette()).reshape(-1, 3)
    assert np.array_equal(colors[file][known], data.palette[sample["mask"][known]])


def test_lists_of_the_detail_api_come_first(tmp_path):
    voc = miniature.write_pascal_context(tmp_path)
    miniature.write_list(voc / "ImageSets" / "SegmentationContext" / "train.txt", miniature.CONTEXT_TRAIN[:1])
    assert len(context(tmp_path).make_dataset("train")) == 1


def test_predicting_needs_no_labels_of_the_images(tmp_path):
    miniature.write_pascal_context(tmp_path)
    (tmp_path / "trainval" / f"{miniature.CONTEXT_VAL[0]}.mat").unlink()
    batch = next(iter(context(tmp_path).predict_dataloader()))
    assert batch["name"] == miniature.CONTEXT_VAL[:1]
    assert (batch["mask"] == 255).all()
    with pytest.raises(FileNotFoundError, match=r"1 files of 2 samples are missing, .*2008_000007.mat"):
        context(tmp_path).make_dataset("val")


def test_missing_data_and_other_numbers_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"VOCdevkit/VOC2010/JPEGImages.*icnn-zoo prepare pascal-context"):
        context(tmp_path).make_dataset("train")
    voc = miniature.write_pascal_context(tmp_path, "official")
    with pytest.raises(ValueError, match="train must have 4998 images and has 2"):
        context(tmp_path, class_order="official", num_train="official").make_dataset("train")
    (voc / "SegmentationClassContext").rename(tmp_path / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match=r"no labels of PASCAL-Context: looked for .*59_context_labels.*trainval"
    ):
        context(tmp_path).make_dataset("train")
    with pytest.raises(FileNotFoundError, match="`labels`: there is no folder"):
        context(tmp_path, labels="nowhere").make_dataset("train")
    assert len(context(tmp_path, labels="elsewhere", class_order="official").make_dataset("train")) == 2


def test_values_outside_the_classes_are_refused_by_file(tmp_path):
    voc = miniature.write_pascal_context(tmp_path, "official")
    Image.fromarray(np.full((40, 48), 60, np.uint8)).save(voc / "SegmentationClassContext" / "2008_000002.png")
    with pytest.raises(ValueError, match=r"2008_000002.png': label values must be 0 to 59, 255; got \[60\]"):
        context(tmp_path, class_order="official").make_dataset("train")[0]


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="`class_order` must be auto, official or alphabetical; got 'mmseg'"):
        context(Path("nowhere"), class_order="mmseg")

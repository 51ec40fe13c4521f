"""VOC 2012 with SBD: every layout trains on the same 10,582 images and labels, in small."""

import pickle
import shutil
from pathlib import Path

import miniature
import numpy as np
import pytest
from PIL import Image

from icnn_zoo.data import VOC2012DataModule, color_map
from icnn_zoo.io.label_pictures import palette_picture


def voc(root: Path, **kwargs) -> VOC2012DataModule:
    return VOC2012DataModule(root, **{"num_train": "any", "num_val": "any", "num_workers": 0, **kwargs})


@pytest.fixture
def root(tmp_path) -> Path:
    miniature.write_voc2012(tmp_path)
    return tmp_path


def labels_of(dataset) -> dict[str, np.ndarray]:
    return {sample["name"]: sample["mask"] for sample in (dataset[index] for index in range(len(dataset)))}


def expected_labels() -> dict[str, np.ndarray]:
    """VOC's own labels for VOC's images, SBD's, without borders, for the others."""
    return {
        name: miniature.voc_labels(name, border=255 if name in miniature.VOC_TRAIN else 0)
        for name in miniature.TRAIN_AUG
    }


def assert_labels(found: dict[str, np.ndarray]) -> None:
    expected = expected_labels()
    assert list(found) == list(expected)
    for name, labels in found.items():
        assert np.array_equal(labels, expected[name]), name


def ready_folder(folder: Path, convention: str) -> None:
    """SegmentationClassAug as it is passed around."""
    own = miniature.VOC_TRAIN + miniature.VOC_VAL if convention == "deeplab" else []
    for name in {*miniature.SBD_TRAIN, *miniature.SBD_VAL, *own}:
        labels = miniature.voc_labels(name, border=255 if name in own else 0)
        miniature.save(Image.fromarray(labels), folder / f"{name}.png")


def test_raw_sbd_gives_the_official_set_with_vocs_own_labels_for_its_images(root):
    assert_labels(labels_of(voc(root).make_dataset("train")))


@pytest.mark.parametrize("convention", ["deeplab", "mmseg"])
@pytest.mark.parametrize("listed", ["", "deeplab", "ids", "mmseg"])
def test_a_ready_folder_of_either_convention_gives_the_same_set(tmp_path, convention, listed):
    folder = miniature.write_voc2012(tmp_path, sbd=False)
    ready_folder(folder / "SegmentationClassAug", convention)
    sets = folder / "ImageSets"
    if listed == "deeplab":
        lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in miniature.TRAIN_AUG]
        miniature.write_list(sets / "SegmentationAug" / "train_aug.txt", lines)
    elif listed == "ids":
        miniature.write_list(sets / "Segmentation" / "trainaug.txt", reversed(miniature.TRAIN_AUG))
    elif listed == "mmseg":
        names = sorted(set(miniature.TRAIN_AUG) - set(miniature.VOC_TRAIN))
        miniature.write_list(sets / "Segmentation" / "aug.txt", names)
    assert_labels(labels_of(voc(tmp_path).make_dataset("train")))


def test_a_list_of_ones_own_decides_images_and_with_two_columns_labels(root):
    folder = root / "VOCdevkit" / "VOC2012"
    ready_folder(folder / "SegmentationClassAug", "mmseg")
    line = "/JPEGImages/2008_000008.jpg /SegmentationClassAug/2008_000008.png"
    miniature.write_list(root / "mine.txt", [line, "2007_000032", miniature.VOC_VAL[0]])
    found = labels_of(voc(root, train_list="mine.txt").make_dataset("train"))
    assert list(found) == ["2008_000008", "2007_000032"]
    assert np.array_equal(found["2008_000008"], miniature.voc_labels("2008_000008", border=0))


def test_validation_and_test_are_on_vocs_own_labels_even_beside_others(root):
    for name in miniature.VOC_VAL:
        miniature.save(
            Image.fromarray(np.zeros((40, 40), np.uint8)),
            root / "VOCdevkit/VOC2012/SegmentationClassAug" / f"{name}.png",
        )
    for split in ("val", "test"):
        found = labels_of(voc(root).make_dataset(split))
        assert list(found) == miniature.VOC_VAL
        assert all(np.array_equal(labels, miniature.voc_labels(name)) for name, labels in found.items())


def test_palette_pngs_are_read_as_indices(root):
    path = root / "VOCdevkit/VOC2012/SegmentationClass" / f"{miniature.VOC_VAL[0]}.png"
    with Image.open(path) as picture:
        assert picture.mode == "P"
    assert np.array_equal(voc(root).make_dataset("val")[0]["mask"], miniature.voc_labels(miniature.VOC_VAL[0]))


def test_evaluation_pads_to_513_with_the_mean_and_says_the_size(root):
    batch = next(iter(voc(root, eval_batch_size=2).val_dataloader()))
    assert batch["image"].shape == (2, 3, 513, 513)
    for image, mask, name, (height, width) in zip(
        batch["image"], batch["mask"], batch["name"], batch["size"].tolist(), strict=True
    ):
        labels = miniature.voc_labels(name)
        assert (height, width) == labels.shape
        assert np.array_equal(mask[:height, :width], labels)
        assert (mask[height:] == 255).all()
        assert (mask[:, width:] == 255).all()
        assert image[:, height:].flatten(1).unique(dim=1).squeeze(1).tolist() == [124, 116, 104]


def test_native_sizes_by_choice_and_too_small_a_size_is_refused(root):
    sizes = [tuple(batch["mask"].shape[1:]) for batch in voc(root, eval_size=None).val_dataloader()]
    assert sizes == [miniature.voc_labels(name).shape for name in miniature.VOC_VAL]
    with pytest.raises(ValueError, match=r"2007_000033: an image of .* does not fit into `eval_size` = 25 x 25"):
        list(voc(root, eval_size=25).val_dataloader())


@pytest.mark.parametrize(("split", "names"), [("val", miniature.VOC_VAL), ("test", miniature.VOC_TEST)])
def test_predictions_need_no_labels_and_lie_as_the_server_wants(root, split, names):
    shutil.rmtree(root / "VOCdevkit/VOC2012/SegmentationClass")
    data = voc(root, predict_split=split, num_test="any")
    batches = list(data.predict_dataloader())
    assert [batch["name"][0] for batch in batches] == names
    assert all((batch["mask"] == 255).all() for batch in batches)
    assert data.prediction_file(names[0]) == f"results/VOC2012/Segmentation/comp6_{split}_cls/{names[0]}.png"
    picture = data.encode_labels(np.array([[0, 15], [20, 3]], np.uint8))
    assert picture.mode == "P"
    assert np.asarray(picture).tolist() == [[0, 15], [20, 3]]
    assert picture.getpalette()[45:48] == [192, 128, 128]


def test_numbers_other_than_the_official_ones_are_refused_unless_given(root):
    with pytest.raises(ValueError, match=r"train must have 10582 images and has 6.* set `num_train` to 6 or to any"):
        voc(root, num_train="official").make_dataset("train")
    with pytest.raises(ValueError, match="val must have 1449 images and has 2"):
        voc(root, num_val="official").make_dataset("val")
    assert len(voc(root, num_train=6, num_val=2).make_dataset("train")) == 6
    with pytest.raises(ValueError, match="must have 1464 images and has 3"):
        voc(root, train_set="train", num_train="official").make_dataset("train")


def test_missing_folders_and_lists_are_named_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"VOCdevkit/VOC2012/ImageSets.*icnn-zoo prepare voc2012 --root"):
        voc(tmp_path).make_dataset("train")
    folder = miniature.write_voc2012(tmp_path, sbd=False)
    with pytest.raises(
        FileNotFoundError, match=r"SegmentationClassAug, .*benchmark_RELEASE/dataset/cls.*`train_set` to"
    ):
        voc(tmp_path).make_dataset("train")
    assert len(voc(tmp_path, train_set="train").make_dataset("train")) == 3
    (folder / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no list .*val.txt'\. `icnn-zoo prepare voc2012"):
        voc(tmp_path).make_dataset("val")
    (folder / "ImageSets/Segmentation/test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no list .*test.txt'\. .*evaluation server"):
        voc(tmp_path, predict_split="test").make_dataset("predict")
    with pytest.raises(FileNotFoundError, match=r"no list .*mine.txt'\. `train_list` must be a file"):
        voc(tmp_path, train_list="mine.txt").make_dataset("train")


def test_missing_files_are_counted_and_named(root):
    (root / "VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg").unlink()
    (root / "benchmark_RELEASE/dataset/cls/2008_000015.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 files of 6 samples are missing.*2007_000032.jpg.*2008_000015"):
        voc(root).setup("fit")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "2007_000033.png' is not a readable image"),
        (
            lambda path: Image.open(path).convert("RGB").save(path),
            r"2007_000033.png' must be a label map.* color picture \(mode RGB\)",
        ),
        (
            lambda path: palette_picture(np.full((40, 40), 21, np.uint8), color_map(256)).save(path),
            r"2007_000033.png': label values must be 0 to 20, 255; got \[21\]",
        ),
        (
            lambda path: Image.fromarray(np.zeros((9, 8), np.uint8)).save(path),
            r"one size: .*2007_000033.jpg' has .* and .*2007_000033.png' \(9, 8\)",
        ),
    ],
    ids=["truncated", "colors", "values", "sizes"],
)
def test_label_files_that_cannot_be_used_are_named(root, damage, message):
    damage(root / "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png")
    with pytest.raises(ValueError, match=message):
        voc(root).make_dataset("val")[0]


def test_unreadable_images_and_mat_files_are_named(root):
    (root / "VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"2007_000033.jpg' is not a readable image"):
        voc(root).make_dataset("val")[0]
    (root / "benchmark_RELEASE/dataset/cls/2008_000015.mat").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"2008_000015.mat' is not a readable .mat file"):
        voc(root).make_dataset("train")[3]


@pytest.mark.parametrize(("line", "number"), [("a b c", 1), ("aeroplane -1", 1)])
def test_lists_of_another_form_are_refused_by_line(root, line, number):
    miniature.write_list(root / "mine.txt", [line])
    with pytest.raises(ValueError, match=f"mine.txt', line {number}: expected an id"):
        voc(root, train_list="mine.txt").make_dataset("train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_set": "trainval"}, "`train_set` must be train_aug or train; got 'trainval'"),
        ({"num_val": 0}, "`num_val` must be a positive number, official or any; got 0"),
        ({"predict_split": "all"}, "`predict_split` must be one of train, val, test; got 'all'"),
        ({"eval_size": 0}, "`eval_size` must be a positive number of pixels"),
        ({"crop_size": -321}, "`crop_size` must be a positive number"),
        ({"fill": (0, 0, 256)}, "`fill` must be one number for each channel, 0 to 255"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        voc(Path("nowhere"), **arguments)


def test_samples_can_be_sent_to_worker_processes(root):
    assert len(pickle.loads(pickle.dumps(voc(root).make_dataset("train")))) == 6
    assert next(iter(voc(root, batch_size=2, num_workers=1).train_dataloader()))["image"].shape == (2, 3, 321, 321)

"""A person's own images and masks: what is wrong with them is said before training begins."""

from pathlib import Path

import miniature
import numpy as np
import pytest
from PIL import Image

from icnn_zoo.data import FolderDataModule

NAMES = ["background", "leaf", "flower"]


def folder(root: Path, **kwargs) -> FolderDataModule:
    return FolderDataModule(root, **{"class_names": NAMES, "num_workers": 0, "crop_size": 33, **kwargs})


def write(root: Path, split: str, name: str, values=(0, 1, 2), size: tuple[int, int] = (20, 24), mask_name="") -> None:
    labels = np.zeros(size, np.uint8)
    for place, value in enumerate(values):
        labels[:, 2 * place : 2 * place + 2] = value
    miniature.save(miniature.image_of(labels), root / "images" / split / f"{name}.jpg")
    miniature.save(Image.fromarray(labels), root / "masks" / split / f"{mask_name or name}.png")


@pytest.fixture
def root(tmp_path) -> Path:
    for split, names in {"train": ["a", "b.1", "deep/c"], "val": ["d"]}.items():
        for name in names:
            write(tmp_path, split, name)
    return tmp_path


def names_of(data: FolderDataModule, split: str) -> list[str]:
    return [item.name for item in data.make_dataset(split).items]


def test_subfolders_are_splits_and_names_pair_images_with_masks(root):
    data = folder(root)
    data.prepare_data()
    data.setup("fit")
    assert names_of(data, "train") == ["a", "b.1", "deep/c"]
    assert names_of(data, "val") == names_of(data, "test") == names_of(data, "predict") == ["d"]
    sample = data.make_dataset("train")[0]
    assert sample["image"].shape == (20, 24, 3)
    assert sample["mask"][0, :7].tolist() == [0, 0, 1, 1, 2, 2, 0]
    assert next(iter(folder(root, batch_size=3).train_dataloader()))["mask"].shape == (3, 33, 33)
    assert data.prediction_file("deep/c") == "deep/c.png"


def test_a_split_of_its_own_is_tested(root):
    write(root, "test", "e")
    assert names_of(folder(root), "test") == ["e"]
    (root / "masks" / "test" / "e.png").unlink()
    data = folder(root, predict_split="test")
    data.prepare_data()
    assert names_of(data, "predict") == ["e"]


def test_lists_of_names_are_splits_too(tmp_path):
    for name in "abc":
        write(tmp_path, "", name, mask_name=f"{name}_mask")
    miniature.write_list(tmp_path / "train.txt", ["a", "c", ""])
    miniature.write_list(tmp_path / "val.txt", ["b"])
    data = folder(tmp_path, mask_suffix="_mask")
    data.prepare_data()
    assert (names_of(data, "train"), names_of(data, "val")) == (["a", "c"], ["b"])
    miniature.write_list(tmp_path / "val.txt", ["b.jpg"])
    with pytest.raises(FileNotFoundError, match=r"1 names in .*val.txt' are no images .* such as b.jpg: a line is"):
        data.prepare_data()


@pytest.mark.parametrize("values", [(0, 255), (255,)])
def test_masks_of_0_and_255_are_told_what_to_set(tmp_path, values):
    for split in ("train", "val"):
        write(tmp_path, split, "a", values=values)
    with pytest.raises(ValueError, match=r"hold background and nothing else\..* set `mask_values` to \[0, 255\]"):
        folder(tmp_path, class_names=NAMES[:2]).prepare_data()
    data = folder(tmp_path, class_names=NAMES[:2], mask_values=[0, 255])
    data.prepare_data()
    assert set(np.unique(data.make_dataset("train")[0]["mask"])) == {0, 1}


def test_masks_of_other_two_values_are_told_so_too(tmp_path):
    for split in ("train", "val"):
        write(tmp_path, split, "a", values=(0, 128))
    with pytest.raises(ValueError, match=r"hold the two values \[0, 128\]: set `mask_values`(.|\n)*got \[128\]"):
        folder(tmp_path, class_names=NAMES[:2]).prepare_data()


def test_all_problems_of_values_sizes_and_reading_are_named_at_once(root):
    write(root, "train", "high", values=(0, 1, 7))
    write(root, "train", "small")
    write(root, "train", "torn")
    write(root, "train", "colours")
    masks = root / "masks" / "train"
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(masks / "small.png")
    (masks / "torn.png").write_bytes((masks / "torn.png").read_bytes()[:50])
    miniature.image_of(np.ones((20, 24), np.uint8)).save(masks / "colours.png")
    with pytest.raises(ValueError, match=r"4 files of .* cannot be used") as caught:
        folder(root).prepare_data()
    for expected in (
        r"high.png': label values must be 0 to 2, 255; got [7]",
        "small.png' (9, 8)",
        "torn.png' is not a readable image",
        "colours.png' must be a label map",
    ):
        assert expected in str(caught.value)
    folder(root, check=False).prepare_data()


def test_images_and_masks_without_the_other_are_named(root):
    (root / "masks" / "train" / "b.1.png").unlink()
    with pytest.raises(ValueError, match=r"1 images of the split train have no mask of the same name, such as b\.1"):
        folder(root).prepare_data()
    (root / "images" / "train" / "a.jpg").unlink()
    (root / "images" / "train" / "b.1.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 masks of the split train have no image of the same name, such as a\."):
        folder(root).prepare_data()


def test_two_images_of_one_name_are_refused(root):
    miniature.image_of(np.zeros((20, 24), np.uint8)).save(root / "images" / "train" / "a.png")
    with pytest.raises(ValueError, match=r"a.jpg' and .*a.png' have one name"):
        folder(root).prepare_data()


def test_missing_folders_say_where_to_put_what(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no images of the split train: looked in .*images'.*masks/train"):
        folder(tmp_path).prepare_data()


def test_images_of_16_bits_are_refused(root):
    (root / "images" / "train" / "a.jpg").unlink()
    Image.fromarray(np.full((20, 24), 4000, np.uint16)).save(root / "images" / "train" / "a.png")
    with pytest.raises(ValueError, match=r"a.png' has 16 bits a channel.* set `white_level`"):
        folder(root).make_dataset("train")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_values": [0, 255]}, r"`mask_values` must be 3 different numbers.* got \[0, 255\]"),
        ({"mask_values": [0, 1, 1]}, "`mask_values` must be 3 different numbers"),
        ({"class_names": ["only"]}, "2 to 255 classes"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        folder(Path("nowhere"), **arguments)

"""A person's own images and masks: what is wrong with them is said before training begins."""

import unicodedata
from pathlib import Path
from types import SimpleNamespace

import miniature
import numpy as np
import pytest
from lightning.pytorch.trainer.states import TrainerFn
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
    with pytest.raises(FileNotFoundError, match=r"1 names in .*val.txt' are not images .* such as b.jpg: a line is"):
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
    write(root, "train", "colors")
    masks = root / "masks" / "train"
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(masks / "small.png")
    (masks / "torn.png").write_bytes((masks / "torn.png").read_bytes()[:50])
    miniature.image_of(np.ones((20, 24), np.uint8)).save(masks / "colors.png")
    with pytest.raises(ValueError, match=r"4 files of .* cannot be used") as caught:
        folder(root).prepare_data()
    for expected in (
        r"high.png': label values must be 0 to 2, 255; got [7]",
        "small.png' (9, 8)",
        "torn.png' is not a readable image",
        "colors.png' must be a label map",
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
    with pytest.raises(
        ValueError,
        match=r"a.jpg' and .*a.png' are both called 'a'.* belongs below .*masks",
    ):
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
        ({"class_names": ["a", "b", "a"]}, "`class_names` must differ.* more than once: a"),
        ({"class_names": ["a", " "]}, "`class_names` must be names that can be printed; got ' ' at 1"),
        ({"class_names": ["a", "\x1b[31m"]}, "`class_names` must be names that can be printed"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        folder(Path("nowhere"), **arguments)


def test_hidden_files_are_left_out_and_linked_folders_are_not(root, tmp_path):
    write(root, "train/.ipynb_checkpoints", "a-checkpoint")
    for kind in ("images", "masks"):
        (root / kind / "train" / "._a.png").write_bytes(b"of a Mac")
        (root / kind / "train" / "more").symlink_to(root / kind / "val")
        (root / kind / "train" / "loop").symlink_to(root / kind)
    assert names_of(folder(root), "train") == ["a", "b.1", "deep/c", "loop/val/d", "more/d"]


def test_a_class_may_be_rare(tmp_path):
    """No class in the masks that are looked at first, only background and borders."""
    for index in range(40):
        write(tmp_path, "train", f"{index:02}", values=(1, 255) if index == 21 else (255,))
    write(tmp_path, "val", "a")
    data = folder(tmp_path)
    data.prepare_data()
    data.setup("fit")
    (tmp_path / "masks/train/21.png").write_bytes((tmp_path / "masks/train/20.png").read_bytes())
    with pytest.raises(ValueError, match="hold only 0 and 255"):
        folder(tmp_path).setup("fit")


@pytest.mark.parametrize(("stage", "needs_masks"), [("fit", False), ("validate", False), ("test", True)])
def test_a_stage_checks_what_it_needs(root, stage, needs_masks):
    write(root, "test", "e")
    (root / "masks/test/e.png").unlink()
    data = folder(root)
    data.prepare_data()
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn(stage)))
    if needs_masks:
        with pytest.raises(ValueError, match=r"1 images of the split test .* `predict_split` = test"):
            data.prepare_data()
    else:
        data.prepare_data()


def test_names_in_lists_may_have_a_mark_in_front_and_accents_in_two_parts(tmp_path):
    apart, composed = unicodedata.normalize("NFD", "ä"), "ä"
    write(tmp_path, "", apart, mask_name=composed)
    write(tmp_path, "", "b")
    (tmp_path / "train.txt").write_text(f"{composed}\r\nb\r\n", encoding="utf-8-sig")
    miniature.write_list(tmp_path / "val.txt", [apart])
    data = folder(tmp_path)
    data.prepare_data()
    assert names_of(data, "train") == [composed, "b"]
    (tmp_path / "val.txt").write_bytes("ä".encode("cp1252"))
    with pytest.raises(ValueError, match=r"val.txt' is not text in UTF-8"):
        data.prepare_data()


def test_a_tilde_is_the_home_folder(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    assert names_of(folder(f"~/{root.name}"), "train") == names_of(folder(root), "train")


@pytest.mark.parametrize(("mask_suffix", "ending"), [("", "jpg"), ("_mask", "png")])
def test_images_and_masks_may_lie_in_one_folder(tmp_path, mask_suffix, ending):
    for split in ("train", "val"):
        write(tmp_path, split, "a")
        (tmp_path / "all" / split).mkdir(parents=True)
        with Image.open(tmp_path / "images" / split / "a.jpg") as image:
            image.save(tmp_path / "all" / split / f"a.{ending}")
        (tmp_path / "masks" / split / "a.png").rename(tmp_path / "all" / split / f"a{mask_suffix}.png")
    data = folder(tmp_path, images="all", masks="all", mask_suffix=mask_suffix)
    data.prepare_data()
    assert names_of(data, "train") == ["a"]
    assert data.make_dataset("train")[0]["mask"].max() == 2


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_turned_photograph_with_a_mask_that_is_not_turned_is_told(root, orientation):
    """A quarter turn does not fit the mask's size, which is an error; after half a turn nothing can tell."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = root / "images/train/a.jpg"
    with Image.open(path) as image:
        image.save(path, exif=exif)
    if orientation == 6:
        with pytest.raises(ValueError, match=r"a.jpg' has \(24, 20\) .* The camera was turned .*exiftool"):
            folder(root).prepare_data()
        with pytest.raises(ValueError, match="The camera was turned"):
            folder(root).make_dataset("train")[0]
    else:
        with pytest.warns(UserWarning, match=r"Of 1 photographs the camera was turned, such as .*a.jpg'"):
            folder(root).prepare_data()


@pytest.mark.parametrize("images", ["{split}/images/*.png", "set_{split}/*.png", "{split}/**/*.png"])
def test_patterns_with_lists_find_masks_by_the_split_of_the_folder(tmp_path, images):
    root = tmp_path / "b[1]"
    for split, stem in (("train", "a"), ("val", "b")):
        place = root / images.replace("{split}", split).replace("**", "deep")
        for file in (place.with_name(f"{stem}.png"), root / f"masks_{split}" / f"{stem}.png"):
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (20, 20), 1).convert("RGB" if file.parent == place.parent else "L").save(file)
        (root / f"{split}.txt").write_text(f"{stem}\n")
    data = folder(root, images=images, masks="masks_{split}/{stem}.png")
    data.prepare_data()
    assert [len(names_of(data, split)) for split in ("train", "val")] == [1, 1]


def test_a_split_in_the_files_name_beside_lists_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"`images`='\{split\}_\*\.png' has \{split\} in the file's name"):
        folder(tmp_path, images="{split}_*.png", masks="{stem}_mask.png").prepare_data()

"""Cityscapes: ids mapped while reading, predictions that the official evaluation takes and scores as we do."""

import json
from pathlib import Path

import lightning.pytorch as pl
import miniature
import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassConfusionMatrix

from icnn_zoo.data import CityscapesDataModule
from icnn_zoo.training.callbacks import PredictionWriter
from icnn_zoo.training.scores import iou_and_accuracy

cityscapesscripts = pytest.importorskip("cityscapesscripts")
from cityscapesscripts.helpers.labels import id2label, trainId2label  # noqa: E402
from cityscapesscripts.preparation.json2labelImg import json2labelImg  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def cityscapes(root: Path, **kwargs) -> CityscapesDataModule:
    any_number = {f"num_{split}": "any" for split in ("train", "val", "test")}
    return CityscapesDataModule(root, **{**any_number, "num_workers": 0, **kwargs})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return miniature.write_cityscapes(tmp_path_factory.mktemp("cityscapes"))


@pytest.fixture
def own_root(tmp_path) -> Path:
    """One that a test may change."""
    return miniature.write_cityscapes(tmp_path)


def test_classes_colors_and_ids_are_those_of_the_official_scripts():
    data = cityscapes(Path("nowhere"))
    assert (data.num_classes, data.ignore_index) == (19, 255)
    for index, name in enumerate(data.classes):
        label = trainId2label[index]
        assert (label.name, label.color) == (name, tuple(data.palette[index].tolist()))
        assert np.asarray(data.encode_labels(np.array([[index]], np.uint8))).item() == label.id


def test_label_ids_are_mapped_as_the_official_tool_maps_polygons(root, tmp_path):
    dataset = cityscapes(root).make_dataset("train")
    assert len(dataset) == 4
    seen = set()
    for index in range(len(dataset)):
        sample = dataset[index]
        city = sample["name"].split("_")[0]
        polygons = root / "gtFine" / "train" / city / f"{sample['name']}_gtFine_polygons.json"
        json2labelImg(str(polygons), str(tmp_path / "ids.png"), "trainIds")
        assert np.array_equal(sample["mask"], miniature.values_of(tmp_path / "ids.png"))
        seen.update(np.unique(sample["mask"]).tolist())
    assert len(seen) > 10


def test_train_ids_are_taken_where_they_are(own_root):
    first = cityscapes(own_root).make_dataset("train")[0]
    file = own_root / "gtFine" / "train" / "aachen" / f"{first['name']}_gtFine_labelTrainIds.png"
    miniature.save(Image.fromarray(np.where(first["mask"] == 255, 255, 18).astype(np.uint8)), file)
    dataset = cityscapes(own_root).make_dataset("train")
    assert set(np.unique(dataset[0]["mask"])) == {18, 255}
    assert len(np.unique(dataset[1]["mask"])) > 2


def test_hidden_files_of_a_mac_are_left_out(own_root):
    number = len(cityscapes(own_root).items("train"))
    image = next((own_root / "leftImg8bit/train").glob("*/*_leftImg8bit.png"))
    image.with_name(f"._{image.name}").write_bytes(b"of a Mac")
    assert len(cityscapes(own_root).items("train")) == number


def test_images_keep_their_size_in_evaluation(root):
    batch = next(iter(cityscapes(root).val_dataloader()))
    assert batch["image"].shape == (1, 3, 64, 128)
    assert batch["size"].tolist() == [[64, 128]]
    assert batch["name"][0].startswith("lindau_")


def test_a_folder_named_cityscapes_is_found(tmp_path):
    miniature.write_cityscapes(tmp_path / "cityscapes", number=1)
    assert len(cityscapes(tmp_path).make_dataset("val")) == 1


class Noisy(pl.LightningModule):
    """Predicts the labels of a folder with every third pixel wrong."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.masks = {sample["name"]: sample["mask"] for sample in cityscapes(root).make_dataset("val")}

    def predict_step(self, batch, batch_idx):
        maps = []
        for name in batch["name"]:
            generator = np.random.default_rng(len(maps))
            mask, wrong = self.masks[name], generator.integers(0, 19, self.masks[name].shape)
            keep = (generator.random(mask.shape) < 2 / 3) & (mask != 255)
            maps.append(torch.from_numpy(np.where(keep, mask, wrong).astype(np.uint8)))
        return {"name": batch["name"], "labels": maps}


def predict(root: Path, folder: Path, **kwargs) -> dict[str, np.ndarray]:
    """The label ids written by ``predict``, by the name of their file."""
    model = Noisy(root)
    options = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(default_root_dir=folder, callbacks=[PredictionWriter()], **options)
    trainer.predict(model, cityscapes(root, **kwargs), return_predictions=False)
    return {path.name: miniature.values_of(path) for path in sorted((folder / "predictions").iterdir())}


def test_the_official_evaluation_of_our_predictions_gives_our_miou(root, tmp_path):
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official

    predicted = predict(root, tmp_path)
    assert list(predicted) == [f"lindau_{index:06d}_000019_pred_labelIds.png" for index in range(2)]
    confusion = MulticlassConfusionMatrix(19, ignore_index=255)
    to_train_id = np.array([id2label[index].trainId % 256 for index in range(34)], np.uint8)
    dataset = cityscapes(root).make_dataset("val")
    for index, labels in enumerate(predicted.values()):
        confusion.update(torch.from_numpy(to_train_id[labels])[None], torch.from_numpy(dataset[index]["mask"])[None])
    iou, _ = iou_and_accuracy(confusion.compute())

    args = official.args
    args.predictionPath, args.predictionWalk = str(tmp_path / "predictions"), None
    args.evalInstLevelScore, args.evalPixelAccuracy, args.quiet, args.JSONOutput = False, False, True, False
    truth = sorted(str(path) for path in (root / "gtFine" / "val").glob("*/*_gtFine_labelIds.png"))
    result = official.evaluateImgLists([official.getPrediction(args, path) for path in truth], truth, args)
    assert float(iou.nanmean()) == pytest.approx(result["averageScoreClasses"], abs=1e-6)
    assert 0.2 < float(iou.nanmean()) < 0.9
    for index, value in enumerate(iou.tolist()):
        expected = result["classScores"][trainId2label[index].name]
        assert value == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_the_test_set_needs_no_labels(own_root, tmp_path):
    for file in (own_root / "gtFine" / "test").rglob("*.png"):
        file.unlink()
    batch = next(iter(cityscapes(own_root, predict_split="test").predict_dataloader()))
    assert batch["name"] == ["mainz_000000_000019"]
    assert (batch["mask"] == 255).all()


def test_missing_images_labels_and_other_numbers_are_refused_with_what_to_do(own_root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/leftImg8bit/train.* Fetch leftImg8bit_trainvaltest.zip"):
        cityscapes(Path("nowhere")).make_dataset("train")
    with pytest.raises(ValueError, match=r"val must have 500 images and has 2: .* set `num_val` to 2 or to any"):
        cityscapes(own_root, num_val="official").make_dataset("val")
    next((own_root / "gtFine" / "val").rglob("*_labelIds.png")).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 files of 2 samples are missing, .*_gtFine_labelIds.png"):
        cityscapes(own_root).make_dataset("val")


def test_colors_and_unknown_ids_given_as_labels_are_refused_by_file(own_root):
    files = sorted((own_root / "gtFine" / "val" / "lindau").glob("*_labelIds.png"))
    json2labelImg(str(files[0]).replace("labelIds.png", "polygons.json"), str(files[0]), "color")
    ids = miniature.values_of(files[1])
    ids[0, 0] = 34
    Image.fromarray(ids).save(files[1])
    dataset = cityscapes(own_root).make_dataset("val")
    with pytest.raises(ValueError, match=r"lindau_000000_.*labelIds.png' must be a label map.*mode RGBA"):
        dataset[0]
    with pytest.raises(ValueError, match=r"lindau_000001_.*: label values must be 0 to 33, 255; got \[34\]"):
        dataset[1]


def test_polygons_of_the_miniature_hold_what_is_never_drawn(root):
    labels = [
        thing["label"]
        for path in (root / "gtFine").rglob("*.json")
        for thing in json.loads(path.read_text())["objects"]
    ]
    assert {"license plate", "cargroup"} <= set(labels)

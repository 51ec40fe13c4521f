"""The paper's configs as they stand, on datasets in miniature: fit, validate, test and predict."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from icnn_zoo.cli import lightning_main

ROOT = Path(__file__).parents[1]
CONFIGS = {"voc2012": 321, "pascal_context": 321, "cityscapes": 473}
SIZES = {"train": [(40, 60), (70, 44), (33, 50), (64, 64)], "val": [(50, 41), (64, 37), (45, 65)]}

pytestmark = pytest.mark.filterwarnings("ignore")


def save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def pairs(split: str, values: list[int]):
    """Names, images and label maps whose left half is 0 and right half shows the values, with a border of 255."""
    rng = np.random.default_rng(len(split))
    for index, (height, width) in enumerate(SIZES[split]):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        labels = rng.choice(np.array(values, np.uint8), (height, width))
        labels[:, : width // 2] = 0
        labels[:2] = 255
        yield f"2008_{len(split)}{index:05d}", image, labels


def voc2012(root: Path) -> list[str]:
    voc = root / "VOCdevkit" / "VOC2012"
    for split in SIZES:
        names = []
        for name, image, labels in pairs(split, [1, 20]):
            save(image, voc / "JPEGImages" / f"{name}.jpg")
            save(labels, voc / "SegmentationClass" / f"{name}.png")
            names.append(name)
        folder = voc / "ImageSets" / "Segmentation"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.txt").write_text("\n".join(names))
    return ["--data.init_args.train_set", "train"]


def pascal_context(root: Path) -> list[str]:
    voc = root / "VOCdevkit" / "VOC2010"
    for split in SIZES:
        names = []
        for name, image, labels in pairs(split, [1, 59]):
            save(image, voc / "JPEGImages" / f"{name}.jpg")
            save(labels, voc / "SegmentationClassContext" / f"{name}.png")
            names.append(name)
        folder = voc / "ImageSets" / "SegmentationContext"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.txt").write_text("\n".join(names))
    return ["--data.init_args.class_order", "official"]


def cityscapes(root: Path) -> list[str]:
    for split in SIZES:
        for name, image, labels in pairs(split, [7, 33]):
            stem = f"{split}/aachen/aachen_{name[-6:]}_000019"
            save(image, root / "leftImg8bit" / f"{stem}_leftImg8bit.png")
            save(np.where(labels == 255, 0, labels), root / "gtFine" / f"{stem}_gtFine_labelIds.png")
    return ["--model.window", "33"]


DATASETS = {"voc2012": voc2012, "pascal_context": pascal_context, "cityscapes": cityscapes}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_the_paper_fits_validates_tests_and_predicts(name, tmp_path, monkeypatch):
    own = DATASETS[name](tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    if name != "cityscapes":
        own += ["--data.init_args.eval_size", "73"]
    small = ["--model.backbone", "test_resnet", "--model.start", "layer3", "--model.pretrained", "false"]
    small += ["--data.init_args.num_train", "any", "--data.init_args.num_val", "3", "--data.init_args.crop_size", "33"]
    small += ["--data.init_args.batch_size", "2", "--data.init_args.num_workers", "0", "--trainer.accelerator", "cpu"]
    small += ["--trainer.max_steps", "3", "--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1"]
    config = ["-c", str(ROOT / "configs" / f"{name}.yaml"), *own, *small]
    lightning_main(["fit", *config])
    last = tmp_path / "runs" / name / "version_0" / "checkpoints" / "last.ckpt"
    assert (last.parent / "best.ckpt").is_file()
    for version, verb in enumerate(("validate", "test", "predict"), start=1):
        lightning_main([verb, *config, "--ckpt_path", str(last)])
        folder = tmp_path / "runs" / name / f"version_{version}"
        if verb != "predict":
            split = {"validate": "val", "test": "test"}[verb]
            assert f"{split}/mIoU" in (folder / "metrics.csv").read_text().splitlines()[0]
    written = sorted((folder / "predictions").rglob("*.png"))
    # The labels of images come at their own sizes, without what was padded.
    assert sorted(Image.open(path).size[::-1] for path in written) == sorted(SIZES["val"])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_the_paper_has_the_papers_values(name):
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    model, data, trainer = config["model"], config["data"]["init_args"], config["trainer"]
    assert model["backbone"].startswith("resnet101")
    assert (model["lr"], model["position_lr"], model["poly_power"]) == (0.001, 50.0, 0.9)
    assert (model["optimizer"], model["momentum"], model["weight_decay"]) == ("sgd", 0.9, 0.0005)
    assert (model["output_stride"], model["dilation_rule"], model["freeze_norm"]) == (8, "caffe", True)
    assert (model["start"], model["loss_resolution"], model["head_lr_factor"]) == ("layer3.11", "logits", 10)
    assert (data["batch_size"], data["crop_size"]) == (16, CONFIGS[name])
    assert data["scales"] == [0.5, 0.75, 1.0, 1.25, 1.5]
    if name == "cityscapes":
        assert (trainer["max_steps"], model["evaluation"], model["window"]) == (45000, "sliding", 713)
    else:
        assert (trainer["max_steps"], model["evaluation"], data["eval_size"]) == (20000, "whole", 513)
    assert trainer["max_steps"] % trainer["val_check_interval"] == 0

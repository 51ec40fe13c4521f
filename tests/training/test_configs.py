"""Configs of data on disk as they stand, on datasets in miniature: fit, validate, test and predict."""

import inspect
from functools import partial
from pathlib import Path

import pytest
import yaml
from miniature import TRAIN_AUG, write_cityscapes, write_folder, write_pascal_context, write_voc2012
from PIL import Image

from icnn_zoo.cli.programs import lightning_main
from icnn_zoo.data import FolderDataModule

ROOT = Path(__file__).parents[2]
CONFIGS = {"voc2012": 321, "pascal_context": 321, "cityscapes": 473}

pytestmark = pytest.mark.filterwarnings("ignore")


DATASETS = {
    "voc2012": write_voc2012,
    "pascal_context": write_pascal_context,
    "cityscapes": partial(write_cityscapes, size=(56, 72)),
    "folder": write_folder,
}
ANY = ["--data.init_args.num_train", "any", "--data.init_args.num_val", "any"]
OWN = {  # what only a miniature needs
    "voc2012": [*ANY, "--data.init_args.eval_size", "73", "--data.init_args.num_train", str(len(TRAIN_AUG))],
    "pascal_context": [*ANY, "--data.init_args.eval_size", "73"],
    "cityscapes": [*ANY, "--model.window", "33"],
    "folder": ["--data.init_args.root", "data"],
}


@pytest.mark.parametrize("name", DATASETS)
def test_a_config_fits_validates_tests_and_predicts(name, tmp_path, monkeypatch):
    DATASETS[name](tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    small = ["--model.backbone", "test_resnet", "--model.start", "layer3", "--model.pretrained", "false"]
    small += ["--data.init_args.crop_size", "33", "--data.init_args.batch_size", "2"]
    small += ["--data.init_args.num_workers", "0", "--data.init_args.eval_batch_size", "1"]
    small += ["--trainer.accelerator", "cpu", "--trainer.max_steps", "3", "--trainer.val_check_interval", "2"]
    config = ["-c", str(ROOT / "configs" / f"{name}.yaml"), *small, *OWN[name]]
    lightning_main(["fit", *config])
    last = tmp_path / "runs" / name / "version_0" / "checkpoints" / "last.ckpt"
    assert (last.parent / "best.ckpt").is_file()
    for version, verb in enumerate(("validate", "test", "predict"), start=1):
        lightning_main([verb, *config, "--ckpt_path", str(last)])
        folder = tmp_path / "runs" / name / f"version_{version}"
        if verb != "predict":
            split = {"validate": "val", "test": "test"}[verb]
            assert f"{split}/mIoU" in (folder / "metrics.csv").read_text().splitlines()[0]
    images = {path.stem.removesuffix("_leftImg8bit"): path for path in (tmp_path / "data").rglob("*.[jp][pn]g")}
    written = sorted((folder / "predictions").rglob("*.png"))
    assert len(written) == 2
    for path in written:  # at their own sizes, without what was padded
        assert Image.open(path).size == Image.open(images[path.stem.removesuffix("_pred_labelIds")]).size


def test_the_config_of_documents_fits_and_tests_pages_and_scans(tmp_path, monkeypatch, documents_root):
    monkeypatch.chdir(tmp_path)
    small = ["--data.init_args.root", str(documents_root), "--data.init_args.num_workers", "0"]
    small += ["--data.init_args.num_val", "2", "--data.init_args.num_test", "2", "--data.init_args.batch_size", "2"]
    small += ["--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--trainer.val_check_interval", "1"]
    config = ["-c", str(ROOT / "configs" / "documents.yaml"), *small]
    lightning_main(["fit", *config])
    last = tmp_path / "runs" / "documents" / "version_0" / "checkpoints" / "last.ckpt"
    for scans in ("false", "true"):
        lightning_main(["test", *config, "--ckpt_path", str(last), "--data.init_args.scans", scans])
    results = [
        (tmp_path / "runs" / "documents" / f"version_{version}" / "metrics.csv").read_text() for version in (1, 2)
    ]
    assert all("test/mIoU" in result for result in results)
    assert results[0] != results[1]


def test_the_config_of_own_images_names_every_option_of_theirs():
    config = yaml.safe_load((ROOT / "configs" / "folder.yaml").read_text())
    options = set(inspect.signature(FolderDataModule).parameters) - {"kwargs"}
    assert options <= config["data"]["init_args"].keys()
    assert {"network", "loss", "class_weights", "aux_weight", "mean", "std"} <= config["model"].keys()


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

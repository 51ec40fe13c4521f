"""A run beside stored results: compared where the configuration is the same, and told what differs otherwise."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from icnn_zoo.data import LinesDataModule
from icnn_zoo.experiments import comparison as module
from icnn_zoo.experiments.catalog import find_config
from icnn_zoo.experiments.comparison import Comparison, differences
from icnn_zoo.experiments.table import write_table
from icnn_zoo.training.task import SegmentationTask

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load(find_config("quickstart.yaml").read_text(encoding="utf-8"))
NETWORK = {"backbone": "plain5", "num_classes": 4, "output_stride": 2, "head_dilation": 1}


def changed(**keys) -> dict:
    config = copy.deepcopy(CONFIG)
    for key, value in keys.items():
        *sections, last = key.split("__")
        place = config
        for section in sections:
            place = place[section]
        place[last] = value
    return config


def trainer(tmp_path, config: dict, score: float = 0.987) -> SimpleNamespace:
    class Config(dict):
        def as_dict(self):
            return self

    saved = SaveConfigCallback.__new__(SaveConfigCallback)
    saved.config = Config(config)
    logger = SimpleNamespace(save_dir=str(tmp_path), name="run", version="version_0")
    (tmp_path / "run" / "version_0").mkdir(parents=True)
    return SimpleNamespace(
        fast_dev_run=False,
        is_global_zero=True,
        callbacks=[saved],
        callback_metrics={"val/pixel_accuracy": torch.tensor(score)},
        logger=logger,
        datamodule=LinesDataModule(image_size=49, num_workers=0),
    )


def compare(run: SimpleNamespace, task: SegmentationTask) -> Comparison:
    comparison = Comparison("lines", "plain5.lines_regular")
    comparison.on_fit_start(run, task)
    comparison.teardown(run, task, "fit")
    return comparison


def test_the_stored_results_are_of_the_quickstarts_configuration():
    stored = json.loads((module.STORED / "lines.json").read_text(encoding="utf-8"))
    assert differences(stored["config"], CONFIG) == []
    for row in ("regular", "dilation-2", "dilation-3", "dilation-4"):
        assert stored["rows"][row]["val/pixel_accuracy"]["values"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"model__start": None, "model__position_lr": 9.0, "model__position_rule": "optimizer"}, []),
        ({"data__init_args__num_workers": 0, "seed_everything": 5}, []),
        ({"trainer__max_steps": 10, "trainer__devices": 4}, ["trainer.max_steps"]),
        ({"data__init_args__rotation": [-5, 5], "model__lr": 1.0}, ["model.lr", "data.init_args.rotation"]),
    ],
)
def test_what_has_a_part_in_the_result_is_compared(keys, expected):
    assert differences(CONFIG, changed(**keys)) == expected


def test_a_run_of_the_same_configuration_gets_a_table_and_a_picture(tmp_path, capsys):
    task = SegmentationTask(start="layer1", **NETWORK)
    compare(trainer(tmp_path, CONFIG), task)
    output = capsys.readouterr().out
    assert "learned" in output
    assert "98.7" in output
    assert "icnn-zoo reproduce lines --rows regular dilation-2 dilation-3 dilation-4" in output
    assert (tmp_path / "run" / "version_0" / "comparison.png").stat().st_size > 10_000
    assert task.training


def test_the_picture_has_image_truth_both_labels_and_the_shapes(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(module, "draw_comparison", lambda *args: figures.append(args) or DRAW(*args))
    compare(trainer(tmp_path, CONFIG), SegmentationTask(start="layer1", **NETWORK))
    panels, shapes = figures[0]
    assert [title.partition(":")[0] for title in panels] == ["image", "truth", "regular", "learned"]
    assert [layer.name.rpartition("backbone.")[2] for layer in shapes] == [
        "layer1.0", "layer2.0", "layer3.0", "model.classifier",
    ]  # fmt: skip
    pictures = list(panels.values())
    between = (pictures[1] == 224).all(axis=-1)  # no class: the same in truth and predictions
    assert between.any()
    assert all((picture[between] == 224).all() for picture in pictures[2:])
    assert all(np.unique(picture.reshape(-1, 3), axis=0).shape[0] <= 5 for picture in pictures[1:])


DRAW = module.draw_comparison


def test_a_regular_run_gets_the_table_alone(tmp_path, capsys):
    compare(trainer(tmp_path, changed(model__start=None), 0.75), SegmentationTask(**NETWORK))
    assert "75.0" in capsys.readouterr().out
    assert not (tmp_path / "run" / "version_0" / "comparison.png").exists()


def test_another_configuration_is_not_compared_but_told_of(tmp_path, capsys):
    compare(trainer(tmp_path, changed(trainer__max_steps=7)), SegmentationTask(start="layer1", **NETWORK))
    expected = "Not compared with stored results, as this run differs in trainer.max_steps.\n"
    assert capsys.readouterr().out == expected


def test_other_stages_are_not_compared(tmp_path, capsys):
    run, task = trainer(tmp_path, CONFIG), SegmentationTask(**NETWORK)
    comparison = Comparison("lines", "plain5.lines_regular")
    comparison.on_fit_start(run, task)
    comparison.teardown(run, task, "test")
    assert capsys.readouterr().out == ""


def test_an_experiment_without_stored_results_is_refused():
    for name in ("table1", "../lines", "circles"):
        with pytest.raises(ValueError, match=f"`experiment` must be one with stored results, lines; got '{name}'"):
            Comparison(name, "plain5.lines_regular")


def test_a_missing_checkpoint_is_told_before_training(tmp_path):
    comparison = Comparison("lines", "plain5.nothing")
    with pytest.raises(ValueError, match=r"plain5.nothing"):
        comparison.on_fit_start(trainer(tmp_path, CONFIG), SegmentationTask(start="layer1", **NETWORK))


def test_the_stored_results_are_the_table_of_the_committed_runs(tmp_path):
    shutil.copytree(ROOT / "docs" / "results" / "lines", tmp_path / "lines")
    table = write_table("lines", tmp_path).with_suffix(".json")
    assert json.loads(table.read_text()) == json.loads((module.STORED / "lines.json").read_text(encoding="utf-8"))

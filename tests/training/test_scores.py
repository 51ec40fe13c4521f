"""Scores and their names in logs."""

import math
from types import SimpleNamespace

import pytest
import torch

from icnn_zoo.training.callbacks import ScoreTable
from icnn_zoo.training.scores import background_miou, iou_and_accuracy, score_names
from icnn_zoo.training.task import SegmentationTask


def test_scores_come_from_one_confusion_matrix_over_the_whole_set():
    confusion = torch.tensor([[50, 10, 0], [5, 35, 0], [0, 0, 0]])
    iou, accuracy = iou_and_accuracy(confusion)
    assert iou[:2].tolist() == pytest.approx([50 / 65, 35 / 50])
    assert math.isnan(iou[2])
    assert float(accuracy) == pytest.approx(0.85)
    assert background_miou(confusion) == pytest.approx(0.6 / 2)


def test_names_in_logs_hold_no_character_that_a_logger_refuses_and_stay_different():
    names = score_names("val", ["road", "a[wet]", "a(wet)", "tête", "parking lot", "猫"])
    assert names[0] == "val/IoU/road"
    assert names[4] == "val/IoU/parking lot"
    assert names[1:4] == ["val/IoU/a_wet__1", "val/IoU/a_wet__2", "val/IoU/t_te"]
    assert len(set(names)) == 6
    assert all(name.isascii() and "[" not in name for name in names)


def test_more_classes_than_label_maps_can_hold_are_refused():
    with pytest.raises(ValueError, match=r"`num_classes` must be 2 to 256"):
        SegmentationTask("test_resnet", 257)


def test_a_table_shows_names_as_they_are(capsys):
    names = ["[wet]", "a[/b]", "猫"]
    metrics = dict(zip(score_names("val", names), [0.5, 0.25, math.nan], strict=True))
    metrics |= {key: 0.5 for kind in ("Dice", "precision", "recall") for key in score_names("val", names, kind)}
    metrics |= {"val/mIoU": 0.4, "val/mIoU_background": 0.1, "val/pixel_accuracy": 0.9}
    trainer = SimpleNamespace(callback_metrics=metrics, is_global_zero=True)
    ScoreTable().on_fit_end(trainer, SimpleNamespace(class_names=names))
    out = capsys.readouterr().out
    assert all(name in out for name in (*names, "mIoU of [wet] everywhere"))

"""A task, data and a trainer small enough for tests."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from icnn_zoo.data import ShapesDataModule
from icnn_zoo.training.task import SegmentationTask


def make_task(**arguments) -> SegmentationTask:
    torch.manual_seed(0)
    defaults = {"backbone": "test_resnet", "num_classes": 4, "start": "layer3", "lr": 0.01, "position_lr": 20.0}
    return SegmentationTask(**{**defaults, "position_rule": "optimizer", **arguments})


def make_data(**arguments) -> ShapesDataModule:
    defaults = {"image_size": 33, "num_classes": 4, "num_train": 16, "num_val": 5, "num_test": 3, "batch_size": 4}
    return ShapesDataModule(**{**defaults, "num_workers": 0, **arguments})


def make_trainer(folder: Path, *callbacks: Callback, **arguments) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=CSVLogger(folder, name="run"),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        **{"max_steps": 6, "devices": 1, "num_sanity_val_steps": 0, **arguments},
    )

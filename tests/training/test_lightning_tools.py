"""What people use Lightning for: averages of the network, early stopping, the rate finder, clipping, loggers."""

from argparse import Namespace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import wandb
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from torch.optim.swa_utils import get_ema_avg_fn

from icnn_zoo import irregular_layers
from icnn_zoo.data import LinesDataModule
from icnn_zoo.training.callbacks import LastCheckpoint, NetworkAverage, SamplePictures, ValidateAtEnd
from icnn_zoo.training.callbacks.averaging import check_averaging
from icnn_zoo.training.checkpoints import read_checkpoint
from icnn_zoo.training.loggers import WandbLogger
from icnn_zoo.training.network_sources import load_task
from icnn_zoo.training.run_folder import RunFolder
from icnn_zoo.training.task import SegmentationTask

# Lightning's own warnings on CPU runs, workers and short epochs say nothing about the package.
pytestmark = pytest.mark.filterwarnings("ignore")
NAME = "model.backbone.layer1.0.displacement"


def make_task(**arguments) -> SegmentationTask:
    torch.manual_seed(0)
    network = {"backbone": "plain5", "num_classes": 3, "start": "layer1", "output_stride": 2, "head_dilation": 1}
    rates = {"optimizer": "adamw", "lr": 0.01, "position_lr": 0.3, "position_rule": "optimizer"}
    return SegmentationTask(**{**network, **rates, "loss_resolution": "image", **arguments})


def make_data() -> LinesDataModule:
    return LinesDataModule(image_size=25, num_classes=3, num_train=8, num_val=2, batch_size=2, num_workers=0)


def make_trainer(folder: Path, *callbacks: Callback, **arguments) -> pl.Trainer:
    options = {"max_steps": 4, "val_check_interval": 1, "num_sanity_val_steps": 0, "logger": CSVLogger(folder, "run")}
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        **{**options, **arguments},
    )


class Steps(Callback):
    """Keeps a displacement after every step, as it is when validating, and what the bound of each step allows."""

    def __init__(self) -> None:
        self.trained: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.last = irregular_layers(pl_module)["model.backbone.layer1.0"].positions.detach().clone()

    def on_train_batch_end(self, trainer, pl_module, *_):
        layer = irregular_layers(pl_module)["model.backbone.layer1.0"]
        assert (layer.positions >= self.last.floor() - 1.001e-3).all()
        assert (layer.positions <= self.last.ceil() + 1.001e-3).all()
        self.trained.append(layer.displacement.detach().clone())

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *_):
        if batch_idx:
            return
        self.validated.append(pl_module.state_dict()[NAME].clone())
        grid = irregular_layers(pl_module)["model.backbone.layer1.0"].regular_grid
        assert torch.equal(grid, grid.round())


@pytest.mark.parametrize(("decay", "start"), [(0.9, 0), (None, 2)])
def test_averages_are_evaluated_saved_and_left_behind_while_training_stays_bounded(tmp_path, decay, start):
    steps = Steps()
    callbacks = [NetworkAverage(decay, start), steps, LastCheckpoint(), ValidateAtEnd()]
    trainer, task = make_trainer(tmp_path, *callbacks), make_task()
    trainer.fit(task, make_data())
    expected, average = [], None
    for number, newest in enumerate(steps.trained):
        if number >= start:
            share = 1 / (number - start + 1) if decay is None else 1.0 if number == start else 1 - decay
            average = newest.double() if average is None else average + share * (newest.double() - average)
        expected.append(newest.double() if average is None else average)
    assert (steps.trained[-1] - steps.trained[0]).abs().max() > 0.3
    assert len(steps.validated) == len(expected) == 4
    for validated, wanted in zip(steps.validated, expected, strict=True):
        torch.testing.assert_close(validated.double(), wanted, atol=1e-6, rtol=0)
    assert torch.equal(task.state_dict()[NAME], steps.validated[-1])
    saved = read_checkpoint(RunFolder.of(trainer).last)
    assert torch.equal(saved["state_dict"][NAME], steps.validated[-1])
    assert torch.equal(saved["current_model_state"][NAME], steps.trained[-1])
    assert torch.equal(load_task(RunFolder.of(trainer).last).state_dict()[NAME], steps.validated[-1])


def test_a_run_with_an_average_resumes_bit_for_bit(tmp_path):
    def run(ckpt_path=None):
        saving = ModelCheckpoint(tmp_path / "all", "{step}", save_top_k=-1, every_n_train_steps=1)
        task = make_task()
        trainer = make_trainer(tmp_path, NetworkAverage(0.9, start_step=1), saving, val_check_interval=4)
        trainer.fit(task, make_data(), ckpt_path=ckpt_path, weights_only=True)
        return task.state_dict()

    whole = run()
    for step in (1, 3):  # before the first update, and after it
        resumed = run(tmp_path / "all" / f"step={step}.ckpt")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), step


def test_averages_that_round_or_lose_positions_are_refused_with_what_to_take():
    grid, rule = torch.arange(-32.0, 33.0), get_ema_avg_fn(0.9999)
    average = grid
    for number in range(2000):
        average = rule(average, grid, torch.tensor(number))
    assert (average - grid).abs().max() > 2e-3  # what it does to regular positions
    for callback in (EMAWeightAveraging(decay=0.9999), StochasticWeightAveraging(0.1)):
        with pytest.raises(ValueError, match=r"Take icnn_zoo\.training\.callbacks\.NetworkAverage"):
            check_averaging(Namespace(callbacks=[callback]), make_task())
        check_averaging(Namespace(callbacks=[callback]), make_task(start=None))
    for wrong in ({"decay": 1.0}, {"start_step": -1}, {"every_n_steps": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            NetworkAverage(**wrong)


def test_early_stopping_ends_a_run_with_its_last_checkpoint(tmp_path):
    stopping = EarlyStopping("val/mIoU", mode="max", patience=1)
    trainer = make_trainer(tmp_path, stopping, LastCheckpoint(), ValidateAtEnd(), max_steps=30, val_check_interval=2)
    trainer.fit(make_task(lr=0.0, position_lr=0.0, freeze_norm=True), make_data())
    assert trainer.global_step == 4
    assert read_checkpoint(RunFolder.of(trainer).last)["global_step"] == 4


def test_clipping_bounds_all_gradients_and_positions_still_move(tmp_path):
    class Norms(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
            norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())

    norms, task = [], make_task()
    make_trainer(tmp_path, Norms(), gradient_clip_val=1e-3).fit(task, make_data())
    assert norms == pytest.approx([1e-3] * 4, rel=1e-3)
    assert (task.state_dict()[NAME] - 1e-3).abs().max() > 0.3


def test_the_rate_finder_leaves_network_and_positions_as_they_were(tmp_path):
    task = make_task()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    trainer = make_trainer(tmp_path, max_steps=50, val_check_interval=1.0)
    finder = Tuner(trainer).lr_find(task, make_data(), num_training=16, min_lr=1e-4, max_lr=0.1)
    assert task.lr == finder.suggestion() != 0.01
    assert all(torch.equal(before[name], value) for name, value in task.state_dict().items())
    assert task.position_lr == 0.3


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_run_is_logged_with(name, tmp_path, monkeypatch):
    if name == "tensorboard":
        logger = TensorBoardLogger(tmp_path, "board")
    elif name == "mlflow":
        pytest.importorskip("mlflow")
        logger = MLFlowLogger("lines", tracking_uri=f"sqlite:///{tmp_path}/runs.db", artifact_location=str(tmp_path))
    else:
        monkeypatch.setenv("WANDB_MODE", "offline")
        wandb.finish()  # a run that another test left would be gone on with
        logger = WandbLogger(save_dir=str(tmp_path))
    trainer = make_trainer(tmp_path, LastCheckpoint(), SamplePictures(1), max_steps=2, logger=logger)
    trainer.fit(make_task(), make_data())
    assert RunFolder.of(trainer).last.is_file()
    if name == "tensorboard":
        assert list(RunFolder.of(trainer).path.glob("events.out.tfevents.*"))
    elif name == "mlflow":
        logged = logger.experiment.get_run(logger.run_id).data.metrics
        assert {"train/loss", "val/mIoU", "displacement/dead"} <= logged.keys()
    else:
        assert logger.experiment.summary.get("val/mIoU") is not None
        folder = Path(logger.experiment.dir)
        logger.experiment.finish()
        assert folder.is_relative_to(tmp_path), folder
        assert folder.parent.name.startswith("offline-run-")

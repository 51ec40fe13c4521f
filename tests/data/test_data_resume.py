"""A Lightning run that is resumed sees exactly the batches that the uninterrupted one saw."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from icnn_zoo.data import ShapesDataModule

pytestmark = pytest.mark.filterwarnings("ignore")


class Recorder(pl.LightningModule):
    """Learns nothing to speak of and remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)
        self.seen: list[tuple[int, tuple[str, ...], int]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, tuple(batch["name"]), int(batch["image"].long().sum())))
        return self.layer(batch["image"].float() / 255).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def run(folder: Path, save: dict, ckpt_path=None, num_workers: int = 0, **trainer):
    module = Recorder()
    data = ShapesDataModule(image_size=24, num_train=22, num_val=2, batch_size=4, num_workers=num_workers)
    saving = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{step}", auto_insert_metric_name=False, **save)
    pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[saving],
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    ).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.seen


@pytest.mark.parametrize(
    ("save", "trainer"),
    [
        pytest.param({"every_n_train_steps": 2}, {"max_steps": 12}, id="steps"),
        pytest.param({"every_n_epochs": 1}, {"max_epochs": 3}, id="epochs"),
        pytest.param(
            {"every_n_epochs": 1, "save_on_train_epoch_end": True}, {"max_steps": 12}, id="epoch ends of a run by steps"
        ),
        pytest.param({"every_n_train_steps": 2}, {"max_epochs": 3, "limit_train_batches": 3}, id="limited epochs"),
        pytest.param(
            {},
            {"max_steps": 12, "val_check_interval": 4, "check_val_every_n_epoch": None},
            id="at validations counted in steps",
        ),
        pytest.param(
            {"every_n_train_steps": 1}, {"max_steps": 6, "accumulate_grad_batches": 2}, id="accumulated gradients"
        ),
    ],
)
def test_a_resumed_run_sees_the_same_batches(tmp_path, save, trainer):
    whole = run(tmp_path / "whole", save, **trainer)
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"), key=lambda file: int(file.stem))
    assert len(checkpoints) >= 3
    shares = trainer.get("accumulate_grad_batches", 1)
    for number, checkpoint in enumerate(checkpoints[:4]):
        resumed = run(tmp_path / "resumed", save, checkpoint, num_workers=2 if number == 1 else 0, **trainer)
        assert resumed == whole[int(checkpoint.stem) * shares :]


def test_overfit_batches_are_refused(tmp_path):
    with pytest.raises(ValueError, match="use limit_train_batches"):
        run(tmp_path, {}, max_steps=1, overfit_batches=1)


def test_a_batch_size_that_accumulation_cannot_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"devices x accumulation = 1 x 3; got 4"):
        run(tmp_path, {}, max_steps=1, accumulate_grad_batches=3)

"""Training and evaluation with Lightning: exactness of resuming, of several processes and of the scores."""

import math
from argparse import Namespace
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from PIL import Image
from task_cases import make_data, make_task, make_trainer

from icnn_zoo import irregular_layers
from icnn_zoo.training.callbacks import LastCheckpoint, PredictionWriter, SamplePictures
from icnn_zoo.training.run_folder import RunFolder

# Lightning's own warnings on CPU runs, workers and short epochs say nothing about the package.
pytestmark = pytest.mark.filterwarnings("ignore")


class Losses(Callback):
    """Keeps the loss of every batch, and draws from the generators as dropout would."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.draws: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.losses.append(outputs["loss"].item())
        self.draws.append(torch.rand(()).item() + np.random.rand())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("optimizer", "rule", "position_lr"),
    [("sgd", "optimizer", 20.0), ("adamw", "optimizer", 0.1), ("adamw", "layer", 0.1)],
)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path, optimizer, rule, position_lr, accumulate):
    def run(ckpt_path=None):
        task = make_task(optimizer=optimizer, position_rule=rule, position_lr=position_lr)
        record = Losses()
        saving = ModelCheckpoint(tmp_path / "all", "{step}", save_top_k=-1, every_n_train_steps=3)
        trainer = make_trainer(tmp_path, record, saving, accumulate_grad_batches=accumulate)
        trainer.fit(task, make_data(), ckpt_path=ckpt_path)
        return record, task.state_dict()

    whole, weights = run()
    resumed, resumed_weights = run(tmp_path / "all" / "step=3.ckpt")  # within the first epoch of four steps
    assert resumed.losses == whole.losses[3 * accumulate :]
    assert resumed.draws == whole.draws[3 * accumulate :]
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


class Keep(Callback):
    """Writes what a process ended with to a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_fit_end(self, trainer, pl_module):
        self._keep(trainer, pl_module)

    def on_validation_end(self, trainer, pl_module):
        self._keep(trainer, pl_module)

    def _keep(self, trainer, pl_module):
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save(
            {"state": state, "metrics": metrics, "losses": self.losses}, self.folder / f"{trainer.global_rank}.pt"
        )


def test_two_processes_train_and_score_as_one_does(tmp_path):
    results = {}
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        trainer = make_trainer(
            folder, Keep(folder), devices=devices, strategy="ddp_spawn" if devices == 2 else "auto", max_steps=4
        )
        # Frozen norms: batch statistics would differ between one batch of four and two of two. Small scales pad crops
        # with ignored labels, so processes have different numbers of valid pixels. Five validation images are uneven.
        task = make_task(freeze_norm=True, position_lr=2.0, class_weights="auto")
        trainer.fit(task, make_data(scales=(0.5, 1.0)))
        results[devices] = [torch.load(folder / f"{rank}.pt") for rank in range(devices)]
    (one,), (first, second) = results[1], results[2]
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
        torch.testing.assert_close(value, one["state"][name], rtol=1e-4, atol=1e-5, msg=name)
    assert any(
        (value - 1e-3).abs().max() > 1e-3 for name, value in one["state"].items() if name.endswith("displacement")
    )
    assert len(one["losses"]) == 4
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-4)
    # Depends on the labels alone: an image scored twice, or not at all, changes it.
    assert first["metrics"]["val/mIoU_background"] == pytest.approx(one["metrics"]["val/mIoU_background"], rel=1e-6)
    # Predictions of a network that hardly learned tie often, so a rounding error turns some pixels over.
    assert first["metrics"]["val/mIoU"] == pytest.approx(one["metrics"]["val/mIoU"], abs=0.03)


def test_two_processes_score_a_set_that_does_not_divide_exactly_as_one_does(tmp_path, waken):
    metrics = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        task = make_task(evaluation="sliding", window=25, flip=True)
        waken(task.model.backbone)  # spread logits: no prediction is a tie
        trainer = make_trainer(folder, Keep(folder), devices=devices, strategy="ddp_spawn" if devices == 2 else "auto")
        trainer.validate(task, make_data(num_val=5), verbose=False)
        metrics += [torch.load(folder / f"{rank}.pt")["metrics"] for rank in range(devices)]
    assert len(metrics) == 3
    assert "val/mIoU" in metrics[0]
    assert metrics[1] == pytest.approx(metrics[2], rel=0, abs=0, nan_ok=True)
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-6, nan_ok=True)


def test_the_last_checkpoint_is_the_end_of_training_and_training_goes_on_from_there(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_last=True, monitor="val/mIoU", enable_version_counter=False)
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    make_trainer(tmp_path, saving, LastCheckpoint(), max_steps=3, **options).fit(make_task(), make_data())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
    record = Names()
    make_trainer(tmp_path, record, max_steps=5).fit(make_task(), make_data(), ckpt_path=tmp_path / "last.ckpt")
    whole = Names()
    make_trainer(tmp_path, whole, max_steps=5).fit(make_task(), make_data())
    assert record.names == whole.names[3:]


class Names(Callback):
    """Keeps the names of the images of every batch."""

    def __init__(self) -> None:
        self.names: list[list[str]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, *_):
        self.names.append(batch["name"])


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_shard_parameters_are_refused(strategy):
    task = make_task()
    task.trainer = Namespace(strategy=strategy.__new__(strategy))
    with pytest.raises(ValueError, match="Take ddp"):
        task.setup("fit")


def test_sync_batchnorm_that_would_drop_activations_is_refused(tmp_path):
    task = make_task(backbone="tf_efficientnet_lite0", start="classifier")
    with pytest.raises(ValueError, match="sync_batchnorm"):
        make_trainer(tmp_path, sync_batchnorm=True, strategy="ddp", max_steps=1).fit(task, make_data())


def test_the_loss_is_the_mean_over_valid_pixels_at_logit_resolution():
    task = make_task()
    task.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    task.log = lambda *_, **__: None
    images = torch.randint(0, 255, (2, 3, 33, 33), dtype=torch.uint8)
    labels = torch.randint(0, 4, (2, 33, 33))
    labels[0, :20] = 255
    task.eval()
    loss = task.training_step({"image": images, "mask": labels}, 0)
    small = labels[:, ::8, ::8]
    logits = task(images)
    expected = -logits.log_softmax(1).gather(1, small.clamp(max=3)[:, None])[:, 0][small != 255].mean()
    torch.testing.assert_close(loss, expected)
    nothing = task.training_step({"image": images, "mask": torch.full_like(labels, 255)}, 0)
    assert nothing.item() == 0


def test_fit_validate_test_and_predict_leave_tables_pictures_and_label_maps(tmp_path):
    task, data = make_task(), make_data()
    trainer = make_trainer(tmp_path, SamplePictures(2), PredictionWriter(), max_steps=2)
    trainer.fit(task, data)
    rows = RunFolder.of(trainer).metrics.read_text()
    assert "displacement/max/backbone.layer3" in rows
    assert "displacement/dead" in rows
    trainer.validate(task, data)
    assert 0 <= trainer.callback_metrics["val/mIoU"] <= 1
    trainer.test(task, data)
    assert "test/IoU/0" in trainer.callback_metrics
    trainer.predict(task, data, return_predictions=False)
    assert len(list(RunFolder.of(trainer).pictures.glob("*.png"))) == 4
    maps = sorted(RunFolder.of(trainer).predictions.glob("*.png"))
    assert len(maps) == 5
    picture = Image.open(maps[0])
    assert (picture.mode, picture.size) == ("P", (33, 33))
    assert np.asarray(picture).max() < 4


def test_positions_never_leave_the_cell_of_a_step_in_training(tmp_path):
    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            self.last = [layer.positions.detach().clone() for layer in irregular_layers(pl_module).values()]

        def on_train_batch_end(self, trainer, pl_module, *_):
            for last, layer in zip(self.last, irregular_layers(pl_module).values(), strict=True):
                assert (layer.positions >= last.floor() - 1.001e-3).all()
                assert (layer.positions <= last.ceil() + 1.001e-3).all()

    make_trainer(tmp_path, Watch()).fit(make_task(position_lr=1e4), make_data())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"task": {"channels_last": True}}, id="channels_last"),
        pytest.param({"task": {"loss_resolution": "image"}}, id="loss at image resolution"),
        pytest.param({"task": {"start": None}}, id="regular baseline"),
        pytest.param({"task": {"start": "classifier"}}, id="head alone"),
        pytest.param({"task": {"position_rule": "layer", "position_lr": 0.05}}, id="rule of positions"),
        pytest.param({"task": {"axes": "columns", "limit": "extent"}}, id="one axis within a limit"),
        pytest.param({"task": {"shapes": "kernel", "start": "layer4.0.conv2"}}, id="full version"),
        pytest.param({"trainer": {"precision": "bf16-mixed"}}, id="bf16-mixed"),
        pytest.param({"task": {"compile": True}}, id="compile", marks=pytest.mark.slow),
    ],
)
def test_options_train(tmp_path, options):
    record = Losses()
    trainer = make_trainer(tmp_path, record, max_steps=2, **options.get("trainer", {}))
    trainer.fit(make_task(**options.get("task", {})), make_data())
    assert all(math.isfinite(loss) for loss in record.losses)


def test_a_rate_per_unit_of_gradient_is_refused_for_a_rule_in_pixels(tmp_path):
    with pytest.raises(ValueError, match=r"position_lr.*got 50.0.*position_rule optimizer"):
        make_trainer(tmp_path).fit(make_task(position_rule="layer", position_lr=50.0), make_data())


def test_a_checkpoint_from_before_the_rule_goes_on_by_the_optimizers(tmp_path):
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    make_trainer(tmp_path, saving, max_steps=1).fit(make_task(), make_data())
    checkpoint = torch.load(tmp_path / "step=1.ckpt", weights_only=False)
    del checkpoint["hyper_parameters"]["position_rule"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    task = make_task(position_rule="layer")  # at 20 px a step, which that rule refuses
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(task, make_data(), ckpt_path=tmp_path / "old.ckpt")
    assert (trainer.global_step, task.position_rule) == (2, "optimizer")


def test_a_checkpoint_of_both_axes_does_not_go_on_with_one(tmp_path):
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    make_trainer(tmp_path, saving, max_steps=1).fit(make_task(limit=2.0), make_data())
    checkpoint = torch.load(tmp_path / "step=1.ckpt", weights_only=False)
    assert (checkpoint["hyper_parameters"]["axes"], checkpoint["hyper_parameters"].pop("limit")) == ("both", 2.0)
    del checkpoint["hyper_parameters"]["axes"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    for options in ({"axes": "rows"}, {"limit": 3.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}`: the checkpoint is of a network with"):
            make_trainer(tmp_path, max_steps=2).fit(make_task(**options), make_data(), ckpt_path=tmp_path / "old.ckpt")


def test_the_rates_of_a_run_follow_the_poly_policy_at_the_first_second_half_and_last_step(tmp_path):
    class Rates(Callback):
        def __init__(self):
            self.rates = []

        def on_train_batch_start(self, trainer, pl_module, *_):
            self.rates.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})

    record, steps = Rates(), 8
    make_trainer(tmp_path, record, max_steps=steps, accumulate_grad_batches=2).fit(
        make_task(lr=0.001, position_lr=50.0), make_data()
    )
    base = {"backbone": 0.001, "backbone_no_decay": 0.001, "head": 0.01, "head_bias": 0.02, "positions": 50.0}
    rates = record.rates[::2]  # two batches a step
    assert rates == record.rates[1::2]
    assert len(rates) == steps
    for step in (0, 1, steps // 2, steps - 1):
        expected = {name: rate * (1 - step / steps) ** 0.9 for name, rate in base.items()}
        assert rates[step] == pytest.approx(expected, rel=1e-9), step


def test_a_run_without_a_length_and_wrong_choices_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        make_trainer(tmp_path, max_steps=-1, max_epochs=-1).fit(make_task(), make_data())
    with pytest.raises(ValueError, match="`optimizer`"):
        make_task(optimizer="lion")
    with pytest.raises(ValueError, match="`loss_resolution`"):
        make_task(loss_resolution="full")
    with pytest.raises(ValueError, match="`class_names`"):
        make_task(class_names=["a"])


@pytest.mark.parametrize("size", [97, 100, 103, 104])
def test_labels_lie_where_the_image_says_at_any_size(size):
    task = make_task(output_stride=8, mean=[0.5] * 3, std=[0.5] * 3, num_classes=2)
    task.model.forward = lambda images, further=False: torch.cat([-images[:, :1, ::8, ::8], images[:, :1, ::8, ::8]], 1)
    for edge in (9, 40, size - 12):
        image = (127.5 + 10 * (torch.arange(size) + 0.5 - edge)).clamp(0, 255).expand(1, 3, size, size)
        assert (task._predict(image)[0, 0] == 0).sum() == edge
        pixels = task.model.preprocess(image)
        logits = task.model.upsample(task.model.forward(pixels), (size, size))  # as the loss has them
        assert (logits.argmax(1)[0, 0] == 0).sum() == edge


def test_nothing_is_saved_while_gradients_are_accumulated_and_the_next_step_is(tmp_path):
    """A validation within an accumulated batch: what is saved after it resumes bit for bit."""
    kept = {}

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            last = RunFolder.of(trainer).last
            if last.is_file() and not kept:
                kept["bytes"], kept["step"] = last.read_bytes(), trainer.global_step

    options = {"accumulate_grad_batches": 2, "val_check_interval": 3, "check_val_every_n_epoch": None}
    # After LastCheckpoint, which Lightning has last: hence a step later.
    whole = make_task()
    make_trainer(tmp_path, Keep(), LastCheckpoint(), **options).fit(whole, make_data())
    (tmp_path / "middle.ckpt").write_bytes(kept["bytes"])
    assert torch.load(tmp_path / "middle.ckpt", weights_only=True)["global_step"] == 2
    resumed = make_task()
    make_trainer(tmp_path, **options).fit(
        resumed, make_data(), ckpt_path=str(tmp_path / "middle.ckpt"), weights_only=True
    )
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())
    with pytest.raises(ValueError, match="accumulate_grad_batches=2, this run has 4: resume with as many"):
        make_trainer(tmp_path, accumulate_grad_batches=4, max_steps=9).fit(
            make_task(), make_data(), ckpt_path=str(tmp_path / "middle.ckpt"), weights_only=True
        )

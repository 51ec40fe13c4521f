"""Shapes logged while a network trains, and the animation made of them."""

import csv
import threading
import time
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from icnn_zoo.analysis import layer_shapes
from icnn_zoo.analysis.shape_animation import animate_shapes, read_record
from icnn_zoo.data import ShapesDataModule
from icnn_zoo.training.callbacks import shapes_logger
from icnn_zoo.training.callbacks.shapes_logger import ShapesLogger
from icnn_zoo.training.task import SegmentationTask


def fit(folder, *callbacks, steps=5, start="layer4", logger=None, ckpt_path=None):
    pl.seed_everything(0, verbose=False)
    data = ShapesDataModule(image_size=65, num_classes=3, num_train=40, num_val=2, batch_size=2, num_workers=0)
    task = SegmentationTask(
        num_classes=3, backbone="test_resnet", start=start, output_stride=8, head_dilation=3, pretrained=False,
        optimizer="adamw", lr=1e-3, position_lr=0.05,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=steps, accelerator="cpu", logger=logger or CSVLogger(folder, name="run"), log_every_n_steps=1,
            callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(task, data, ckpt_path=ckpt_path)
    return task


def records(folder):
    return sorted(path.stem for path in (folder / "run" / "version_0" / "shapes").glob("*.npz"))


def test_the_first_every_nth_and_the_last_step_are_logged_once(tmp_path):
    task = fit(tmp_path, ShapesLogger(every_n_steps=2))
    wanted = [f"step_{step:07d}" for step in (0, 2, 4, 5)]
    assert records(tmp_path) == wanted
    folder = tmp_path / "run" / "version_0" / "shapes"
    assert sorted(path.stem for path in folder.glob("*.png")) == wanted
    step, shapes = read_record(folder / "step_0000005.npz")
    assert step == 5
    for kept, now in zip(shapes, layer_shapes(task), strict=True):
        assert kept.name == now.name
        assert np.allclose(kept.positions, now.positions, atol=1e-5)
    _, first = read_record(folder / "step_0000000.npz")
    assert all(abs(shapes.displacement).max() < 0.01 for shapes in first)
    with (tmp_path / "run" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["shapes/length/classifier"]]
    assert [int(row["step"]) for row in rows] == [0, 2, 4, 5]
    assert float(rows[-1]["shapes/length/classifier"]) > float(rows[0]["shapes/length/classifier"])


def test_training_is_the_same_with_and_without(tmp_path):
    plain, watched = fit(tmp_path / "a"), fit(tmp_path / "b", ShapesLogger(every_n_steps=1))
    for (name, first), second in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(first, second), name


def test_tensorboard_gets_the_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tmp_path, ShapesLogger(every_n_steps=4), logger=TensorBoardLogger(tmp_path, name="run"))
    events = EventAccumulator(str(tmp_path / "run" / "version_0"))
    events.Reload()
    assert [image.step for image in events.Images("shapes")] == [0, 4, 5]


def test_an_error_in_the_drawing_thread_ends_the_run(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(shapes_logger, "save_record", fail)
    with pytest.raises(OSError, match="no space left"):
        fit(tmp_path, ShapesLogger(every_n_steps=1))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shapes")]


def test_a_run_that_fails_leaves_no_thread_behind(tmp_path):
    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, ShapesLogger(every_n_steps=1), Fails())
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("shapes") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_regular_network_an_unknown_layer_and_zero_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no irregular layer"):
        fit(tmp_path, ShapesLogger(), start=None)
    with pytest.raises(ValueError, match="'layer1' names no irregular layer"):
        fit(tmp_path, ShapesLogger(layers=["layer1"]))
    with pytest.raises(ValueError, match="`every_n_steps` must be at least 1; got 0"):
        ShapesLogger(every_n_steps=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    fit(folder, ShapesLogger(every_n_steps=2))
    return folder / "run" / "version_0"


def test_an_animation_has_a_frame_for_each_record(run, tmp_path):
    path = tmp_path / "shapes.gif"
    assert animate_shapes(run, path) == 4
    with Image.open(path) as picture:
        assert picture.n_frames == 4
        assert picture.info["loop"] == 0
        first = np.asarray(picture.convert("RGB")).copy()
        picture.seek(3)
        assert (np.asarray(picture.convert("RGB")) != first).any()
    assert animate_shapes(run, path, layers=["classifier"]) == 4


def test_animations_that_cannot_be_made_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"must end in .gif"):
        animate_shapes(run, tmp_path / "shapes.mp4")
    with pytest.raises(FileNotFoundError, match=r"no records of shapes.*ShapesLogger"):
        animate_shapes(tmp_path, tmp_path / "shapes.gif")
    with pytest.raises(ValueError, match=r"'nothing' names no irregular layer; the nearest are model.*layer4"):
        animate_shapes(run, tmp_path / "shapes.gif", layers=["nothing"])
    single = tmp_path / "shapes"
    single.mkdir()
    (single / "step_0000000.npz").write_bytes((run / "shapes" / "step_0000000.npz").read_bytes())
    with pytest.raises(ValueError, match="holds one record"):
        animate_shapes(tmp_path, tmp_path / "shapes.gif")
    np.savez(single / "step_0000001.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match="is not a record of shapes"):
        animate_shapes(tmp_path, tmp_path / "shapes.gif")
    assert not (tmp_path / "shapes.gif").exists()

"""Sample pictures and predictions with a data module and with plain loaders."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch.utils.data import DataLoader

from icnn_zoo.training.callbacks import PredictionWriter, SamplePictures
from icnn_zoo.training.run_folder import RunFolder
from icnn_zoo.training.task import SegmentationTask

pytestmark = pytest.mark.filterwarnings("ignore")


def loader(*keys: str) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(3):
        image = torch.randint(0, 256, (3, 33, 41), generator=generator, dtype=torch.uint8).float()
        mask = torch.randint(0, 4, (33, 41), generator=generator)
        samples.append({"image": image, "mask": mask, "name": f"video_{number % 2}/{number // 2:03d}"})
    return DataLoader([{key: sample[key] for key in keys} for sample in samples], batch_size=2)


def make_trainer(folder) -> pl.Trainer:
    callbacks = [SamplePictures(3), PredictionWriter()]
    logger = CSVLogger(folder, name="run")
    return pl.Trainer(accelerator="cpu", logger=logger, callbacks=callbacks, enable_progress_bar=False)


@pytest.mark.parametrize("named", [True, False])
def test_plain_loaders_get_pictures_and_predictions(tmp_path, named):
    task, keys = SegmentationTask("test_resnet", 4), ["name"] if named else []
    trainer = make_trainer(tmp_path)
    trainer.validate(task, loader("image", "mask", *keys), verbose=False)
    trainer.predict(task, loader("image", *keys), return_predictions=False)
    run = RunFolder.of(trainer)
    pictures = {path.stem for path in run.pictures.iterdir()}
    # With their folders: frames of two videos share names.
    names = ["video_0/000", "video_1/000", "video_0/001"] if named else ["000000", "000001", "000002"]
    assert pictures == {f"step_000000_{name.replace('/', '_')}" for name in names}
    written = {str(path.relative_to(run.predictions)) for path in run.predictions.rglob("*.png")}
    assert written == {f"{name}.png" for name in names}
    labels = np.asarray(Image.open(next(run.predictions.rglob("*.png"))))
    assert labels.shape == (33, 41)
    assert labels.max() < 4

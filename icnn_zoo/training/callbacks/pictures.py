"""Pictures and label maps of a run."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from PIL import Image

from icnn_zoo.data import SegmentationDataModule
from icnn_zoo.io.images import write_picture
from icnn_zoo.io.label_pictures import color_map, colored, palette_picture
from icnn_zoo.io.rasters import visible
from icnn_zoo.training.loggers import log_picture
from icnn_zoo.training.run_folder import RunFolder


class SamplePictures(Callback):
    """Writes pictures of image, truth and prediction side by side into ``pictures/`` of the run folder.

    Loggers that take pictures (Weights & Biases, TensorBoard) get them too, as ``pictures/<image name>``.

    Args:
        num_samples: Images of the first validation or test batches to show, one picture each.
    """

    def __init__(self, num_samples: int = 4) -> None:
        self.num_samples = num_samples
        self._kept: list[tuple[str, np.ndarray, np.ndarray]] = []

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._keep(trainer, args[1])

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._keep(trainer, args[1])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module, f"step_{trainer.global_step:06d}")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    def _keep(self, trainer: pl.Trainer, batch: dict[str, Any]) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        for image, mask, name in zip(batch["image"], batch["mask"], batch.get("name", cycle([None])), strict=False):
            if len(self._kept) < self.num_samples:
                self._kept.append((name or f"{len(self._kept):06d}", image.cpu().numpy(), mask.cpu().numpy()))

    @torch.no_grad()
    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, prefix: str) -> None:
        folder = RunFolder.of(trainer).pictures if self._kept else Path()
        palette = _data(trainer, pl_module).palette
        for name, image, mask in self._kept:
            images = torch.from_numpy(image)[None].to(pl_module.device)
            prediction = pl_module.predict_step({"image": images}, 0)[0].cpu().numpy()
            pixels = visible(image.transpose(1, 2, 0))
            panels = [pixels, colored(mask, palette), colored(prediction, palette)]
            flat = name.replace("/", "_").replace("\\", "_")  # with its folders: frames of two videos share names
            path = folder / f"{prefix}_{flat}.png"
            write_picture(Image.fromarray(np.concatenate(panels, axis=1)), path)
            for logger in trainer.loggers:
                log_picture(logger, f"pictures/{name}", path, trainer.global_step)
        self._kept.clear()


class PredictionWriter(BasePredictionWriter):
    """Writes predicted label maps as PNGs below ``predictions/`` in the run folder, without what padding added.

    The data module says under which name and in which code: :meth:`SegmentationDataModule.prediction_file` and
    :meth:`SegmentationDataModule.encode_labels`. VOC and Cityscapes give what their evaluation servers take. With plain
    loaders files are named by the batch's "name", or numbered, and hold class indices in VOC's colors.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._folder = Path()
        self._number = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Other processes than the first might count another version of the run by now.
        self._folder = trainer.strategy.broadcast(RunFolder.of(trainer).predictions)
        self._number = 0

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        data = _data(trainer, pl_module)
        named = isinstance(prediction, dict)
        maps = prediction["labels"] if named else prediction
        numbers = batch_indices or range(self._number, self._number + len(maps))
        names = prediction["name"] if named else [f"{number:06d}" for number in numbers]
        self._number += len(maps)
        for labels, name, padding in zip(maps, names, batch.get("padding", [False] * len(maps)), strict=True):
            if not padding:
                write_picture(data.encode_labels(labels.cpu().numpy()), self._folder / data.prediction_file(name))


class _PlainData:
    """How predictions are stored and drawn where no data module says it."""

    def __init__(self, num_classes: int) -> None:
        self.palette = color_map(num_classes)

    def prediction_file(self, name: str) -> str:
        return f"{name}.png"

    def encode_labels(self, labels: np.ndarray) -> Image.Image:
        return palette_picture(labels, self.palette)


def _data(trainer: pl.Trainer, pl_module: pl.LightningModule) -> SegmentationDataModule | _PlainData:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, SegmentationDataModule):
        return data
    return _PlainData(len(pl_module.class_names))  # type: ignore[arg-type]

"""Pictures and label maps of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from PIL import Image

from icnn_zoo.io.images import write_picture
from icnn_zoo.io.label_pictures import colored
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
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        for image, mask, name in zip(batch["image"], batch["mask"], batch["name"], strict=True):
            if len(self._kept) < self.num_samples:
                self._kept.append((name, image.cpu().numpy(), mask.cpu().numpy()))

    @torch.no_grad()
    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, prefix: str) -> None:
        if not self._kept:
            return
        folder = RunFolder.of(trainer).pictures
        folder.mkdir(parents=True, exist_ok=True)
        palette = trainer.datamodule.palette  # type: ignore[attr-defined]
        for name, image, mask in self._kept:
            images = torch.from_numpy(image)[None].to(pl_module.device)
            prediction = pl_module.predict_step({"image": images}, 0)[0].cpu().numpy()
            panels = [image.transpose(1, 2, 0), colored(mask, palette), colored(prediction, palette)]
            path = folder / f"{prefix}_{Path(name).name}.png"
            Image.fromarray(np.concatenate(panels, axis=1)).save(path)
            for logger in trainer.loggers:
                log_picture(logger, f"pictures/{Path(name).name}", path, trainer.global_step)
        self._kept.clear()


class PredictionWriter(BasePredictionWriter):
    """Writes predicted label maps as PNGs below ``predictions/`` in the run folder, without what padding added.

    The data module says under which name and in which code: :meth:`SegmentationDataModule.prediction_file` and
    :meth:`SegmentationDataModule.encode_labels`. VOC and Cityscapes give what their evaluation servers take.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

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
        folder, data = RunFolder.of(trainer).predictions, trainer.datamodule  # type: ignore[attr-defined]
        for labels, name, padding in zip(prediction["labels"], prediction["name"], batch["padding"], strict=True):
            if padding:
                continue
            write_picture(data.encode_labels(labels.cpu().numpy()), folder / data.prediction_file(name))

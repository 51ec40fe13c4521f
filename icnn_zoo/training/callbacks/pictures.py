"""What a run keeps and shows: its last state, displacement statistics, tables, pictures and predictions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, ModelCheckpoint
from PIL import Image
from rich.console import Console
from rich.table import Table

from icnn_zoo.analysis.displacement import InputSizes, displacement_statistics
from icnn_zoo.data.label_files import write_picture
from icnn_zoo.training.loggers import log_picture


def run_folder(trainer: pl.Trainer) -> Path:
    """The folder of a run: beside the logger's files, where ModelCheckpoint puts its own folder too."""
    logger = trainer.logger
    if logger is None or logger.save_dir is None:
        return Path(trainer.default_root_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir) / str(logger.name) / version


class GeneratorStates(Callback):
    """Saves every process's random generator states in checkpoints, so that a resumed run draws what the other had."""

    def __init__(self) -> None:
        self._restored: list[Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        states: list[Any] = [_generator_states()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, _generator_states())
        return {"states": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["states"]

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        # As late as possible: building loaders and sanity checks may draw from the generators.
        if self._restored is None:
            return
        if len(self._restored) != trainer.world_size:
            raise ValueError(
                f"the checkpoint holds generator states of {len(self._restored)} processes, this run has "
                f"{trainer.world_size}: resume with as many devices as before, or start a new run from its weights."
            )
        _set_generator_states(self._restored[trainer.global_rank])
        self._restored = None


def _generator_states() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (numpy_state[0], torch.from_numpy(np.array(numpy_state[1], dtype=np.int64)), *numpy_state[2:]),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generator_states(states: dict[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


class LastCheckpoint(Callback):
    """Saves ``last.ckpt`` after step ``max_steps``, beside every ModelCheckpoint that has ``save_last``.

    ModelCheckpoint itself saves it with each validation, hence not the last steps of a run whose length is no multiple
    of ``val_check_interval``.
    """

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        # Not when training ends: by then Lightning counts the epoch as over, and resuming would begin the next one.
        if trainer.global_step != trainer.max_steps:
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_last and callback.dirpath:
                trainer.save_checkpoint(Path(callback.dirpath) / f"{callback.CHECKPOINT_NAME_LAST}.ckpt")


class DisplacementMonitor(Callback):
    """Logs how far taps moved and the share of dead ones, per layer, every ``trainer.log_every_n_steps`` steps.

    Metrics are ``displacement/<statistic>/<layer>`` with the statistics of
    :func:`icnn_zoo.analysis.displacement_statistics`, and ``displacement/<statistic>`` for the worst layer.
    """

    def __init__(self) -> None:
        self._sizes: InputSizes | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sizes = InputSizes(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._sizes is None or trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        statistics = displacement_statistics(pl_module, self._sizes.sizes)
        values: dict[str, float] = {}
        for layer, of_layer in statistics.items():
            for statistic, value in of_layer.items():
                values[f"displacement/{statistic}/{layer.removeprefix('model.')}"] = value
                values[f"displacement/{statistic}"] = max(values.get(f"displacement/{statistic}", 0.0), value)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._sizes is not None:
            self._sizes.remove()
            self._sizes = None


class ScoreTable(Callback):
    """Prints IoU per class, mIoU and pixel accuracy after training, validating and testing."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._print(trainer, pl_module, "val")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._print(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._print(trainer, pl_module, "test")

    def _print(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        metrics = trainer.callback_metrics
        if not trainer.is_global_zero or f"{split}/mIoU" not in metrics:
            return
        table = Table(title=f"{split}: intersection over union", title_justify="left")
        table.add_column("class")
        table.add_column("IoU", justify="right")
        for name in pl_module.class_names:  # type: ignore[union-attr]
            value = float(metrics[f"{split}/IoU/{name}"])
            table.add_row(name, "absent" if np.isnan(value) else f"{value:.3f}")
        table.add_section()
        table.add_row("mIoU", f"{float(metrics[f'{split}/mIoU']):.3f}")
        first = pl_module.class_names[0]  # type: ignore[index]
        table.add_row(f"mIoU of {first} everywhere", f"{float(metrics[f'{split}/mIoU_background']):.3f}")
        table.add_row("pixel accuracy", f"{float(metrics[f'{split}/pixel_accuracy']):.3f}")
        Console().print(table)


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
        folder = run_folder(trainer) / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        palette = trainer.datamodule.palette  # type: ignore[attr-defined]
        for name, image, mask in self._kept:
            images = torch.from_numpy(image)[None].to(pl_module.device)
            prediction = pl_module.predict_step({"image": images}, 0)[0].cpu().numpy()
            panels = [image.transpose(1, 2, 0), colour(mask, palette), colour(prediction, palette)]
            path = folder / f"{prefix}_{Path(name).name}.png"
            Image.fromarray(np.concatenate(panels, axis=1)).save(path)
            for logger in trainer.loggers:
                log_picture(logger, f"pictures/{Path(name).name}", path, trainer.global_step)
        self._kept.clear()


def colour(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Label map [H, W] to RGB [H, W, 3]; what is no class becomes light grey."""
    picture = np.full((*labels.shape, 3), 224, dtype=np.uint8)
    known = (labels >= 0) & (labels < len(palette))
    picture[known] = palette[labels[known]]
    return picture


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
        folder, data = run_folder(trainer) / "predictions", trainer.datamodule  # type: ignore[attr-defined]
        for labels, name, padding in zip(prediction["labels"], prediction["name"], batch["padding"], strict=True):
            if padding:
                continue
            write_picture(data.encode_labels(labels.cpu().numpy()), folder / data.prediction_file(name))

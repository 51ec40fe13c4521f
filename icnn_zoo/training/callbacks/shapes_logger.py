"""Shapes in the log of a run, drawn while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from icnn_zoo.analysis.kernel_shapes import LayerShapes, layer_shapes
from icnn_zoo.analysis.shape_animation import FOLDER, save_record
from icnn_zoo.analysis.shape_figures import draw_shapes
from icnn_zoo.analysis.statistics import describe
from icnn_zoo.io.files import replacing
from icnn_zoo.training.loggers import log_picture
from icnn_zoo.training.run_folder import RunFolder

STATISTICS = ("center_shift", "length", "width", "anisotropy", "elongation", "outside")


class ShapesLogger(Callback):
    """Logs the kernel shapes every N steps: a figure, their statistics, and the positions for an animation.

    Figures go to every logger that takes pictures (Weights & Biases, TensorBoard) as ``shapes``, and always to
    ``shapes/step_<step>.png`` of the run folder; the positions beside them, as .npz, for
    ``icnn-zoo shapes RUN --animate --to shapes.gif``. Metrics are ``shapes/<statistic>/<layer>``, see
    :class:`icnn_zoo.analysis.ShapeStatistics`. Displacements, dead taps, IoU per class and sample predictions come
    from the callbacks that every run has: DisplacementMonitor, SegmentationTask and SamplePictures.

    The training loop only copies the positions; drawing is left to a thread, and what it made is handed to the loggers
    at the end of a later step. On two CPU cores the loop of a small ResNet waits for 1 ms at each log, and its four
    layers take the thread 0.36 s, which at the default of 500 steps (75 s) is 0.5 % of one core's time.

    Args:
        every_n_steps: Optimizer steps between logs; the first and the last step are always logged.
        layers: Names of the layers, in full or a unique ending; None for all.

    Raises:
        ValueError: ``every_n_steps`` is below 1. When training starts: the network has no irregular layer, or none of a
            given name. While it trains: a position is not a finite number.
    """

    def __init__(self, every_n_steps: int = 500, layers: Sequence[str] | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be at least 1; got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self.layers = layers
        self._worker: ThreadPoolExecutor | None = None
        self._jobs: list[Future[tuple[int, Path, dict[str, float]]]] = []
        self._last_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shapes = layer_shapes(pl_module, self.layers)  # on all processes, so that all of them fail
        if trainer.is_global_zero:
            # One thread: matplotlib is not made for two, and figures come in the order of steps.
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shapes")
            self._submit(trainer, shapes)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._worker is None:
            return
        self._hand_over(trainer, wait=False)
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._last_step:
            self._submit(trainer, layer_shapes(pl_module, self.layers))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._worker is None:
            return
        if trainer.global_step != self._last_step:
            self._submit(trainer, layer_shapes(pl_module, self.layers))
        self._hand_over(trainer, wait=True)
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Also after an error or an interrupt: a thread left behind would keep the program from ending.
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
            self._worker = None
            self._jobs.clear()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def _submit(self, trainer: pl.Trainer, shapes: list[LayerShapes]) -> None:
        assert self._worker is not None
        self._last_step = trainer.global_step
        self._jobs.append(self._worker.submit(_draw, RunFolder.of(trainer).path / FOLDER, trainer.global_step, shapes))

    def _hand_over(self, trainer: pl.Trainer, wait: bool) -> None:
        # Loggers are called from the training loop's thread only, as they expect.
        while self._jobs and (wait or self._jobs[0].done()):
            step, picture, values = self._jobs.pop(0).result()
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)
                log_picture(logger, "shapes", picture, step)


def _draw(folder: Path, step: int, all_shapes: list[LayerShapes]) -> tuple[int, Path, dict[str, float]]:
    record = save_record(folder, step, all_shapes)
    picture = record.with_suffix(".png")
    with replacing(picture) as temporary:
        draw_shapes(all_shapes, f"step {step}").savefig(temporary, dpi=80)
    values = {}
    for shapes in all_shapes:
        description = describe(shapes)
        for key in STATISTICS:
            if (value := getattr(description, key)) is not None:
                values[f"shapes/{key}/{shapes.name.removeprefix('model.')}"] = value
    return step, picture, values

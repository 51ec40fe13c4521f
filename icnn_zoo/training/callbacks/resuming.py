"""What makes a run resumable: its generator states and its last checkpoint."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from icnn_zoo.training.run_folder import RunFolder


class LastCheckpoint(Checkpoint):
    """Saves ``last.ckpt`` after every validation, at the end of training, and when the process is told to end.

    It takes the place of ``save_last`` of every ModelCheckpoint that has it, in the same folder; without any
    ModelCheckpoint it writes into ``checkpoints/`` of the run folder. Since Lightning 2.6 ``save_last`` writes only
    together with a better checkpoint: a run without a better score would lose everything since then.

    Told to end (SIGTERM), a run of one process saves the step it has just finished. With several, whose steps would
    have to be made to agree while they end, the last validation's checkpoint stays. Nothing is saved while gradients
    are accumulated, which no checkpoint holds: after a validation there, the step that they end in is.
    """

    best_model_path = ""  # Lightning asks the first Checkpoint callback for it

    def __init__(self) -> None:
        self._beside: list[ModelCheckpoint] = []
        self._alone = False
        self._is_due = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        others = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        self._alone = not others
        self._beside += [callback for callback in others if callback.save_last]
        for callback in others:
            callback.save_last = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Checkpoint callbacks come last, those of the configuration first: the best score of this validation is in.
        # Not at the end, where the step has been saved: Lightning resumes wrongly after a validation out of turn.
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not is_last_step(trainer):
            self._is_due = _is_accumulating(trainer)
            if not self._is_due:
                self._save(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        # Not when training ends: by then Lightning counts the epoch as over, and resuming would begin the next one.
        if is_last_step(trainer) or (self._is_due and not _is_accumulating(trainer)):
            self._is_due = False
            self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not trainer.received_sigterm or trainer.world_size > 1 or trainer.sanity_checking:
            return
        # A worker that was told to end too can interrupt a step halfway; that is not a state to resume from.
        done = trainer.fit_loop.epoch_loop.batch_progress.current
        whole = done.ready == done.completed and not _is_accumulating(trainer)
        if trainer.state.fn == TrainerFn.FITTING and trainer.global_step > 0 and whole:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folders = [str(callback.dirpath) for callback in self._beside if callback.dirpath]
        if self._alone:
            folders = [str(RunFolder.of(trainer).last.parent)]
        for folder in dict.fromkeys(folders):
            trainer.save_checkpoint(f"{folder}/{ModelCheckpoint.CHECKPOINT_NAME_LAST}.ckpt", False)  # all of it


class ValidateAtEnd(Callback):
    """Validates after the last step, also where the run's length is not a multiple of the validation interval."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if is_last_step(trainer):
            trainer.should_stop = True  # before it stops, Lightning validates


def is_last_step(trainer: pl.Trainer) -> bool:
    """Whether the step that has just ended is the last one of the run, by ``max_steps`` or ``max_epochs``."""
    if trainer.global_step == trainer.max_steps:
        return True
    return trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs


def _is_accumulating(trainer: pl.Trainer) -> bool:
    """Whether the batch that was last is one whose gradients wait for those of the next."""
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return ready % trainer.accumulate_grad_batches != 0 and not trainer.is_last_batch


class GeneratorStates(Callback):
    """Saves every process's random generator states in checkpoints, so that a resumed run draws what the other had."""

    def __init__(self) -> None:
        self._restored: list[Any] | None = None
        self._trainer: pl.Trainer | None = None
        self._shares: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        states: list[Any] = [_generator_states()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, _generator_states())
        shares = None if self._trainer is None else self._trainer.accumulate_grad_batches
        return {"states": states, "accumulate_grad_batches": shares}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["states"]
        self._shares = state_dict.get("accumulate_grad_batches")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # As late as possible: building loaders and sanity checks may draw from the generators.
        if self._restored is None:
            return
        # Lightning counts an epoch's batches, and with other shares of a step they are others.
        if batch_idx > 0 and self._shares not in (None, trainer.accumulate_grad_batches):
            raise ValueError(
                f"the checkpoint is from within an epoch of accumulate_grad_batches={self._shares}, this run has "
                f"{trainer.accumulate_grad_batches}: resume with as many, or start a new run from its weights."
            )
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

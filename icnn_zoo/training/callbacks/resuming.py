"""What makes a run resumable: its generator states and its last checkpoint."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed
from lightning.pytorch.callbacks import Callback, ModelCheckpoint


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

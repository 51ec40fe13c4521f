"""Controls for learned positions: what shapes are worth that were moved, or chosen, without asking the data."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from icnn_zoo.nn.irregular_conv import irregular_layers
from icnn_zoo.nn.tap_restriction import LEARNED


class RandomWalk(Callback):
    """Lets positions walk at random: their gradients are replaced by normal numbers of the same root mean square.

    Layer by layer and step by step, just before the optimizer's step, so that rate, schedule and bound are those of
    learned positions. For ``position_rule="optimizer"``: the rule "layer" follows only gradients that agree, so that
    hardly anything would walk. Drawn from torch's global generator, whose state checkpoints hold: a resumed walk goes
    on as the uninterrupted one would.
    """

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for layer in irregular_layers(pl_module).values():
            gradient = layer.displacement.grad
            if gradient is not None:
                learned = gradient[..., LEARNED[layer.axes]]
                size = learned.square().mean().sqrt()
                learned.normal_().mul_(size)


class RandomShapes(Callback):
    """Starts from random shapes: displacements normal with a mean of zero, in rows and columns alike.

    With ``--model.position_lr 0`` they stay as they are. Drawn when training begins, unless it is resumed.

    Args:
        spread: Standard deviation in pixels.

    Raises:
        ValueError: ``spread`` is not positive.
    """

    def __init__(self, spread: float = 1.0) -> None:
        if not spread > 0:
            raise ValueError(f"`spread` must be a positive number of pixels; got {spread}.")
        self.spread = spread

    @torch.no_grad()
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is None:
            for layer in irregular_layers(pl_module).values():
                layer.displacement[..., LEARNED[layer.axes]].normal_(std=self.spread)

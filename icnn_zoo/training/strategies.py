"""Which of Lightning's strategies a network with learned shapes can be trained by."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from timm.layers import BatchNormAct2d
from torch import nn

from icnn_zoo.training.callbacks.averaging import check_averaging


def check_strategy(trainer: pl.Trainer, model: nn.Module) -> None:
    """Refuses what would train something else than a single device does.

    Raises:
        ValueError: A strategy that shards parameters, ``sync_batchnorm`` where it would drop activations, or an average
            of the network that would round or lose its positions.
    """
    check_averaging(trainer, model)
    strategy = trainer.strategy
    if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        # Their parameters are flat shards, perhaps in half precision: displacements would be rounded, the bound of
        # Eq. 7 would not see them, and weight decay could not tell a weight from a bias.
        raise ValueError(
            f"`trainer.strategy` must keep parameters whole and displacements in float32; got "
            f"{type(strategy).__name__}, which shards them. Take ddp: a ResNet-101 and its optimizer need 0.5 GB. (In "
            "a loop of your own fully_shard works: see icnn_zoo.whole_displacements.)"
        )
    dropped = [name for name, module in model.named_modules() if isinstance(module, BatchNormAct2d)]
    if getattr(strategy, "_layer_sync", None) is not None and dropped:
        raise ValueError(
            f"`trainer.sync_batchnorm` would drop the activations inside of this backbone's {len(dropped)} norm layers "
            f"such as {dropped[0]}: take a backbone with plain BatchNorm (resnet), or leave it off (freeze_norm=true "
            "needs no statistics of other devices)."
        )

"""The optimizer of a run: groups with their rates, and the rule of positions hooked to its steps."""

from __future__ import annotations

import torch

from icnn_zoo.models.segmentation import SegmentationModel
from icnn_zoo.optim import bound_positions, keep_options, move_positions, parameter_groups


def make_optimizer(
    model: SegmentationModel,
    name: str,
    position_rule: str | None,
    *,
    lr: float,
    head_lr_factor: float,
    position_lr: float,
    momentum: float,
    weight_decay: float,
    bound_epsilon: float,
    spread_lr: float | None = None,
) -> torch.optim.Optimizer:
    """Makes the optimizer of a network, the arguments those of :class:`icnn_zoo.training.task.SegmentationTask`.

    Args:
        model: The network; one that is not a backbone and a head has one rate for all weights.
        name: "sgd" or "adamw".
        position_rule: "layer" or "optimizer"; None for a regular network.
        lr: Rate of the backbone's weights.
        head_lr_factor: Rate of the head's weights over ``lr``; its biases have twice that.
        position_lr: Rate of the positions.
        momentum: Momentum of SGD.
        weight_decay: Decay of weights.
        bound_epsilon: How far one step may carry a position across its cell's border, in pixels.
        spread_lr: Rate of the spreads; None for ``lr``.

    Raises:
        ValueError: A rate that is not in the rule's units.
    """
    if position_rule == "layer" and position_lr > 1:
        raise ValueError(
            f"`position_lr` is in pixels with position_rule layer, 0.1 to begin with; got {position_lr}."
            " Rates per unit of gradient, such as the paper's 50, go with position_rule optimizer."
        )
    groups = parameter_groups(
        model,
        lr=lr,
        position_lr=position_lr,
        weight_decay=weight_decay,
        head="classifier" if model.spec is None else None,
        head_lr_factor=head_lr_factor,
        head_bias_lr_factor=2 * head_lr_factor,
        spread_lr=spread_lr,
    )
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=lr)
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum)
    if position_rule is not None:
        hook = move_positions if position_rule == "layer" else bound_positions
        hook(optimizer, model, bound_epsilon=bound_epsilon)
    keep_options(optimizer)
    return optimizer

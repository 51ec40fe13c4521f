"""Displacements kept whole and exact where everything else is sharded."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from icnn_zoo.nn.irregular_conv import irregular_layers


def whole_displacements(model: nn.Module, group: Any = None) -> set[nn.Parameter]:
    """Displacements, and spreads, for FSDP to leave out, their gradients averaged over the processes as FSDP would.

    With ``MixedPrecisionPolicy(param_dtype=...)`` FSDP2 rounds what it shards to half precision, positions included,
    which irregular layers refuse. Left out, a displacement stays whole, float32, and the same on all processes. Without
    a ``param_dtype`` sharded displacements are exact, and this is not needed.

    Args:
        model: The converted network, before sharding, the same on all processes.
        group: The process group to average over; None for the default one.

    Returns:
        The displacements, for ``fully_shard(..., ignored_params=...)``, in every call that shards a part of the
        network, or for ``FullyShardedDataParallel(..., ignored_states=...)``. In an optimizer they need a group of
        their own, as :func:`icnn_zoo.parameter_groups` makes it: sharded and whole tensors cannot be stepped together.

    Raises:
        ValueError: The network has no irregular layer.

    Example:
        >>> import torch, icnn_zoo
        >>> model = icnn_zoo.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), start="0")
        >>> [tuple(parameter.shape) for parameter in icnn_zoo.whole_displacements(model)]
        [(3, 9, 2)]
    """
    found = {
        parameter
        for layer in irregular_layers(model).values()
        for parameter in (*layer.displacement_parameters(), *layer.spread_parameters())
    }
    if not found:
        raise ValueError(f"`model` must have irregular layers; {type(model).__name__} has none. See icnn_zoo.convert.")

    def average(parameter: Tensor) -> None:
        if parameter.grad is not None and dist.is_initialized():
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= dist.get_world_size(group)

    for parameter in found:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)
    return found

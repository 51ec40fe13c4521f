"""Norm layers held as they are while the rest trains."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def freeze_norm(model: nn.Module) -> nn.Module:
    """Freezes the statistics and the affine parameters of every norm layer, as DeepLab fine-tunes.

    ``model.train()`` puts norm layers back into training mode: call this after it
    (:class:`icnn_zoo.models.SegmentationModel` does).

    Returns:
        The same model.
    """
    for module in model.modules():
        if isinstance(module, _NORMS):
            module.eval()
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    return model

"""Norm layers held as they are while the rest trains."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


def freeze_norm(model: nn.Module) -> nn.Module:
    """Freezes the statistics and the affine parameters of every norm layer, as DeepLab fine-tunes.

    Norm layers are those of ``torch.nn``, and modules of other classes named so (timm's RmsNorm2d, transformers'
    LlamaRMSNorm) whose own parameters and buffers are no more than one number per channel.

    ``model.train()`` puts norm layers back into training mode: call this after it
    (:class:`icnn_zoo.models.SegmentationModel` does).

    Returns:
        The same model.
    """
    for module in model.modules():
        if _is_norm(module):
            module.eval()
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    return model


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, _NORMS):
        return True
    if "norm" not in type(module).__name__.lower():
        return False
    # Blocks that hold a norm are named after it too; they have no tensors of their own, or a matrix.
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return bool(own) and all(sum(extent > 1 for extent in tensor.shape) <= 1 for tensor in own)

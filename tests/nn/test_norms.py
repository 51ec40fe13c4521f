"""Which modules are norm layers, and that they are frozen."""

import pytest
import torch
from timm.layers import BatchNormAct2d, EvoNorm2dB0, FilterResponseNormTlu2d, LayerNorm2d, RmsNorm, RmsNorm2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from icnn_zoo import freeze_norm


class LlamaRMSNorm(nn.Module):
    """As transformers has it: a class of its own, not a subclass."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "sync batch": lambda: nn.SyncBatchNorm(4),
    "group": lambda: nn.GroupNorm(2, 4),
    "layer": lambda: nn.LayerNorm((4, 4)),
    "rms": lambda: nn.RMSNorm(4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "timm layer": lambda: LayerNorm2d(4),
    "timm rms": lambda: RmsNorm(4),
    "timm rms 2d": lambda: RmsNorm2d(4),
    "timm batch with activation": lambda: BatchNormAct2d(4),
    "timm evo": lambda: EvoNorm2dB0(4),
    "timm filter response": lambda: FilterResponseNormTlu2d(4),
    "torchvision frozen": lambda: FrozenBatchNorm2d(4),
    "of another class": lambda: LlamaRMSNorm(4),
}


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_every_norm_layer_is_frozen(make):
    norm = make()
    freeze_norm(nn.Sequential(norm).train())
    assert not norm.training
    assert not any(parameter.requires_grad for parameter in norm.parameters())


def test_statistics_of_an_instance_norm_stay():
    model = nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True)).train()
    freeze_norm(model)(torch.randn(2, 4, 5, 5) + 3)
    assert not model[0].running_mean.any()


class NormedConv2d(nn.Conv2d):
    """A convolution with a normalized weight, as in mmdetection."""


class PreNorm(nn.Module):
    """A block named after the norm in it."""

    def __init__(self):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.Dropout())


def test_what_is_only_named_after_a_norm_keeps_training():
    model = freeze_norm(nn.ModuleDict({"conv": NormedConv2d(4, 4, 3), "block": PreNorm()}).train())
    assert all(module.training for module in (model.conv, model.block, *model.block.fn))
    assert all(parameter.requires_grad for parameter in (*model.conv.parameters(), *model.block.fn.parameters()))
    assert not model.block.norm.training

"""Heads of segmentation networks: a name for each, and what builds it. Nothing else knows what is inside one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch.nn.functional as F
from torch import Tensor, nn


class HeadBuilder(Protocol):
    """Builds a head: a module from features [B, channels, h, w] to logits [B, num_classes, h, w]."""

    def __call__(self, channels: int, num_classes: int, dilation: int) -> nn.Module:
        """Builds it.

        Args:
            channels: Channels of the backbone's last stage.
            num_classes: Classes, background included.
            dilation: Spacing of the head's taps in feature pixels, in whatever way the head is dilated.
        """


def largefov(channels: int, num_classes: int, dilation: int) -> nn.Module:
    """DeepLab's LargeFOV as one 3x3 convolution, drawn as DeepLab draws it."""
    head = nn.Conv2d(channels, num_classes, 3, padding=dilation, dilation=dilation)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.constant_(cast(Tensor, head.bias), 0)
    return head


def aspp(channels: int, num_classes: int, dilation: int) -> nn.Module:
    """DeepLabV3's head as torchvision has it: 3x3 convolutions at once, two and three times the dilation."""
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead

    return DeepLabHead(channels, num_classes, (dilation, 2 * dilation, 3 * dilation))


def fcn(channels: int, num_classes: int, dilation: int) -> nn.Module:
    """FCN's head as torchvision has it: a 3x3 convolution to a quarter of the channels, without dilation."""
    from torchvision.models.segmentation.fcn import FCNHead

    return FCNHead(channels, num_classes)


class FPNHead(nn.Module):
    """A feature pyramid (torchvision's), its levels added at the finest, mixed by a 3x3 convolution and classified.

    Args:
        channels: Channels of the backbone's stages, finest first.
        num_classes: Classes, background included.
        width: Channels of the pyramid.

    References:
        The sum over levels is that of "Panoptic Feature Pyramid Networks" (Kirillov et al., 2019).
    """

    def __init__(self, channels: Sequence[int], num_classes: int, width: int = 128) -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.pyramid = FeaturePyramidNetwork(list(channels), width)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.logits = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features of the stages, finest first, to logits at the size of the finest."""
        levels = list(self.pyramid({str(place): level for place, level in enumerate(features)}).values())
        size = levels[0].shape[-2:]
        total = sum(
            (F.interpolate(level, size, mode="bilinear", align_corners=True) for level in levels[1:]), levels[0]
        )
        return self.logits(F.relu(self.mix(total)))


HEADS: dict[str, HeadBuilder] = {"largefov": largefov, "aspp": aspp, "fcn": fcn}
PYRAMID_HEADS = {"fpn": FPNHead}  # which take several stages of a backbone that is not dilated
UNDILATED = ("fcn", "fpn")


def default_dilation(output_stride: int) -> int:
    """The paper's 12 at output stride 8, and the same field of view at others: 6 at 16."""
    return 12 * 8 // output_stride

"""Heads of segmentation networks: a name for each, and what builds it. Nothing else knows what is inside one."""

from __future__ import annotations

from typing import Protocol, cast

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


HEADS: dict[str, HeadBuilder] = {"largefov": largefov}


def default_dilation(output_stride: int) -> int:
    """The paper's 12 at output stride 8, and the same field of view at others: 6 at 16."""
    return 12 * 8 // output_stride

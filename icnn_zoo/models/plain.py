"""A small network of plain dense convolutions, for tasks and trials that take a minute on one CPU core."""

from __future__ import annotations

from typing import Any

from timm.models import FeatureInfo, register_model
from torch import Tensor, nn

_STRIDE = 2


class PlainNetwork(nn.Module):
    """Five dense 3x3 convolutions with batch norm and ReLU, the second with stride 2; no skip connections.

    timm knows it as "plain5" once :mod:`icnn_zoo.models` is imported, so that it is a backbone like any other.

    Args:
        channels: Channels of the last three layers.

    Attributes:
        stem: The first two convolutions.
        layer1: The third, at stride 2; ``layer2`` and ``layer3`` likewise.
        feature_info: What timm's feature networks say of themselves.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(_layer(3, 24), _layer(24, channels, stride=_STRIDE))
        self.layer1 = _layer(channels, channels)
        self.layer2 = _layer(channels, channels)
        self.layer3 = _layer(channels, channels)
        self.feature_info = FeatureInfo([{"num_chs": channels, "reduction": _STRIDE, "module": "layer3"}], (0,))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] to a list of one tensor of features [B, channels, H / 2, W / 2], sizes rounded up."""
        return [self.layer3(self.layer2(self.layer1(self.stem(images))))]


def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


@register_model
def plain5(pretrained: bool = False, *, output_stride: int = _STRIDE, **timm_arguments: Any) -> PlainNetwork:
    """Timm's entry point of :class:`PlainNetwork`.

    Raises:
        ValueError: Pretrained weights, of which there are none.
        AssertionError: Another output stride than 2, as timm's own networks refuse what they cannot do.
    """
    if pretrained:
        raise ValueError("`pretrained`: there are no weights of plain5 to load; set false.")
    assert output_stride == _STRIDE, f"plain5 has the output stride {_STRIDE}"
    return PlainNetwork()

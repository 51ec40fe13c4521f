"""VGG16 as DeepLab-LargeFOV has it: the backbone of the first DeepLab, dense 3x3 convolutions throughout."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from timm.models import FeatureInfo, generate_default_cfgs, register_model
from torch import Tensor, nn

_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Caffe's networks see RGB in 0..255 minus this mean, divided by nothing.
default_cfgs = generate_default_cfgs(
    {
        "vgg16_largefov.untrained": {
            "mean": (122.67892 / 255, 116.66877 / 255, 104.00699 / 255),
            "std": (1 / 255, 1 / 255, 1 / 255),
        }
    }
)


class LargeFOVBackbone(nn.Module):
    """The thirteen convolutions of VGG16 with pools of 3x3 pixels, the last ones dilated instead of strided.

    timm knows it as "vgg16_largefov" once :mod:`icnn_zoo.models` is imported. Layers have DeepLab's names, so that
    ``start="conv5_1"`` makes the last three convolutions and the head irregular. Pools pad by one pixel, so that sizes
    of 8k + 1 keep a feature on every 8th pixel. ``icnn-zoo prepare vgg16`` fetches weights.

    Args:
        output_stride: Input pixels per pixel of the features: 8, as DeepLab has it, or 16.

    Attributes:
        feature_info: What timm's feature networks say of themselves.

    Source:
        Chen et al., "Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs" (2015).
    """

    def __init__(self, output_stride: int = 8) -> None:
        super().__init__()
        channels = 3
        self.blocks: list[list[str]] = []
        self.strides = (2, 2, 2, 1 if output_stride == 8 else 2, 1)
        dilations = (1, 1, 1, 1, 2 if output_stride == 8 else 1)
        for block, (widths, dilation) in enumerate(zip(_WIDTHS, dilations, strict=True), start=1):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for number, width in enumerate(widths, start=1):
                conv = nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation)
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
                layers[f"conv{block}_{number}"] = conv
                channels = width
            for name, layer in layers.items():
                self.add_module(name, layer)
            self.blocks.append(list(layers))
        reduction = 8 if output_stride == 8 else 16
        self.feature_info = FeatureInfo(
            [{"num_chs": channels, "reduction": reduction, "module": self.blocks[-1][-1]}], (0,)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] to a list of one tensor of features [B, 512, H / 8, W / 8], sizes rounded up."""
        features = images
        for names, stride in zip(self.blocks, self.strides, strict=True):
            for name in names:
                features = F.relu(self.get_submodule(name)(features))
            features = F.max_pool2d(features, 3, stride=stride, padding=1)
        return [features]


@register_model
def vgg16_largefov(pretrained: bool = False, *, output_stride: int = 8, **timm_arguments: Any) -> LargeFOVBackbone:
    """Timm's entry point of :class:`LargeFOVBackbone`.

    Raises:
        ValueError: Pretrained weights, which timm's hub does not have.
        AssertionError: Another output stride than 8 and 16, as timm's own networks refuse what they cannot do.
    """
    if pretrained:
        raise ValueError(
            "`pretrained`: timm has no weights of vgg16_largefov. Make a file: icnn-zoo prepare vgg16 --root data; "
            "then set pretrained to data/vgg16/vgg16_largefov.safetensors."
        )
    assert output_stride in (8, 16), f"vgg16_largefov has the output strides 8 and 16, not {output_stride}"
    return LargeFOVBackbone(output_stride)

"""Segmentation networks: a timm backbone at an output stride and a small head. Plain nn.Modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icnn_zoo.models.backbones import DILATION_RULES, BackboneArgs, create_backbone, dilate_as_caffe, feature_info
from icnn_zoo.models.heads import HEADS, default_dilation
from icnn_zoo.nn.norms import freeze_norm as freeze_norm_layers


class SegmentationModel(nn.Module):
    """A timm backbone and a head on its last stage: DeepLab's LargeFOV, one 3x3 convolution with dilation 12.

    Its parts are named ``backbone`` and ``classifier``, so that ``icnn_zoo.convert(model, start="classifier")``
    converts the head and ``start="layer3.11"`` the backbone from there on and the head.

    Args:
        backbone: Any timm name that can be dilated ("resnet101", "tf_efficientnet_lite0").
        num_classes: Classes, background included.
        output_stride: Input pixels per logit: 8 (the paper's), 16, or 2 and 4 where the backbone can.
        head: Name of the head in :data:`icnn_zoo.models.heads.HEADS`.
        head_dilation: Dilation of the head; None for the paper's 12 at output stride 8, and 6 at 16, the same field of
            view. Feature maps smaller than the dilation leave only the head's center tap alive.
        dilation_rule: Dilation of the convolutions that lost their stride, the first 3x3 of each dilated stage. "timm"
            (torchvision likewise) gives them that of the stage before, "caffe" that of their own stage, as DeepLab's
            networks have it: 2 in layer3.0 and 4 in layer4.0 of a ResNet at output stride 8, not 1 and 2.
        backbone_args: Sizes and rates for timm's network, numbers or lists of them, such as
            ``{"channels": [32, 64, 128, 256]}`` for a ResNet of half the width; None for its own.
        freeze_norm: Freezes statistics and affine parameters of all norm layers, in training mode too.
        mean: Mean of the RGB channels in 0 to 1, None for what timm says of the backbone.
        std: Standard deviation likewise.

    Attributes:
        backbone: The timm network, giving the last stage's features.
        classifier: The head.
        head_dilation: Dilation of the head, the default resolved.

    Raises:
        ValueError: No such backbone, one that timm cannot dilate to this output stride, or one for which Caffe's rule
            says nothing; the message names choices.

    Note:
        One difference to DeepLab's Caffe network stays: a timm ResNet has the remaining stride of layer2.0 in its 3x3
        convolution, Caffe's in the 1x1 before. It goes with the weights, which were trained so. Caffe rounds the
        stem's pooling up, which is the same at sizes of 8k + 1.

    Example:
        >>> import torch
        >>> from icnn_zoo.models.segmentation import SegmentationModel
        >>> model = SegmentationModel("resnet18", num_classes=21)
        >>> model(torch.randn(1, 3, 97, 129)).shape
        torch.Size([1, 21, 13, 17])
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        output_stride: int = 8,
        head: str = "largefov",
        head_dilation: int | None = None,
        dilation_rule: str = "timm",
        backbone_args: BackboneArgs | None = None,
        freeze_norm: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2, background included; got {num_classes}.")
        if head_dilation is not None and head_dilation < 1:
            raise ValueError(f"`head_dilation` must be at least 1; got {head_dilation}.")
        if head not in HEADS:
            raise ValueError(f"`head` must be one of {', '.join(HEADS)}; got {head!r}.")
        if dilation_rule not in DILATION_RULES:
            raise ValueError(f"`dilation_rule` must be one of {', '.join(DILATION_RULES)}; got {dilation_rule!r}.")
        self.backbone_name = backbone
        self.num_classes = num_classes
        self.output_stride = output_stride
        self.freeze_norm = freeze_norm
        self.backbone_args: BackboneArgs = backbone_args or {}
        self.backbone = create_backbone(backbone, output_stride, self.backbone_args)
        if dilation_rule == "caffe":
            dilate_as_caffe(self.backbone, backbone, output_stride, self.backbone_args)
        self.head_dilation = default_dilation(output_stride) if head_dilation is None else head_dilation
        channels = feature_info(self.backbone).channels()[-1]
        self.classifier = HEADS[head](channels, num_classes, self.head_dilation)
        self._statistics: dict[str, tuple[float, ...]] = {}
        cfg = timm.get_pretrained_cfg(backbone, allow_unregistered=True)
        for name, values, default in (("mean", mean, cfg and cfg.mean), ("std", std, cfg and cfg.std)):
            values = tuple(values or default or (0.5, 0.5, 0.5))
            if len(values) != 3:
                raise ValueError(f"`{name}` must have one number for each of R, G and B; got {values}.")
            self._statistics[name] = values
            self.register_buffer(f"_{name}", torch.tensor(values)[:, None, None], persistent=False)
        self.train()

    @property
    def mean(self) -> Tensor:
        """Mean of the RGB channels in 0 to 1 [3, 1, 1]."""
        return self._statistic("mean")

    @property
    def std(self) -> Tensor:
        """Standard deviation of the RGB channels in 0 to 1 [3, 1, 1]."""
        return self._statistic("std")

    def _statistic(self, name: str) -> Tensor:
        buffer: Any = self._buffers[f"_{name}"]
        device = next(self.classifier.parameters()).device
        # Made on meta and loaded with assign=True, only what is in the state dict is there.
        if buffer.is_meta and device.type != "meta":
            return torch.tensor(self._statistics[name], dtype=buffer.dtype, device=device)[:, None, None]
        return buffer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SegmentationModel:
        super()._apply(fn, recurse)
        for name, values in self._statistics.items():  # anew: to_empty() leaves memory as it comes
            buffer: Any = self._buffers[f"_{name}"]
            self._buffers[f"_{name}"] = torch.tensor(values, dtype=buffer.dtype, device=buffer.device)[:, None, None]
        return self

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalizes RGB images [B, 3, H, W] from 0..255 (uint8 or float) to what the backbone was trained on."""
        return (images.to(self.mean.dtype) / 255 - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Computes logits.

        Args:
            images: Normalized images [B, 3, H, W].

        Returns:
            Logits [B, num_classes, H / output_stride, W / output_stride], sizes rounded up.
        """
        return self.classifier(self.backbone(images)[-1])

    def upsample(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Bilinear logits at image size. Sizes of 8k + 1 have a logit on every 8th pixel, hence align corners."""
        aligned = all((extent - 1) % self.output_stride == 0 for extent in size)
        return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=aligned)

    def full_logits(self, images: Tensor, network: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Logits of photographs of any size at their own size.

        The network sees them with their right and bottom edge repeated up to ``output_stride * k + 1`` pixels, where a
        logit lies on every ``output_stride``-th pixel as in training.

        Args:
            images: What ``network`` takes, [B, 3, H, W].
            network: Computes logits at the output stride from images; None for this network.

        Returns:
            [B, num_classes, H, W], at least float32.
        """
        height, width = images.shape[-2:]
        missing = [-(extent - 1) % self.output_stride for extent in (height, width)]
        padded = F.pad(images, (0, missing[1], 0, missing[0]), mode="replicate")
        logits = (network or self)(padded)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return self.upsample(logits, padded.shape[-2:])[..., :height, :width]

    def train(self, mode: bool = True) -> SegmentationModel:
        super().train(mode)
        if self.freeze_norm:
            freeze_norm_layers(self)
        return self


class PixelsToLogits(nn.Module):
    """A segmentation network with its normalization in front: RGB images [B, 3, H, W] in 0..255 to logits.

    Args:
        model: The network.
    """

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.model.preprocess(images))


def shrink_labels(labels: Tensor, output_stride: int) -> Tensor:
    """Takes every 8th (16th) pixel of label maps [B, H, W], where the logits of an 8k + 1 sized image lie.

    Raises:
        ValueError: Height or width is not a multiple of the stride plus 1.
    """
    for extent in labels.shape[-2:]:
        if (extent - 1) % output_stride:
            low = (extent - 1) // output_stride * output_stride + 1
            raise ValueError(
                f"`loss_resolution`='logits' needs image sizes of {output_stride}k + 1; got {list(labels.shape[-2:])}. "
                f"Use {low} or {low + output_stride} for {extent}, or loss_resolution='image'."
            )
    return labels[..., ::output_stride, ::output_stride]

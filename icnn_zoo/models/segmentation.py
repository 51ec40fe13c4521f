"""Segmentation networks: a timm backbone at an output stride and a small head, or any other. Plain nn.Modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from icnn_zoo.models.backbones import (
    DILATION_RULES,
    BackboneArgs,
    create_backbone,
    create_pyramid,
    dilate_as_caffe,
    feature_info,
    with_channels,
)
from icnn_zoo.models.heads import HEADS, PYRAMID_HEADS, UNDILATED, default_dilation
from icnn_zoo.nn.class_paths import build, read_spec, without_memory
from icnn_zoo.nn.norms import freeze_norm as freeze_norm_layers


class SegmentationModel(nn.Module):
    """A timm backbone and a head on it, or any network of images to logits.

    With a backbone the parts are named ``backbone`` and ``classifier``, so that ``icnn_zoo.convert(model,
    start="classifier")`` converts the head and ``start="layer3.11"`` the backbone from there on and the head. Any other
    network is the part ``network``.

    Args:
        backbone: Any timm name that can be dilated ("resnet101", "tf_efficientnet_lite0"), or with the head "fpn" any
            that has stages; None where ``network`` takes its place.
        num_classes: Classes, background included.
        network: A network of another package or one's own, ``{"class_path": "package.Class", "init_args": {...}}``: an
            nn.Module from images [B, C, H, W] to logits [B, num_classes, h, w], or to a mapping with those as "out" and
            perhaps further logits, at which training alone looks. It gets the arguments ``classes`` or ``num_classes``
            and ``in_channels`` or ``in_chans``, if it has them, and is built without fetching weights. It sees images
            whose right and bottom edge is repeated up to a multiple of its ``size_multiple``, 32 if it does not say.
            What follows is about backbones, but for the last four.
        output_stride: Input pixels per logit: 8 (the paper's), 16, or 2 and 4 where the backbone can.
        head: Name of the head: "largefov" (DeepLab's, one 3x3 convolution with dilation 12), "aspp" (DeepLabV3's),
            "fcn" or "fpn" (a feature pyramid, for backbones that cannot be dilated).
        head_dilation: Dilation of the head; None for the paper's 12 at output stride 8, and 6 at 16, the same field of
            view. Feature maps smaller than the dilation leave only the head's center tap alive.
        dilation_rule: Dilation of the convolutions that lost their stride, the first 3x3 of each dilated stage. "timm"
            (torchvision likewise) gives them that of the stage before, "caffe" that of their own stage, as DeepLab's
            networks have it: 2 in layer3.0 and 4 in layer4.0 of a ResNet at output stride 8, not 1 and 2.
        backbone_args: Sizes and rates for timm's network, numbers or lists of them, such as
            ``{"channels": [32, 64, 128, 256]}`` for a ResNet of half the width; None for its own.
        freeze_norm: Freezes statistics and affine parameters of the backbone's (the network's) norm layers, in training
            mode too.
        in_channels: Channels of the images. The first convolution takes them, its weights adapted as timm does.
        mean: Mean of the channels in 0 to 1, None for what timm says of the backbone, and 0.5 but for three channels.
        std: Standard deviation likewise.

    Attributes:
        backbone: The timm network.
        classifier: The head.
        network: The other network; only where there is one.
        spec: ``network`` as given, None for a backbone.
        output_stride: As given; 1 for another network, whose logits are brought to the images' size.
        head_dilation: Dilation of the head, the default resolved; None where there is none.

    Raises:
        ValueError: No such backbone, one that timm cannot dilate to this output stride, or one for which Caffe's rule
            says nothing; a network that cannot be imported or built; the message names choices.

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
        backbone: str | None,
        num_classes: int,
        *,
        network: Mapping[str, Any] | None = None,
        output_stride: int = 8,
        head: str = "largefov",
        head_dilation: int | None = None,
        dilation_rule: str = "timm",
        backbone_args: BackboneArgs | None = None,
        freeze_norm: bool = False,
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2, background included; got {num_classes}.")
        if (backbone is None) == (network is None):
            raise ValueError(
                "`backbone` must name a timm network, or be None with a `network` in its place; got "
                f"{'neither' if network is None else f'{backbone!r} and a network'}."
            )
        if not 1 <= in_channels <= 1024:
            raise ValueError(f"`in_channels` must be 1 to 1024; got {in_channels}.")
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.freeze_norm = freeze_norm
        self.backbone_args: BackboneArgs = backbone_args or {}
        self.spec = None if network is None else dict(network)
        self.head_dilation: int | None = None
        statistics: tuple[Sequence[float], Sequence[float]] = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        if network is not None:
            self.network = with_channels(build("network", network, self._given()), in_channels)
            self.backbone_name = read_spec("network", network)[0]
            self.output_stride = 1
        else:
            assert backbone is not None
            self.backbone_name = backbone
            self.output_stride = output_stride
            self._make_parts(backbone, head, head_dilation, dilation_rule)
            cfg = timm.get_pretrained_cfg(backbone, allow_unregistered=True)
            half = (0.5, 0.5, 0.5)
            statistics = ((cfg and cfg.mean) or half, (cfg and cfg.std) or half)
        if in_channels != len(statistics[0]):
            statistics = (0.5,) * in_channels, (0.5,) * in_channels
        self._statistics: dict[str, tuple[float, ...]] = {}
        for name, values, default in (("mean", mean, statistics[0]), ("std", std, statistics[1])):
            values = tuple(values or default)
            if len(values) != in_channels:
                kind = "R, G and B" if in_channels == 3 else f"{in_channels} channels"
                raise ValueError(f"`{name}` must have one number for each of {kind}; got {values}.")
            self._statistics[name] = values
            self.register_buffer(f"_{name}", torch.tensor(values)[:, None, None], persistent=False)
        self.train()

    def _given(self, more_classes: int = 0) -> dict[str, Any]:
        """What a network of another package is told, where it asks for it."""
        classes = self.num_classes + more_classes
        return {
            "classes": classes,
            "num_classes": classes,
            "in_channels": self.in_channels,
            "in_chans": self.in_channels,
        }

    def _make_parts(self, backbone: str, head: str, head_dilation: int | None, dilation_rule: str) -> None:
        heads = (*HEADS, *PYRAMID_HEADS)
        if head not in heads:
            raise ValueError(f"`head` must be one of {', '.join(heads)}; got {head!r}.")
        if head_dilation is not None and (head_dilation < 1 or head in UNDILATED):
            rule = "be at least 1" if head_dilation < 1 else f"be None for the head {head}, which is not dilated"
            raise ValueError(f"`head_dilation` must {rule}; got {head_dilation}.")
        if dilation_rule not in DILATION_RULES:
            raise ValueError(f"`dilation_rule` must be one of {', '.join(DILATION_RULES)}; got {dilation_rule!r}.")
        name, stride, arguments = backbone, self.output_stride, self.backbone_args
        if head in PYRAMID_HEADS:
            self.backbone = create_pyramid(name, stride, arguments, in_channels=self.in_channels)
            self.classifier: nn.Module = PYRAMID_HEADS[head](feature_info(self.backbone).channels(), self.num_classes)
            return
        self.backbone = create_backbone(name, stride, arguments, in_channels=self.in_channels)
        if dilation_rule == "caffe":
            dilate_as_caffe(self.backbone, name, stride, arguments)
        dilation = default_dilation(stride) if head_dilation is None else head_dilation
        self.head_dilation = None if head in UNDILATED else dilation
        self.classifier = HEADS[head](feature_info(self.backbone).channels()[-1], self.num_classes, dilation)

    def head_names(self) -> tuple[str, ...]:
        """Names of the tensors that depend on the classes: the head's, or of another network the layers that do."""
        names = list(self.state_dict())
        if self.spec is None:
            return tuple(name for name in names if name.startswith("classifier."))
        sizes = []
        for more in (0, 1):
            given = self._given(more)
            made = without_memory(lambda given=given: build("network", self.spec, given), trusted=True)  # type: ignore[misc]
            sizes.append({name: tensor.shape for name, tensor in made.state_dict().items()})
        layers = {f"network.{name.rpartition('.')[0]}." for name, shape in sizes[0].items() if sizes[1][name] != shape}
        return tuple(name for name in names if name.startswith(tuple(layers)))

    def own_weights(self) -> dict[str, Tensor]:
        """The tensors that the network comes with: timm's default ones of a backbone, else those its arguments ask for.

        They are downloaded, if they were not before.
        """
        if self.spec is not None:
            made = build("network", self.spec, self._given(), weights=True)
            return {f"network.{name}": tensor for name, tensor in made.state_dict().items()}
        pyramid = isinstance(self.classifier, tuple(PYRAMID_HEADS.values()))
        make = create_pyramid if pyramid else create_backbone
        options: Any = {"pretrained": True, "in_channels": self.in_channels}
        state = make(self.backbone_name, self.output_stride, self.backbone_args, **options).state_dict()
        return {f"backbone.{name}": tensor for name, tensor in state.items()}

    @property
    def mean(self) -> Tensor:
        """Mean of the channels in 0 to 1 [C, 1, 1]."""
        return self._statistic("mean")

    @property
    def std(self) -> Tensor:
        """Standard deviation of the channels in 0 to 1 [C, 1, 1]."""
        return self._statistic("std")

    def _statistic(self, name: str) -> Tensor:
        buffer: Any = self._buffers[f"_{name}"]
        device = next(self.parameters()).device
        # Made on meta and loaded with assign=True, only what is in the state dict is there.
        if buffer.is_meta and device.type != "meta":
            return torch.tensor(self._statistics[name], dtype=buffer.dtype, device=device)[:, None, None]
        return buffer

    def set_statistic(self, name: str, values: Sequence[float]) -> None:
        """Sets the "mean" or "std" of the channels in 0 to 1."""
        self._statistics[name] = tuple(values)
        buffer: Any = self._buffers[f"_{name}"]
        self._buffers[f"_{name}"] = torch.tensor(values, dtype=buffer.dtype, device=buffer.device)[:, None, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SegmentationModel:
        super()._apply(fn, recurse)
        for name, values in self._statistics.items():  # anew: to_empty() leaves memory as it comes
            buffer: Any = self._buffers[f"_{name}"]
            self._buffers[f"_{name}"] = torch.tensor(values, dtype=buffer.dtype, device=buffer.device)[:, None, None]
        return self

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalizes images [B, C, H, W] from 0..255 (uint8 or float) to what the backbone was trained on."""
        return (images.to(self.mean.dtype) / 255 - self.mean) / self.std

    def forward(self, images: Tensor, further: bool = False) -> Tensor | dict[str, Tensor]:
        """Computes logits.

        Args:
            images: Normalized images [B, C, H, W].
            further: Whether to give the further outputs of another network too.

        Returns:
            Logits [B, num_classes, H / output_stride, W / output_stride], sizes rounded up; with ``further`` all
            outputs by name, those logits as "out".

        Raises:
            ValueError: Another network gives something else.
        """
        if self.spec is None:
            logits = self._head_logits(images)
            return {"out": logits} if further else logits
        outputs = self._outputs(images)
        if further:
            return {name: self._whole_logits(name, output, images) for name, output in outputs.items()}
        return self._whole_logits("out", outputs["out"], images)

    def _head_logits(self, images: Tensor) -> Tensor:
        if not isinstance(self.classifier, tuple(PYRAMID_HEADS.values())):
            return self.classifier(self.backbone(images)[-1])
        features = self.backbone(_pad(images, feature_info(self.backbone).reduction()[-1]))
        form = getattr(self.backbone, "output_fmt", None)
        if str(getattr(form, "value", form)) == "NHWC":
            features = [level.permute(0, 3, 1, 2) for level in features]
        height, width = ((extent - 1) // self.output_stride + 1 for extent in images.shape[-2:])
        return self.classifier(features)[..., :height, :width]

    def _outputs(self, images: Tensor) -> Mapping[str, Any]:
        """What the other network gives, by name."""
        output: Any = self.network(_pad(images, self._size_multiple))
        if not isinstance(output, Mapping):
            return {"out": output}
        if "out" not in output:
            raise ValueError(
                f"`network`: {self.backbone_name} must give logits, alone or as 'out'; got {sorted(output)}. "
                "Put a class around it whose forward gives them."
            )
        return output

    def _whole_logits(self, name: str, output: Any, images: Tensor) -> Tensor:
        """An output of the other network at the images' size."""
        if not isinstance(output, Tensor) or output.dim() != 4 or output.shape[1] != self.num_classes:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"`network`: {self.backbone_name} must give logits [B, {self.num_classes}, h, w]; got {got}"
                + ("." if name == "out" else f" as {name!r}. With aux_weight 0 training looks at 'out' alone.")
            )
        height, width = images.shape[-2:]
        size = [extent + -extent % self._size_multiple for extent in (height, width)]
        return F.interpolate(output, size, mode="bilinear", align_corners=False)[..., :height, :width]

    @property
    def _size_multiple(self) -> int:
        return int(getattr(self.network, "size_multiple", 32))

    def upsample(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Bilinear logits at image size: one lies on every ``output_stride``-th pixel, beyond the last it is repeated.

        Where a network has another number of them they are spread evenly.
        """
        stride = self.output_stride
        if stride == 1:
            return logits
        if list(logits.shape[-2:]) != [-(-extent // stride) for extent in size]:
            aligned = all((extent - 1) % stride == 0 for extent in size)
            return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=aligned)
        for axis, extent in zip((-2, -1), size, strict=True):
            if (extent - 1) % stride:
                logits = torch.cat([logits, logits.narrow(axis, logits.shape[axis] - 1, 1)], dim=axis)
        whole = [(number - 1) * stride + 1 for number in logits.shape[-2:]]
        logits = F.interpolate(logits, size=whole, mode="bilinear", align_corners=True)
        return logits[..., : size[0], : size[1]]

    def full_logits(self, images: Tensor, network: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Logits of photographs of any size at their own size.

        The network sees them with their right and bottom edge repeated up to ``output_stride * k + 1`` pixels, where a
        logit lies on every ``output_stride``-th pixel as in training.

        Args:
            images: What ``network`` takes, [B, C, H, W].
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
            freeze_norm_layers(self.backbone if self.spec is None else self.network)
        return self


class PixelsToLogits(nn.Module):
    """A segmentation network with its normalization in front: images [B, C, H, W] in 0..255 to logits.

    Args:
        model: The network.
    """

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.model.preprocess(images))


def _pad(images: Tensor, multiple: int) -> Tensor:
    """Repeats the right and bottom edge up to sides that are multiples."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")


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

"""Backbones from timm at an output stride, dilated by timm's rule or by Caffe's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import Conv2dSame
from torch import nn

OUTPUT_STRIDES = (2, 4, 8, 16)
DILATION_RULES = ("caffe", "timm")
BackboneArgs = Mapping[str, Any]
_NOT_NUMBERS = re.compile("pretrained|checkpoint|cache|features_only|output_stride|out_indices|num_classes|in_chans")


def check_backbone(name: str) -> None:
    """Checks that timm has a network of this name.

    Raises:
        ValueError: It has not; the message lists the nearest names.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        raise ValueError(f"`backbone`={name!r} is not a timm model; the nearest are {', '.join(near) or 'none'}.")


def check_backbone_args(arguments: BackboneArgs) -> None:
    """Checks that arguments of a timm network are sizes and rates: numbers, or lists of them.

    Raises:
        ValueError: One is something else, or decides what this package decides.
    """
    if not isinstance(arguments, Mapping):
        raise ValueError(f"`backbone_args` must be names and numbers; got a {type(arguments).__name__}.")
    for key, value in arguments.items():
        if _NOT_NUMBERS.search(key):
            raise ValueError(f"`backbone_args` may not have {key!r}, which other options decide.")
        items = value if isinstance(value, (list, tuple)) else [value]
        if len(items) > 64 or not all(isinstance(item, (int, float)) and abs(item) <= 4096 for item in items):
            raise ValueError(
                f"`backbone_args` must be numbers up to 4096, or lists of them; {key!r} is {str(value)[:80]}."
            )


def create_backbone(
    name: str, output_stride: int, arguments: BackboneArgs | None = None, *, pretrained: bool = False
) -> nn.Module:
    """A timm network that gives the last stage's features.

    Args:
        name: timm's name.
        output_stride: Input pixels per pixel of the features.
        arguments: Sizes and rates that the network's class takes, such as ``{"channels": [32, 64, 128, 256]}``.
        pretrained: Loads timm's weights.

    Raises:
        ValueError: There is no such network, timm cannot dilate it so, or it does not take the arguments.
    """
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"`output_stride` must be one of {OUTPUT_STRIDES}; got {output_stride}.")
    check_backbone(name)
    check_backbone_args(arguments or {})
    try:
        backbone = timm.create_model(
            name, pretrained, features_only=True, output_stride=output_stride, out_indices=(-1,), **(arguments or {})
        )
        reduction = feature_info(backbone).reduction()[-1]
    except (TypeError, AssertionError, RuntimeError) as error:
        if pretrained:  # the network itself was built before without an error, so the weights are at fault
            raise
        if arguments:
            create_backbone(name, output_stride)  # says so where the network cannot be dilated without them either
            raise ValueError(f"`backbone_args`: {name} does not take {dict(arguments)}: {error}") from error
        raise ValueError(_cannot_dilate(name, output_stride)) from error
    if reduction != output_stride:
        raise ValueError(_cannot_dilate(name, output_stride))
    return backbone


def dilate_as_caffe(backbone: nn.Module, name: str, output_stride: int, arguments: BackboneArgs | None = None) -> None:
    """Multiplies the dilation of every convolution that lost its stride by that stride, and its padding alike."""
    with torch.device("meta"):
        original = timm.create_model(name, features_only=True, out_indices=(-1,), **(arguments or {}))
    strided = {path: layer for path, layer in original.named_modules() if isinstance(layer, nn.Conv2d)}
    changes: dict[nn.Conv2d, int] = {}
    for path, layer in backbone.named_modules():
        before = strided.get(path)
        if not isinstance(layer, nn.Conv2d) or before is None or max(before.kernel_size) == 1:
            continue
        factor = before.stride[0] // layer.stride[0]
        if factor > 1:
            changes[layer] = factor
    total = feature_info(original).reduction()[-1] // output_stride
    wanted = {2**power for power in range(1, total.bit_length())}
    found = {layer.dilation[0] * factor for layer, factor in changes.items()}
    if found != wanted or not all(_has_center(layer) for layer in changes):
        raise ValueError(
            f"`dilation_rule`='caffe' is for backbones whose stages begin with a strided 3x3 convolution, such as "
            f"resnet or regnet; {name!r} at output stride {output_stride} is not one. Use dilation_rule='timm'."
        )
    for layer, factor in changes.items():
        layer.dilation = (layer.dilation[0] * factor, layer.dilation[1] * factor)
        if not isinstance(layer, Conv2dSame):  # which pads by its dilation in every forward
            layer.padding = tuple(int(pad) * factor for pad in layer.padding)


def _has_center(layer: nn.Conv2d) -> bool:
    """Whether a dilation can change without moving the output: odd kernel, padded by half of it with zeros."""
    if any(extent % 2 == 0 for extent in layer.kernel_size) or layer.padding_mode != "zeros":
        return False
    halves = tuple(dilation * (extent // 2) for dilation, extent in zip(layer.dilation, layer.kernel_size, strict=True))
    return isinstance(layer, Conv2dSame) or layer.padding == halves


def feature_info(backbone: nn.Module) -> Any:
    """Channels and reductions of the stages, as timm keeps them."""
    return backbone.feature_info


def _cannot_dilate(name: str, output_stride: int) -> str:
    return (
        f"`backbone`={name!r} cannot be dilated to output stride {output_stride} by timm; families that can: resnet, "
        "resnetv2, regnet, efficientnet, mobilenetv3, convnext, rexnet, nfnet, byobnet, cspnet, xception."
    )

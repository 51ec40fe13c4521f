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

from icnn_zoo.nn.modules import replace_modules

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
    name: str,
    output_stride: int,
    arguments: BackboneArgs | None = None,
    *,
    pretrained: bool = False,
    in_channels: int = 3,
) -> nn.Module:
    """A timm network that gives the last stage's features.

    Args:
        name: timm's name.
        output_stride: Input pixels per pixel of the features.
        arguments: Sizes and rates that the network's class takes, such as ``{"channels": [32, 64, 128, 256]}``.
        pretrained: Loads timm's weights.
        in_channels: Channels of the images; timm adapts the first convolution's weights.

    Raises:
        ValueError: There is no such network, timm cannot dilate it so, or it does not take the arguments.
    """
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"`output_stride` must be one of {OUTPUT_STRIDES}; got {output_stride}.")
    check_backbone(name)
    check_backbone_args(arguments or {})
    try:
        backbone = timm.create_model(
            name,
            pretrained,
            features_only=True,
            output_stride=output_stride,
            out_indices=(-1,),
            in_chans=in_channels,
            **(arguments or {}),
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
    return with_channels(backbone, in_channels)  # of a network that has no such argument


def create_pyramid(
    name: str,
    output_stride: int,
    arguments: BackboneArgs | None = None,
    *,
    pretrained: bool = False,
    in_channels: int = 3,
) -> nn.Module:
    """A timm network that is not dilated, giving its stages from ``output_stride`` on, the last of each size.

    Args:
        name: timm's name.
        output_stride: Input pixels per pixel of the finest stage.
        arguments: As in :func:`create_backbone`.
        pretrained: Loads timm's weights.
        in_channels: Channels of the images; timm adapts the first convolution's weights.

    Raises:
        ValueError: There is no such network, or it has no stages of several sizes, or none of this stride.
    """
    check_backbone(name)
    check_backbone_args(arguments or {})
    options = dict(arguments or {})
    try:
        with torch.device("meta"):
            try:  # transformers that are made for one size, and take others if told so
                timm.create_model(name, strict_img_size=False)
                options["strict_img_size"] = False
            except TypeError:
                pass
            reductions = feature_info(timm.create_model(name, features_only=True, **options)).reduction()
        stages = {reduction: index for index, reduction in enumerate(reductions) if reduction >= output_stride}
        if output_stride in stages and len(stages) > 1:
            places = tuple(stages[reduction] for reduction in sorted(stages))
            options["in_chans"] = in_channels
            return timm.create_model(name, pretrained, features_only=True, out_indices=places, **options)
    except (TypeError, AssertionError, RuntimeError, AttributeError) as error:
        raise ValueError(f"`backbone`={name!r} gives no features of several sizes with {options}: {error}") from error
    raise ValueError(
        f"`backbone`={name!r} has stages with {sorted(set(reductions))} input pixels per pixel; `output_stride` must "
        f"be one of them but the last for the head fpn; got {output_stride}."
    )


def with_channels(network: nn.Module, in_channels: int) -> nn.Module:
    """A network whose first convolution takes images of ``in_channels``: made anew where it takes those of three.

    Raises:
        ValueError: It has no such convolution.
    """
    name, first = next(((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    if first is None or first.in_channels == in_channels:
        return network
    if first.in_channels != 3 or first.groups != 1:
        raise ValueError(
            f"`in_channels` is {in_channels}, and the network's first convolution, {name}, takes {first.in_channels}."
        )
    new = nn.Conv2d(
        in_channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        first.dilation,  # type: ignore[arg-type]
        bias=first.bias is not None,
        padding_mode=first.padding_mode,
        device=first.weight.device,
    )
    return replace_modules(network, {first: new})


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
        "resnetv2, regnet, efficientnet, mobilenetv3, convnext, rexnet, nfnet, byobnet, cspnet, xception. The head fpn "
        "takes backbones as they are: head='fpn', output_stride=4."
    )

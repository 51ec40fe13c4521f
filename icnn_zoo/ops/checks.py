"""What `irregular_conv2d` refuses, in words that name the argument, the rule and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from icnn_zoo.ops.tap_reading import INTERPOLATIONS
from icnn_zoo.ops.wide_interpolation import NARROWEST

_LARGEST_SIZE = 2**24


def check_tensors(
    input: Tensor, weight: Tensor, positions: Tensor, bias: Tensor | None, groups: int, has_extent: bool
) -> None:
    """Checks shapes, groups, the dtype of positions and devices against each other.

    Raises:
        ValueError: A shape, the groups or a device does not fit.
        TypeError: Positions in another dtype than float32 or float64.
    """
    if input.dim() not in (3, 4):
        raise ValueError(f"`input` must have shape [B, C, H, W] or [C, H, W]; got {list(input.shape)}.")
    if weight.dim() != 4 and not (weight.dim() == 3 and has_extent):
        raise ValueError(
            "`weight` must have shape [N, C / groups, kh, kw], or [N, C / groups, T] for free taps, which need an "
            f"`extent`; got {list(weight.shape)}."
        )
    if min(weight.shape[2:]) < 1:
        kernel_size = " x ".join(map(str, weight.shape[2:]))
        raise ValueError(f"`weight` must have a kernel of at least 1 x 1, or one tap; got {kernel_size}.")
    channels, (num_outputs, group_channels, *kernel) = input.shape[-3], weight.shape
    if channels != group_channels * groups:
        raise ValueError(
            f"`input` must have weight.shape[1] * groups = {group_channels} * {groups} = {group_channels * groups} "
            f"channels; got {channels} (input {list(input.shape)}, weight {list(weight.shape)})."
        )
    if num_outputs % groups:
        raise ValueError(f"`weight` must have a multiple of groups = {groups} output channels; got {num_outputs}.")
    if positions.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"`positions` must be float32 or float64 (half precision moves a tap by up to 0.03 px at 8 px); got "
            f"{positions.dtype}. Keep them in float32: `positions.float()`."
        )
    taps = math.prod(kernel)
    allowed = {
        "the layer": (1, taps, 2),
        "each group": (groups, taps, 2),
        "each input channel": (channels, taps, 2),
        "each kernel": (num_outputs, group_channels, taps, 2),
    }
    if tuple(positions.shape) not in allowed.values():
        shapes = ", ".join(f"{[*shape]} for {owner}" for owner, shape in allowed.items())
        raise ValueError(
            f"`positions` must hold one shape for the layer, each group, each input channel or each kernel ({shapes}); "
            f"got {list(positions.shape)}."
        )
    if bias is not None and list(bias.shape) != [num_outputs]:
        raise ValueError(
            f"`bias` must have shape [{num_outputs}], one for each output channel; got {list(bias.shape)}."
        )
    devices = {tensor.device for tensor in (input, weight, positions, bias) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(
            f"`input`, `weight`, `positions` and `bias` must be on one device; got {sorted(map(str, devices))}."
        )


def check_interpolation(interpolation: str, spread: Tensor | None, positions: Tensor) -> None:
    """Checks that an interpolation is known, and that it gets a spread that fits where it has one.

    Raises:
        ValueError: It does not, or is on another device than positions.
        TypeError: A spread in another dtype than the positions.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"`interpolation` must be one of {', '.join(INTERPOLATIONS)}; got {interpolation!r}.")
    if (interpolation == "bilinear") != (spread is None):
        raise ValueError(
            "`spread` must be left out for bilinear interpolation, which has none."
            if spread is not None
            else f"`spread` must be given for {interpolation} interpolation, in pixels."
        )
    if spread is None:
        return
    if spread.dtype != positions.dtype:
        raise TypeError(f"`spread` must have the dtype of `positions`, {positions.dtype}; got {spread.dtype}.")
    if spread.device != positions.device:
        raise ValueError(f"`spread` must be on the device of `positions`, {positions.device}; got {spread.device}.")
    sizes = zip(reversed(spread.shape), reversed(positions.shape), strict=False)
    if spread.dim() > positions.dim() or any(own not in (1, other) for own, other in sizes):
        raise ValueError(
            f"`spread` must be a number, or broadcast to `positions` {list(positions.shape)}; got {list(spread.shape)}."
        )


def check_spread(spread: Tensor, interpolation: str, largest: float) -> None:
    """Checks the numbers of a spread.

    Raises:
        ValueError: One is not finite, less than the interpolation's least or more than ``largest``.
    """
    if spread.numel() == 0:
        return
    least, low, high = NARROWEST[interpolation], *map(float, spread.detach().aminmax())
    # Of a float32 that was rounded down.
    if not (least * (1 - 1e-6) <= low and high <= largest * (1 + 1e-6)):
        raise ValueError(
            f"`spread` must be {least} to {largest:g} pixels for {interpolation} interpolation (no more than the "
            f"map's longer side); got {low:g} to {high:g}."
        )


def check_output_size(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> None:
    """Checks that the kernel fits the padded input, and that float32 can tell its pixels apart.

    Raises:
        ValueError: It does not; ``padding`` is (top, bottom, left, right).
    """
    for axis, name in enumerate(("height", "width")):
        size = input.shape[2 + axis] + padding[2 * axis] + padding[2 * axis + 1]
        if size > _LARGEST_SIZE:
            raise ValueError(
                f"`input` must have at most {_LARGEST_SIZE} pixels a side with its padding (float32 positions cannot "
                f"tell pixels apart beyond); got padded {name} {size}. Split it into tiles."
            )
        reach = dilation[axis] * (kernel_size[axis] - 1) + 1
        if size < reach:
            raise ValueError(
                f"`input` must be at least as large as the kernel: padded {name} {size} is less than the kernel's "
                f"{reach} (kernel {kernel_size[axis]}, dilation {dilation[axis]}); add padding or a larger input."
            )


def check_finite(positions: Tensor) -> None:
    """Checks that every position is a number.

    Raises:
        ValueError: One is not; the message says where.
    """
    unknown = (~positions.detach().isfinite()).nonzero()
    if len(unknown):
        first = unknown[0].tolist()
        raise ValueError(
            f"`positions` must be finite; got {positions[tuple(first)].item()} at {first}, {len(unknown)} of "
            f"{positions.numel()} are not. A position learning rate that is too high does this."
        )


def check_dtypes(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Checks that the tensors share one floating dtype.

    Raises:
        TypeError: They do not.
    """
    supported = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if input.dtype not in supported:
        raise TypeError(f"`input` must be float16, bfloat16, float32 or float64; got {input.dtype}.")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"`{name}` must have the dtype of `input`, {input.dtype}; got {tensor.dtype}.")

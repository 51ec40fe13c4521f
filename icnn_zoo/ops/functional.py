"""The public function: argument checks, padding, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from icnn_zoo.ops import operators, reference

_LARGEST_SIZE = 2**24


def irregular_conv2d(
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolves with kernels whose taps sit at real-valued positions (Eq. 2 to 4 of the paper).

    With I' the bilinearly interpolated input, zero outside the padded input, s the stride and P the positions, this is

        out[b, o, r, c] = bias[o] + sum over ci, i of
                          weight[o, ci, i] * I'[b, ci, r * s + P[ci, i].row, c * s + P[ci, i].col]

    and on the regular grid (``IrregularConv2d.regular_grid``) it is ``torch.nn.functional.conv2d`` with the same
    arguments.

    Args:
        input: Images [B, C, H, W] or [C, H, W]; any strides.
        weight: Weights [N, C / groups, kh, kw] in the dtype of ``input``.
        positions: Absolute tap positions (row, col) in input pixels, origin at the kernel's centre tap
            ``((kh - 1) // 2, (kw - 1) // 2)``: [C, kh * kw, 2], one shape per input channel shared by all kernels, or
            [N, C / groups, kh * kw, 2], the full version with one shape per kernel. float32 or float64, whatever the
            dtype of ``input``; autocast leaves them alone.
        bias: Bias [N] or None.
        stride: Step between output pixels, an int or (rows, columns).
        padding: Zeros on each side, an int or (rows, columns), "valid" (none), or "same" (stride 1; the odd one goes to
            the bottom and right).
        dilation: Sets the origin and the output size as in ``conv2d``, an int or (rows, columns). Positions are
            absolute: they are not multiplied by it.
        groups: Number of groups, from 1 to C (depthwise).
        backend: "auto" takes the first that can run of "triton" (CUDA), "native" (CPU; a C kernel, compiled on first
            use where there is a compiler) and "torch" (standard PyTorch operators, any device). "reference" is plain
            float64 loops: the oracle for tests, only for tiny sizes.

    Returns:
        Output [B, N, Ho, Wo] ([N, Ho, Wo] for an unbatched input) of ``conv2d``'s size, in the dtype of ``input``
        (autocast's dtype under autocast).

    Raises:
        ValueError: A shape, size, padding or backend does not fit; the message names it.
        TypeError: ``positions`` is not float32 or float64, or dtypes of ``input``, ``weight`` and ``bias`` differ.
        RuntimeError: The ``backend`` asked for cannot run here; the message says why.

    Note:
        Gradients exist for ``input``, ``weight``, ``positions`` and ``bias``, of any order (from the second on by
        standard operators that hold all columns in memory). Bilinear interpolation has kinks at integer positions,
        where the derivative of the cell to the right/below is taken. A NaN or infinite position gives NaN outputs, and
        a ValueError while ``torch.autograd.set_detect_anomaly`` is on. Two runs agree bit for bit. On a CPU the cost
        does not depend on how far positions moved, but for the torch backend's depthwise layers and full version, which
        are drawn as dense kernels while these are small (time grows with the box around all taps, up to that of
        gathered columns). The full version takes up to four multiply-adds a tap where a convolution takes one, and
        holds no columns.

    Example:
        >>> import torch, icnn_zoo
        >>> image, weight = torch.randn(1, 8, 21, 33), torch.randn(16, 8, 3, 3)
        >>> grid = torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2))
        >>> positions = grid.repeat(8, 1, 1)
        >>> output = icnn_zoo.irregular_conv2d(image, weight, positions, padding=1)
        >>> torch.allclose(output, torch.nn.functional.conv2d(image, weight, padding=1), atol=1e-5)
        True

    References:
        Ma, Wang, Wang: Irregular Convolutional Neural Networks, 2017, section 3.
    """
    known = ("auto", *operators.names(), "reference")
    if backend not in known:
        raise ValueError(f"`backend` must be one of {', '.join(known)}; got {backend!r}.")
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    _check_tensors(input, weight, positions, bias, groups)
    top_bottom_left_right = resolve_padding(padding, tuple(weight.shape[-2:]), stride, dilation)
    if input.dim() == 3:
        batch = irregular_conv2d(
            input[None], weight, positions, bias, stride, padding, dilation, groups, backend=backend
        )
        return batch[0]
    _check_output_size(input, weight, stride, top_bottom_left_right, dilation)
    input, weight, bias = _autocast(input, weight, bias)
    _check_dtypes(input, weight, bias)
    if not torch.compiler.is_compiling() and torch.is_anomaly_enabled():
        _check_finite(positions)
    # A tap with one coordinate that is no number is nowhere: make both NaN, so that every gradient through it is NaN
    # too.
    positions = positions + (positions.detach() * 0).sum(-1, keepdim=True)
    sizes = (stride, top_bottom_left_right, dilation, groups)
    if backend == "reference":
        return reference.irregular_conv2d(input, weight, positions, bias, *sizes)
    output: Tensor = operators.IrregularConv2dFunction.apply(input, weight, positions, bias, sizes, backend)
    return output


def pair(name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    """Reads an int or a pair of ints, rows first.

    Raises:
        TypeError: Neither an int nor a sequence.
        ValueError: Not one or two ints, or less than ``minimum``.
    """
    try:
        values = (value, value) if isinstance(value, int) else tuple(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an int or a pair (rows, columns) of ints; got {value!r}.") from None
    if len(values) != 2 or not all(isinstance(item, int) and item >= minimum for item in values):
        raise ValueError(f"`{name}` must be an int or a pair (rows, columns) of at least {minimum}; got {value!r}.")
    return values


def resolve_padding(
    padding: int | Sequence[int] | str,
    kernel_size: tuple[int, ...],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int, int, int]:
    """Zeros (top, bottom, left, right) that ``padding`` means, as ``nn.Conv2d`` does.

    Raises:
        ValueError: An unknown string, a negative number, or "same" with a stride.
    """
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f'`padding` must be an int, a pair, "same" or "valid"; got {padding!r}.')
        if padding == "valid":
            return 0, 0, 0, 0
        if stride != (1, 1):
            raise ValueError(f'`padding`="same" needs stride 1, as in nn.Conv2d; got stride {stride}.')
        rows, cols = (step * (size - 1) for step, size in zip(dilation, kernel_size, strict=True))
        return rows // 2, rows - rows // 2, cols // 2, cols - cols // 2
    rows, cols = pair("padding", padding, 0)
    return rows, rows, cols, cols


def _check_tensors(input: Tensor, weight: Tensor, positions: Tensor, bias: Tensor | None, groups: int) -> None:
    if input.dim() not in (3, 4):
        raise ValueError(f"`input` must have shape [B, C, H, W] or [C, H, W]; got {list(input.shape)}.")
    if weight.dim() != 4:
        raise ValueError(f"`weight` must have shape [N, C / groups, kh, kw]; got {list(weight.shape)}.")
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"`groups` must be an int of at least 1; got {groups!r}.")
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
    taps = kernel[0] * kernel[1]
    shared, per_kernel = (channels, taps, 2), (num_outputs, group_channels, taps, 2)
    if tuple(positions.shape) != (per_kernel if positions.dim() == 4 else shared):
        raise ValueError(
            f"`positions` must have shape {[*shared]} (C, kh * kw, 2) or {[*per_kernel]} (N, C / groups, kh * kw, 2) "
            f"for the full version; got {list(positions.shape)}."
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


def _check_output_size(
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> None:
    for axis, name in enumerate(("height", "width")):
        size = input.shape[2 + axis] + padding[2 * axis] + padding[2 * axis + 1]
        if size > _LARGEST_SIZE:
            raise ValueError(
                f"`input` must have at most {_LARGEST_SIZE} pixels a side with its padding (float32 positions cannot "
                f"tell pixels apart beyond); got padded {name} {size}. Split it into tiles."
            )
        reach = dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        if size < reach:
            raise ValueError(
                f"`input` must be at least as large as the kernel: padded {name} {size} is less than the kernel's "
                f"{reach} (kernel {weight.shape[2 + axis]}, dilation {dilation[axis]}); add padding or a larger input."
            )


def _check_finite(positions: Tensor) -> None:
    unknown = (~positions.detach().isfinite()).nonzero()
    if len(unknown):
        first = unknown[0].tolist()
        raise ValueError(
            f"`positions` must be finite; got {positions[tuple(first)].item()} at {first}, {len(unknown)} of "
            f"{positions.numel()} are not. A position learning rate that is too high does this."
        )


def _autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts as autocast casts ``conv2d``: everything to its dtype, but never the positions."""
    kind = input.device.type
    if not torch.is_autocast_enabled(kind) or input.dtype == torch.float64:
        return input, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_dtypes(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    supported = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if input.dtype not in supported:
        raise TypeError(f"`input` must be float16, bfloat16, float32 or float64; got {input.dtype}.")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(f"`{name}` must have the dtype of `input`, {input.dtype}; got {tensor.dtype}.")


def pad_with_mode(input: Tensor, padding: tuple[int, int, int, int], mode: str) -> Tensor:
    """Pads by (top, bottom, left, right) with one of ``nn.Conv2d``'s modes other than "zeros"."""
    top, bottom, left, right = padding
    return F.pad(input, (left, right, top, bottom), mode=mode)

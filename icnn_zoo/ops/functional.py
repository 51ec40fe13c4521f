"""The public function: argument checks, padding, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from icnn_zoo.ops import backends, checks, formula, operators, reference
from icnn_zoo.ops.geometry import Geometry, at_least_one, pair, resolve_padding
from icnn_zoo.ops.sharing import expand_shapes


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
    interpolation: str = "bilinear",
    spread: Tensor | float | None = None,
    extent: int | Sequence[int] | None = None,
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
        weight: Weights [N, C / groups, kh, kw] in the dtype of ``input``, or [N, C / groups, T] of free taps, so many
            of them anywhere; padding and output size are then those of a kernel of the size ``extent``.
        positions: Absolute tap positions (row, col) in input pixels, origin at the kernel's center tap
            ``((kh - 1) // 2, (kw - 1) // 2)``: [C, kh * kw, 2], one shape per input channel shared by all kernels;
            [1, kh * kw, 2], one of the layer; [groups, kh * kw, 2], one per group; or [N, C / groups, kh * kw, 2], the
            full version with one shape per kernel. float32 or float64, whatever the dtype of ``input``; autocast leaves
            them alone.
        bias: Bias [N] or None.
        stride: Step between output pixels, an int or (rows, columns).
        padding: Zeros on each side, an int or (rows, columns), "valid" (none), or "same" (stride 1; the odd one goes to
            the bottom and right).
        dilation: Sets the origin and the output size as in ``conv2d``, an int or (rows, columns). Positions are
            absolute: they are not multiplied by it.
        groups: Number of groups, from 1 to C (depthwise).
        interpolation: "bilinear" reads the four pixels around a position, "triangle" and "gaussian" all within the
            reach of a spread; weights of what is read sum to one. See :mod:`icnn_zoo.ops.wide_interpolation`.
        spread: Of a triangle (half of its base, at least 1; at 1 it is bilinear) or a gaussian (its standard deviation,
            at least 0.2), in pixels: a number, or a tensor that broadcasts to ``positions``, in their dtype; its last
            dimension, if not 1, is (rows, columns). At most the map's longer side.
        extent: Rows and columns of pixels around the center, an int or a pair: the kernel size of free taps. A triangle
            or gaussian reads nothing outside of it, as in DCLS (``dilated_kernel_size``); None for no such limit.
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
        Gradients exist for ``input``, ``weight``, ``positions``, ``spread`` and ``bias``, of any order and in both
        modes (from the second on, and in forward mode, by standard operators that hold all columns in memory).
        ``torch.func.vmap``
        makes one call of a batch of images or of an ensemble. ``torch.utils.flop_counter`` counts what conv2d counts
        and four multiply-adds for each interpolated value. Bilinear interpolation has kinks at integer positions,
        where the derivative of the cell to the right/below is taken. A NaN or infinite position gives NaN outputs, and
        a ValueError while ``torch.autograd.set_detect_anomaly`` is on. Two runs agree bit for bit; on CUDA those of
        triangles and gaussians, which take "torch" there, where cuDNN's convolutions do
        (``torch.use_deterministic_algorithms``). On CUDA products of
        float32 are rounded to TF32 where cuDNN's convolutions are (``torch.backends.cudnn.conv.fp32_precision``),
        PyTorch's default. On a CPU the cost does not depend on how far positions moved, but for the torch backend's
        depthwise layers and full version, which are drawn as dense kernels while these are small (time grows with the
        box around all taps, up to that of gathered columns). The full version takes up to four multiply-adds a tap
        where a convolution takes one, and holds no columns.

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
    known = ("auto", *backends.names(), "reference")
    if backend not in known:
        raise ValueError(f"`backend` must be one of {', '.join(known)}; got {backend!r}.")
    groups = at_least_one("groups", groups)
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    checks.check_tensors(input, weight, positions, bias, groups, has_extent=extent is not None)
    if isinstance(spread, (int, float)):
        spread = positions.new_tensor(float(spread))
    checks.check_interpolation(interpolation, spread, positions)
    box = () if extent is None else pair("extent", extent, 1)
    kernel_size = box if weight.dim() == 3 else tuple(weight.shape[-2:])
    top_bottom_left_right = resolve_padding(padding, kernel_size, stride, dilation)
    if input.dim() == 3:
        options: dict[str, Any] = {
            "interpolation": interpolation,
            "spread": spread,
            "extent": extent,
            "backend": backend,
        }
        return irregular_conv2d(input[None], weight, positions, bias, stride, padding, dilation, groups, **options)[0]
    checks.check_output_size(input, kernel_size, stride, top_bottom_left_right, dilation)
    if weight.dim() == 3:
        weight = weight[:, :, None]
        top_bottom_left_right = _pad_line(top_bottom_left_right, kernel_size, dilation, weight.shape[-1])
        dilation = (1, 1)
    input, weight, bias = _autocast(input, weight, bias)
    checks.check_dtypes(input, weight, bias)
    taps = positions if spread is None else torch.cat([positions, spread.expand_as(positions)], dim=-1)
    sizes = (stride, top_bottom_left_right, dilation, groups)
    taps = expand_shapes(taps, input.shape[1])
    how = (backend, interpolation, box)
    if backend == "reference":
        if torch.is_anomaly_enabled():
            checks.check_finite(positions)
        return reference.irregular_conv2d(input, weight, taps, bias, *sizes, interpolation, box)
    if backend == "auto" and stride != (1, 1) and not torch.compiler.is_compiling():
        geometry = Geometry.of(input.shape[-2:], weight.shape[-2:], *sizes)
        if geometry.is_mostly_padding() and input.numel() > 0 and weight.numel() > 0:
            return formula.irregular_conv2d(input, weight, taps, bias, *sizes, *how)
    return operators.differentiable(input, weight, taps, bias, sizes, how)


def _pad_line(
    padding: tuple[int, int, int, int], kernel_size: Sequence[int], dilation: tuple[int, int], taps: int
) -> tuple[int, int, int, int]:
    """The padding with which a kernel of 1 x ``taps`` has the origin and the output size of ``kernel_size``."""
    line_up = []
    for axis, size in enumerate((1, taps)):
        before, after = ((kernel_size[axis] - 1) // 2, kernel_size[axis] // 2)
        line_up.append(padding[2 * axis] - dilation[axis] * before + (size - 1) // 2)
        line_up.append(padding[2 * axis + 1] - dilation[axis] * after + size // 2)
    return line_up[0], line_up[1], line_up[2], line_up[3]


def _autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts as autocast casts ``conv2d``: everything to its dtype, but never the positions."""
    kind = input.device.type
    # Some kinds (meta) know no autocast and raise when asked. Older compilers cannot trace that question.
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(kind):
        return input, weight, bias
    if not torch.is_autocast_enabled(kind) or input.dtype == torch.float64:
        return input, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)

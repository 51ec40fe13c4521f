"""The irregular convolution written out: Eq. 2-4 and their exact derivatives as plain loops in float64.

This is the oracle. Every other backend must agree with it, so it is written to be checked by eye against the
equations: no vectorised step, no automatic differentiation, nothing clever. It is also very slow.

With ``K = [W, P]`` a kernel of weights and positions, ``s`` the stride and ``I'`` the interpolated input,

    out[b, o, r, c] = bias[o] + sum over ci, i of  W[o, ci, i] * I'[b, ci, row, col]
    row = r * s - pad_top + dilation * ((k - 1) // 2) + P[ci, i].row        (col alike)
    I'[b, ci, row, col] = sum over pixels q of  g(row, q.row) * g(col, q.col) * I[b, ci, q]
    g(a, q) = max(0, 1 - |a - q|)

Pixels outside the input are zero. The derivatives follow by the chain rule: towards the bias 1, towards a
weight the sample ``I'``, towards a pixel ``W * g * g``, towards a position ``W`` times the slope of ``I'``.

Where the exact derivative differs from Eq. 6 as it is printed in the paper:

- The printed sums run over ``0 < r_or`` and so drop the first row and the first column of the output. Here
  every output pixel counts.
- At an integer the hat ``g`` has a kink. The printed slope there gives both neighbors the same sign. Here
  the position belongs to the cell to its right (below), the one that ``floor`` names, and the slope is that
  inside this cell: -1 for the pixel itself, +1 for the next one.

A position that is NaN or infinite is nowhere in particular: every output that such a tap takes part in is
NaN, and so are the derivatives through it, towards every pixel of the plane that it would read. A finite
position far outside the input reads zero and has zero derivatives.

References:
    Ma, Wang and Wang, "Irregular Convolutional Neural Networks", 2017, https://arxiv.org/abs/1706.07966
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from icnn_zoo.ops import literal_weights

__all__ = ["irregular_conv2d", "irregular_conv2d_backward", "irregular_conv2d_forward"]

Plane: TypeAlias = list[list[float]]  # [row][col]
Pair: TypeAlias = tuple[int, int]  # (vertical, horizontal)
Padding: TypeAlias = tuple[int, int, int, int]  # (top, bottom, left, right)


class _Corner(NamedTuple):
    """A pixel that a sample reads: its share in the value and in the slopes."""

    row: int
    col: int
    share: float
    slopes: tuple[float, ...]
    """By row and column, and by the spreads of both where there are any."""


class _Tap(NamedTuple):
    """One tap of one kernel, placed at one output pixel."""

    in_kernel: int  # input channel, counted within the group: weight[o, in_kernel]
    channel: int  # the same, counted over all groups: input[b, channel]
    number: int  # place in the kernel, row by row: weight.flatten(2)[o, in_kernel, number]
    corners: list[_Corner]


def irregular_conv2d_forward(
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    kind: str = "bilinear",
    extent: Sequence[int] = (),
) -> Tensor:
    """Evaluate Eq. 2-4.

    Args:
        input: [batch, in_channels, height, width].
        weight: [out_channels, in_channels / groups, kernel_height, kernel_width].
        positions: Absolute (row, col) of each tap in input pixels, origin at the center tap:
            [in_channels, taps, 2], or one shape per kernel: [out_channels, in_channels / groups, taps, 2]. The
            spreads (row, col) of a triangle or gaussian follow them: [..., taps, 4].
        bias: [out_channels], or None for zero.
        stride: Vertical and horizontal.
        padding: Zeros around the input: top, bottom, left, right.
        dilation: Vertical and horizontal. Sets the origin and the output size only: positions are absolute.
        groups: Number of groups of channels.
        kind: The interpolation.
        extent: Rows and columns of pixels outside of which a triangle or gaussian reads nothing, or ().

    Returns:
        [batch, out_channels, out_height, out_width], float64, on the CPU.
    """
    geometry = _Geometry(input, weight, positions, stride, padding, dilation, groups, kind, extent)
    pixels, weights = _numbers(input), _numbers(weight.flatten(2))
    biases = [0.0] * geometry.out_channels if bias is None else _numbers(bias)
    output = _zeros(geometry.output_shape)
    for b, o, r, c in geometry.output_pixels():
        total = biases[o]
        for tap in geometry.taps(o, r, c):
            total += weights[o][tap.in_kernel][tap.number] * _sample(pixels[b][tap.channel], tap.corners)
        output[b][o][r][c] = total
    return _tensor(output, geometry.output_shape)


def irregular_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    kind: str = "bilinear",
    extent: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Carry a gradient back through `irregular_conv2d_forward`: the exact derivatives of Eq. 2-4.

    Args:
        grad_output: Gradient towards the output, of the output's shape.
        input: As in the forward; so are all the arguments that follow.
        weight: See `input`.
        positions: See `input`.
        bias: See `input`. Its values do not matter here.
        stride: See `input`.
        padding: See `input`.
        dilation: See `input`.
        groups: See `input`.
        kind: See `input`.
        extent: See `input`.

    Returns:
        The gradients towards input, weight, positions and bias (None without a bias), each of the shape of
        its argument, float64, on the CPU.
    """
    geometry = _Geometry(input, weight, positions, stride, padding, dilation, groups, kind, extent)
    pixels, weights, grads = _numbers(input), _numbers(weight.flatten(2)), _numbers(grad_output)
    full_shape = (*weight.flatten(2).shape, positions.shape[-1])
    grad_input = _zeros(input.shape)
    grad_weight = _zeros(full_shape[:-1])
    grad_positions = _zeros(full_shape)
    grad_bias = _zeros(weight.shape[:1])
    for b, o, r, c in geometry.output_pixels():
        grad = grads[b][o][r][c]
        grad_bias[o] += grad
        for tap in geometry.taps(o, r, c):
            plane, grad_plane = pixels[b][tap.channel], grad_input[b][tap.channel]
            grad_weight[o][tap.in_kernel][tap.number] += grad * _sample(plane, tap.corners)
            grad_sample = grad * weights[o][tap.in_kernel][tap.number]
            grad_position = grad_positions[o][tap.in_kernel][tap.number]
            for corner in tap.corners:
                pixel = plane[corner.row][corner.col]
                grad_plane[corner.row][corner.col] += grad_sample * corner.share
                for number, slope in enumerate(corner.slopes):
                    grad_position[number] += grad_sample * slope * pixel
    full_grad_positions = _tensor(grad_positions, full_shape)
    return (
        _tensor(grad_input, input.shape),
        _tensor(grad_weight, weight.shape),
        _sum_over_kernels(full_grad_positions, positions, groups),
        None if bias is None else _tensor(grad_bias, weight.shape[:1]),
    )


class _Geometry:
    """Which pixels each output pixel reads. Everything of Eq. 2-4 but the values."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        positions: Tensor,
        stride: Pair,
        padding: Padding,
        dilation: Pair,
        groups: int,
        kind: str,
        extent: Sequence[int],
    ) -> None:
        self.kind, self.extent = kind, extent
        batch, self.in_channels, self.height, self.width = input.shape
        self.out_channels, self.channels_per_kernel, kernel_height, kernel_width = weight.shape
        self.kernels_per_group = self.out_channels // groups
        self.stride = stride
        top, bottom, left, right = padding
        out_height = (self.height + top + bottom - dilation[0] * (kernel_height - 1) - 1) // stride[0] + 1
        out_width = (self.width + left + right - dilation[1] * (kernel_width - 1) - 1) // stride[1] + 1
        self.output_shape = (batch, self.out_channels, out_height, out_width)
        # Where the kernel's center, the origin of the positions, lies for the first output pixel.
        self.origin = (
            dilation[0] * ((kernel_height - 1) // 2) - top,
            dilation[1] * ((kernel_width - 1) // 2) - left,
        )
        self.positions = _numbers(_one_shape_per_kernel(positions, weight, groups))

    def output_pixels(self) -> Iterator[tuple[int, int, int, int]]:
        """Walk over (batch, out channel, row, col) of the output."""
        batch, out_channels, out_height, out_width = self.output_shape
        for b in range(batch):
            for o in range(out_channels):
                for r in range(out_height):
                    for c in range(out_width):
                        yield b, o, r, c

    def taps(self, o: int, r: int, c: int) -> Iterator[_Tap]:
        """Walk over the taps of kernel `o` placed at output pixel (`r`, `c`)."""
        group = o // self.kernels_per_group
        row = r * self.stride[0] + self.origin[0]
        col = c * self.stride[1] + self.origin[1]
        for in_kernel in range(self.channels_per_kernel):
            channel = group * self.channels_per_kernel + in_kernel
            for number, tap in enumerate(self.positions[o][in_kernel]):
                yield _Tap(in_kernel, channel, number, self._corners(row, col, tap))

    def _corners(self, row: int, col: int, tap: list[float]) -> list[_Corner]:
        """List the pixels with a share in the sample of a tap [row, col, and perhaps spreads] at (row, col)."""
        if not all(map(math.isfinite, tap)):
            every_pixel = ((q_row, q_col) for q_row in range(self.height) for q_col in range(self.width))
            return [_Corner(q_row, q_col, math.nan, (math.nan,) * len(tap)) for q_row, q_col in every_pixel]
        return [
            _Corner(
                q_row,
                q_col,
                g_row * g_col,
                tuple(
                    slope
                    for by_row, by_col in zip(row_slopes, col_slopes, strict=True)
                    for slope in (by_row * g_col, g_row * by_col)
                ),
            )
            for q_row, g_row, row_slopes in self._neighbors(row, tap, 0)
            for q_col, g_col, col_slopes in self._neighbors(col, tap, 1)
        ]

    def _neighbors(self, origin: int, tap: list[float], axis: int) -> list[tuple[int, float, tuple[float, ...]]]:
        """List the pixels of the input along an axis that a tap reads, with their weight and its slopes."""
        if self.kind == "bilinear":
            read = literal_weights.bilinear(tap[axis])
        else:
            read = literal_weights.wide(self.kind, tap[axis], tap[2 + axis], self.extent[axis] if self.extent else None)
        size = (self.height, self.width)[axis]
        return [(origin + k, weight, slopes) for k, weight, slopes in read if 0 <= origin + k < size]


def _sample(plane: Plane, corners: list[_Corner]) -> float:
    """Interpolate: I' of Eq. 3-4."""
    value = 0.0
    for corner in corners:
        value += corner.share * plane[corner.row][corner.col]
    return value


def _one_shape_per_kernel(positions: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Write a shared shape out for each kernel: [out_channels, in_channels / groups, taps, 2]."""
    if positions.dim() == 4:
        return positions
    kernels_per_group = weight.shape[0] // groups
    of_groups = positions.reshape(groups, weight.shape[1], *positions.shape[1:])
    return of_groups.repeat_interleave(kernels_per_group, dim=0)


def _sum_over_kernels(full_grad: Tensor, positions: Tensor, groups: int) -> Tensor:
    """Undo `_one_shape_per_kernel`: a shared shape gathers the gradients of all its kernels."""
    if positions.dim() == 4:
        return full_grad
    of_groups = full_grad.reshape(groups, full_grad.shape[0] // groups, *full_grad.shape[1:])
    return of_groups.sum(dim=1).reshape(positions.shape)


def _zeros(shape: tuple[int, ...]) -> list[Any]:
    """Make nested lists of zeros."""
    return [_zeros(shape[1:]) if len(shape) > 1 else 0.0 for _ in range(shape[0])]


def _numbers(tensor: Tensor) -> list[Any]:
    """Turn a tensor into nested lists of float64 numbers."""
    numbers: list[Any] = tensor.detach().cpu().double().tolist()  # there are devices without float64
    return numbers


def _tensor(numbers: list[Any], shape: tuple[int, ...]) -> Tensor:
    """Turn nested lists back into a tensor; the shape matters where a size is zero."""
    return torch.tensor(numbers, dtype=torch.float64).reshape(shape)


def _like(result: Tensor, tensor: Tensor) -> Tensor:
    """Give a result the dtype and the device of a tensor: the dtype first, as there are devices without float64."""
    return result.to(tensor.dtype).to(tensor.device)


class _IrregularConv2d(torch.autograd.Function):
    """Joins the two halves for autograd."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        positions: Tensor,
        bias: Tensor | None,
        stride: Pair,
        padding: Padding,
        dilation: Pair,
        groups: int,
        kind: str,
        extent: Sequence[int],
    ) -> Tensor:
        output = irregular_conv2d_forward(
            input, weight, positions, bias, stride, padding, dilation, groups, kind, extent
        )
        return _like(output, input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.geometry = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads: tuple[Tensor | None, ...] = _Gradients.apply(grad_output, *ctx.saved_tensors, *ctx.geometry)
        return (*grads, None, None, None, None, None, None)


class _Gradients(torch.autograd.Function):
    """The backward as a node of its own, so that whoever differentiates it meets an error.

    `once_differentiable` would not do: asked for with `allow_unused`, a second derivative is zero to it.
    """

    @staticmethod
    def forward(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        positions: Tensor,
        bias: Tensor | None,
        stride: Pair,
        padding: Padding,
        dilation: Pair,
        groups: int,
        kind: str,
        extent: Sequence[int],
    ) -> tuple[Tensor | None, ...]:
        arguments = (input, weight, positions, bias)
        grads = irregular_conv2d_backward(grad_output, *arguments, stride, padding, dilation, groups, kind, extent)
        pairs = zip(grads, arguments, strict=True)
        return tuple(None if grad is None or like is None else _like(grad, like) for grad, like in pairs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Keep nothing: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            '`irregular_conv2d` with backend "reference" can be differentiated only once; '
            "this asked for a second derivative."
        )


def irregular_conv2d(
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    kind: str = "bilinear",
    extent: Sequence[int] = (),
) -> Tensor:
    """Evaluate Eq. 2-4 with gradients attached: the backend named "reference".

    Args:
        input: See `irregular_conv2d_forward`, and so for all the arguments that follow.
        weight: See `input`.
        positions: See `input`.
        bias: See `input`.
        stride: See `input`.
        padding: See `input`.
        dilation: See `input`.
        groups: See `input`.
        kind: See `input`.
        extent: See `input`.

    Returns:
        As `irregular_conv2d_forward`, computed in float64 and given as `input` is: in its dtype, on its device. It can
        be differentiated once; a second derivative raises RuntimeError.
    """
    arguments = (input, weight, positions, bias, stride, padding, dilation, groups, kind, extent)
    output: Tensor = _IrregularConv2d.apply(*arguments)
    return output

"""Sizes of one call and the layout of what it returns: what every backend is told."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from icnn_zoo.ops.tap_reading import BILINEAR, Reading


@dataclass(frozen=True)
class Geometry:
    """Sizes of one call.

    Output pixel (r, c) reads tap position p at row ``r * stride[0] + origin[0] + p.row`` of the unpadded input, columns
    alike; outside the input the value is zero.
    """

    input_size: tuple[int, int]
    output_size: tuple[int, int]
    stride: tuple[int, int]
    origin: tuple[int, int]
    groups: int
    reading: Reading = BILINEAR

    @staticmethod
    def of(
        input_size: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        interpolation: str = "bilinear",
        extent: Sequence[int] | None = None,
    ) -> Geometry:
        """Derives the geometry of a convolution; ``padding`` is (top, bottom, left, right)."""
        top, bottom, left, right = padding
        return Geometry(
            input_size=(input_size[0], input_size[1]),
            output_size=(
                (input_size[0] + top + bottom - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1,
                (input_size[1] + left + right - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1,
            ),
            stride=(stride[0], stride[1]),
            origin=(dilation[0] * ((kernel_size[0] - 1) // 2) - top, dilation[1] * ((kernel_size[1] - 1) // 2) - left),
            groups=groups,
            reading=Reading(interpolation, (extent[0], extent[1]) if extent else None),
        )

    def canonical(self) -> Geometry:
        """The same convolution with stride 1 along an axis of one output, where any stride is the same."""
        rows, cols = (1 if size == 1 else step for size, step in zip(self.output_size, self.stride, strict=True))
        return self if (rows, cols) == self.stride else replace(self, stride=(rows, cols))

    @property
    def largest_spread(self) -> int:
        """The most that a spread may be, in pixels: the longer side of the map that positions move over."""
        outputs = (size * step for size, step in zip(self.output_size, self.stride, strict=True))
        largest: Any = 0
        for size in (*self.input_size, *outputs):
            largest = torch.sym_max(largest, size)  # not max(), which makes numbers of sizes that an export keeps open
        return largest

    def is_mostly_padding(self) -> bool:
        """Whether the padded image, of which backends copy planes, is far larger than input and output together.

        This takes padding and a stride that no network has; memory must not grow with them.
        """
        geometry = self.canonical()
        padded = math.prod((size - 1) * step + 1 for size, step in zip(self.output_size, geometry.stride, strict=True))
        return padded > 2**16 + 16 * (math.prod(self.input_size) + math.prod(self.output_size))


def memory_format(input: Tensor) -> torch.memory_format:
    """The layout of an output and of the input's gradient: channels_last as the input, else contiguous."""
    if not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def pair(name: str, value: Any, minimum: int) -> tuple[int, int]:
    """Reads an int or a pair of ints, rows first.

    Integers of other libraries, NumPy's for one, are ints too.

    Raises:
        TypeError: Neither an int nor a sequence.
        ValueError: Not one or two ints, less than ``minimum``, or beyond 64 bits.
    """
    if type(value) is int and minimum <= value < 2**63:  # as nearly always: what follows takes longer
        return value, value
    try:
        values = (value, value) if isinstance(value, int) or not isinstance(value, Iterable) else tuple(value)
        values = tuple(item if isinstance(item, int) else operator.index(item) for item in values)
    except TypeError:
        raise TypeError(f"`{name}` must be an int or a pair (rows, columns) of ints; got {value!r}.") from None
    if len(values) != 2 or not all(minimum <= item < 2**63 for item in values):
        raise ValueError(f"`{name}` must be an int or a pair (rows, columns) of at least {minimum}; got {value!r}.")
    return values[0], values[1]


def at_least_one(name: str, value: Any) -> int:
    """Reads a number of things as an int; integers of other libraries are ints too.

    Raises:
        ValueError: It is not an integer, or less than 1.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"`{name}` must be an int of at least 1; got {value!r}.")
    return number


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

"""Sizes of one call and the layout of what it returns: what every backend is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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

    @staticmethod
    def of(
        input_size: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
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
        )


def memory_format(input: Tensor) -> torch.memory_format:
    """The layout of an output and of the input's gradient: channels_last as the input, else contiguous."""
    if not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format

"""Convolutions with learnable shapes."""

from icnn_zoo.layers import IrregularConv2d
from icnn_zoo.ops import irregular_conv2d

__all__ = ["IrregularConv2d", "irregular_conv2d"]

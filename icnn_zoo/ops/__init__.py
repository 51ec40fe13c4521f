"""The irregular convolution and its backends."""

from icnn_zoo.ops.functional import irregular_conv2d

__all__ = ["irregular_conv2d"]

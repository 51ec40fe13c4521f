"""The irregular convolution and its backends."""

from icnn_zoo.ops.functional import irregular_conv2d
from icnn_zoo.ops.operators import Backend, register_backend

__all__ = ["Backend", "irregular_conv2d", "register_backend"]

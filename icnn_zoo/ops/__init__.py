"""The irregular convolution and its backends."""

from icnn_zoo.ops.backends import Backend, BackendError, register_backend, unregister_backend
from icnn_zoo.ops.functional import irregular_conv2d

__all__ = ["Backend", "BackendError", "irregular_conv2d", "register_backend", "unregister_backend"]

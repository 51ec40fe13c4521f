"""The sizes that the torch backend works in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes chosen for speed; what is computed depends on them by rounding only. Measured on two CPU cores, float32."""

    block_elements: int = 2**22
    """Elements of a block of columns: 16 MiB are a product of all channels of an image of 41x41."""
    cached_elements: int = 2**20
    """Elements of bilinear columns made at once on a CPU: more leave the caches, fewer cost more calls."""
    grad_elements: int = 2**20
    """Elements of a block of bilinear columns in the backward on a CPU, where more passes go over it."""
    slab_area: int = 2048
    """Output pixels: images smaller than this together make one slab, so that products stay large on small maps."""
    copied_elements: int = 2**21
    """Elements of the input that the full version copies at once, once for each output channel."""
    kernel_elements: int = 2**24
    """Elements of the dense kernels drawn at once, but for depthwise layers, which are drawn whole."""
    cells_per_tap: int = 64
    """Cells of a dense kernel for each tap above which columns are gathered: a gathered column element costs as much as
    about this many multiply-adds of a convolution."""
    cells_per_tap_elsewhere: int = 256
    """Likewise on other devices than CPUs, where columns of triangles and gaussians took 400 to 700 times as long as
    a convolution of the regular kernel (one NVIDIA H200)."""

"""The sizes that the Triton backend works in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes chosen for speed; what is computed depends on them by rounding only.

    They follow from instruction counts of the compiled kernels and from timings on an H200 (docs/gpu.md).
    """

    drawn_taps: int = 64
    """Most taps for which kernels of groups of one input channel are drawn as dense boxes; at most 64."""
    direct_channels: int = 1
    """Most input channels of a group for which nothing but taps are summed, without columns."""
    direct_product: int = 8
    """Most input channels times outputs of a group, likewise."""
    few_outputs: int = 32
    """Most outputs of a dense layer for which the product comes first and the shifts second; at most 32."""
    few_channels: int = 64
    """Fewest input channels, likewise."""
    chunk_bytes: int = 512 * 2**20
    """Columns of a chunk of images: the whole batch of most layers. Chunks small enough for the L2 cache would save
    traffic, but each costs the CPU more time to launch than that takes."""
    image_bytes: int = 512 * 2**20
    """Columns of a single image above which its channels are taken in parts."""
    staged: bool = False
    """Whether dense layers take the kernels in CUDA C++ (``staged.cu``). Off, as they ran on a GPU in trials only."""
    programs: int = 512
    """The programs that a launch should have at least, where a sum can be split to get there."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The CUDA kernel that multiplies columns as it makes them. Letters as in ``sampling``."""

import triton
import triton.language as tl

from icnn_zoo.ops.triton_backend.sampling import GROUPING, SAMPLING, blend, number_pixels, split_position

# The interpreter's `tl.dot` multiplies the bits of bfloat16 numbers: it gets float32.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit(
    do_not_specialize=[
        "groups",
        "length",
        "split_entries",
        "stride_split",
        "stride_image",
        "stride_output",
        "stride_pixel",
        *GROUPING,
        *SAMPLING,
    ]
)
def fused_forward_kernel(
    planes,
    weight,
    positions,
    bias,
    output,
    groups,
    group_outputs,
    group_channels,
    taps,
    length,
    split_entries,
    stride_split,
    stride_image,
    stride_output,
    stride_pixel,
    height,
    width,
    out_height,
    out_width,
    origin_row,
    origin_col,
    bound_row,
    bound_col,
    pitch,
    plane_size,
    last_free_shift,
    STRIDE_ROW: tl.constexpr,
    STRIDE_COL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    """Multiplies columns as it makes them, for few outputs. Grid: splits x groups x blocks of pixels.

    An entry is a (channel, tap) of a group. Each split sums its share of the entries to its own part of ``output``.
    """
    blocks = tl.cdiv(length, BLOCK_PIXELS)
    group = tl.program_id(0) // blocks % groups
    split = tl.program_id(0) // (blocks * groups)
    size = out_height * out_width
    number, image, pixel, row, col = number_pixels(tl.program_id(0) % blocks, length, size, out_width, BLOCK_PIXELS)
    column = (col * STRIDE_COL)[:, None]
    flat = (row * (STRIDE_ROW * pitch) + col * STRIDE_COL)[:, None]
    start = (image * (groups * group_channels * plane_size))[:, None]
    kernels = tl.arange(0, BLOCK_OUTPUTS)
    entries = group_channels * taps
    total = tl.zeros([BLOCK_PIXELS, BLOCK_OUTPUTS], tl.float32)
    for first in range(split * split_entries, tl.minimum((split + 1) * split_entries, entries), BLOCK_ENTRIES):
        entry = first + tl.arange(0, BLOCK_ENTRIES)
        known = tl.minimum(entry, entries - 1)
        row_shift, col_shift, row_fraction, col_fraction = split_position(
            positions,
            (group * group_channels).to(tl.int64) * taps + known,
            origin_row,
            origin_col,
            bound_row,
            bound_col,
        )
        index = flat + (row_shift * pitch + col_shift)[None, :]
        index = tl.minimum(tl.maximum(index, -pitch - 2), height * pitch)
        channel = first // taps
        base = planes + ((group * group_channels + channel).to(tl.int64) * plane_size + (pitch + 2))
        index += start + ((known // taps - channel) * plane_size)[None, :]
        top = base + index
        bottom = base + pitch + index
        moved = column + col_shift[None, :]
        left = (moved >= 0) & (moved < width)
        right = (moved >= -1) & (moved < width - 1)
        values = blend(
            tl.load(top, mask=left, other=0.0).to(tl.float32),
            tl.load(top + 1, mask=right, other=0.0).to(tl.float32),
            tl.load(bottom, mask=left, other=0.0).to(tl.float32),
            tl.load(bottom + 1, mask=right, other=0.0).to(tl.float32),
            row_fraction[None, :],
            col_fraction[None, :],
        )
        # An entry past the end repeats the last one: its weight is zero, but zero times NaN would not be.
        values = tl.where((entry < entries)[None, :], values, 0.0).to(planes.dtype.element_ty)
        used = (entry < entries)[:, None] & (kernels < group_outputs)[None, :]
        place = (group * group_outputs + kernels).to(tl.int64)[None, :] * entries + entry[:, None]
        factors = tl.load(weight + place, mask=used, other=0.0)
        if _INTERPRETED:
            total = tl.dot(values.to(tl.float32), factors.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(values, factors, total, input_precision=PRECISION)
    kernel = group * group_outputs + kernels
    used = kernels < group_outputs
    if HAS_BIAS:
        total += tl.load(bias + kernel, mask=used, other=0.0).to(tl.float32)[None, :]
    target = output + split.to(tl.int64) * stride_split
    target += image.to(tl.int64) * stride_image + pixel.to(tl.int64) * stride_pixel
    target = target[:, None] + (kernel.to(tl.int64) * stride_output)[None, :]
    tl.store(target, total.to(output.dtype.element_ty), mask=(number < length)[:, None] & used[None, :])

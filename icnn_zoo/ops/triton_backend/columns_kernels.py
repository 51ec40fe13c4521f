# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""CUDA kernels that make columns: stored, multiplied at once, and their adjoint. Letters as in ``sampling``."""

import triton
import triton.language as tl

from icnn_zoo.ops.triton_backend.sampling import (
    GATHERING,
    GROUPING,
    SAMPLING,
    blend,
    gather_adjoint,
    number_pixels,
    read_corners,
    slopes,
    split_position,
)

# The interpreter's `tl.dot` multiplies the bits of bfloat16 numbers: it gets float32.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit(do_not_specialize=["channels", "height", "width", "pitch", "plane_size"])
def planes_kernel(
    input,
    planes,
    channels,
    height,
    width,
    stride_image,
    stride_channel,
    stride_row,
    stride_col,
    pitch,
    plane_size,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Copies an input [B, C, H, W] of any strides to planes, zeros around them. Grid: B x channels x pixels."""
    pixel_blocks = tl.cdiv(plane_size, BLOCK_PIXELS)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    program = tl.program_id(0)
    image = (program // (pixel_blocks * channel_blocks)).to(tl.int64)
    channel = (program // pixel_blocks % channel_blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    place = (program % pixel_blocks) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    pixel = place - (pitch + 2)
    row = pixel // pitch
    col = pixel - row * pitch
    used = (pixel >= 0) & (row < height) & (col < width)
    real = channel < channels
    source = (
        image * stride_image
        + channel.to(tl.int64)[:, None] * stride_channel
        + (row.to(tl.int64) * stride_row + col.to(tl.int64) * stride_col)[None, :]
    )
    values = tl.load(input + source, mask=real[:, None] & used[None, :], other=0.0)
    target = (image * channels + channel)[:, None] * plane_size + place[None, :]
    tl.store(planes + target, values, mask=real[:, None] & (place < plane_size)[None, :])


@triton.jit(do_not_specialize=["stride_image", "channels", "taps", "length", "column_pitch", *SAMPLING])
def columns_kernel(
    planes,
    positions,
    columns,
    partials,
    stride_image,
    channels,
    taps,
    length,
    column_pitch,
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
    GRADIENT: tl.constexpr,
    STORE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Makes columns [C * T, column_pitch * VECTOR] from planes [B, C, plane_size]. Grid: C x blocks of pixels.

    Images lie ``stride_image`` elements apart. With GRADIENT ``columns`` holds the columns' gradient: the positions'
    gradient goes to ``partials`` [blocks, C, T, 2]. With STORE the columns are written, over their gradient if there is
    one.
    """
    blocks = tl.cdiv(length, BLOCK)
    channel = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    number, image, _, row, col = number_pixels(block, length, out_height * out_width, out_width, BLOCK)
    real = number < length
    # A mask as aligned as the rows are: what lies past the end of a row is read and written, but never used.
    in_row = number < column_pitch * VECTOR
    column = col * STRIDE_COL
    flat = row * (STRIDE_ROW * pitch) + column
    base = planes + (channel.to(tl.int64) * plane_size + (pitch + 2))
    start = image * stride_image
    for tap in range(taps):
        owner = channel.to(tl.int64) * taps + tap
        row_shift, col_shift, row_fraction, col_fraction = split_position(
            positions, owner, origin_row, origin_col, bound_row, bound_col
        )
        top_left, top_right, bottom_left, bottom_right = read_corners(
            base, start, flat, column, row_shift, col_shift, height, width, pitch, last_free_shift
        )
        # VECTOR elements a lane are known to be aligned: it decides how wide a lane's stores are.
        target = columns + owner * (column_pitch.to(tl.int64) * VECTOR) + number
        if GRADIENT:
            grad = tl.load(target, mask=in_row, other=0.0).to(tl.float32)
            by_row, by_col = slopes(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction)
            partial = partials + ((block.to(tl.int64) * channels + channel) * taps + tap) * 2
            tl.store(partial, tl.sum(tl.where(real, grad * by_row, 0.0)))
            tl.store(partial + 1, tl.sum(tl.where(real, grad * by_col, 0.0)))
        if STORE:
            values = blend(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction)
            tl.store(target, values.to(columns.dtype.element_ty), mask=in_row)


@triton.jit(do_not_specialize=["taps", "length", "column_pitch", "stride_image", *GATHERING])
def input_gradient_kernel(
    grad_columns,
    positions,
    grad_planes,
    taps,
    length,
    column_pitch,
    stride_image,
    height,
    width,
    out_height,
    out_width,
    origin_row,
    origin_col,
    bound_row,
    bound_col,
    STRIDE_ROW: tl.constexpr,
    STRIDE_COL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gathers the input's gradient [B, C, H, W] from the columns' [C * T, column_pitch]. Grid: C x blocks of pixels."""
    blocks = tl.cdiv(length, BLOCK)
    channel = tl.program_id(0) // blocks
    number, image, pixel, row, col = number_pixels(tl.program_id(0) % blocks, length, height * width, width, BLOCK)
    start = image * (out_height * out_width)
    flat = start + row * out_width + col
    total = tl.zeros([BLOCK], tl.float32)
    for tap in range(taps):
        owner = channel.to(tl.int64) * taps + tap
        row_shift, col_shift, row_fraction, col_fraction = split_position(
            positions, owner, origin_row, origin_col, bound_row, bound_col
        )
        total += gather_adjoint(
            grad_columns + owner * column_pitch,
            start,
            flat,
            row,
            col,
            row_shift,
            col_shift,
            row_fraction,
            col_fraction,
            out_height,
            out_width,
            STRIDE_ROW,
            STRIDE_COL,
        )
    target = grad_planes + image.to(tl.int64) * stride_image + channel.to(tl.int64) * (height * width) + pixel
    tl.store(target, total.to(grad_planes.dtype.element_ty), mask=number < length)


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

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""CUDA kernels for dense layers with few outputs: the taps outside of their boxes. Letters as in ``sampling``.

An *entry* is a (channel, tap). Those outside are listed in ``entries``, ``count`` of them, and each has a ``slot`` in
the list, -1 for those inside. Lists are made and read on the GPU: a launch has few programs, each for many blocks of
pixels, so that what is not listed costs next to nothing. Images are read where they are, in any strides.
"""

import triton
import triton.language as tl

from icnn_zoo.ops.triton_backend.sampling import (
    GATHERING,
    blend,
    gather_adjoint,
    number_pixels,
    slopes,
    split_position,
)

STRIDES = ["stride_image", "stride_channel", "stride_row", "stride_col"]

# The interpreter's `tl.dot` multiplies the bits of bfloat16 numbers: it gets float32.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(left, right, total, PRECISION: tl.constexpr):
    if _INTERPRETED:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def _read_corners(source, row, col, height, width, stride_row, stride_col):
    """Reads the four neighbors of samples in float32, zero outside of the image; ``source`` is where it begins."""
    top = (row >= 0) & (row < height)
    bottom = (row >= -1) & (row < height - 1)
    left = (col >= 0) & (col < width)
    right = (col >= -1) & (col < width - 1)
    place = source + (row.to(tl.int64) * stride_row + col.to(tl.int64) * stride_col)
    return (
        tl.load(place, mask=top & left, other=0.0).to(tl.float32),
        tl.load(place + stride_col, mask=top & right, other=0.0).to(tl.float32),
        tl.load(place + stride_row, mask=bottom & left, other=0.0).to(tl.float32),
        tl.load(place + stride_row + stride_col, mask=bottom & right, other=0.0).to(tl.float32),
    )


@triton.jit(do_not_specialize=["outputs", "all_entries", "taps", "length", *STRIDES, *GATHERING])
def listed_sum_kernel(
    input,
    weight,
    positions,
    entries,
    count,
    rest,
    outputs,
    all_entries,
    taps,
    length,
    stride_image,
    stride_channel,
    stride_row,
    stride_col,
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
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Sums what the listed entries give: rest [SPLITS, N, L]. Grid: SPLITS x blocks of pixels."""
    blocks = tl.cdiv(length, BLOCK_PIXELS)
    split = tl.program_id(0) // blocks
    number, image, _, row, col = number_pixels(
        tl.program_id(0) % blocks, length, out_height * out_width, out_width, BLOCK_PIXELS
    )
    source = (input + image.to(tl.int64) * stride_image)[:, None]
    kernels = tl.arange(0, BLOCK_OUTPUTS)
    total = tl.zeros([BLOCK_PIXELS, BLOCK_OUTPUTS], tl.float32)
    listed = tl.load(count)
    share = tl.cdiv(tl.cdiv(listed, SPLITS), BLOCK_ENTRIES) * BLOCK_ENTRIES
    for first in range(split * share, tl.minimum((split + 1) * share, listed), BLOCK_ENTRIES):
        slot = first + tl.arange(0, BLOCK_ENTRIES)
        entry = tl.load(entries + tl.minimum(slot, listed - 1))
        row_shift, col_shift, row_fraction, col_fraction = split_position(
            positions, entry, origin_row, origin_col, bound_row, bound_col
        )
        top_left, top_right, bottom_left, bottom_right = _read_corners(
            source + ((entry // taps).to(tl.int64) * stride_channel)[None, :],
            (row * STRIDE_ROW)[:, None] + row_shift[None, :],
            (col * STRIDE_COL)[:, None] + col_shift[None, :],
            height,
            width,
            stride_row,
            stride_col,
        )
        values = blend(top_left, top_right, bottom_left, bottom_right, row_fraction[None, :], col_fraction[None, :])
        values = tl.where((slot < listed)[None, :], values, 0.0).to(input.dtype.element_ty)
        used = (slot < listed)[:, None] & (kernels < outputs)[None, :]
        factors = tl.load(weight + kernels[None, :] * all_entries + entry[:, None], mask=used, other=0.0)
        total = _dot(values, factors, total, PRECISION)
    place = (split * outputs + kernels).to(tl.int64)[None, :] * length + number[:, None]
    tl.store(rest + place, total, mask=(number < length)[:, None] & (kernels < outputs)[None, :])


@triton.jit(do_not_specialize=["outputs", "all_entries", "length", "size", "column_pitch"])
def listed_column_gradient_kernel(
    grad_output,
    weight,
    entries,
    count,
    columns,
    outputs,
    all_entries,
    length,
    size,
    column_pitch,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Multiplies weights and the output's gradient [B, N, size] for listed entries: columns [slots, column_pitch].

    Grid: blocks of slots x SPLITS, which share the blocks of pixels.
    """
    slot = (tl.program_id(0) // SPLITS) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    listed = tl.load(count)
    if tl.min(slot) < listed:
        kernels = tl.arange(0, BLOCK_OUTPUTS)
        known = slot < listed
        used = kernels < outputs
        entry = tl.load(entries + slot, mask=known, other=0)
        place = kernels[None, :] * all_entries + entry[:, None]
        factors = tl.load(weight + place, mask=known[:, None] & used[None, :], other=0.0)
        for block in range(tl.program_id(0) % SPLITS, tl.cdiv(length, BLOCK_PIXELS), SPLITS):
            number = block * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
            last = tl.minimum(number, length - 1)
            image = last // size
            source = (image * outputs * size + last - image * size)[None, :] + (kernels * size)[:, None]
            grad = tl.load(grad_output + source, mask=used[:, None], other=0.0)
            total = tl.zeros([BLOCK_ENTRIES, BLOCK_PIXELS], tl.float32)
            total = _dot(factors, grad, total, PRECISION)
            target = columns + slot.to(tl.int64)[:, None] * column_pitch + number[None, :]
            tl.store(target, total.to(columns.dtype.element_ty), mask=known[:, None] & (number < length)[None, :])


@triton.jit(
    do_not_specialize=["taps", "length", "column_pitch", "stride_image", "stride_channel", "stride_pixel", *GATHERING]
)
def listed_input_gradient_kernel(
    grad_columns,
    positions,
    slots,
    grad_input,
    taps,
    length,
    column_pitch,
    stride_image,
    stride_channel,
    stride_pixel,
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
    SPLITS: tl.constexpr,
):
    """Adds what listed entries give to the input's gradient. Grid: C x SPLITS, which share the blocks of pixels."""
    channel = tl.program_id(0) // SPLITS
    last_slot = tl.full([], -1, tl.int32)
    for tap in range(taps):
        last_slot = tl.maximum(last_slot, tl.load(slots + channel * taps + tap))
    if last_slot >= 0:
        for block in range(tl.program_id(0) % SPLITS, tl.cdiv(length, BLOCK), SPLITS):
            number, image, pixel, row, col = number_pixels(block, length, height * width, width, BLOCK)
            real = number < length
            start = image * (out_height * out_width)
            flat = start + row * out_width + col
            target = grad_input + image.to(tl.int64) * stride_image + channel.to(tl.int64) * stride_channel
            target += pixel.to(tl.int64) * stride_pixel
            total = tl.load(target, mask=real, other=0.0).to(tl.float32)
            for tap in range(taps):
                slot = tl.load(slots + channel * taps + tap)
                if slot >= 0:
                    row_shift, col_shift, row_fraction, col_fraction = split_position(
                        positions, channel * taps + tap, origin_row, origin_col, bound_row, bound_col
                    )
                    total += gather_adjoint(
                        grad_columns + slot.to(tl.int64) * column_pitch,
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
            tl.store(target, total.to(grad_input.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["channels", "taps", "length", "column_pitch", *STRIDES, *GATHERING])
def listed_columns_kernel(
    input,
    positions,
    slots,
    columns,
    partials,
    channels,
    taps,
    length,
    column_pitch,
    stride_image,
    stride_channel,
    stride_row,
    stride_col,
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
    SPLITS: tl.constexpr,
):
    """Makes the columns of listed entries over their gradient, whose products give partials [SPLITS, C, T, 2].

    Grid: C x SPLITS, which share the blocks of pixels. One warp a program: its sums need no barrier.
    """
    channel = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    source = input + channel.to(tl.int64) * stride_channel
    for tap in range(taps):
        slot = tl.load(slots + channel * taps + tap)
        by_row = tl.zeros([BLOCK], tl.float32)
        by_col = tl.zeros([BLOCK], tl.float32)
        if slot >= 0:
            row_shift, col_shift, row_fraction, col_fraction = split_position(
                positions, channel * taps + tap, origin_row, origin_col, bound_row, bound_col
            )
            for block in range(split, tl.cdiv(length, BLOCK), SPLITS):
                number, image, _, row, col = number_pixels(block, length, out_height * out_width, out_width, BLOCK)
                real = number < length
                top_left, top_right, bottom_left, bottom_right = _read_corners(
                    source + image.to(tl.int64) * stride_image,
                    row * STRIDE_ROW + row_shift,
                    col * STRIDE_COL + col_shift,
                    height,
                    width,
                    stride_row,
                    stride_col,
                )
                target = columns + slot.to(tl.int64) * column_pitch + number
                grad = tl.load(target, mask=real, other=0.0).to(tl.float32)
                row_slope, col_slope = slopes(
                    top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction
                )
                by_row += tl.where(real, grad * row_slope, 0.0)
                by_col += tl.where(real, grad * col_slope, 0.0)
                values = blend(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction)
                tl.store(target, values.to(columns.dtype.element_ty), mask=real)
        partial = partials + ((split * channels + channel) * taps + tap).to(tl.int64) * 2
        tl.store(partial, tl.sum(by_row))
        tl.store(partial + 1, tl.sum(by_col))


@triton.jit(do_not_specialize=["outputs", "all_entries", "length", "size", "column_pitch"])
def listed_weight_gradient_kernel(
    grad_output,
    columns,
    count,
    partials,
    outputs,
    all_entries,
    length,
    size,
    column_pitch,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Multiplies columns and the output's gradient [B, N, size]: partials [SPLITS, slots, BLOCK_OUTPUTS].

    Slots past the count get zeros. Grid: blocks of slots x SPLITS.
    """
    first_slot = (tl.program_id(0) // SPLITS) * BLOCK_ENTRIES
    slot = first_slot + tl.arange(0, BLOCK_ENTRIES)
    rows = columns + first_slot.to(tl.int64) * column_pitch
    split = tl.program_id(0) % SPLITS
    listed = tl.load(count)
    kernels = tl.arange(0, BLOCK_OUTPUTS)
    known = slot < listed
    total = tl.zeros([BLOCK_ENTRIES, BLOCK_OUTPUTS], tl.float32)
    if tl.min(slot) < listed:
        share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_PIXELS) * BLOCK_PIXELS
        for first in range(split * share, tl.minimum((split + 1) * share, length), BLOCK_PIXELS):
            number = first + tl.arange(0, BLOCK_PIXELS)
            real = number < length
            last = tl.minimum(number, length - 1)
            image = last // size
            source = rows + ((slot - first_slot)[:, None] * column_pitch + number[None, :])
            values = tl.load(source, mask=known[:, None] & real[None, :], other=0.0)
            place = (image * outputs * size + last - image * size)[:, None] + (kernels * size)[None, :]
            grad = tl.load(grad_output + place, mask=real[:, None] & (kernels < outputs)[None, :], other=0.0)
            total = _dot(values, grad, total, PRECISION)
    target = (split * all_entries + slot).to(tl.int64)[:, None] * BLOCK_OUTPUTS + kernels[None, :]
    tl.store(partials + target, total, mask=(slot < all_entries)[:, None])

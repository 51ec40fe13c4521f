# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""CUDA kernels that sum tap by tap, without columns. Letters as in ``sampling``."""

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


@triton.jit(do_not_specialize=["outputs", "length", *GROUPING, *SAMPLING])
def direct_forward_kernel(
    planes,
    weight,
    positions,
    bias,
    output,
    outputs,
    group_outputs,
    group_channels,
    taps,
    length,
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
    PER_KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes the output [B, N, Ho, Wo] tap by tap from planes [B, C], without columns. Grid: N x blocks of pixels."""
    blocks = tl.cdiv(length, BLOCK)
    kernel = tl.program_id(0) // blocks
    size = out_height * out_width
    number, image, pixel, row, col = number_pixels(tl.program_id(0) % blocks, length, size, out_width, BLOCK)
    column = col * STRIDE_COL
    flat = row * (STRIDE_ROW * pitch) + column
    channels = outputs // group_outputs * group_channels
    first = kernel // group_outputs * group_channels
    base = planes + (first.to(tl.int64) * plane_size + (pitch + 2))
    start = image * (channels * plane_size)
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + kernel).to(tl.float32)
    for in_kernel in range(group_channels):
        part = tl.zeros([BLOCK], tl.float32)  # sums of sums: fewer roundings of large numbers
        for tap in range(taps):
            entry = in_kernel * taps + tap
            place = kernel.to(tl.int64) * group_channels * taps + entry
            owner = place
            if not PER_KERNEL:
                owner = first.to(tl.int64) * taps + entry
            row_shift, col_shift, row_fraction, col_fraction = split_position(
                positions, owner, origin_row, origin_col, bound_row, bound_col
            )
            top_left, top_right, bottom_left, bottom_right = read_corners(
                base,
                start,
                flat,
                column,
                row_shift,
                col_shift,
                height,
                width,
                pitch,
                last_free_shift,
            )
            values = blend(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction)
            part += tl.load(weight + place).to(tl.float32) * values
        total += part
        base += plane_size
    target = output + (image.to(tl.int64) * outputs + kernel) * size + pixel
    tl.store(target, total.to(output.dtype.element_ty), mask=number < length)


@triton.jit(do_not_specialize=["outputs", "length", *GROUPING, *GATHERING])
def direct_input_gradient_kernel(
    grad_output,
    weight,
    positions,
    grad_planes,
    outputs,
    group_outputs,
    group_channels,
    taps,
    length,
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
    PER_KERNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gathers the input's gradient [B, C, H, W] from the output's [B, N, Ho, Wo]. Grid: C x blocks of pixels."""
    blocks = tl.cdiv(length, BLOCK)
    channel = tl.program_id(0) // blocks
    number, image, pixel, row, col = number_pixels(tl.program_id(0) % blocks, length, height * width, width, BLOCK)
    size = out_height * out_width
    channels = outputs // group_outputs * group_channels
    in_kernel = channel % group_channels
    first = channel // group_channels * group_outputs
    base = grad_output + first.to(tl.int64) * size
    start = image * (outputs * size)
    flat = start + row * out_width + col
    total = tl.zeros([BLOCK], tl.float32)
    for kernel in range(group_outputs):
        part = tl.zeros([BLOCK], tl.float32)
        for tap in range(taps):
            place = ((first + kernel).to(tl.int64) * group_channels + in_kernel) * taps + tap
            owner = place
            if not PER_KERNEL:
                owner = channel.to(tl.int64) * taps + tap
            row_shift, col_shift, row_fraction, col_fraction = split_position(
                positions, owner, origin_row, origin_col, bound_row, bound_col
            )
            values = gather_adjoint(
                base,
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
            part += tl.load(weight + place).to(tl.float32) * values
        total += part
        base += size
    target = grad_planes + (image.to(tl.int64) * channels + channel) * (height * width) + pixel
    tl.store(target, total.to(grad_planes.dtype.element_ty), mask=number < length)


@triton.jit(do_not_specialize=["outputs", "length", "split_blocks", *GROUPING, *SAMPLING])
def direct_kernel_gradient_kernel(
    grad_output,
    planes,
    positions,
    partials,
    outputs,
    group_outputs,
    group_channels,
    taps,
    length,
    split_blocks,
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
    PER_KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums what the gradients of weights and positions need: partials [splits, N * C / G, T, 3].

    The three are the sums over pixels of the output's gradient times the sample, its slope by row, its slope by col.
    Grid: splits x (N * C / G). One warp a program: its sums need no barrier.
    """
    pairs = outputs * group_channels
    split = tl.program_id(0) // pairs
    pair = tl.program_id(0) % pairs
    kernel = pair // group_channels
    channels = outputs // group_outputs * group_channels
    channel = kernel // group_outputs * group_channels + pair % group_channels
    owner = channel
    if PER_KERNEL:
        owner = pair
    size = out_height * out_width
    numbers = tl.arange(0, TAPS)
    by_weight = tl.zeros([TAPS], tl.float32)
    by_row = tl.zeros([TAPS], tl.float32)
    by_col = tl.zeros([TAPS], tl.float32)
    for step in range(split_blocks):
        number, image, pixel, row, col = number_pixels(split * split_blocks + step, length, size, out_width, BLOCK)
        real = number < length
        column = col * STRIDE_COL
        flat = row * (STRIDE_ROW * pitch) + column
        base = planes + (channel.to(tl.int64) * plane_size + (pitch + 2))
        start = image * (channels * plane_size)
        place = image * (outputs * size) + pixel
        grad = tl.load(grad_output + kernel.to(tl.int64) * size + place, mask=real, other=0.0).to(tl.float32)
        for tap in range(taps):
            row_shift, col_shift, row_fraction, col_fraction = split_position(
                positions, owner.to(tl.int64) * taps + tap, origin_row, origin_col, bound_row, bound_col
            )
            top_left, top_right, bottom_left, bottom_right = read_corners(
                base, start, flat, column, row_shift, col_shift, height, width, pitch, last_free_shift
            )
            values = blend(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction)
            row_slope, col_slope = slopes(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction)
            here = numbers == tap
            by_weight += tl.where(here, tl.sum(tl.where(real, grad * values, 0.0)), 0.0)
            by_row += tl.where(here, tl.sum(tl.where(real, grad * row_slope, 0.0)), 0.0)
            by_col += tl.where(here, tl.sum(tl.where(real, grad * col_slope, 0.0)), 0.0)
    target = partials + (tl.program_id(0).to(tl.int64) * taps + numbers) * 3
    tl.store(target, by_weight, mask=numbers < taps)
    tl.store(target + 1, by_row, mask=numbers < taps)
    tl.store(target + 2, by_col, mask=numbers < taps)

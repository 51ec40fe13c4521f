# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment, unreachable, var-annotated"
"""CUDA kernels that make columns, and their adjoint. Letters as in ``sampling``."""

import triton
import triton.language as tl

from icnn_zoo.ops.triton_backend.sampling import GATHERING, gather_adjoint, number_pixels, split_position

_SIZES = ["stride_image", "channels", "taps", "lanes", "column_pitch", "pitch", "plane_size"]


@triton.jit
def _near(place, col_fraction):
    """Reads every lane's pixel and the one after it, in float32: their blend, and their difference."""
    left = tl.load(place).to(tl.float32)
    right = tl.load(place + 1).to(tl.float32)
    return left * (1 - col_fraction) + right * col_fraction, right - left


@triton.jit(do_not_specialize=[*_SIZES, *GATHERING])
def columns_kernel(
    planes,
    positions,
    columns,
    partials,
    stride_image,
    channels,
    taps,
    lanes,
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
    STRIDE_ROW: tl.constexpr,
    STRIDE_COL: tl.constexpr,
    GRADIENT: tl.constexpr,
    STORE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Makes columns [C * T, column_pitch] from planes [B, C, plane_size]. Grid: C x bands of ROWS x blocks of lanes.

    A lane is a column of an image's output. All rows of a band are read before one is written: a store would hold back
    the loads that follow it, as they might be of the same memory. With stride 1 each row's blend serves two samples.
    Images lie ``stride_image`` elements apart. With GRADIENT ``columns`` holds the columns' gradient: the positions'
    gradient goes to ``partials`` [bands * blocks, C, T, 2]. With STORE the columns are written, over their gradient if
    there is one.
    """
    blocks = tl.cdiv(lanes, BLOCK)
    bands = tl.cdiv(out_height, ROWS)
    channel = tl.program_id(0) // (bands * blocks)
    tile = tl.program_id(0) % (bands * blocks)
    first_row = tile % bands * ROWS
    lane = tile // bands * BLOCK + tl.arange(0, BLOCK)
    real = lane < lanes
    last = tl.minimum(lane, lanes - 1)
    image = last // out_width
    col = last - image * out_width
    start = image * stride_image
    base = planes + (channel.to(tl.int64) * plane_size + (pitch + 2))
    first_target = image * (out_height * out_width) + first_row * out_width + col
    for tap in range(taps):
        owner = channel.to(tl.int64) * taps + tap
        row_shift, col_shift, row_fraction, col_fraction = split_position(
            positions, owner, origin_row, origin_col, bound_row, bound_col
        )
        target = columns + owner * column_pitch + first_target
        # Two columns of zeros lie at either side of a row, a row of zeros above and below the image.
        near = base + (start + tl.minimum(tl.maximum(col * STRIDE_COL + col_shift, -2), width))
        row = first_row * STRIDE_ROW + row_shift
        grads = ()
        tops = ()
        bottoms = ()
        for step in tl.static_range(ROWS):
            if GRADIENT:
                mask = real & (first_row + step < out_height)
                grads += (tl.load(target + step * out_width, mask=mask, other=0.0),)
            if step == 0 or STRIDE_ROW > 1:
                at = tl.minimum(tl.maximum(row + step * STRIDE_ROW, -1), height)
                tops += (_near(near + at * pitch, col_fraction),)
            else:
                tops += (bottoms[step - 1],)
            at = tl.minimum(tl.maximum(row + step * STRIDE_ROW + 1, -1), height)
            bottoms += (_near(near + at * pitch, col_fraction),)
        by_row = tl.zeros([BLOCK], tl.float32)
        by_col = tl.zeros([BLOCK], tl.float32)
        for step in tl.static_range(ROWS):
            top, top_step = tops[step]
            bottom, bottom_step = bottoms[step]
            if GRADIENT:
                grad = grads[step].to(tl.float32)
                by_row += grad * (bottom - top)
                by_col += grad * (top_step * (1 - row_fraction) + bottom_step * row_fraction)
            if STORE:
                # Products with both weights, not lerp: an infinite pixel must not meet its own negative.
                value = top * (1 - row_fraction) + bottom * row_fraction
                mask = real & (first_row + step < out_height)
                tl.store(target + step * out_width, value.to(columns.dtype.element_ty), mask=mask)
        if GRADIENT:
            partial = partials + ((tile.to(tl.int64) * channels + channel) * taps + tap) * 2
            tl.store(partial, tl.sum(by_row))
            tl.store(partial + 1, tl.sum(by_col))


@triton.jit
def _adjoint_rows(
    totals,
    samples,
    row,
    left,
    right,
    row_fraction,
    col_fraction,
    out_height,
    out_width,
    ROWS: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Adds to the rows of a band what a tap's samples give: those at the row and the one above it."""
    blends = ()
    for step in tl.static_range(ROWS + 1):
        place = samples + step * out_width
        at = left
        before = right
        if CHECKED:
            inside = (row + step >= 0) & (row + step < out_height)
            at = left & inside
            before = right & inside
        value = tl.load(place, mask=at, other=0.0).to(tl.float32) * (1 - col_fraction)
        blends += (value + tl.load(place - 1, mask=before, other=0.0).to(tl.float32) * col_fraction,)
    added = ()
    for step in tl.static_range(ROWS):
        total = totals[step] + blends[step + 1] * (1 - row_fraction)
        added += (total + blends[step] * row_fraction,)
    return added


@triton.jit(do_not_specialize=["taps", "lanes", "column_pitch", "stride_image", *GATHERING])
def banded_input_gradient_kernel(
    grad_columns,
    positions,
    grad_planes,
    taps,
    lanes,
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gathers the input's gradient [B, C, H, W] from the columns' [C * T, column_pitch], with strides of 1.

    Grid: C x bands of ROWS x blocks of lanes. A lane is a column of an image's input; each row of samples is read once
    for the two rows of the input that it gives to.
    """
    blocks = tl.cdiv(lanes, BLOCK)
    bands = tl.cdiv(height, ROWS)
    channel = tl.program_id(0) // (bands * blocks)
    tile = tl.program_id(0) % (bands * blocks)
    first_row = tile % bands * ROWS
    lane = tile // bands * BLOCK + tl.arange(0, BLOCK)
    last = tl.minimum(lane, lanes - 1)
    image = last // width
    col = last - image * width
    place = image * (out_height * out_width) + col
    totals = (tl.zeros([BLOCK], tl.float32),) * ROWS
    for tap in range(taps):
        owner = channel.to(tl.int64) * taps + tap
        row_shift, col_shift, row_fraction, col_fraction = split_position(
            positions, owner, origin_row, origin_col, bound_row, bound_col
        )
        row = first_row - 1 - row_shift
        moved = col - col_shift
        left = (moved >= 0) & (moved < out_width)
        right = (moved > 0) & (moved <= out_width)
        samples = grad_columns + (owner * column_pitch + row.to(tl.int64) * out_width - col_shift) + place
        if (row >= 0) & (row + ROWS < out_height):
            totals = _adjoint_rows(
                totals, samples, row, left, right, row_fraction, col_fraction, out_height, out_width, ROWS, False
            )
        else:
            totals = _adjoint_rows(
                totals, samples, row, left, right, row_fraction, col_fraction, out_height, out_width, ROWS, True
            )
    target = grad_planes + (channel.to(tl.int64) * (height * width) + image.to(tl.int64) * stride_image)
    target += first_row * width + col
    for step in tl.static_range(ROWS):
        mask = (lane < lanes) & (first_row + step < height)
        tl.store(target + step * width, totals[step].to(grad_planes.dtype.element_ty), mask=mask)


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

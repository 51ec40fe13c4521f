# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""CUDA kernels for layers of one input channel a group: each kernel is drawn as the dense box around its taps.

A cell of the box costs an aligned read's worth of work for each pixel, a tap four reads and their blending. Boxes are
made and read on the GPU: one that holds more than ``limit`` cells, or that shifts past a plane's gap, has 0 rows, and
its kernel is summed tap by tap. Letters as in ``sampling``; a *kernel* is one output channel's.
"""

import triton
import triton.language as tl

from icnn_zoo.ops.triton_backend.sampling import (
    GATHERING,
    SAMPLING,
    blend,
    number_pixels,
    read_corners,
    slopes,
    split_position,
)


@triton.jit
def _near(at, shift, first, second):
    """``first`` where a cell is the one at a shift, ``second`` where it is the next one, else zero."""
    return tl.where(at == shift, first, 0.0) + tl.where(at == shift + 1, second, 0.0)


@triton.jit
def _load_box(boxes, kernel):
    """First row, first col, rows and cols of a kernel's box."""
    box = boxes + 4 * kernel
    return tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)


@triton.jit(do_not_specialize=["multiplier", "taps", "limit", *SAMPLING])
def draw_kernel(
    weight,
    positions,
    boxes,
    cells,
    multiplier,
    taps,
    limit,
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
    PER_KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Draws kernels [N, T] as boxes [N, 4] of cells [N, CELLS]. Grid: N."""
    kernel = tl.program_id(0)
    owner = kernel
    if not PER_KERNEL:
        owner = kernel // multiplier
    tap = tl.arange(0, TAPS)
    known = tl.minimum(tap, taps - 1)  # those past the end repeat the last one, with no weight
    row_shift, col_shift, row_fraction, col_fraction = split_position(
        positions, owner.to(tl.int64) * taps + known, origin_row, origin_col, bound_row, bound_col
    )
    first_row = tl.min(row_shift)
    first_col = tl.min(col_shift)
    rows = tl.max(row_shift) - first_row + 2
    cols = tl.max(col_shift) - first_col + 2
    free = (first_col >= width - pitch) & (first_col + cols - 2 <= last_free_shift)
    small = (rows <= limit) & (cols <= limit) & (tl.minimum(rows, limit) * tl.minimum(cols, limit) <= limit)
    rows = tl.where(free & small, rows, 0)
    tl.store(boxes + 4 * kernel, first_row)
    tl.store(boxes + 4 * kernel + 1, first_col)
    tl.store(boxes + 4 * kernel + 2, rows)
    tl.store(boxes + 4 * kernel + 3, cols)
    cell = tl.arange(0, CELLS)
    row = (first_row + cell // cols)[:, None]
    col = (first_col + cell % cols)[:, None]
    factor = tl.load(weight + kernel.to(tl.int64) * taps + known, mask=tap < taps, other=0.0).to(tl.float32)
    by_row = _near(row, row_shift[None, :], (1 - row_fraction)[None, :], row_fraction[None, :])
    by_col = _near(col, col_shift[None, :], (1 - col_fraction)[None, :], col_fraction[None, :])
    drawn = tl.sum(factor[None, :] * by_row * by_col, axis=1)
    tl.store(cells + kernel.to(tl.int64) * CELLS + cell, drawn, mask=cell < rows * cols)


@triton.jit(do_not_specialize=["kernels", "multiplier", "taps", "length", *SAMPLING])
def drawn_sum_kernel(
    planes,
    cells,
    boxes,
    weight,
    positions,
    bias,
    output,
    kernels,
    multiplier,
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
    ADJOINT: tl.constexpr,
    PER_KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes the output from planes of the input, or with ADJOINT the input's gradient from planes of the output's.

    With ADJOINT height and width are those of the output, out_height and out_width those of the input.
    Grid: output (or input) channels x blocks of pixels.
    """
    blocks = tl.cdiv(length, BLOCK)
    target = tl.program_id(0) // blocks
    size = out_height * out_width
    number, image, pixel, row, col = number_pixels(tl.program_id(0) % blocks, length, size, out_width, BLOCK)
    column = col * STRIDE_COL
    flat = row * (STRIDE_ROW * pitch) + column
    targets = kernels
    sources = kernels // multiplier
    steps = 1
    if ADJOINT:
        targets = kernels // multiplier
        sources = kernels
        steps = multiplier
    start = image * (sources * plane_size)
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + target).to(tl.float32)
    for step in range(steps):
        kernel = target * steps + step
        source = kernel
        if not ADJOINT:
            source = kernel // multiplier
        owner = kernel
        if not PER_KERNEL:
            owner = kernel // multiplier
        base = planes + (source.to(tl.int64) * plane_size + (pitch + 2))
        first_row, first_col, rows, cols = _load_box(boxes, kernel)
        drawn = rows > 0
        if ADJOINT:  # the other way, a shift past the gap is another one
            drawn = drawn & (-(first_col + cols - 1) >= width - pitch) & (-first_col <= last_free_shift + 1)
        if drawn:
            for cell in range(rows * cols):
                row_shift = first_row + cell // cols
                col_shift = first_col + cell % cols
                if ADJOINT:
                    row_shift = -row_shift
                    col_shift = -col_shift
                index = flat + (row_shift * pitch + col_shift)
                index = start + tl.minimum(tl.maximum(index, -pitch - 2), height * pitch)
                factor = tl.load(cells + kernel.to(tl.int64) * CELLS + cell)
                total += factor * tl.load(base + index).to(tl.float32)
        else:
            for tap in range(taps):
                row_shift, col_shift, row_fraction, col_fraction = split_position(
                    positions, owner.to(tl.int64) * taps + tap, origin_row, origin_col, bound_row, bound_col
                )
                if ADJOINT:
                    row_shift = -row_shift - 1
                    col_shift = -col_shift - 1
                    row_fraction = 1 - row_fraction
                    col_fraction = 1 - col_fraction
                top_left, top_right, bottom_left, bottom_right = read_corners(
                    base, start, flat, column, row_shift, col_shift, height, width, pitch, last_free_shift
                )
                values = blend(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction)
                total += tl.load(weight + kernel.to(tl.int64) * taps + tap).to(tl.float32) * values
    place = output + (image.to(tl.int64) * targets + target) * size + pixel
    tl.store(place, total.to(output.dtype.element_ty), mask=number < length)


@triton.jit(do_not_specialize=["kernels", "multiplier", "taps", "length", "split_blocks", *SAMPLING])
def drawn_gradient_kernel(
    grad_output,
    planes,
    boxes,
    positions,
    partials,
    kernels,
    multiplier,
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
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums the output's gradient times the input, over pixels, for each cell: partials [splits, N, CELLS].

    Without a box the numbers are three for each tap: with its sample, its slope by row and its slope by col.
    Grid: splits x N. One warp a program: its sums need no barrier.
    """
    split = tl.program_id(0) // kernels
    kernel = tl.program_id(0) % kernels
    source = kernel // multiplier
    owner = kernel
    if not PER_KERNEL:
        owner = source
    first_row, first_col, rows, cols = _load_box(boxes, kernel)
    size = out_height * out_width
    base = planes + (source.to(tl.int64) * plane_size + (pitch + 2))
    numbers = tl.arange(0, CELLS)
    sums = tl.zeros([CELLS], tl.float32)
    for step in range(split_blocks):
        number, image, pixel, row, col = number_pixels(split * split_blocks + step, length, size, out_width, BLOCK)
        real = number < length
        column = col * STRIDE_COL
        flat = row * (STRIDE_ROW * pitch) + column
        start = image * ((kernels // multiplier) * plane_size)
        place = image * (kernels * size) + pixel
        grad = tl.load(grad_output + kernel.to(tl.int64) * size + place, mask=real, other=0.0).to(tl.float32)
        if rows > 0:
            for cell in range(rows * cols):
                index = flat + ((first_row + cell // cols) * pitch + first_col + cell % cols)
                index = start + tl.minimum(tl.maximum(index, -pitch - 2), height * pitch)
                values = tl.load(base + index).to(tl.float32)
                sums += tl.where(numbers == cell, tl.sum(tl.where(real, grad * values, 0.0)), 0.0)
        else:
            for tap in range(taps):
                row_shift, col_shift, row_fraction, col_fraction = split_position(
                    positions, owner.to(tl.int64) * taps + tap, origin_row, origin_col, bound_row, bound_col
                )
                top_left, top_right, bottom_left, bottom_right = read_corners(
                    base, start, flat, column, row_shift, col_shift, height, width, pitch, last_free_shift
                )
                values = blend(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction)
                by_row, by_col = slopes(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction)
                here = numbers - 3 * tap
                sums += tl.where(here == 0, tl.sum(tl.where(real, grad * values, 0.0)), 0.0)
                sums += tl.where(here == 1, tl.sum(tl.where(real, grad * by_row, 0.0)), 0.0)
                sums += tl.where(here == 2, tl.sum(tl.where(real, grad * by_col, 0.0)), 0.0)
    tl.store(partials + tl.program_id(0).to(tl.int64) * CELLS + numbers, sums)


@triton.jit(do_not_specialize=["multiplier", "taps", *GATHERING])
def undraw_kernel(
    sums,
    boxes,
    weight,
    positions,
    by_weight,
    by_position,
    multiplier,
    taps,
    height,
    width,
    out_height,
    out_width,
    origin_row,
    origin_col,
    bound_row,
    bound_col,
    PER_KERNEL: tl.constexpr,
    TAPS: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Turns sums [N, CELLS] into the gradients of weights [N, T] and of positions [N, T, 2]. Grid: N."""
    kernel = tl.program_id(0)
    owner = kernel
    if not PER_KERNEL:
        owner = kernel // multiplier
    first_row, first_col, rows, cols = _load_box(boxes, kernel)
    tap = tl.arange(0, TAPS)
    known = tl.minimum(tap, taps - 1)
    place = kernel.to(tl.int64) * taps + known
    factor = tl.load(weight + place).to(tl.float32)
    numbers = sums + kernel.to(tl.int64) * CELLS
    if rows > 0:
        row_shift, col_shift, row_fraction, col_fraction = split_position(
            positions, owner.to(tl.int64) * taps + known, origin_row, origin_col, bound_row, bound_col
        )
        cell = tl.arange(0, CELLS)
        values = tl.load(numbers + cell, mask=cell < rows * cols, other=0.0)[:, None]
        row = (first_row + cell // cols)[:, None]
        col = (first_col + cell % cols)[:, None]
        row_weight = _near(row, row_shift[None, :], (1 - row_fraction)[None, :], row_fraction[None, :])
        col_weight = _near(col, col_shift[None, :], (1 - col_fraction)[None, :], col_fraction[None, :])
        value = tl.sum(values * row_weight * col_weight, axis=0)
        row_slope = tl.sum(values * _near(row, row_shift[None, :], -1.0, 1.0) * col_weight, axis=0)
        col_slope = tl.sum(values * row_weight * _near(col, col_shift[None, :], -1.0, 1.0), axis=0)
    else:
        value = tl.load(numbers + 3 * known)
        row_slope = tl.load(numbers + 3 * known + 1)
        col_slope = tl.load(numbers + 3 * known + 2)
    real = tap < taps
    tl.store(by_weight + place, value, mask=real)
    tl.store(by_position + 2 * place, factor * row_slope, mask=real)
    tl.store(by_position + 2 * place + 1, factor * col_slope, mask=real)

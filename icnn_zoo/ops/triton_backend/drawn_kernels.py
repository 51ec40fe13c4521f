# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""CUDA kernels for layers of one input channel a group: kernels are drawn as dense boxes around their taps.

A *group* of kernels, those of some neighboring input channels, shares a box: then all of them read the same pixels,
which lie side by side in memory where channels come last. Boxes are made and read on the GPU, with rows rounded up to a
multiple of ``ROWS``; one of more than ``CELLS`` cells has 0 rows, and its kernels are summed tap by tap.
Letters as in ``sampling``; a *kernel* is one output channel's.
"""

import triton
import triton.language as tl

from icnn_zoo.ops.triton_backend.sampling import GATHERING, blend, slopes, split_position


@triton.jit
def _near(at, shift, first, second):
    """``first`` where a cell is the one at a shift, ``second`` where it is the next one, else zero."""
    return tl.where(at == shift, first, 0.0) + tl.where(at == shift + 1, second, 0.0)


@triton.jit
def load_box(box):
    """First row, first col, rows and cols of a box."""
    return tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)


@triton.jit
def _measure(positions, count, origin_row, origin_col, bound_row, bound_col, BLOCK: tl.constexpr):
    """First row, first col, rows and cols of the box around the reads of so many positions."""
    low_row = tl.full([BLOCK], 2**31 - 1, tl.int32)
    low_col = tl.full([BLOCK], 2**31 - 1, tl.int32)
    high_row = tl.full([BLOCK], -(2**31), tl.int32)
    high_col = tl.full([BLOCK], -(2**31), tl.int32)
    for step in range(tl.cdiv(count, BLOCK)):
        place = tl.minimum(step * BLOCK + tl.arange(0, BLOCK), count - 1)
        row_shift, col_shift, _, _ = split_position(positions, place, origin_row, origin_col, bound_row, bound_col)
        low_row = tl.minimum(low_row, row_shift)
        high_row = tl.maximum(high_row, row_shift)
        low_col = tl.minimum(low_col, col_shift)
        high_col = tl.maximum(high_col, col_shift)
    first_row = tl.min(low_row)
    first_col = tl.min(low_col)
    return first_row, first_col, tl.max(high_row) - first_row + 2, tl.max(high_col) - first_col + 2


@triton.jit(do_not_specialize=["kernels", "multiplier", "taps", *GATHERING])
def draw_kernel(
    weight,
    positions,
    boxes,
    cells,
    kernels,
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
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Draws kernels [N, T] as boxes [groups, 4] of cells [CELLS, N]. Grid: N."""
    kernel = tl.program_id(0)
    owner = kernel
    owners = kernels
    group_owners = GROUP * multiplier
    if not PER_KERNEL:
        owner = kernel // multiplier
        owners = kernels // multiplier
        group_owners = GROUP
    group = owner // group_owners
    first = group.to(tl.int64) * group_owners * taps
    count = tl.minimum(group_owners, owners - group * group_owners) * taps
    first_row, first_col, rows, cols = _measure(
        positions + 2 * first, count, origin_row, origin_col, bound_row, bound_col, BLOCK
    )
    rows = tl.cdiv(rows, ROWS) * ROWS
    fits = (rows <= CELLS) & (cols <= CELLS) & (tl.minimum(rows, CELLS) * tl.minimum(cols, CELLS) <= CELLS)
    rows = tl.where(fits, rows, 0)
    box = boxes + 4 * group
    tl.store(box, first_row)
    tl.store(box + 1, first_col)
    tl.store(box + 2, rows)
    tl.store(box + 3, cols)
    for block in range(tl.cdiv(rows * cols, BLOCK)):
        cell = block * BLOCK + tl.arange(0, BLOCK)
        row = first_row + cell // cols
        col = first_col + cell % cols
        drawn = tl.zeros([BLOCK], tl.float32)
        for tap in range(taps):
            row_shift, col_shift, row_fraction, col_fraction = split_position(
                positions, owner.to(tl.int64) * taps + tap, origin_row, origin_col, bound_row, bound_col
            )
            factor = tl.load(weight + kernel.to(tl.int64) * taps + tap).to(tl.float32)
            by_row = _near(row, row_shift, factor * (1 - row_fraction), factor * row_fraction)
            drawn += by_row * _near(col, col_shift, 1 - col_fraction, col_fraction)
        tl.store(cells + cell.to(tl.int64) * kernels + kernel, drawn, mask=cell < rows * cols)


@triton.jit(do_not_specialize=["kernels", "multiplier", "taps", "splits", *GATHERING])
def undraw_kernel(
    partials,
    boxes,
    weight,
    positions,
    by_weight,
    by_position,
    kernels,
    multiplier,
    taps,
    splits,
    height,
    width,
    out_height,
    out_width,
    origin_row,
    origin_col,
    bound_row,
    bound_col,
    PER_KERNEL: tl.constexpr,
    GROUP: tl.constexpr,
    CELLS: tl.constexpr,
    KERNELS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Turns sums [splits, CELLS, N] into the gradients of weights [N, T] and of positions [N, T, 2]. Grid: N x taps."""
    blocks = tl.cdiv(taps, TAPS)
    kernel = tl.program_id(0) // blocks * KERNELS + tl.arange(0, KERNELS)[None, :]
    tap = tl.program_id(0) % blocks * TAPS + tl.arange(0, TAPS)[:, None]
    real = (kernel < kernels) & (tap < taps)
    kernel = tl.minimum(kernel, kernels - 1)
    tap = tl.minimum(tap, taps - 1)
    owner = kernel
    if not PER_KERNEL:
        owner = kernel // multiplier
    first_row, first_col, rows, cols = load_box(boxes + 4 * (kernel // (GROUP * multiplier)))
    row_shift, col_shift, row_fraction, col_fraction = split_position(
        positions, owner.to(tl.int64) * taps + tap, origin_row, origin_col, bound_row, bound_col
    )
    drawn = rows > 0
    first = tl.where(drawn, (row_shift - first_row) * cols + (col_shift - first_col), 3 * tap)
    step = tl.where(drawn, cols, 2)
    first = first.to(tl.int64) * kernels + kernel
    second = first + step.to(tl.int64) * kernels
    size = CELLS * kernels.to(tl.int64)
    top_left = tl.zeros([TAPS, KERNELS], tl.float32)
    top_right = tl.zeros([TAPS, KERNELS], tl.float32)
    bottom_left = tl.zeros([TAPS, KERNELS], tl.float32)
    bottom_right = tl.zeros([TAPS, KERNELS], tl.float32)
    for split in tl.range(splits, loop_unroll_factor=4):
        numbers = partials + split * size
        top_left += tl.load(numbers + first, mask=real, other=0.0)
        top_right += tl.load(numbers + first + kernels, mask=real, other=0.0)
        bottom_left += tl.load(numbers + second, mask=real, other=0.0)
        bottom_right += tl.load(numbers + second + kernels, mask=real & drawn, other=0.0)
    value = blend(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction)
    by_row, by_col = slopes(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction)
    # Without a box the numbers are those asked for.
    value = tl.where(drawn, value, top_left)
    by_row = tl.where(drawn, by_row, top_right)
    by_col = tl.where(drawn, by_col, bottom_left)
    place = kernel.to(tl.int64) * taps + tap
    factor = tl.load(weight + place).to(tl.float32)
    tl.store(by_weight + place, value, mask=real)
    tl.store(by_position + 2 * place, factor * by_row, mask=real)
    tl.store(by_position + 2 * place + 1, factor * by_col, mask=real)

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""CUDA kernels for the boxes of dense layers with few outputs: chosen, drawn on, and read. Letters as in ``sampling``.

A tap's box has 3 x 3 cells around the median of its positions over the channels. Entries (channel * T + tap) whose
samples are not sums over the box are listed.
"""

import triton
import triton.language as tl


@triton.jit
def _rounded_median(values, real, channels, limit):
    """Rounds the median of some numbers, clamped to the limit; what is not a number is larger than all."""
    low = -limit
    high = limit
    while low < high:
        middle = low + (high - low) // 2
        below = tl.sum(((values <= middle) & real).to(tl.int32))
        enough = below > channels // 2
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return low


@triton.jit(do_not_specialize=["channels", "taps", "origin_row", "origin_col", "limit"])
def boxes_kernel(positions, firsts, offsets, channels, taps, origin_row, origin_col, limit, CHANNELS: tl.constexpr):
    """Chooses boxes: first cells [T, 2] and, with the origin, the offsets of all cells [T * 9, 2]. Grid: T."""
    tap = tl.program_id(0)
    channel = tl.arange(0, CHANNELS)
    real = channel < channels
    place = positions + (channel * taps + tap) * 2
    rows = tl.floor(tl.load(place, mask=real, other=0.0).to(tl.float32) + 0.5)
    cols = tl.floor(tl.load(place + 1, mask=real, other=0.0).to(tl.float32) + 0.5)
    first_row = _rounded_median(rows, real, channels, limit) - 1
    first_col = _rounded_median(cols, real, channels, limit) - 1
    tl.store(firsts + 2 * tap, first_row)
    tl.store(firsts + 2 * tap + 1, first_col)
    cell = tl.arange(0, 16)
    target = offsets + (tap * 9 + cell) * 2
    tl.store(target, first_row + cell // 3 + origin_row, mask=cell < 9)
    tl.store(target + 1, first_col + cell % 3 + origin_col, mask=cell < 9)


@triton.jit
def _within(positions, firsts, entry, tap, mask):
    """Cell (0 or 1) and fraction of positions in their boxes by row and by col, and whether they are inside."""
    row = tl.load(positions + 2 * entry, mask=mask, other=0.0).to(tl.float32) - tl.load(firsts + 2 * tap).to(tl.float32)
    col = tl.load(positions + 2 * entry + 1, mask=mask, other=0.0).to(tl.float32)
    col -= tl.load(firsts + 2 * tap + 1).to(tl.float32)
    inside = (row >= 0) & (row < 2) & (col >= 0) & (col < 2)  # NaN is outside
    row_cell = tl.floor(row)
    col_cell = tl.floor(col)
    return row_cell, col_cell, row - row_cell, col - col_cell, inside


@triton.jit(do_not_specialize=["entries_number", "taps"])
def list_kernel(positions, firsts, entries, slots, count, entries_number, taps, BLOCK: tl.constexpr):
    """Lists the entries outside of their boxes in order; each entry's slot in the list is -1 inside. Grid: 1."""
    listed = tl.full([], 0, tl.int32)
    for start in range(0, entries_number, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        real = entry < entries_number
        _, _, _, _, inside = _within(positions, firsts, entry, entry % taps, real)
        outside = (real & (inside == 0)).to(tl.int32)
        slot = listed + tl.cumsum(outside) - 1
        tl.store(slots + entry, tl.where(outside == 1, slot, -1), mask=real)
        tl.store(entries + slot, entry, mask=outside == 1)
        listed += tl.sum(outside)
    tl.store(count, listed)


@triton.jit
def _cell_weight(cell, at, fraction, inside):
    """What a sample gives to, or takes from, a row (or column) of its box, and the derivative by the position."""
    first = inside & (at == cell)
    second = inside & (at == cell - 1)
    return tl.where(first, 1 - fraction, 0.0) + tl.where(second, fraction, 0.0), second.to(tl.float32) - first.to(
        tl.float32
    )


@triton.jit(do_not_specialize=["outputs", "channels", "taps"])
def spread_kernel(weight, positions, firsts, spread, outputs, channels, taps, BLOCK: tl.constexpr):
    """Draws weights [N, C, T] on the cells [T * 9 * N, C]. Grid: T x blocks of channels."""
    blocks = tl.cdiv(channels, BLOCK)
    tap = tl.program_id(0) // blocks
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    entry = channel * taps + tap
    row_cell, col_cell, row_fraction, col_fraction, inside = _within(positions, firsts, entry, tap, real)
    for kernel in range(outputs):
        factor = tl.load(weight + kernel * channels * taps + entry, mask=real, other=0.0).to(tl.float32)
        for cell in tl.static_range(9):
            by_row, _ = _cell_weight(cell // 3, row_cell, row_fraction, inside)
            by_col, _ = _cell_weight(cell % 3, col_cell, col_fraction, inside)
            target = spread + ((tap * 9 + cell) * outputs + kernel).to(tl.int64) * channels + channel
            tl.store(target, (factor * by_row * by_col).to(spread.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["outputs", "channels", "taps"])
def gather_kernel(
    by_cell,
    weight,
    positions,
    firsts,
    slots,
    listed_weight,
    listed_positions,
    by_weight,
    by_position,
    outputs,
    channels,
    taps,
    LISTED_OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reads the gradients of weights [N, C, T] and positions [C, T, 2] off those of the cells [T * 9 * N, C].

    Listed entries have theirs in listed_weight [slots, LISTED_OUTPUTS] and listed_positions [C, T, 2]. Grid: T x blocks
    of channels.
    """
    blocks = tl.cdiv(channels, BLOCK)
    tap = tl.program_id(0) // blocks
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    entry = channel * taps + tap
    row_cell, col_cell, row_fraction, col_fraction, inside = _within(positions, firsts, entry, tap, real)
    slot = tl.load(slots + entry, mask=real, other=-1)
    row_total = tl.load(listed_positions + 2 * entry, mask=real, other=0.0)
    col_total = tl.load(listed_positions + 2 * entry + 1, mask=real, other=0.0)
    for kernel in range(outputs):
        factor = tl.load(weight + kernel * channels * taps + entry, mask=real, other=0.0).to(tl.float32)
        total = tl.load(listed_weight + slot * LISTED_OUTPUTS + kernel, mask=slot >= 0, other=0.0)
        row_sum = tl.zeros([BLOCK], tl.float32)
        col_sum = tl.zeros([BLOCK], tl.float32)
        for cell in tl.static_range(9):
            by_row, row_slope = _cell_weight(cell // 3, row_cell, row_fraction, inside)
            by_col, col_slope = _cell_weight(cell % 3, col_cell, col_fraction, inside)
            source = by_cell + ((tap * 9 + cell) * outputs + kernel).to(tl.int64) * channels + channel
            value = tl.load(source, mask=real & inside, other=0.0)
            total += value * by_row * by_col
            row_sum += value * row_slope * by_col
            col_sum += value * by_row * col_slope
        tl.store(by_weight + kernel * channels * taps + entry, total, mask=real)
        row_total += row_sum * factor
        col_total += col_sum * factor
    tl.store(by_position + 2 * entry, row_total, mask=real)
    tl.store(by_position + 2 * entry + 1, col_total, mask=real)

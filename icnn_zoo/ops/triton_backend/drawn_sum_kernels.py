# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment, var-annotated"
"""CUDA kernels that sum over the cells of drawn kernels, and over pixels for each cell.

A thread computes ``PART`` outputs, one below the other: a column of cells and the pixels beside them are read once for
all products of both. Letters as in ``sampling``, boxes as in ``drawn_kernels``.
"""

import triton
import triton.language as tl

from icnn_zoo.ops.triton_backend.drawn_kernels import load_box
from icnn_zoo.ops.triton_backend.sampling import GATHERING, blend, slopes, split_position


@triton.jit
def _number_columns(block, columns, width, COLUMNS: tl.constexpr):
    """Image and column of each of a block's columns [COLUMNS, 1] of pixels, and whether there is one."""
    number = block * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    last = tl.minimum(number, columns - 1)
    image = last // width
    return image.to(tl.int64), last - image * width, number < columns


@triton.jit
def _within(place, size):
    """Whether a row or col is one of the image. Unsigned, so that one comparison finds negative ones too."""
    return place.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


@triton.jit
def _read_column(pixel, step, row, height, real, SIZE: tl.constexpr):
    """Reads SIZE pixels, one below the other from a row on, in float32; zeros outside of the image."""
    values = ()
    for index in tl.static_range(SIZE):
        inside = real & _within(row + index, height)
        values += (tl.load(pixel, mask=inside, other=0.0).to(tl.float32),)
        pixel += step
    return values


@triton.jit
def _add_products(sums, grads, values, STRIDE_ROW: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr):
    """Adds the products of the output's gradient and the input below each other to the sums of a column of cells."""
    added = ()
    for cell in tl.static_range(ROWS):
        total = sums[cell]
        for part in tl.static_range(PART):
            total += grads[part] * values[part * STRIDE_ROW + cell]
        added += (total,)
    return added


@triton.jit
def _read_around(image, step_row, step_col, row, col, height, width, real):
    """Reads the four pixels from (row, col) to (row + 1, col + 1) in float32; zeros outside of the image."""
    top = real & _within(row, height)
    bottom = real & _within(row + 1, height)
    left = _within(col, width)
    right = _within(col + 1, width)
    first = image + (row.to(tl.int64) * step_row + col.to(tl.int64) * step_col)
    second = first + step_row
    return (
        tl.load(first, mask=top & left, other=0.0).to(tl.float32),
        tl.load(first + step_col, mask=top & right, other=0.0).to(tl.float32),
        tl.load(second, mask=bottom & left, other=0.0).to(tl.float32),
        tl.load(second + step_col, mask=bottom & right, other=0.0).to(tl.float32),
    )


@triton.jit(do_not_specialize=["taps", "columns", *GATHERING])
def drawn_sum_kernel(
    source,
    cells,
    boxes,
    weight,
    positions,
    bias,
    target,
    kernels,
    multiplier,
    taps,
    columns,
    height,
    width,
    out_height,
    out_width,
    origin_row,
    origin_col,
    bound_row,
    bound_col,
    source_image,
    source_channel,
    source_row,
    source_col,
    target_image,
    target_channel,
    target_row,
    target_col,
    STRIDE_ROW: tl.constexpr,
    STRIDE_COL: tl.constexpr,
    ADJOINT: tl.constexpr,
    PER_KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Computes the output from the input, or with ADJOINT the input's gradient from the output's.

    With ADJOINT, which takes strides of 1, height and width are those of the output, out_height and out_width those of
    the input. Grid: groups of output (or input) channels x parts of rows x blocks of columns.
    """
    blocks = tl.cdiv(columns, COLUMNS)
    parts = tl.cdiv(out_height, PART)
    group = tl.program_id(0) // (blocks * parts)
    first = tl.program_id(0) // blocks % parts * PART
    image, col, real = _number_columns(tl.program_id(0) % blocks, columns, out_width, COLUMNS)
    channel = group * GROUP + tl.arange(0, GROUP)[None, :]
    targets = kernels
    steps = 1
    box = boxes + 4 * (group // multiplier)
    if ADJOINT:
        targets = kernels // multiplier
        steps = multiplier
        box = boxes + 4 * group
    real = real & (channel < targets)
    first_row, first_col, rows, cols = load_box(box)
    source += image * source_image
    target += image * target_image + channel.to(tl.int64) * target_channel + col.to(tl.int64) * target_col
    start = tl.zeros([COLUMNS, GROUP], tl.float32)
    if HAS_BIAS:
        start += tl.load(bias + channel, mask=channel < targets, other=0.0).to(tl.float32)
    if rows > 0:
        top = first * STRIDE_ROW + first_row
        left = col * STRIDE_COL + first_col
        if ADJOINT:
            top = first - (first_row + rows - 1)
            left = col - (first_col + cols - 1)
        totals = ()
        for _ in tl.static_range(PART):
            totals += (start,)
        for step in range(steps):
            kernel = channel * steps + step
            read = kernel
            if not ADJOINT:
                read = kernel // multiplier
            plane = source + read.to(tl.int64) * source_channel
            down = rows * 0
            right = rows * 0
            for _number in range(rows // ROWS * cols):
                cell = down * cols + right
                below = cols * kernels
                if ADJOINT:
                    cell = rows * cols - 1 - cell
                    below = -below
                factor = cells + cell.to(tl.int64) * kernels + kernel
                factors = ()
                for _ in tl.static_range(ROWS):
                    factors += (tl.load(factor, mask=channel < targets, other=0.0),)
                    factor += below
                inside = real & _within(left + right, width)
                pixel = plane + (top + down).to(tl.int64) * source_row + (left + right).to(tl.int64) * source_col
                values = _read_column(pixel, source_row, top + down, height, inside, (PART - 1) * STRIDE_ROW + ROWS)
                added = ()
                for part in tl.static_range(PART):
                    total = totals[part]
                    for index in tl.static_range(ROWS):
                        total += factors[index] * values[part * STRIDE_ROW + index]
                    added += (total,)
                totals = added
                # Not two loops: the compiler would keep a pointer to each row in registers.
                right += 1
                down = tl.where(right == cols, down + ROWS, down)
                right = tl.where(right == cols, 0, right)
        for part in tl.static_range(PART):
            place = target + (first + part).to(tl.int64) * target_row
            tl.store(place, totals[part].to(target.dtype.element_ty), mask=real & (first + part < out_height))
    else:
        channel = tl.minimum(channel, targets - 1)
        for part in range(PART):
            row = first + part
            total = start
            for number in range(steps * taps):
                kernel = channel * steps + number // taps
                read = kernel
                if not ADJOINT:
                    read = kernel // multiplier
                owner = kernel
                if not PER_KERNEL:
                    owner = kernel // multiplier
                tap = number % taps
                row_shift, col_shift, row_fraction, col_fraction = split_position(
                    positions, owner.to(tl.int64) * taps + tap, origin_row, origin_col, bound_row, bound_col
                )
                if ADJOINT:
                    row_shift = -row_shift - 1
                    col_shift = -col_shift - 1
                    row_fraction = 1 - row_fraction
                    col_fraction = 1 - col_fraction
                top_left, top_right, bottom_left, bottom_right = _read_around(
                    source + read.to(tl.int64) * source_channel,
                    source_row,
                    source_col,
                    row * STRIDE_ROW + row_shift,
                    col * STRIDE_COL + col_shift,
                    height,
                    width,
                    real,
                )
                values = blend(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction)
                total += tl.load(weight + kernel.to(tl.int64) * taps + tap).to(tl.float32) * values
            place = target + row.to(tl.int64) * target_row
            tl.store(place, total.to(target.dtype.element_ty), mask=real & (row < out_height))


@triton.jit(do_not_specialize=["taps", "columns", "split_steps", *GATHERING])
def drawn_gradient_kernel(
    target,
    source,
    boxes,
    positions,
    partials,
    kernels,
    multiplier,
    taps,
    columns,
    split_steps,
    height,
    width,
    out_height,
    out_width,
    origin_row,
    origin_col,
    bound_row,
    bound_col,
    source_image,
    source_channel,
    source_row,
    source_col,
    target_image,
    target_channel,
    target_row,
    target_col,
    STRIDE_ROW: tl.constexpr,
    STRIDE_COL: tl.constexpr,
    PER_KERNEL: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    PART: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIP: tl.constexpr,
    STRIPS: tl.constexpr,
):
    """Sums the output's gradient (target) times the input (source), over pixels, for each cell: [splits, CELLS, N].

    Without a box the numbers are three for each tap: with its sample, its slope by row and its slope by col.
    Grid: splits x strips of a box's columns x groups of output channels.
    """
    groups = tl.cdiv(kernels, GROUP)
    group = tl.program_id(0) % groups
    strip = tl.program_id(0) // groups % STRIPS
    split = tl.program_id(0) // (groups * STRIPS)
    parts = tl.cdiv(out_height, PART)
    lane = tl.arange(0, GROUP)
    kernel = (group * GROUP + lane)[None, :]
    channel = kernel // multiplier
    target += kernel.to(tl.int64) * target_channel
    source += channel.to(tl.int64) * source_channel
    partials += split.to(tl.int64) * CELLS * kernels + group * GROUP + lane
    wanted = group * GROUP + lane < kernels
    first_row, first_col, rows, cols = load_box(boxes + 4 * (group // multiplier))
    across = tl.cdiv(cols, STRIP)
    for place in range(strip, rows // ROWS * across, STRIPS):
        down = place // across * ROWS
        right = place % across * STRIP
        sums = ()
        for _ in tl.static_range(STRIP * ROWS):
            sums += (tl.zeros([COLUMNS, GROUP], tl.float32),)
        for step in range(split * split_steps, (split + 1) * split_steps):
            image, col, real = _number_columns(step // parts, columns, out_width, COLUMNS)
            real = real & (kernel < kernels)
            first = step % parts * PART
            pixel = target + (image * target_image + first.to(tl.int64) * target_row + col.to(tl.int64) * target_col)
            grads = _read_column(pixel, target_row, first, out_height, real, PART)
            top = first * STRIDE_ROW + first_row + down
            left = col * STRIDE_COL + first_col + right
            pixel = source + (image * source_image + top.to(tl.int64) * source_row + left.to(tl.int64) * source_col)
            added = ()
            for index in tl.static_range(STRIP):
                column = ()
                for cell in tl.static_range(ROWS):
                    column += (sums[index * ROWS + cell],)
                if right + index < cols:
                    inside = real & _within(left + index, width)
                    beside = pixel + index * source_col
                    values = _read_column(beside, source_row, top, height, inside, (PART - 1) * STRIDE_ROW + ROWS)
                    column = _add_products(column, grads, values, STRIDE_ROW, ROWS, PART)
                added += column
            sums = added
        for index in tl.static_range(STRIP):
            for cell in tl.static_range(ROWS):
                numbers = partials + ((down + cell) * cols + (right + index)).to(tl.int64) * kernels
                total = tl.sum(sums[index * ROWS + cell], axis=0)
                tl.store(numbers, total, mask=wanted & (right + index < cols))
    if rows == 0:
        owner = tl.minimum(kernel, kernels - 1)
        if not PER_KERNEL:
            owner = owner // multiplier
        for tap in range(strip, taps, STRIPS):
            row_shift, col_shift, row_fraction, col_fraction = split_position(
                positions, owner.to(tl.int64) * taps + tap, origin_row, origin_col, bound_row, bound_col
            )
            by_value = tl.zeros([COLUMNS, GROUP], tl.float32)
            by_row = tl.zeros([COLUMNS, GROUP], tl.float32)
            by_col = tl.zeros([COLUMNS, GROUP], tl.float32)
            for number in range(split * split_steps * PART, (split + 1) * split_steps * PART):
                step = number // PART
                image, col, real = _number_columns(step // parts, columns, out_width, COLUMNS)
                real = real & (kernel < kernels)
                row = step % parts * PART + number % PART
                real = real & (row < out_height)
                pixel = target + (image * target_image + row.to(tl.int64) * target_row + col.to(tl.int64) * target_col)
                grad = tl.load(pixel, mask=real, other=0.0).to(tl.float32)
                top_left, top_right, bottom_left, bottom_right = _read_around(
                    source + image * source_image,
                    source_row,
                    source_col,
                    row * STRIDE_ROW + row_shift,
                    col * STRIDE_COL + col_shift,
                    height,
                    width,
                    real,
                )
                values = blend(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction)
                row_slope, col_slope = slopes(
                    top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction
                )
                by_value += tl.where(real, grad * values, 0.0)
                by_row += tl.where(real, grad * row_slope, 0.0)
                by_col += tl.where(real, grad * col_slope, 0.0)
            numbers = partials + 3 * tap * kernels
            tl.store(numbers, tl.sum(by_value, axis=0), mask=wanted)
            tl.store(numbers + kernels, tl.sum(by_row, axis=0), mask=wanted)
            tl.store(numbers + 2 * kernels, tl.sum(by_col, axis=0), mask=wanted)

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The CUDA kernels of the irregular convolution, in Triton.

Letters: B images, C input channels, N output channels, G groups, T taps, L pixels of all images of a call, flattened.

A *plane* is one channel of one image, copied to a layout in which reading at any shift needs no test by row and, for
shifts up to ``gap`` columns, none by column either: rows of ``pitch = W + gap`` elements, the last ``gap`` of them zero
(they are also the left border of the next row), with ``pitch + 2`` zeros before and after. The flat index of a read is
clamped to ``[-pitch - 2, H * pitch]``, beyond which all four corners lie in the zeros.

A program's pixels are told apart by flat numbers over (image, row, col): small maps still fill a block. These numbers,
and where an image starts in what a launch reads, are 32 bits wide (a launch with several images is small, and the first
image starts at 0); where a channel starts is a scalar of 64 bits.

Every sum has a fixed order and there are no atomics.
"""

import triton
import triton.language as tl

# The interpreter's `tl.dot` multiplies the bits of bfloat16 numbers: it gets float32.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _shift(positions, tap, origin_row, origin_col, bound_row, bound_col):
    """Splits the position of a tap into integer shifts (origin included) and fractions.

    Past the bounds every read is outside the input, so clamping does not change the function. NaN and infinite
    positions get shift 0 or a bound, which is safe to read at, and the fraction NaN, which is what comes out.
    """
    row = tl.load(positions + 2 * tap)
    col = tl.load(positions + 2 * tap + 1)
    row_floor = tl.floor(row)
    col_floor = tl.floor(col)
    row_fraction = (row - row_floor).to(tl.float32)
    col_fraction = (col - col_floor).to(tl.float32)
    row_floor = tl.where(row_floor == row_floor, row_floor, 0.0)
    col_floor = tl.where(col_floor == col_floor, col_floor, 0.0)
    row_shift = tl.minimum(tl.maximum(row_floor, -bound_row), bound_row).to(tl.int32) + origin_row
    col_shift = tl.minimum(tl.maximum(col_floor, -bound_col), bound_col).to(tl.int32) + origin_col
    return row_shift, col_shift, row_fraction, col_fraction


@triton.jit
def _pixels(block, length, image_size, width, BLOCK: tl.constexpr):
    """Numbers of a block's pixels, and image, row and col of each; those past the end repeat the last pixel."""
    number = block * BLOCK + tl.arange(0, BLOCK)
    last = tl.minimum(number, length - 1)
    image = last // image_size
    pixel = last - image * image_size
    row = pixel // width
    return number, image, pixel, row, pixel - row * width


@triton.jit
def _corners(base, start, flat, column, row_shift, col_shift, height, width, pitch, last_free_shift):
    """Reads the four neighbours of every sample in float32: top left, top right, bottom left, bottom right.

    Args:
        base: Pointer to the pixel (0, 0) of the plane in the first image.
        start: Where each sample's image starts.
        flat: Flat index of each sample in its plane before the shift.
        column: Column of each sample before the shift.
        row_shift: Rows to shift by, one for all samples.
        col_shift: Columns to shift by, one for all samples.
        height: Rows of a plane.
        width: Used columns of a plane.
        pitch: Columns of a plane with its gap.
        last_free_shift: Largest shift that leaves all columns within the plane's own gap.
    """
    index = flat + (row_shift * pitch + col_shift)
    index = start + tl.minimum(tl.maximum(index, -pitch - 2), height * pitch)
    top = base + index
    bottom = base + pitch + index
    if (col_shift >= width - pitch) & (col_shift <= last_free_shift):
        top_left = tl.load(top)
        top_right = tl.load(top + 1)
        bottom_left = tl.load(bottom)
        bottom_right = tl.load(bottom + 1)
    else:
        moved = column + col_shift
        left = (moved >= 0) & (moved < width)
        right = (moved >= -1) & (moved < width - 1)
        top_left = tl.load(top, mask=left, other=0.0)
        top_right = tl.load(top + 1, mask=right, other=0.0)
        bottom_left = tl.load(bottom, mask=left, other=0.0)
        bottom_right = tl.load(bottom + 1, mask=right, other=0.0)
    return top_left.to(tl.float32), top_right.to(tl.float32), bottom_left.to(tl.float32), bottom_right.to(tl.float32)


@triton.jit
def _blend(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction):
    """Interpolates. Products with both weights, not lerp: an infinite pixel must not meet its own negative."""
    top = top_left * (1 - col_fraction) + top_right * col_fraction
    bottom = bottom_left * (1 - col_fraction) + bottom_right * col_fraction
    return top * (1 - row_fraction) + bottom * row_fraction


@triton.jit
def _output_place(place, size, STRIDE: tl.constexpr):
    """Row (or col) of the output whose samples start at a row of the input, and whether there is one."""
    # Unsigned, so that one comparison finds negative rows too.
    unsigned = place.to(tl.uint32, bitcast=True)
    quotient = unsigned // STRIDE
    inside = (quotient < size.to(tl.uint32, bitcast=True)) & (quotient * STRIDE == unsigned)
    return quotient.to(tl.int32, bitcast=True), inside


@triton.jit
def _gather_adjoint(
    base,
    start,
    flat,
    row,
    col,
    row_shift,
    col_shift,
    row_fraction,
    col_fraction,
    height,
    width,
    STRIDE_ROW: tl.constexpr,
    STRIDE_COL: tl.constexpr,
):
    """The exact adjoint of :func:`_blend` at shifted reads: what input pixels get from the samples next to them.

    The sample at an input pixel minus the shift has the pixel as its top left corner, the one a row up has it as its
    bottom left corner, and so on. With stride 1 ``flat`` is the pixel's place in the output, ``start`` its image's.
    """
    row = row - row_shift
    col = col - col_shift
    top_row, top = _output_place(row, height, STRIDE_ROW)
    bottom_row, bottom = _output_place(row - 1, height, STRIDE_ROW)
    left_col, left = _output_place(col, width, STRIDE_COL)
    right_col, right = _output_place(col - 1, width, STRIDE_COL)
    if STRIDE_ROW == 1 and STRIDE_COL == 1:
        # The same addresses as below, in fewer instructions.
        index = flat - (row_shift * width + col_shift)
        top_left = base + index
        top_right = top_left - 1
        bottom_left = base - width + index
        bottom_right = bottom_left - 1
    else:
        top_left = base + (start + top_row * width + left_col)
        top_right = base + (start + top_row * width + right_col)
        bottom_left = base + (start + bottom_row * width + left_col)
        bottom_right = base + (start + bottom_row * width + right_col)
    return _blend(
        tl.load(top_left, mask=top & left, other=0.0).to(tl.float32),
        tl.load(top_right, mask=top & right, other=0.0).to(tl.float32),
        tl.load(bottom_left, mask=bottom & left, other=0.0).to(tl.float32),
        tl.load(bottom_right, mask=bottom & right, other=0.0).to(tl.float32),
        row_fraction,
        col_fraction,
    )


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


@triton.jit(
    do_not_specialize=[
        "channels",
        "taps",
        "length",
        "column_pitch",
        "height",
        "width",
        "pitch",
        "plane_size",
        "out_height",
        "out_width",
        "origin_row",
        "origin_col",
        "bound_row",
        "bound_col",
        "last_free_shift",
    ]
)
def columns_kernel(
    planes,
    positions,
    columns,
    partials,
    channels,
    taps,
    length,
    column_pitch,
    height,
    width,
    pitch,
    plane_size,
    out_height,
    out_width,
    origin_row,
    origin_col,
    bound_row,
    bound_col,
    last_free_shift,
    STRIDE_ROW: tl.constexpr,
    STRIDE_COL: tl.constexpr,
    GRADIENT: tl.constexpr,
    STORE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Makes columns [C * T, column_pitch * VECTOR] from planes [B, C]. Grid: C x blocks of pixels.

    With GRADIENT ``columns`` holds the columns' gradient: the positions' gradient goes to ``partials``
    [blocks, C, T, 2]. With STORE the columns are written, over their gradient if there is one.
    """
    blocks = tl.cdiv(length, BLOCK)
    channel = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    number, image, _, row, col = _pixels(block, length, out_height * out_width, out_width, BLOCK)
    real = number < length
    # A mask as aligned as the rows are: what lies past the end of a row is read and written, but never used.
    in_row = number < column_pitch * VECTOR
    column = col * STRIDE_COL
    flat = row * (STRIDE_ROW * pitch) + column
    base = planes + (channel.to(tl.int64) * plane_size + (pitch + 2))
    start = image * (channels * plane_size)
    for tap in range(taps):
        owner = channel.to(tl.int64) * taps + tap
        row_shift, col_shift, row_fraction, col_fraction = _shift(
            positions, owner, origin_row, origin_col, bound_row, bound_col
        )
        top_left, top_right, bottom_left, bottom_right = _corners(
            base, start, flat, column, row_shift, col_shift, height, width, pitch, last_free_shift
        )
        # VECTOR elements a lane are known to be aligned: it decides how wide a lane's stores are.
        target = columns + owner * (column_pitch.to(tl.int64) * VECTOR) + number
        if GRADIENT:
            grad = tl.load(target, mask=in_row, other=0.0).to(tl.float32)
            by_row = (bottom_left - top_left) * (1 - col_fraction) + (bottom_right - top_right) * col_fraction
            by_col = (top_right - top_left) * (1 - row_fraction) + (bottom_right - bottom_left) * row_fraction
            partial = partials + ((block.to(tl.int64) * channels + channel) * taps + tap) * 2
            tl.store(partial, tl.sum(tl.where(real, grad * by_row, 0.0)))
            tl.store(partial + 1, tl.sum(tl.where(real, grad * by_col, 0.0)))
        if STORE:
            values = _blend(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction)
            tl.store(target, values.to(columns.dtype.element_ty), mask=in_row)


@triton.jit(
    do_not_specialize=[
        "taps",
        "length",
        "column_pitch",
        "stride_image",
        "height",
        "width",
        "out_height",
        "out_width",
        "origin_row",
        "origin_col",
        "bound_row",
        "bound_col",
    ]
)
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
    number, image, pixel, row, col = _pixels(tl.program_id(0) % blocks, length, height * width, width, BLOCK)
    start = image * (out_height * out_width)
    flat = start + row * out_width + col
    total = tl.zeros([BLOCK], tl.float32)
    for tap in range(taps):
        owner = channel.to(tl.int64) * taps + tap
        row_shift, col_shift, row_fraction, col_fraction = _shift(
            positions, owner, origin_row, origin_col, bound_row, bound_col
        )
        total += _gather_adjoint(
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
        "outputs",
        "group_outputs",
        "group_channels",
        "taps",
        "length",
        "height",
        "width",
        "pitch",
        "plane_size",
        "out_height",
        "out_width",
        "origin_row",
        "origin_col",
        "bound_row",
        "bound_col",
        "last_free_shift",
    ]
)
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
    pitch,
    plane_size,
    out_height,
    out_width,
    origin_row,
    origin_col,
    bound_row,
    bound_col,
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
    number, image, pixel, row, col = _pixels(tl.program_id(0) % blocks, length, size, out_width, BLOCK)
    column = col * STRIDE_COL
    flat = row * (STRIDE_ROW * pitch) + column
    channels = outputs // group_outputs * group_channels
    first = kernel // group_outputs * group_channels
    base = planes + (first.to(tl.int64) * plane_size + (pitch + 2))
    start = image * (channels * plane_size)
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + kernel).to(tl.float32)
    for entry in range(group_channels * taps):
        in_kernel = entry // taps
        place = kernel.to(tl.int64) * group_channels * taps + entry
        owner = place
        if not PER_KERNEL:
            owner = first.to(tl.int64) * taps + entry
        row_shift, col_shift, row_fraction, col_fraction = _shift(
            positions, owner, origin_row, origin_col, bound_row, bound_col
        )
        top_left, top_right, bottom_left, bottom_right = _corners(
            base + in_kernel.to(tl.int64) * plane_size,
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
        values = _blend(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction)
        total += tl.load(weight + place).to(tl.float32) * values
    target = output + (image.to(tl.int64) * outputs + kernel) * size + pixel
    tl.store(target, total.to(output.dtype.element_ty), mask=number < length)


@triton.jit(
    do_not_specialize=[
        "outputs",
        "group_outputs",
        "group_channels",
        "taps",
        "length",
        "height",
        "width",
        "out_height",
        "out_width",
        "origin_row",
        "origin_col",
        "bound_row",
        "bound_col",
    ]
)
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
    number, image, pixel, row, col = _pixels(tl.program_id(0) % blocks, length, height * width, width, BLOCK)
    size = out_height * out_width
    channels = outputs // group_outputs * group_channels
    in_kernel = channel % group_channels
    first = channel // group_channels * group_outputs
    base = grad_output + first.to(tl.int64) * size
    start = image * (outputs * size)
    flat = start + row * out_width + col
    total = tl.zeros([BLOCK], tl.float32)
    for entry in range(group_outputs * taps):
        kernel = entry // taps
        place = ((first + kernel).to(tl.int64) * group_channels + in_kernel) * taps + (entry - kernel * taps)
        owner = place
        if not PER_KERNEL:
            owner = channel.to(tl.int64) * taps + (entry - kernel * taps)
        row_shift, col_shift, row_fraction, col_fraction = _shift(
            positions, owner, origin_row, origin_col, bound_row, bound_col
        )
        values = _gather_adjoint(
            base + kernel.to(tl.int64) * size,
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
        total += tl.load(weight + place).to(tl.float32) * values
    target = grad_planes + (image.to(tl.int64) * channels + channel) * (height * width) + pixel
    tl.store(target, total.to(grad_planes.dtype.element_ty), mask=number < length)


@triton.jit(
    do_not_specialize=[
        "outputs",
        "group_outputs",
        "group_channels",
        "taps",
        "length",
        "split_blocks",
        "height",
        "width",
        "pitch",
        "plane_size",
        "out_height",
        "out_width",
        "origin_row",
        "origin_col",
        "bound_row",
        "bound_col",
        "last_free_shift",
    ]
)
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
    pitch,
    plane_size,
    out_height,
    out_width,
    origin_row,
    origin_col,
    bound_row,
    bound_col,
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
        number, image, pixel, row, col = _pixels(split * split_blocks + step, length, size, out_width, BLOCK)
        real = number < length
        column = col * STRIDE_COL
        flat = row * (STRIDE_ROW * pitch) + column
        base = planes + (channel.to(tl.int64) * plane_size + (pitch + 2))
        start = image * (channels * plane_size)
        place = image * (outputs * size) + pixel
        grad = tl.load(grad_output + kernel.to(tl.int64) * size + place, mask=real, other=0.0).to(tl.float32)
        for tap in range(taps):
            row_shift, col_shift, row_fraction, col_fraction = _shift(
                positions, owner.to(tl.int64) * taps + tap, origin_row, origin_col, bound_row, bound_col
            )
            top_left, top_right, bottom_left, bottom_right = _corners(
                base, start, flat, column, row_shift, col_shift, height, width, pitch, last_free_shift
            )
            values = _blend(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction)
            row_slope = (bottom_left - top_left) * (1 - col_fraction) + (bottom_right - top_right) * col_fraction
            col_slope = (top_right - top_left) * (1 - row_fraction) + (bottom_right - bottom_left) * row_fraction
            here = numbers == tap
            by_weight += tl.where(here, tl.sum(tl.where(real, grad * values, 0.0)), 0.0)
            by_row += tl.where(here, tl.sum(tl.where(real, grad * row_slope, 0.0)), 0.0)
            by_col += tl.where(here, tl.sum(tl.where(real, grad * col_slope, 0.0)), 0.0)
    target = partials + (tl.program_id(0).to(tl.int64) * taps + numbers) * 3
    tl.store(target, by_weight, mask=numbers < taps)
    tl.store(target + 1, by_row, mask=numbers < taps)
    tl.store(target + 2, by_col, mask=numbers < taps)


@triton.jit(
    do_not_specialize=[
        "groups",
        "group_outputs",
        "group_channels",
        "taps",
        "length",
        "split_entries",
        "height",
        "width",
        "pitch",
        "plane_size",
        "out_height",
        "out_width",
        "stride_split",
        "stride_image",
        "stride_output",
        "stride_pixel",
        "origin_row",
        "origin_col",
        "bound_row",
        "bound_col",
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
    height,
    width,
    pitch,
    plane_size,
    out_height,
    out_width,
    stride_split,
    stride_image,
    stride_output,
    stride_pixel,
    origin_row,
    origin_col,
    bound_row,
    bound_col,
    STRIDE_ROW: tl.constexpr,
    STRIDE_COL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    number, image, pixel, row, col = _pixels(tl.program_id(0) % blocks, length, size, out_width, BLOCK_PIXELS)
    column = (col * STRIDE_COL)[:, None]
    flat = (row * (STRIDE_ROW * pitch) + col * STRIDE_COL)[:, None]
    start = (image * (groups * group_channels * plane_size))[:, None]
    kernels = tl.arange(0, BLOCK_OUTPUTS)
    entries = group_channels * taps
    total = tl.zeros([BLOCK_PIXELS, BLOCK_OUTPUTS], tl.float32)
    for first in range(split * split_entries, tl.minimum((split + 1) * split_entries, entries), BLOCK_ENTRIES):
        entry = first + tl.arange(0, BLOCK_ENTRIES)
        known = tl.minimum(entry, entries - 1)
        row_shift, col_shift, row_fraction, col_fraction = _shift(
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
        values = _blend(
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
            total = tl.dot(values, factors, total, input_precision="ieee")
    kernel = group * group_outputs + kernels
    used = kernels < group_outputs
    if HAS_BIAS:
        total += tl.load(bias + kernel, mask=used, other=0.0).to(tl.float32)[None, :]
    target = output + split.to(tl.int64) * stride_split
    target += image.to(tl.int64) * stride_image + pixel.to(tl.int64) * stride_pixel
    target = target[:, None] + (kernel.to(tl.int64) * stride_output)[None, :]
    tl.store(target, total.to(output.dtype.element_ty), mask=(number < length)[:, None] & used[None, :])

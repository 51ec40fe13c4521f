# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What all CUDA kernels share: how pixels are numbered and how planes are read at a shift.

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

# Arguments that differ from call to call: a kernel is not compiled anew for each of their values. They are the names
# of what a Call hands to the kernels.
GATHERING = ["height", "width", "out_height", "out_width", "origin_row", "origin_col", "bound_row", "bound_col"]
SAMPLING = [*GATHERING, "pitch", "plane_size", "last_free_shift"]
GROUPING = ["group_outputs", "group_channels", "taps"]


@triton.jit
def split_position(positions, tap, origin_row, origin_col, bound_row, bound_col):
    """Splits the position of a tap into integer shifts (origin included) and fractions, as ``ops/interpolation.py``.

    Past the bounds every read is outside the input, so clamping does not change the function. NaN and infinite
    coordinates get shift 0 or a bound, which is safe to read at; both fractions are then NaN, which is what comes out.
    """
    row = tl.load(positions + 2 * tap)
    col = tl.load(positions + 2 * tap + 1)
    row_floor = tl.floor(row)
    col_floor = tl.floor(col)
    row_fraction = (row - row_floor).to(tl.float32)
    col_fraction = (col - col_floor).to(tl.float32)
    either = row_fraction * col_fraction  # NaN where one of them is
    row_fraction = tl.where(either == either, row_fraction, either)
    col_fraction = tl.where(either == either, col_fraction, either)
    row_floor = tl.where(row_floor == row_floor, row_floor, 0.0)
    col_floor = tl.where(col_floor == col_floor, col_floor, 0.0)
    row_shift = tl.minimum(tl.maximum(row_floor, -bound_row), bound_row).to(tl.int32) + origin_row
    col_shift = tl.minimum(tl.maximum(col_floor, -bound_col), bound_col).to(tl.int32) + origin_col
    return row_shift, col_shift, row_fraction, col_fraction


@triton.jit
def number_pixels(block, length, image_size, width, BLOCK: tl.constexpr):
    """Numbers of a block's pixels, and image, row and col of each; those past the end repeat the last pixel."""
    number = block * BLOCK + tl.arange(0, BLOCK)
    last = tl.minimum(number, length - 1)
    image = last // image_size
    pixel = last - image * image_size
    row = pixel // width
    return number, image, pixel, row, pixel - row * width


@triton.jit
def read_corners(base, start, flat, column, row_shift, col_shift, height, width, pitch, last_free_shift):
    """Reads the four neighbors of every sample in float32: top left, top right, bottom left, bottom right.

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
def blend(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction):
    """Interpolates. Products with both weights, not lerp: an infinite pixel must not meet its own negative."""
    top = top_left * (1 - col_fraction) + top_right * col_fraction
    bottom = bottom_left * (1 - col_fraction) + bottom_right * col_fraction
    return top * (1 - row_fraction) + bottom * row_fraction


@triton.jit
def slopes(top_left, top_right, bottom_left, bottom_right, row_fraction, col_fraction):
    """Derivatives of :func:`blend` by row and by col."""
    by_row = (bottom_left - top_left) * (1 - col_fraction) + (bottom_right - top_right) * col_fraction
    by_col = (top_right - top_left) * (1 - row_fraction) + (bottom_right - bottom_left) * row_fraction
    return by_row, by_col


@triton.jit
def _output_place(place, size, STRIDE: tl.constexpr):
    """Row (or col) of the output whose samples start at a row of the input, and whether there is one."""
    # Unsigned, so that one comparison finds negative rows too.
    unsigned = place.to(tl.uint32, bitcast=True)
    quotient = unsigned // STRIDE
    inside = (quotient < size.to(tl.uint32, bitcast=True)) & (quotient * STRIDE == unsigned)
    return quotient.to(tl.int32, bitcast=True), inside


@triton.jit
def gather_adjoint(
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
    """The exact adjoint of :func:`blend` at shifted reads: what input pixels get from the samples next to them.

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
    return blend(
        tl.load(top_left, mask=top & left, other=0.0).to(tl.float32),
        tl.load(top_right, mask=top & right, other=0.0).to(tl.float32),
        tl.load(bottom_left, mask=bottom & left, other=0.0).to(tl.float32),
        tl.load(bottom_right, mask=bottom & right, other=0.0).to(tl.float32),
        row_fraction,
        col_fraction,
    )

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""CUDA kernels for dense layers with few outputs: the shifts after the product. Letters as in ``sampling``.

A *cell* is an integer offset that one tap may read at; all channels of a tap share the cells of its box.
"""

import triton
import triton.language as tl

from icnn_zoo.ops.triton_backend.sampling import number_pixels

_SIZES = ["height", "width", "out_height", "out_width"]


@triton.jit(
    do_not_specialize=[
        "outputs",
        "cells",
        "length",
        "row_pitch",
        "splits",
        "stride_image",
        "stride_output",
        "stride_pixel",
        *_SIZES,
    ]
)
def shifted_sum_kernel(
    products,
    offsets,
    rest,
    bias,
    output,
    outputs,
    cells,
    length,
    row_pitch,
    splits,
    stride_image,
    stride_output,
    stride_pixel,
    height,
    width,
    out_height,
    out_width,
    STRIDE_ROW: tl.constexpr,
    STRIDE_COL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums products [cells * N, row_pitch] at the cells' offsets and rest [splits, N, L]. Grid: N x pixels."""
    blocks = tl.cdiv(length, BLOCK)
    kernel = tl.program_id(0) // blocks
    size = out_height * out_width
    number, image, pixel, row, col = number_pixels(tl.program_id(0) % blocks, length, size, out_width, BLOCK)
    real = number < length
    start = image * (height * width)
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + kernel).to(tl.float32)
    for cell in range(cells):
        at_row = row * STRIDE_ROW + tl.load(offsets + 2 * cell)
        at_col = col * STRIDE_COL + tl.load(offsets + 2 * cell + 1)
        inside = (at_row >= 0) & (at_row < height) & (at_col >= 0) & (at_col < width)
        source = products + (cell * outputs + kernel).to(tl.int64) * row_pitch
        total += tl.load(source + (start + at_row * width + at_col), mask=inside, other=0.0).to(tl.float32)
    for split in range(splits):
        place = (split * outputs + kernel).to(tl.int64) * length + number
        total += tl.load(rest + place, mask=real, other=0.0)
    target = output + image.to(tl.int64) * stride_image + kernel.to(tl.int64) * stride_output
    tl.store(target + pixel.to(tl.int64) * stride_pixel, total.to(output.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["outputs", "rows", "length", "row_pitch", *_SIZES])
def shift_gradient_kernel(
    grad_output,
    offsets,
    shifted,
    outputs,
    rows,
    length,
    row_pitch,
    height,
    width,
    out_height,
    out_width,
    STRIDE_ROW: tl.constexpr,
    STRIDE_COL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the output's gradient [B, N, Ho, Wo] at the cells' offsets to shifted [rows, row_pitch].

    Rows past those of cells and outputs get zeros. Grid: rows x blocks of the input's pixels.
    """
    blocks = tl.cdiv(row_pitch, BLOCK)
    row_number = tl.program_id(0) // blocks
    number, image, _, row, col = number_pixels(tl.program_id(0) % blocks, length, height * width, width, BLOCK)
    cell = row_number // outputs
    known = row_number < rows
    at_row = row - tl.load(offsets + 2 * cell, mask=known, other=0)
    at_col = col - tl.load(offsets + 2 * cell + 1, mask=known, other=0)
    out_row = at_row // STRIDE_ROW
    out_col = at_col // STRIDE_COL
    inside = known & (number < length)
    inside &= (at_row >= 0) & (out_row < out_height) & (out_row * STRIDE_ROW == at_row)
    inside &= (at_col >= 0) & (out_col < out_width) & (out_col * STRIDE_COL == at_col)
    source = (image * outputs + row_number % outputs) * (out_height * out_width) + out_row * out_width + out_col
    values = tl.load(grad_output + source, mask=inside, other=0.0)
    tl.store(shifted + row_number.to(tl.int64) * row_pitch + number, values, mask=number < row_pitch)

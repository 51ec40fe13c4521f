# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""CUDA kernels that copy images to planes and back. Letters as in ``sampling``."""

import triton
import triton.language as tl


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


@triton.jit(do_not_specialize=["channels", "pixels", "stride_image", "stride_pixel"])
def transpose_kernel(
    planes,
    target,
    channels,
    pixels,
    stride_image,
    stride_pixel,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Copies planes [B, C, P] to rows of pixels [B, P, C], whose channels lie side by side. Grid: B x tiles."""
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    tiles = tl.cdiv(pixels, BLOCK_PIXELS) * channel_blocks
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    channel = tile % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    pixel = tile // channel_blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    real = (channel < channels)[:, None] & (pixel < pixels)[None, :]
    source = planes + image * channels * pixels + channel.to(tl.int64)[:, None] * pixels + pixel[None, :]
    place = target + image * stride_image + pixel.to(tl.int64)[None, :] * stride_pixel + channel[:, None]
    tl.store(place, tl.load(source, mask=real, other=0.0), mask=real)

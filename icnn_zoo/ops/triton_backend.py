"""The irregular convolution on CUDA, with kernels in Triton (``triton_kernels``) and matrix products by cuBLAS.

Three forms, chosen from static sizes alone, so that nothing synchronises and CUDA graphs can hold the calls:

- *columns*, for dense layers: the input is copied to planes with zeros around them, a kernel reads every (channel, tap)
  at its sub-pixel shift into columns, and a matrix product does the rest, for as many images at a time as keep the
  columns within the L2 cache. The backward makes the columns' gradient by a matrix product; one kernel gathers the
  input's gradient from it, a second reads the planes once for both the positions' gradient and the columns, which
  overwrite their own gradient on the way to the weights' gradient.
- *fused*, the forward of layers with few outputs in a group (a classifier): columns are made in registers, multiplied
  at once and never stored. Its backward is that of *columns*.
- *direct*, for depthwise layers, tiny groups and the full version: the taps are summed one by one, without columns.
  The full version costs an interpolation for each output channel, input channel and tap.

Choice, block sizes and chunk sizes are fixed numbers, not tuned at run time: a sum has the same order on every run.
They follow from instruction counts of the compiled kernels and await timings on a GPU.

Positions, fractions and interpolation are float32; a column is rounded once to the dtype of the input; products sum in
float32. What lies outside the input is never read, wherever the positions are.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry, memory_format

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

# The oldest GPUs with bfloat16.
_CAPABILITY = (8, 0)

# Zero columns after each row of a plane. A shift of up to that many columns needs no test for the plane's left and
# right border; a larger one takes a slower branch.
_GAP = 16

# Columns of a chunk of images: well within the 40 to 60 MB of L2 that an A100, H100 or H200 has.
_CHUNK_BYTES = 32 * 2**20

# Columns of a single image above which its channels are taken in parts.
_IMAGE_BYTES = 128 * 2**20

# Rows of columns start at multiples of this many elements: vector stores, and fast kernels in cuBLAS.
_COLUMN_ALIGNMENT = 16

# Most input channels times output channels of a group, and most outputs of a group, that are computed directly.
_DIRECT_PRODUCT, _DIRECT_OUTPUTS = 32, 2

# Most outputs of a group for which columns are made in registers.
_FUSED_OUTPUTS = 32

# Pixels and entries (channels times taps) of a tile of columns there: 128 registers a thread, so 16 warps at once.
_FUSED_TILE = (64, 16)

# The programs that a launch should have at least, where a sum can be split to get there.
_PROGRAMS = 512

_MAX_INT = 2**31 - 1


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on a device, in words that follow "cannot run: ", or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device; the input is on {device}"
    if importlib.util.find_spec("triton") is None:
        return "it needs the package triton (pip install triton)"
    if torch.version.hip is not None:
        return "it was made for NVIDIA's GPUs; this PyTorch is for AMD's"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        needed, given = (".".join(map(str, version)) for version in (_CAPABILITY, capability))
        return f"it needs compute capability {needed} or newer; this is {given}"
    return None


def supports(dtype: torch.dtype) -> bool:
    """Whether this backend computes in a dtype."""
    return dtype in (torch.float32, torch.float16, torch.bfloat16)


def forward(input: Tensor, weight: Tensor, positions: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Computes the irregular convolution of checked arguments.

    Args:
        input: Images [B, C, H, W] of any strides, in a dtype that :func:`supports` names.
        weight: Weights [N, C / G, T].
        positions: Absolute positions in pixels [C, T, 2], or [N, C / G, T, 2] for the full version.
        bias: Bias [N] or None.
        geometry: Sizes of the call.

    Returns:
        Output [B, N, Ho, Wo] in the memory format of ``input``.
    """
    shape = (input.shape[0], weight.shape[0], *geometry.output_size)
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))
    if output.numel() == 0:
        return output
    call = _Call(input, weight.contiguous(), positions.contiguous(), geometry)
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(input):
        form = _forward_form(weight, positions, geometry)
        if form == "direct":
            _direct_forward(call, bias, output)
        elif form == "fused":
            _fused_forward(call, bias, output)
        else:
            _columns_forward(call, bias, output)
    return output


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Computes the gradients of :func:`forward` for input, weight and positions, None where not in ``needs``."""
    call = _Call(input, weight.contiguous(), positions.contiguous(), geometry)
    grads = _Gradients(
        _empty_like(input, memory_format(input)) if needs[0] else None,
        weight.new_zeros(weight.shape, dtype=torch.float32) if needs[1] else None,
        positions.new_zeros(positions.shape, dtype=torch.float32) if needs[2] else None,
    )
    if grad_output.numel() == 0:
        if grads.input is not None:
            grads.input.zero_()
    else:
        with torch.cuda.device_of(input):
            if _is_direct(weight, positions, geometry):
                _direct_backward(call, grad_output, grads)
            else:
                _columns_backward(call, grad_output, grads)
    return (
        grads.input,
        None if grads.weight is None else grads.weight.to(weight.dtype),
        None if grads.positions is None else grads.positions.to(positions.dtype),
    )


@dataclass(frozen=True)
class _Gradients:
    """What the backward fills: the input's gradient in its final form, the others as float32 sums, zero at first."""

    input: Tensor | None
    weight: Tensor | None
    positions: Tensor | None


def _is_direct(weight: Tensor, positions: Tensor, geometry: Geometry) -> bool:
    """Whether columns would cost more than they save."""
    group_outputs, group_channels = weight.shape[0] // geometry.groups, weight.shape[1]
    return (
        positions.dim() == 4
        or group_channels == 1
        or group_outputs <= _DIRECT_OUTPUTS
        or group_outputs * group_channels <= _DIRECT_PRODUCT
    )


def _forward_form(weight: Tensor, positions: Tensor, geometry: Geometry) -> str:
    """The form of the forward: "direct", "fused" or "columns"."""
    if _is_direct(weight, positions, geometry):
        return "direct"
    # The fused kernel numbers the pixels of all planes in a tile with 32 bits.
    largest = _MAX_INT // ((_FUSED_TILE[1] + 2) * 4)
    small = (geometry.input_size[0] + 2) * (geometry.input_size[1] + _GAP) <= largest
    return "fused" if small and weight.shape[0] // geometry.groups <= _FUSED_OUTPUTS else "columns"


def _empty_like(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """Memory of a tensor's shape, with exactly the strides of a layout (``torch.empty_like`` may keep others)."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout)


def _kernels() -> ModuleType:
    """The kernels; importing them imports Triton."""
    return importlib.import_module("icnn_zoo.ops.triton_kernels")


def _launch(name: str, programs: int, *args: Any, **options: Any) -> None:
    """Runs a kernel as so many programs."""
    # Fusing is said, since Triton's default is about to change: its versions should give the same results.
    getattr(_kernels(), name)[(programs,)](*args, **options, enable_fp_fusion=True)


def _blocks(elements: int, block: int) -> int:
    return -(-elements // block)


def _block_size(elements: int, largest: int) -> int:
    """A power of two for so many elements: full blocks, or one that is not much too large."""
    return min(largest, max(128, 1 << (elements - 1).bit_length()))


class _Call:
    """The arguments of one call and the numbers that kernels need to know of them."""

    def __init__(self, input: Tensor, weight: Tensor, positions: Tensor, geometry: Geometry) -> None:
        self.input, self.weight, self.positions, self.geometry = input, weight, positions, geometry
        self.groups = geometry.groups
        self.num_outputs, self.group_channels, self.taps = weight.shape
        self.group_outputs = self.num_outputs // self.groups
        self.per_kernel = positions.dim() == 4
        (height, width), (out_height, out_width) = geometry.input_size, geometry.output_size
        self.out_pixels = out_height * out_width
        reach = [(size - 1) * stride for size, stride in zip(geometry.output_size, geometry.stride, strict=True)]
        gap = min(_GAP, reach[1] + 2)
        pitch = width + gap
        # Past the bounds every read is outside the input wherever the origin is.
        bounds = [
            extent + size + abs(origin) + 2
            for extent, size, origin in zip(reach, geometry.input_size, geometry.origin, strict=True)
        ]
        plane_size = (height + 2) * pitch + 4
        largest = (reach[0] + height + bounds[0] + abs(geometry.origin[0]) + 2) * (
            max(pitch, out_width) + bounds[1] + abs(geometry.origin[1])
        )
        if largest > _MAX_INT:
            raise ValueError(
                '`input` is too large for `backend`="triton", which numbers the pixels of a padded image with 32 bits; '
                f"got images of {height} x {width} and outputs of {out_height} x {out_width}."
            )
        self.plane_size = plane_size
        shared = {
            "height": height,
            "width": width,
            "out_height": out_height,
            "out_width": out_width,
            "origin_row": geometry.origin[0],
            "origin_col": geometry.origin[1],
            "bound_row": bounds[0],
            "bound_col": bounds[1],
            "STRIDE_ROW": geometry.stride[0],
            "STRIDE_COL": geometry.stride[1],
        }
        self.gathering: dict[str, Any] = shared
        self.fused: dict[str, Any] = {**shared, "pitch": pitch, "plane_size": plane_size}
        self.sampling: dict[str, Any] = {**self.fused, "last_free_shift": width + gap - 2 - reach[1]}
        self.grouping = {
            "group_outputs": self.group_outputs,
            "group_channels": self.group_channels,
            "taps": self.taps,
        }

    def planes(self, images: slice, channels: slice) -> Tensor:
        """Copies a part of the input to planes [S, c, plane_size]."""
        source = self.input[images, channels]
        num_images, num_channels = source.shape[:2]
        planes = source.new_empty(num_images, num_channels, self.plane_size)
        channels_last = source.stride(1) == 1 and num_channels > 1
        channel_block, pixel_block = (32, 64) if channels_last else (1, _block_size(self.plane_size, 1024))
        grid = num_images * _blocks(num_channels, channel_block) * _blocks(self.plane_size, pixel_block)
        _launch(
            "planes_kernel",
            grid,
            source,
            planes,
            num_channels,
            *self.geometry.input_size,
            *source.stride(),
            self.sampling["pitch"],
            self.plane_size,
            BLOCK_CHANNELS=channel_block,
            BLOCK_PIXELS=pixel_block,
        )
        return planes

    def image_slabs(self, column_bytes: int = 0) -> Iterator[slice]:
        """Walks the images, as many at a time as keep what one launch reads or writes within a chunk.

        This also makes 32 bits enough for the pixels' numbers and for where all but the first image start.
        """
        size = self.input.element_size()
        output_bytes = self.num_outputs * self.out_pixels * size
        images = max(1, _CHUNK_BYTES // max(column_bytes, self.input.shape[1] * self.plane_size * size, output_bytes))
        for first in range(0, self.input.shape[0], images):
            yield slice(first, min(first + images, self.input.shape[0]))


# Columns


@dataclass(frozen=True)
class _Part:
    """Channels whose columns are made at once: several whole groups, or some of the channels of a single group."""

    groups: slice
    channels: slice
    """Channels within a group."""
    planes: slice
    """Channels within the input."""


def _column_chunks(call: _Call) -> Iterator[tuple[slice, list[list[_Part]]]]:
    """Walks chunks of images; for each, parts that have groups in common stand in one list, to be summed."""
    channel_bytes = call.taps * call.out_pixels * call.input.element_size()
    image_bytes = channel_bytes * call.groups * call.group_channels
    if image_bytes <= _IMAGE_BYTES:
        channels = call.groups * call.group_channels
    else:
        channels = max(1, _IMAGE_BYTES // channel_bytes)
    step_groups = max(1, channels // call.group_channels)
    step_channels = min(channels, call.group_channels)
    parts: list[list[_Part]] = []
    for group in range(0, call.groups, step_groups):
        groups = slice(group, min(group + step_groups, call.groups))
        parts.append([])
        for channel in range(0, call.group_channels, step_channels):
            within = slice(channel, min(channel + step_channels, call.group_channels))
            first = groups.start * call.group_channels + within.start
            last = (groups.stop - 1) * call.group_channels + within.stop
            parts[-1].append(_Part(groups, within, slice(first, last)))
    for images in call.image_slabs(image_bytes):
        yield images, parts


def _columns_forward(call: _Call, bias: Tensor | None, output: Tensor) -> None:
    weight = call.weight.unflatten(0, (call.groups, -1))  # [G, N / G, C / G, T]
    start = None if bias is None else bias.view(call.groups, -1, 1)
    channels_last = memory_format(call.input) == torch.channels_last
    for images, parts in _column_chunks(call):
        num_images = images.stop - images.start
        target = output[images].transpose(0, 1).unflatten(0, (call.groups, -1))  # [G, N / G, S, Ho, Wo]
        for summed in parts:
            groups = summed[0].groups
            rows = target[groups]
            bias_rows = None if start is None else start[groups]
            if len(summed) == 1:
                columns = _make_columns(call, images, summed[0])
                factors = weight[groups].flatten(2)
                # The rows of channels_last outputs are what the product writes: pixels at one stride.
                out = rows.flatten(2) if channels_last else columns.new_empty(*factors.shape[:2], columns.shape[2])
                length = num_images * call.out_pixels
                product = out[:, :, :length]
                if bias_rows is None:
                    torch.bmm(factors, columns[:, :, :length], out=product)
                else:
                    torch.baddbmm(bias_rows, factors, columns[:, :, :length], out=product)
                if channels_last:
                    continue
            else:
                product = _sum_parts(call, images, summed, weight)
                product = product if bias_rows is None else product + bias_rows
            rows.copy_(product.unflatten(2, rows.shape[2:]))


def _sum_parts(call: _Call, images: slice, parts: list[_Part], weight: Tensor) -> Tensor:
    """Sums the products of the channels of one group in float32 [1, N / G, L]."""
    total = None
    for part in parts:
        columns = _make_columns(call, images, part)[:, :, : (images.stop - images.start) * call.out_pixels]
        product = _product_float32(weight[part.groups, :, part.channels].flatten(2), columns)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _product_float32(left: Tensor, right: Tensor) -> Tensor:
    """Batched matrix product with a float32 result, whatever the dtype of its factors."""
    if left.dtype == torch.float32:
        return torch.bmm(left, right)
    if left.device.type == "cuda":
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())  # `out_dtype` is for CUDA; the kernels' tests run on a CPU


def _empty_columns(call: _Call, images: slice, part: _Part) -> Tensor:
    """Memory for the columns of a part [g, c * T, L], L rounded up."""
    length = _blocks((images.stop - images.start) * call.out_pixels, _COLUMN_ALIGNMENT) * _COLUMN_ALIGNMENT
    entries = (part.channels.stop - part.channels.start) * call.taps
    return call.input.new_empty(part.groups.stop - part.groups.start, entries, length)


def _make_columns(call: _Call, images: slice, part: _Part) -> Tensor:
    columns = _empty_columns(call, images, part)
    _launch_columns(call, images, part, columns, gradient=False, store=True)
    return columns


def _launch_columns(
    call: _Call, images: slice, part: _Part, columns: Tensor, *, gradient: bool, store: bool
) -> Tensor | None:
    """Runs ``columns_kernel``; returns the positions' gradient [c, T, 2] of a part with ``gradient``."""
    planes = call.planes(images, part.planes)
    length, channels = planes.shape[0] * call.out_pixels, planes.shape[1]
    # With a sum over each block one warp works alone: no barrier for each tap.
    block, warps = (_block_size(length, 256), 1) if gradient else (_block_size(length, 1024), 4)
    # Stores of 32 bits a lane: wider ones would spread a warp's reads over more cache lines.
    vector = 4 // columns.element_size()
    blocks = _blocks(length, block)
    partials = planes.new_empty((blocks, channels, call.taps, 2), dtype=torch.float32) if gradient else None
    _launch(
        "columns_kernel",
        channels * blocks,
        planes,
        call.positions[part.planes],
        columns,
        planes if partials is None else partials,
        channels,
        call.taps,
        length,
        columns.shape[2] // vector,
        **call.sampling,
        GRADIENT=gradient,
        STORE=store,
        VECTOR=vector,
        BLOCK=block,
        num_warps=warps,
    )
    return None if partials is None else partials.sum(0)


def _columns_backward(call: _Call, grad_output: Tensor, grads: _Gradients) -> None:
    weight = call.weight.unflatten(0, (call.groups, -1))  # [G, N / G, C / G, T]
    # Pixels as rows: what a channels_last gradient is; others are copied.
    grad_rows = grad_output.permute(0, 2, 3, 1).reshape(-1, call.num_outputs)
    grad_rows = grad_rows.t().unflatten(0, (call.groups, -1))  # [G, N / G, B * Ho * Wo]
    grad_weight = None if grads.weight is None else grads.weight.unflatten(0, (call.groups, -1))
    for images, groups_parts in _column_chunks(call):
        span = slice(images.start * call.out_pixels, images.stop * call.out_pixels)
        for part in (part for summed in groups_parts for part in summed):
            grad_part = grad_rows[part.groups, :, span]
            columns = _empty_columns(call, images, part)
            if grads.input is not None or grads.positions is not None:
                factors = weight[part.groups, :, part.channels].flatten(2)
                torch.bmm(factors.transpose(1, 2), grad_part, out=columns[:, :, : grad_part.shape[2]])
            if grads.input is not None:
                _columns_input_gradient(call, images, part, columns, grads.input)
            if grads.positions is None and grad_weight is None:
                continue
            by_position = _launch_columns(
                call, images, part, columns, gradient=grads.positions is not None, store=grad_weight is not None
            )
            if grads.positions is not None and by_position is not None:
                grads.positions[part.planes] += by_position
            if grad_weight is not None:
                product = _product_float32(grad_part, columns[:, :, : grad_part.shape[2]].transpose(1, 2))
                grad_weight[part.groups, :, part.channels] += product.unflatten(2, (-1, call.taps))


def _columns_input_gradient(call: _Call, images: slice, part: _Part, grad_columns: Tensor, grad_input: Tensor) -> None:
    target = grad_input[images, part.planes]
    in_place = memory_format(call.input) == torch.contiguous_format
    planes = target if in_place else _empty_like(target, torch.contiguous_format)
    num_images, channels, height, width = target.shape
    length = num_images * height * width
    block = _block_size(length, 512)
    _launch(
        "input_gradient_kernel",
        channels * _blocks(length, block),
        grad_columns,
        call.positions[part.planes],
        planes,
        call.taps,
        length,
        grad_columns.shape[2],
        planes.stride(0),
        **call.gathering,
        BLOCK=block,
        num_warps=4,
    )
    if not in_place:
        target.copy_(planes)


# Fused


def _fused_forward(call: _Call, bias: Tensor | None, output: Tensor) -> None:
    entries = call.group_channels * call.taps
    pixels, step = _FUSED_TILE
    for images in call.image_slabs():
        planes = call.planes(images, slice(None))
        length = planes.shape[0] * call.out_pixels
        programs = call.groups * _blocks(length, pixels)
        # Few pixels: several programs share the sum over the entries, at least 16 steps each.
        splits = max(1, min(_PROGRAMS // programs, entries // (16 * step)))
        share = _blocks(_blocks(entries, splits), step) * step
        splits = _blocks(entries, share)
        target = output[images]
        out = target if splits == 1 else planes.new_empty((splits, *target.shape), dtype=torch.float32)
        strides = (0, *out.stride()) if splits == 1 else out.stride()
        _launch(
            "fused_forward_kernel",
            splits * programs,
            planes,
            call.weight,
            call.positions,
            call.weight if bias is None else bias,
            out,
            call.groups,
            **call.grouping,
            length=length,
            split_entries=share,
            stride_split=strides[0],
            stride_image=strides[1],
            stride_output=strides[2],
            stride_pixel=strides[4],
            **call.fused,
            HAS_BIAS=bias is not None and splits == 1,
            BLOCK_PIXELS=pixels,
            BLOCK_OUTPUTS=16 if call.group_outputs <= 16 else _FUSED_OUTPUTS,
            BLOCK_ENTRIES=step,
            num_warps=4,  # eight are known to be miscompiled in loops like this one
            num_stages=1,  # prefetching into shared memory, element by element, spills registers
        )
        if splits > 1:
            total = out.sum(0)
            target.copy_(total if bias is None else total + bias[:, None, None])


# Direct


def _direct_forward(call: _Call, bias: Tensor | None, output: Tensor) -> None:
    for images in call.image_slabs():
        planes = call.planes(images, slice(None))
        target = output[images]
        out = _empty_like(target, torch.contiguous_format)
        length = planes.shape[0] * call.out_pixels
        block = _block_size(length, 1024)
        _launch(
            "direct_forward_kernel",
            call.num_outputs * _blocks(length, block),
            planes,
            call.weight,
            call.positions,
            call.weight if bias is None else bias,
            out,
            call.num_outputs,
            **call.grouping,
            length=length,
            **call.sampling,
            PER_KERNEL=call.per_kernel,
            HAS_BIAS=bias is not None,
            BLOCK=block,
            num_warps=4,
        )
        target.copy_(out)


def _direct_backward(call: _Call, grad_output: Tensor, grads: _Gradients) -> None:
    partials = None
    for images in call.image_slabs():
        grad = grad_output[images].contiguous()
        if grads.input is not None:
            _direct_input_gradient(call, grad, grads.input[images])
        if grads.weight is not None or grads.positions is not None:
            sums = _direct_kernel_gradient(call, grad, call.planes(images, slice(None)))
            partials = sums if partials is None else partials.add_(sums)
    if grads.weight is not None:
        assert partials is not None
        grads.weight.copy_(partials[..., 0])
    if grads.positions is not None:
        assert partials is not None
        by_kernel = partials[..., 1:] * call.weight.float()[..., None]  # [N, C / G, T, 2]
        if call.per_kernel:
            grads.positions.copy_(by_kernel)
        else:
            grads.positions.copy_(by_kernel.unflatten(0, (call.groups, -1)).sum(1).flatten(0, 1))


def _direct_input_gradient(call: _Call, grad_output: Tensor, target: Tensor) -> None:
    planes = _empty_like(target, torch.contiguous_format)
    num_images, channels, height, width = target.shape
    length = num_images * height * width
    block = _block_size(length, 512)
    _launch(
        "direct_input_gradient_kernel",
        channels * _blocks(length, block),
        grad_output,
        call.weight,
        call.positions,
        planes,
        call.num_outputs,
        **call.grouping,
        length=length,
        **call.gathering,
        PER_KERNEL=call.per_kernel,
        BLOCK=block,
        num_warps=4,
    )
    target.copy_(planes)


def _direct_kernel_gradient(call: _Call, grad_output: Tensor, planes: Tensor) -> Tensor:
    """Sums over pixels of the output's gradient times sample, slope by row and slope by col: [N, C / G, T, 3]."""
    length = planes.shape[0] * call.out_pixels
    block = _block_size(length, 256)
    blocks = _blocks(length, block)
    pairs = call.num_outputs * call.group_channels
    split_blocks = _blocks(blocks, min(blocks, _blocks(16 * _PROGRAMS, pairs)))
    splits = _blocks(blocks, split_blocks)
    shape = (splits, call.num_outputs, call.group_channels, call.taps, 3)
    partials = planes.new_empty(shape, dtype=torch.float32)
    _launch(
        "direct_kernel_gradient_kernel",
        splits * pairs,
        grad_output,
        planes,
        call.positions,
        partials,
        call.num_outputs,
        **call.grouping,
        length=length,
        split_blocks=split_blocks,
        **call.sampling,
        PER_KERNEL=call.per_kernel,
        TAPS=1 << (call.taps - 1).bit_length(),
        BLOCK=block,
        num_warps=1,
    )
    return partials.sum(0)

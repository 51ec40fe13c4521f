"""What the standard forms of a layer cost, and the choice among them: boxes, outliers, and the cheapest form.

Letters used in shapes: N outputs, C inputs, G groups, T taps, n = N / G, c = C / G.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Costs are in multiply-adds of a wide convolution, for one output pixel. The constants lie between what PyTorch 2.15
# and onnxruntime 1.32 take for the forms of eleven layers (64 to 2048 channels, float32, one core of an AMD EPYC).
# benchmarks/deploy.py measures what is chosen against what they say.
# Writing an element of a convolution's output, copying one, and the multiple that outputs are rounded up to:
PLANE_COST = 75.0
COPY_COST = 25.0
OUTPUT_BLOCK = 16
# A multiply-add of a depthwise convolution, and of one with many inputs and one output a group:
DEPTHWISE_COST = 3.0
NARROW_COST = 25.0
# Time over the sum of the parts: many small operators (taps), sparse dilated kernels (outliers).
TAPS_FACTOR = 1.25
OUTLIERS_FACTOR = 2.0
# One more operator in the graph, spread over the pixels of a 41x41 map:
NODE_COST = 200.0

# Taps further than this from the regular kernel are always outliers: zero padding up to there would be materialized.
MAX_REACH = 64
# Taps further than this read zeros from every map there is, and are left out.
MAX_DISTANCE = 2**16


class Box(NamedTuple):
    """Cells of a kernel, as offsets from the input pixel at (r * stride, c * stride)."""

    row: int
    col: int
    height: int
    width: int


class Reads(NamedTuple):
    """What taps [...] read: runs of pixels from a first one on, and the weights of their rows and columns."""

    first: Tensor
    """[..., 2], offsets from the input pixel at (r * stride, c * stride)."""
    rows: Tensor
    """[..., Rr]."""
    cols: Tensor
    """[..., Rc]."""

    def moved(self, by: Tensor) -> Reads:
        return self._replace(first=self.first + by)

    def select(self, index: Any) -> Reads:
        return Reads(*(values[index] for values in self))

    def ends(self) -> tuple[Tensor, Tensor]:
        """The first and the last pixel [..., 2] whose weight is not zero."""
        low, high = [], []
        for axis, weights in enumerate((self.rows, self.cols)):
            order = torch.arange(weights.shape[-1], dtype=self.first.dtype)
            read = weights != 0
            # What reads nothing, beyond an extent, is a cell of no weight.
            low.append(self.first[..., axis] + torch.where(read, order, order[-1]).amin(-1))
            high.append(self.first[..., axis] + torch.where(read, order, order[0]).amax(-1))
        bottom, top = torch.stack(low, dim=-1), torch.stack(high, dim=-1)
        return bottom, torch.maximum(bottom, top)

    def draw(self, box: Box) -> tuple[Tensor, Tensor]:
        """The weights of a box's rows [..., height] and columns [..., width]."""
        drawn = []
        for axis, (weights, size) in enumerate(((self.rows, box.height), (self.cols, box.width))):
            place = torch.arange(size) + box[axis] - self.first[..., axis, None]
            inside = (place >= 0) & (place < weights.shape[-1])
            drawn.append(weights.gather(-1, place.clamp(0, weights.shape[-1] - 1).long()) * inside)
        return drawn[0], drawn[1]


@dataclass(frozen=True)
class Layout:
    """A layer without its padding: output (r, c) reads taps at (r * stride, c * stride) + offset, zeros outside."""

    weight: Tensor
    """[G, n, c, T] in float64."""
    bias: Tensor | None
    offsets: Tensor
    """[G, 1 or n, c, T, 2] in float64."""
    reads: Reads
    """What the taps at ``offsets`` read."""
    first: tuple[int, int]
    """Offset of the regular kernel's first tap."""
    surplus: tuple[int, int]
    """An input of H rows has (H + surplus) // stride + 1 output rows, columns alike."""
    kernel_size: tuple[int, int]
    dilation: tuple[int, int]
    stride: tuple[int, int]
    like: Tensor

    @property
    def groups(self) -> int:
        return self.weight.shape[0]

    @property
    def num_outputs(self) -> int:
        return self.weight.shape[0] * self.weight.shape[1]

    @property
    def group_inputs(self) -> int:
        return self.weight.shape[2]

    @property
    def num_inputs(self) -> int:
        return self.weight.shape[0] * self.weight.shape[2]

    @property
    def taps(self) -> int:
        return self.weight.shape[3]

    @property
    def is_shared(self) -> bool:
        return self.offsets.shape[1] == 1

    def grid(self) -> Tensor:
        """Offsets of the regular taps from the first one [T, 2]."""
        sizes = zip(self.kernel_size, self.dilation, strict=True)
        return torch.cartesian_prod(*(torch.arange(size) * step for size, step in sizes)).reshape(-1, 2)


@dataclass(frozen=True)
class Plan:
    """Boxes of a form, the pairs that do not go into them [G, 1 or n, c, T], and the cost of it all."""

    boxes: list[Box]
    outliers: Tensor
    cost: float


def conv_cost(outputs: int, group_inputs: int, cells: int) -> float:
    """Cost of a convolution with ``cells`` cells in its kernel."""
    blocks = -(-outputs // OUTPUT_BLOCK) * OUTPUT_BLOCK
    return blocks * (PLANE_COST + cells * max(group_inputs, DEPTHWISE_COST))


def _outlier_cost(layout: Layout, count: int, digits: int) -> float:
    if count == 0:
        return 0.0
    planes = conv_cost(count, layout.num_inputs, 1) + digits * conv_cost(count, 1, 9)
    mixed = conv_cost(count, 1, 9) + conv_cost(layout.num_outputs, count, 1) + layout.num_outputs * COPY_COST
    return OUTLIERS_FACTOR * (planes * math.prod(layout.stride) + mixed) + (5 + digits) * NODE_COST


def plans(layout: Layout) -> list[tuple[str, Plan]]:
    """The forms that can compute a layer, each with the boxes and outliers that make it cheapest."""
    offsets, outputs, inputs = layout.offsets, layout.num_outputs, layout.group_inputs
    relative = offsets - torch.tensor(layout.first, device=offsets.device)
    far = ((relative < -MAX_REACH) | (relative > layout.grid()[-1] + MAX_REACH)).any(-1)
    digits = count_digits(offsets)

    def dense_cost(cells: int) -> float:
        return conv_cost(outputs, inputs, cells) + NODE_COST

    def stacked_cost(cells: int) -> float:
        first = conv_cost(layout.taps * outputs, inputs, cells) * math.prod(layout.stride)
        return first + outputs * (PLANE_COST + layout.taps**2 * NARROW_COST) + 2 * NODE_COST

    def tap_cost(cells: int) -> float:
        crop = layout.num_inputs * COPY_COST * math.prod(layout.stride)
        mixed = conv_cost(outputs, inputs, 1) + outputs * COPY_COST
        return TAPS_FACTOR * (crop + conv_cost(layout.num_inputs, 1, cells) + mixed) + 4 * NODE_COST

    def single(cost: Callable[[int], float], reads: Reads) -> Plan:
        box, outliers = _choose_box(reads, far, lambda cells, count: cost(cells) + _outlier_cost(layout, count, digits))
        total = cost(box.height * box.width) + _outlier_cost(layout, int(outliers.sum()), digits)
        return Plan([box], outliers, total)

    found = [("dense", single(dense_cost, layout.reads))]
    if layout.taps == math.prod(layout.kernel_size):  # not free
        found.append(("stacked", single(stacked_cost, layout.reads.moved(-layout.grid()))))
    if layout.is_shared and inputs > 1:
        # Outliers of different taps share a branch: its fixed costs are counted once, below.
        per_pair = _outlier_cost(layout, 1024, digits) / 1024
        chosen = [
            _choose_box(
                layout.reads.select((..., tap, slice(None))),
                far[..., tap],
                lambda cells, count: tap_cost(cells) + per_pair * count,
            )
            for tap in range(layout.taps)
        ]
        boxes, outliers = [box for box, _ in chosen], torch.stack([mask for _, mask in chosen], dim=-1)
        cost = sum(tap_cost(box.height * box.width) for box in boxes)
        found.append(("taps", Plan(boxes, outliers, cost + _outlier_cost(layout, int(outliers.sum()), digits))))
    return found


def count_digits(offsets: Tensor) -> int:
    """Binary digits of the largest distance, of those that are not left out."""
    return int(offsets.abs().max().clamp(max=MAX_DISTANCE).ceil()).bit_length()


def _choose_box(reads: Reads, far: Tensor, cost: Callable[[int, int], float]) -> tuple[Box, Tensor]:
    """Finds the box that makes ``cost(cells, pairs outside)`` least.

    Starting from the box around all near pairs, the side whose removal frees most cells for a lost pair is moved
    inwards, down to one cell; the best box on the way is taken.

    Args:
        reads: What taps [...] read.
        far: Pairs that have to stay outside [...].
        cost: Cost of a box and of the pairs outside.

    Returns:
        The box, and which pairs are outside [...].
    """
    low, high = reads.ends()
    bounds = torch.cat([low, -high], dim=-1).flatten(0, -2)[~far.flatten()].long()
    if len(bounds) == 0:
        return Box(0, 0, 1, 1), far
    # Rows of `bounds`: top, left, -bottom, -right, so that each side is moved inwards by growing.
    kinds, counts = bounds.unique(dim=0, return_counts=True)
    inside = torch.ones(len(kinds), dtype=torch.bool, device=kinds.device)
    best, best_cost = kinds.amin(0), math.inf
    while inside.any():
        sides = kinds[inside].amin(0)
        height, width = (int(1 - sides[axis] - sides[axis + 2]) for axis in range(2))
        total = cost(height * width, int(far.sum()) + int(counts[~inside].sum()))
        if total < best_cost:
            best, best_cost = sides, total
        gains = []
        for side in range(4):
            goes = inside & (kinds[:, side] == sides[side])
            remaining = kinds[inside & ~goes]
            step = int(remaining[:, side].amin() - sides[side]) if len(remaining) else 1
            freed = step * (width if side % 2 == 0 else height)
            gains.append((freed / int(counts[goes].sum()), goes))
        inside = inside & ~max(gains, key=lambda gain: gain[0])[1]
    top, left, bottom, right = (int(value) for value in best * torch.tensor([1, 1, -1, -1], device=best.device))
    outside = (low < best[:2]).any(-1) | (high > -best[2:]).any(-1)
    return Box(top, left, bottom - top + 1, right - left + 1), outside | far

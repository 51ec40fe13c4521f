"""The boxes of dense layers with few outputs on CUDA: one for each tap, and the list of who is outside of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from icnn_zoo.ops.triton_backend import boxes_kernels
from icnn_zoo.ops.triton_backend.call import Call
from icnn_zoo.ops.triton_backend.launching import block_size, launch, num_blocks
from icnn_zoo.ops.triton_backend.products import round_up

CELLS = 9  # of a box of 3 x 3
# Rows of products start at multiples of this many elements, and there are as many.
ALIGNMENT = 16
_CHANNELS = 128  # of a program that draws boxes or reads them


@dataclass(frozen=True)
class Boxes:
    """The boxes of a call's taps, and who is outside of them; whole numbers of 32 bits, all made on the GPU."""

    firsts: Tensor
    """Row and col of each box's first cell [T, 2]."""
    offsets: Tensor
    """Row and col of each cell [T * 9, 2], the origin included."""
    entries: Tensor
    """The entries (channel * T + tap) outside, in order; room for all [C * T]."""
    slots: Tensor
    """Where each entry is in that list, -1 inside [C * T]."""
    count: Tensor
    """How many are outside [1]."""

    @staticmethod
    def of(call: Call) -> Boxes:
        """Chooses the boxes."""
        channels, taps = call.group_channels, call.taps
        sizes = (taps * 2, taps * CELLS * 2, channels * taps, channels * taps, 1)
        memory = torch.empty(sum(sizes), dtype=torch.int32, device=call.input.device)
        firsts, offsets, entries, slots, count = memory.split(sizes)
        launch(
            boxes_kernels.boxes_kernel,
            taps,
            call.positions,
            firsts,
            offsets,
            channels,
            taps,
            *call.geometry.origin,
            max(call.numbers.bounds),
            CHANNELS=1 << (channels - 1).bit_length(),
            num_warps=4,
        )
        block = block_size(channels * taps, 16384)
        launch(
            boxes_kernels.list_kernel,
            1,
            call.positions,
            firsts,
            entries,
            slots,
            count,
            channels * taps,
            taps,
            BLOCK=block,
            num_warps=16,
        )
        return Boxes(firsts, offsets.view(-1, 2), entries, slots, count)

    def spread(self, call: Call) -> Tensor:
        """Weights [N, C, T] on the cells [T * 9 * N, C], in their dtype, rows rounded up."""
        num_rows = len(self.offsets) * call.num_outputs
        spread = call.weight.new_empty(round_up(num_rows, ALIGNMENT), call.group_channels)
        if len(spread) > num_rows:
            spread[num_rows:] = 0
        launch(
            boxes_kernels.spread_kernel,
            call.taps * num_blocks(call.group_channels, _CHANNELS),
            call.weight,
            call.positions,
            self.firsts,
            spread,
            call.num_outputs,
            call.group_channels,
            call.taps,
            BLOCK=_CHANNELS,
            num_warps=4,
        )
        return spread

    def gather(
        self, call: Call, by_cell: Tensor, listed_weight: Tensor, listed_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of weights [N, C, T] and positions [C, T, 2] from those of the cells [T * 9 * N, C]."""
        by_weight = by_cell.new_empty(call.weight.shape)
        by_position = by_cell.new_empty(call.positions.shape)
        launch(
            boxes_kernels.gather_kernel,
            call.taps * num_blocks(call.group_channels, _CHANNELS),
            by_cell,
            call.weight,
            call.positions,
            self.firsts,
            self.slots,
            listed_weight,
            listed_positions,
            by_weight,
            by_position,
            call.num_outputs,
            call.group_channels,
            call.taps,
            LISTED_OUTPUTS=listed_weight.shape[1],
            BLOCK=_CHANNELS,
            num_warps=4,
        )
        return by_weight, by_position

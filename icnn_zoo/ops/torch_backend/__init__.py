"""The irregular convolution in standard PyTorch operators: any device, no compiler.

Positions vary neither over space nor over the batch, so every (channel, tap) reads its plane at one fixed sub-pixel
shift. Columns copy a window of the plane, a plain piece of memory without an index for each pixel, and blend it twice
with ``torch.lerp``. The adjoint copies windows of the columns' gradient at the negated shift, so nothing is scattered;
the input's and the positions' gradients are two small matrix products with them.

Depthwise layers and the full version are drawn as dense kernels while these are small: on
CPUs, and with triangle or gaussian interpolation on any device, as their spreads must be looked at anyway. On other
devices than CPUs that goes for all layers of these two: their columns are smoothed in a group for each channel, tap
and image, which cuDNN takes hundreds of times as long for as for a dense convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry, memory_format
from icnn_zoo.ops.tap_reading import INTERPOLATIONS
from icnn_zoo.ops.torch_backend import columns, dense
from icnn_zoo.ops.torch_backend.columns import Gradients
from icnn_zoo.ops.torch_backend.limits import Limits
from icnn_zoo.ops.torch_backend.wide import WideColumns
from icnn_zoo.ops.torch_backend.windows import WindowColumns, compute_dtype

if TYPE_CHECKING:
    from icnn_zoo.ops.backends import Backend


class TorchBackend:
    """The backend "torch".

    Args:
        limits: Sizes to work in.
        convolution: What convolves with drawn kernels; PyTorch unless it is given.
        shared: The backend for layers with a shape per channel, which copies of the full version are; this one unless
            it is given.
    """

    interpolations = INTERPOLATIONS

    def __init__(
        self,
        limits: Limits | None = None,
        convolution: dense.Convolution | None = None,
        shared: Backend | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.convolution = convolution or dense.TorchConvolution()
        self.shared = shared or self

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot run on a device: it always can."""
        return None

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether this backend computes in a dtype: in all floating ones."""
        return dtype.is_floating_point

    def forward(
        self, input: Tensor, weight: Tensor, positions: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        """Computes the irregular convolution of checked arguments.

        Args:
            input: Images [B, C, H, W].
            weight: Weights [N, C / G, T].
            positions: Absolute positions in pixels [C, T, 2], or [N, C / G, T, 2] for the full version; with spreads
                [..., T, 4].
            bias: Bias [N] or None.
            geometry: Sizes of the call.

        Returns:
            Output [B, N, Ho, Wo] in the memory format of ``input``.
        """
        box = self._dense_box(weight, positions, geometry)
        if box is not None:
            # Not in half precision: PyTorch 2.14 never returns from some depthwise convolutions (channels_last).
            dtype = compute_dtype(input.dtype)
            start = None if bias is None else bias.to(dtype)
            arguments = (input.to(dtype), weight.to(dtype), positions, start, box, geometry, self.limits)
            output = dense.forward(*arguments, self.convolution).to(input.dtype)
        elif positions.dim() == 3:
            return columns.forward(
                self._make_columns(input, positions, geometry), input, weight, bias, geometry, self.limits
            )
        else:
            parts = [
                self.shared.forward(part, weight[span], moved, None, grouped)
                for span, part, moved, grouped in self._copies(input, positions, geometry)
            ]
            output = torch.cat(parts, dim=1)
            output = output if bias is None else output + bias[:, None, None]
        return output.contiguous(memory_format=memory_format(input))

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        positions: Tensor,
        geometry: Geometry,
        needs: tuple[bool, bool, bool],
    ) -> Gradients:
        """Computes the gradients of :func:`forward` for input, weight and positions, None where not in ``needs``."""
        box = self._dense_box(weight, positions, geometry)
        if box is not None:
            dtype = compute_dtype(input.dtype)
            wide = (grad_output.to(dtype), input.to(dtype), weight.to(dtype))
            by_input, by_weight, by_positions = dense.backward(
                *wide, positions, box, geometry, self.limits, self.convolution, needs
            )
            return (
                None if by_input is None else by_input.to(input.dtype),
                None if by_weight is None else by_weight.to(weight.dtype),
                by_positions,
            )
        if positions.dim() == 3:
            maker = self._make_columns(input, positions, geometry)
            return columns.backward(maker, grad_output, input, weight, positions, geometry, self.limits, needs)
        grad_input = torch.zeros_like(input, dtype=compute_dtype(input.dtype)) if needs[0] else None
        grad_weight = torch.zeros_like(weight) if needs[1] else None
        grad_positions = torch.zeros_like(positions) if needs[2] else None
        group_channels, outputs_per_group = weight.shape[1], weight.shape[0] // geometry.groups
        for span, part, moved, grouped in self._copies(input, positions, geometry):
            grads = self.shared.backward(grad_output[:, span], part, weight[span], moved, grouped, needs)
            if grad_input is not None and grads[0] is not None:
                first = span.start // outputs_per_group * group_channels
                copies = grads[0].unflatten(1, (-1, group_channels))
                grad_input[:, first : first + group_channels] += copies.sum(1, dtype=grad_input.dtype)
            if grad_weight is not None and grads[1] is not None:
                grad_weight[span] = grads[1]
            if grad_positions is not None and grads[2] is not None:
                grad_positions[span] = grads[2].view_as(grad_positions[span])
        return None if grad_input is None else grad_input.to(input.dtype), grad_weight, grad_positions

    def _dense_box(self, weight: Tensor, positions: Tensor, geometry: Geometry) -> dense.Box | None:
        """The box to draw dense kernels into where that is cheaper than columns."""
        shares_columns = positions.dim() == 3 and weight.shape[1] > 1
        if shares_columns and (positions.device.type == "cpu" or not geometry.reading.is_wide):
            return None
        box = dense.measure_box(positions, geometry)
        on_cpu = positions.device.type == "cpu"
        cells_per_tap = self.limits.cells_per_tap if on_cpu else self.limits.cells_per_tap_elsewhere
        return box if box is not None and box.cells <= cells_per_tap * positions.shape[-2] else None

    def _copies(
        self, input: Tensor, positions: Tensor, geometry: Geometry
    ) -> Iterator[tuple[slice, Tensor, Tensor, Geometry]]:
        """The full version as groups of one output channel, each with its own copy of its input channels.

        Yields:
            Output channels of one group, the copied input [B, n * C / G, H, W], its positions [n * C / G, T, 2] and the
            geometry with n groups.
        """
        num_outputs, group_channels = positions.shape[:2]
        outputs_per_group = num_outputs // geometry.groups
        chunk = max(1, self.limits.copied_elements // max(1, input[:, :group_channels].numel()))
        for group in range(geometry.groups):
            last_of_group = (group + 1) * outputs_per_group
            members = input[:, group * group_channels : (group + 1) * group_channels]
            for first in range(group * outputs_per_group, last_of_group, chunk):
                span = slice(first, min(first + chunk, last_of_group))
                outputs = span.stop - span.start
                grouped = replace(geometry, groups=outputs)
                yield span, members.repeat(1, outputs, 1, 1), positions[span].flatten(0, 1), grouped

    def _make_columns(self, input: Tensor, positions: Tensor, geometry: Geometry) -> WindowColumns | WideColumns:
        maker = WideColumns if geometry.reading.is_wide else WindowColumns
        return maker(input, positions, geometry, self.limits)

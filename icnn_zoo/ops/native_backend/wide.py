"""The windows that taps of triangle and gaussian interpolation read, as the C kernel wants them."""

from __future__ import annotations

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.torch_backend.wide import weigh_taps
from icnn_zoo.ops.wide_interpolation import slopes_of


class Windows:
    """Each tap's window of a layer with a shape per input channel.

    Args:
        taps: Positions and spreads [C, T, 4].
        geometry: Sizes of the call.
        dtype: In which C computes.

    Attributes:
        reads: Rows and columns of a window.
        arguments: What C reads: the first row and column [C * T] of the windows of output (0, 0), and the weights of
            their rows and columns [C * T, reads].
    """

    def __init__(self, taps: Tensor, geometry: Geometry, dtype: torch.dtype) -> None:
        starts, (self._rows, self._cols) = weigh_taps(taps, geometry, dtype)
        weights = [weighing.weight.contiguous() for weighing in (self._rows, self._cols)]
        self.reads = [weight.shape[1] for weight in weights]
        self.arguments = dict(zip(("first_row", "first_col", "rows", "cols"), (*starts, *weights), strict=True))

    def carry_back(self, by_weights: Tensor) -> Tensor:
        """The gradient by taps [C * T, 4] from that by their windows' rows, then columns [C * T, Rr + Rc]."""
        by_rows, by_cols = by_weights.to(self._rows.weight.dtype).split(self.reads, dim=1)
        return slopes_of(by_rows, by_cols, self._rows, self._cols)

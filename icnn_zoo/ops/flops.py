"""What ``torch.utils.flop_counter`` counts for the operators: two operations for each multiply-add.

That is one multiply-add for each weight of each output, as conv2d is counted, and four for each interpolated value.
With a shape per input channel a value serves all outputs of its group, so that a layer with N outputs a group counts
1 + 4 / N times conv2d's; in the full version it serves one, which makes 5 times. The backward has one such product for
the gradient of the values and one for that of the weights, and interpolates once for each gradient. Biases are not
counted. Triangles and gaussians read more than four pixels, how many their spreads say, which a counter does not see:
they count as bilinear.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

Shape = Sequence[int]


def forward(input: Shape, weight: Shape, positions: Shape, *_: Any, out_shape: Shape) -> int:
    """Operations of ``irregular_conv2d``."""
    products, values = _count(out_shape, weight, positions)
    return 2 * (products + 4 * values)


def backward(grad_output: Shape, input: Shape, weight: Shape, positions: Shape, *sizes: Any, **_: Any) -> int:
    """Operations of ``irregular_conv2d_backward``."""
    needs_input, needs_weight, needs_positions = sizes[4]
    products, values = _count(grad_output, weight, positions)
    factors = (needs_input or needs_positions) + needs_weight
    return 2 * (factors * products + (needs_input + needs_weight + needs_positions) * 4 * values)


def _count(output: Shape, weight: Shape, positions: Shape) -> tuple[int, int]:
    """Weights times outputs, and interpolated values."""
    pixels = output[0] * output[2] * output[3]
    return pixels * math.prod(weight), pixels * math.prod(positions[:-1])


_COUNTER = "torch.utils.flop_counter"


def register_when_counted() -> None:
    """Registers the formulas, once the counter is there: to import it takes longer than to import this package."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _AfterImport())


def _register(counter: ModuleType) -> None:
    counter.register_flop_formula(torch.ops.icnn_zoo.irregular_conv2d)(forward)
    counter.register_flop_formula(torch.ops.icnn_zoo.irregular_conv2d_backward)(backward)


class _AfterImport(MetaPathFinder):
    """Finds the counter as others do, and registers when it has been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec

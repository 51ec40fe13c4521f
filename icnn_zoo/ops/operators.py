"""The torch.library operators: what compilers and exporters see, and the choice of a backend inside them.

``icnn_zoo::irregular_conv2d`` and ``icnn_zoo::irregular_conv2d_backward`` are opaque to tracing: a compiled or exported
network holds one node for each. Autograd is an ``autograd.Function`` around them, which ``torch.func`` understands. To
break an exported node into standard operators: ``exported.run_decompositions(DECOMPOSITIONS)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from icnn_zoo.ops import formula
from icnn_zoo.ops.backends import choose_backend, get_backend
from icnn_zoo.ops.geometry import Geometry, memory_format

_library = torch.library.Library("icnn_zoo", "DEF")
_SIZES = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups"
_library.define(
    f"irregular_conv2d(Tensor input, Tensor weight, Tensor positions, Tensor? bias, {_SIZES}, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "irregular_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor positions, "
    f"{_SIZES}, bool[3] output_mask, str backend) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _forward(
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
) -> Tensor:
    geometry = Geometry.of(input.shape[-2:], weight.shape[-2:], stride, padding, dilation, groups)
    chosen = get_backend(choose_backend(backend, input.device, input.dtype))
    with torch.autocast(input.device.type, enabled=False):  # dtypes are settled; it would cast what is inside
        output = chosen.forward(input, weight.flatten(2), positions, bias, geometry)
    return output


def _forward_fake(
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
) -> Tensor:
    geometry = Geometry.of(input.shape[-2:], weight.shape[-2:], stride, padding, dilation, groups)
    shape = (input.shape[0], weight.shape[0], *geometry.output_size)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = Geometry.of(input.shape[-2:], weight.shape[-2:], stride, padding, dilation, groups)
    chosen = get_backend(choose_backend(backend, input.device, input.dtype))
    needs = (output_mask[0], output_mask[1], output_mask[2])
    with torch.autocast(input.device.type, enabled=False):
        grads = chosen.backward(grad_output, input, weight.flatten(2), positions, geometry, needs)
    by_input, by_weight, by_positions = (
        like.new_empty(0) if grad is None else grad
        for grad, like in zip(grads, (input, weight, positions), strict=True)
    )
    return by_input, by_weight.reshape(weight.shape) if needs[1] else by_weight, by_positions


def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    formats = (memory_format(input), torch.contiguous_format, torch.contiguous_format)
    by_input, by_weight, by_positions = (
        torch.empty(like.shape if wanted else (0,), dtype=like.dtype, device=like.device, memory_format=layout)
        if wanted
        else like.new_empty(0)
        for like, wanted, layout in zip((input, weight, positions), output_mask, formats, strict=True)
    )
    return by_input, by_weight, by_positions


for _key in ("CPU", "CUDA"):
    _library.impl("irregular_conv2d", _forward, _key)
    _library.impl("irregular_conv2d_backward", _backward, _key)
torch.library.register_fake("icnn_zoo::irregular_conv2d", _forward_fake, lib=_library)
torch.library.register_fake("icnn_zoo::irregular_conv2d_backward", _backward_fake, lib=_library)


class IrregularConv2dFunction(torch.autograd.Function):
    """The operator with its gradients, of any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, positions: Tensor, bias: Tensor | None, sizes: tuple[Any, ...], backend: str
    ) -> Tensor:
        output: Tensor = torch.ops.icnn_zoo.irregular_conv2d(input, weight, positions, bias, *sizes, backend)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, positions, _, ctx.sizes, ctx.backend = inputs
        ctx.save_for_backward(input, weight, positions)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, positions = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        # A compiled backward is not differentiated again.
        gradients = _gradients if torch.compiler.is_compiling() else _GradientsFunction.apply
        grads = gradients(grad_output, input, weight, positions, ctx.sizes, needs, ctx.backend)
        by_bias = grad_output.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), by_bias, None, None)


def _gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    sizes: tuple[Any, ...],
    needs: tuple[bool, ...],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.icnn_zoo.irregular_conv2d_backward(
        grad_output, input, weight, positions, *sizes, list(needs), backend
    )
    return grads


class _GradientsFunction(torch.autograd.Function):
    """The operator's backward; its own derivatives are those of the formula, of any order."""

    generate_vmap_rule = True
    forward = staticmethod(_gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.sizes, ctx.needs = inputs[4:6]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        def convolve(input: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
            return formula.irregular_conv2d(input, weight, positions, None, *ctx.sizes)

        def gradients(grad_output: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
            pullback: Any = torch.func.vjp(convolve, *leaves)[1]
            return tuple(grad for grad, need in zip(pullback(grad_output), ctx.needs, strict=True) if need)

        pullback: Any = torch.func.vjp(gradients, *ctx.saved_tensors)[1]
        return (*pullback(tuple(c for c, need in zip(cotangents, ctx.needs, strict=True) if need)), None, None, None)


DECOMPOSITIONS = {torch.ops.icnn_zoo.irregular_conv2d.default: formula.irregular_conv2d}
"""For ``torch.export.ExportedProgram.run_decompositions``: leaves standard operators only."""

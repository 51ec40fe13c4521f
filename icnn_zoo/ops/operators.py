"""The torch.library operators: what compilers and exporters see, and autograd around them.

``icnn_zoo::irregular_conv2d`` and ``icnn_zoo::irregular_conv2d_backward`` are opaque to tracing: a compiled or exported
network holds one node for each. They run on any device, by whichever backend can. Autograd is an ``autograd.Function``
around them, which ``torch.func`` understands. To break an exported node into standard operators:
``exported.run_decompositions(DECOMPOSITIONS)``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from icnn_zoo.ops import backends, checks, flops, formula, vmap_rules
from icnn_zoo.ops.geometry import Geometry, memory_format


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
    interpolation: str = "bilinear",
    extent: Sequence[int] = (),
) -> Tensor:
    if torch.is_anomaly_enabled():
        checks.check_finite(positions[..., :2])
    geometry = _geometry(input, weight, stride, padding, dilation, groups, interpolation, extent)
    if interpolation != "bilinear":
        backends.choose_backend(backend, input.device, input.dtype, geometry)
        checks.check_spread(positions[..., 2:], interpolation, geometry.largest_spread)
    if input.numel() == 0 or weight.numel() == 0:  # a sum over nothing
        backends.choose_backend(backend, input.device, input.dtype, geometry)  # says why one asked for cannot run
        zeros = _forward_fake(input, weight, positions, bias, stride, padding, dilation, groups, backend).zero_()
        return zeros if bias is None else zeros.add_(bias[:, None, None])
    arguments = (backend, input, weight.flatten(2), positions, bias, geometry)
    output: Tensor = _without_autocast(input.device, backends.forward, *arguments)
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
    interpolation: str = "bilinear",
    extent: Sequence[int] = (),
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
    interpolation: str = "bilinear",
    extent: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = _geometry(input, weight, stride, padding, dilation, groups, interpolation, extent)
    needs = (output_mask[0], output_mask[1], output_mask[2])
    if 0 in (input.numel(), weight.numel(), grad_output.numel()):
        by_input, by_weight, by_positions = (
            grad.zero_() for grad in _gradients_like(input, weight, positions, output_mask)
        )
        return by_input, by_weight, by_positions
    arguments = (backend, grad_output, input, weight.flatten(2), positions, geometry, needs)
    grads = _without_autocast(input.device, backends.backward, *arguments)
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
    interpolation: str = "bilinear",
    extent: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_like(input, weight, positions, output_mask)


def _gradients_like(
    input: Tensor, weight: Tensor, positions: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients, empty where one is not wanted."""
    formats = (memory_format(input), torch.contiguous_format, torch.contiguous_format)
    by_input, by_weight, by_positions = (
        torch.empty(like.shape, dtype=like.dtype, device=like.device, memory_format=layout)
        if wanted
        else like.new_empty(0)
        for like, wanted, layout in zip((input, weight, positions), output_mask, formats, strict=True)
    )
    return by_input, by_weight, by_positions


def _geometry(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    interpolation: str,
    extent: Sequence[int],
) -> Geometry:
    """The canonical geometry of a call, which a layer asks for in every step."""
    sizes = (input.shape[-2:], weight.shape[-2:], tuple(stride), tuple(padding), tuple(dilation), groups)
    return _known_geometry(*sizes, interpolation, tuple(extent))


@functools.lru_cache(1024)
def _known_geometry(*sizes: Any) -> Geometry:
    return Geometry.of(*sizes).canonical()


def _without_autocast(device: torch.device, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function. Dtypes are settled before an operator is called; autocast would cast what is inside."""
    kind = device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return function(*arguments)
    torch.set_autocast_enabled(kind, False)  # as `torch.autocast` does, which takes longer
    try:
        return function(*arguments)
    finally:
        torch.set_autocast_enabled(kind, True)


def _current(name: str) -> Callable[..., Any]:
    """The function of this name in the module as it is when called.

    PyTorch keeps what was registered for as long as the process lives; the module may be reloaded.
    """

    @functools.wraps(globals()[name])
    def call(*args: Any) -> Any:
        return getattr(sys.modules[__name__], name)(*args)

    return call


def _register() -> None:
    sizes = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups"
    how = 'str backend, str interpolation="bilinear", int[] extent=[]'
    schemas = {
        "forward": f"(Tensor input, Tensor weight, Tensor positions, Tensor? bias, {sizes}, {how}) -> Tensor",
        "backward": f"(Tensor grad_output, Tensor input, Tensor weight, Tensor positions, {sizes}, "
        f"bool[3] output_mask, {how}) -> (Tensor, Tensor, Tensor)",
    }
    for direction, schema in schemas.items():
        name = "irregular_conv2d" if direction == "forward" else "irregular_conv2d_backward"
        torch.library.define(f"icnn_zoo::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(f"icnn_zoo::{name}", "CompositeExplicitAutograd", _current(f"_{direction}"))
        torch.library.register_fake(f"icnn_zoo::{name}", _current(f"_{direction}_fake"))
        torch.library.register_vmap(f"icnn_zoo::{name}", getattr(vmap_rules, direction))


if not hasattr(torch.ops.icnn_zoo, "irregular_conv2d"):
    _register()
    flops.register_when_counted()


Sizes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
How = tuple[str, str, tuple[int, ...]]
"""The name of a backend or "auto", the interpolation, and the extent that it reads in, () for no such limit."""


def differentiable(
    input: Tensor, weight: Tensor, positions: Tensor, bias: Tensor | None, sizes: Sizes, how: How
) -> Tensor:
    """The operator with its gradients, of any order and in both modes.

    Args:
        input: Images [B, C, H, W].
        weight: Weights [N, C / G, kh, kw].
        positions: Positions [C, T, 2], or [N, C / G, T, 2]; with the spreads of a triangle or gaussian [..., T, 4].
        bias: Bias [N] or None.
        sizes: Stride, padding (top, bottom, left, right), dilation and groups.
        how: The backend, the interpolation and its extent.
    """
    if _is_forward_mode():
        return formula.irregular_conv2d(input, weight, positions, bias, *sizes, *how)
    if not torch.is_grad_enabled():  # what autograd adds takes longer than a small layer
        output: Tensor = torch.ops.icnn_zoo.irregular_conv2d(input, weight, positions, bias, *sizes, *how)
        return output
    output = _function(_Convolution, _EagerConvolution)(input, weight, positions, bias, sizes, how)
    return output


def _function(transformable: type[torch.autograd.Function], eager: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What to call of two functions that compute the same.

    What only transforms of ``torch.func`` and compilers need takes longer than a small layer: ``Function.apply`` asks
    for the signature of a forward that has a ``setup_context``.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return transformable.apply
    if not torch.is_grad_enabled():
        return transformable.forward
    return super(torch.autograd.Function, eager).apply  # type: ignore[misc]


class _Convolution(torch.autograd.Function):
    """The operator's forward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, positions: Tensor, bias: Tensor | None, sizes: Sizes, how: How
    ) -> Tensor:
        output: Tensor = torch.ops.icnn_zoo.irregular_conv2d(input, weight, positions, bias, *sizes, *how)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, positions, _, ctx.sizes, ctx.how = inputs
        ctx.save_for_backward(input, weight, positions)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, positions = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.compiler.is_compiling():  # a compiled backward is not differentiated again
            grads = _Gradients.forward(grad_output, input, weight, positions, ctx.sizes, needs, ctx.how)
        elif _is_forward_mode():
            grads = _by_formula(grad_output, input, weight, positions, ctx.sizes, ctx.how)
        else:
            function = _function(_Gradients, _EagerGradients)
            grads = function(grad_output, input, weight, positions, ctx.sizes, needs, ctx.how)
        by_bias = grad_output.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), by_bias, None, None)


class _EagerConvolution(torch.autograd.Function):
    """The same, to be called outside of transforms."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _Convolution.forward(*inputs)
        _Convolution.setup_context(ctx, inputs, output)
        return output

    backward = _Convolution.backward


class _Gradients(torch.autograd.Function):
    """The operator's backward; its own derivatives are those of the formula, of any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        positions: Tensor,
        sizes: Sizes,
        needs: tuple[bool, ...],
        how: How,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.icnn_zoo.irregular_conv2d_backward(
            grad_output, input, weight, positions, *sizes, list(needs), *how
        )
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.sizes, ctx.needs, ctx.how = inputs[4:]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        def gradients(grad_output: Tensor, input: Tensor, weight: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
            grads = _by_formula(grad_output, input, weight, positions, ctx.sizes, ctx.how)
            return tuple(grad for grad, need in zip(grads, ctx.needs, strict=True) if need)

        pullback: Any = torch.func.vjp(gradients, *ctx.saved_tensors)[1]
        return (*pullback(tuple(c for c, need in zip(cotangents, ctx.needs, strict=True) if need)), None, None, None)


class _EagerGradients(torch.autograd.Function):
    """The same, to be called outside of transforms."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _Gradients.forward(*inputs)
        _Gradients.setup_context(ctx, inputs, output)
        return output

    backward = _Gradients.backward


def _by_formula(
    grad_output: Tensor, input: Tensor, weight: Tensor, positions: Tensor, sizes: Sizes, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by standard operators, hence with derivatives of their own."""

    def convolve(input: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
        return formula.irregular_conv2d(input, weight, positions, None, *sizes, *how)

    pullback: Any = torch.func.vjp(convolve, input, weight, positions)[1]
    by_input, by_weight, by_positions = pullback(grad_output)
    return by_input, by_weight, by_positions


def _is_forward_mode() -> bool:
    """Whether derivatives are taken in forward mode, by ``torch.func`` or ``torch.autograd.forward_ad``.

    Then standard operators compute: a ``jvp`` of an ``autograd.Function`` does not nest, its own derivatives in forward
    mode would silently be zero.
    """
    return torch.autograd.forward_ad._current_level >= 0


DECOMPOSITIONS = {torch.ops.icnn_zoo.irregular_conv2d.default: formula.irregular_conv2d}
"""For ``torch.export.ExportedProgram.run_decompositions``: leaves standard operators only."""

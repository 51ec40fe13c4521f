"""The torch.library operators: what compilers and exporters see, and the choice of a backend inside them.

``icnn_zoo::irregular_conv2d`` and ``icnn_zoo::irregular_conv2d_backward`` are opaque to tracing: a compiled or exported
network holds one node for each. Autograd is an ``autograd.Function`` around them, which ``torch.func`` understands. To
break an exported node into standard operators: ``exported.run_decompositions(DECOMPOSITIONS)``.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from icnn_zoo.ops.geometry import Geometry, memory_format

logger = logging.getLogger(__name__)

BACKENDS = ("triton", "native", "torch")
"""In the order of preference."""


class Backend(Protocol):
    """What computes the operator: a module or object with these functions, as :mod:`icnn_zoo.ops.torch_backend` has."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on a device, None if it can."""

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether it computes in a dtype."""

    def forward(
        self, input: Tensor, weight: Tensor, positions: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        """The output [B, N, Ho, Wo], in the memory format of ``input`` [B, C, H, W].

        ``weight`` is [N, C / G, T], ``positions`` are absolute [C, T, 2], or [N, C / G, T, 2] in the full version.
        """

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        positions: Tensor,
        geometry: Geometry,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients for input, weight and positions, None where not in ``needs``."""


_registered: dict[str, Backend] = {}


def register_backend(name: str, backend: Backend) -> None:
    """Adds a backend of your own in this process: ``backend=name`` computes with it, "auto" does not take it.

    Checks, padding, dtypes, autograd of any order, ``torch.func``, ``torch.compile`` and export stay the package's own.

    Args:
        name: What ``backend`` is called.
        backend: A module or object with the functions of :class:`Backend`.

    Raises:
        ValueError: The name is taken.
        TypeError: A function is missing.

    Example:
        >>> from icnn_zoo.ops import register_backend, torch_backend
        >>> register_backend("mine", torch_backend)
        >>> import icnn_zoo, torch
        >>> layer = icnn_zoo.IrregularConv2d(2, 3, 3)
        >>> layer.backend = "mine"
        >>> layer(torch.zeros(1, 2, 5, 5)).shape
        torch.Size([1, 3, 3, 3])
    """
    if name in (*names(), "auto", "reference"):
        raise ValueError(f"`name`: there is a backend {name!r} already; known are {', '.join(names())}.")
    missing = [part for part in ("unavailable", "supports", "forward", "backward") if not hasattr(backend, part)]
    if missing:
        raise TypeError(f"`backend` must have {', '.join(missing)}; see icnn_zoo.ops.Backend.")
    _registered[name] = backend


def names() -> tuple[str, ...]:
    """The names of all backends but "auto" and "reference"."""
    return (*BACKENDS, *_registered)


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


def _module(name: str) -> Backend:
    """A backend; those of the package are modules, imported when they are first asked for."""
    if name in _registered:
        return _registered[name]
    return cast(Backend, importlib.import_module(f"icnn_zoo.ops.{name}_backend"))


def why_unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot compute on a device in a dtype, or None if it can."""
    module = _module(name)
    reason = module.unavailable(device)
    if reason is None and not module.supports(dtype):
        reason = f"it does not compute {dtype}"
    return reason


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """Finds a backend; "auto" is the first one that can run.

    Raises:
        RuntimeError: The backend asked for cannot run; the message says why.
    """
    if name != "auto":
        reason = why_unavailable(name, device, dtype)
        if reason is not None:
            raise RuntimeError(f'`backend`={name!r} cannot run: {reason}. `backend`="auto" takes one that can.')
        return _module(name)
    for candidate in BACKENDS[:-1]:
        reason = why_unavailable(candidate, device, dtype)
        if reason is None:
            return _module(candidate)
        logger.debug("`backend`=%r cannot run: %s.", candidate, reason)
    return _module(BACKENDS[-1])


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
    module = choose_backend(backend, input.device, input.dtype)
    with torch.autocast(input.device.type, enabled=False):  # dtypes are settled; it would cast what is inside
        output = module.forward(input, weight.flatten(2), positions, bias, geometry)
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
    module = choose_backend(backend, input.device, input.dtype)
    needs = (output_mask[0], output_mask[1], output_mask[2])
    with torch.autocast(input.device.type, enabled=False):
        grads = module.backward(grad_output, input, weight.flatten(2), positions, geometry, needs)
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
            return formula(input, weight, positions, None, *ctx.sizes)

        def gradients(grad_output: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
            pullback: Any = torch.func.vjp(convolve, *leaves)[1]
            return tuple(grad for grad, need in zip(pullback(grad_output), ctx.needs, strict=True) if need)

        pullback: Any = torch.func.vjp(gradients, *ctx.saved_tensors)[1]
        return (*pullback(tuple(c for c, need in zip(cotangents, ctx.needs, strict=True) if need)), None, None, None)


def formula(
    input: Tensor,
    weight: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str = "auto",
) -> Tensor:
    """The operator as a differentiable, traceable formula of standard operators; all columns are held in memory."""
    geometry = Geometry.of(input.shape[-2:], weight.shape[-2:], stride, padding, dilation, groups)
    floor = positions.detach().floor()
    fraction = positions - floor
    integer = floor.nan_to_num(0.0).clamp(-(2.0**30), 2.0**30).long()
    num_outputs, group_channels, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    grouped = input.unflatten(1, (groups, group_channels))
    per_kernel = positions.dim() == 4
    group = torch.arange(groups, device=input.device).repeat_interleave(
        (num_outputs if per_kernel else groups) // groups
    )
    owner_shape = (group.shape[0], group_channels, taps, 1, 1)
    channel = torch.arange(group_channels, device=input.device)[:, None, None, None]

    def corner(down: int, right: int) -> Tensor:
        rows, cols = (
            torch.arange(geometry.output_size[axis], device=input.device) * geometry.stride[axis]
            + geometry.origin[axis]
            + step
            + integer[..., axis].reshape(*owner_shape[:3], 1)
            for axis, step in ((0, down), (1, right))
        )
        height, width = geometry.input_size
        inside = ((rows >= 0) & (rows < height))[..., None] & ((cols >= 0) & (cols < width))[..., None, :]
        index = (
            group[:, None, None, None, None],
            channel,
            rows.clamp(0, height - 1)[..., None],
            cols.clamp(0, width - 1)[..., None, :],
        )
        return grouped[:, *index] * inside.to(input.dtype)  # [B, owners, C / G, T, Ho, Wo]

    down, right = (fraction[..., axis].reshape(owner_shape) for axis in range(2))
    top = corner(0, 0) * (1 - right) + corner(0, 1) * right
    bottom = corner(1, 0) * (1 - right) + corner(1, 1) * right
    columns = (top * (1 - down) + bottom * down).to(input.dtype)
    if per_kernel:
        output = torch.einsum("bncthw,nct->bnhw", columns, weight.flatten(2))
    else:
        grouped_weight = weight.flatten(2).unflatten(0, (groups, -1))
        output = torch.einsum("bgcthw,gnct->bgnhw", columns, grouped_weight).flatten(1, 2)
    output = output if bias is None else output + bias[:, None, None]
    return output.contiguous(memory_format=memory_format(input))


DECOMPOSITIONS = {torch.ops.icnn_zoo.irregular_conv2d.default: formula}
"""For ``torch.export.ExportedProgram.run_decompositions``: leaves standard operators only."""

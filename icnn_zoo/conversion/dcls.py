"""Networks of DCLS, dilated convolutions with learnable spacings (arXiv:2112.03740, arXiv:2306.00817)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from icnn_zoo.nn.irregular_conv import IrregularConv2d
from icnn_zoo.nn.modules import attached_hooks, replace_modules
from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.torch_backend.dense import Box, draw_kernels
from icnn_zoo.ops.wide_interpolation import NARROWEST

_PACKAGE = "DCLS.construct.modules"
_VERSIONS = {"v1": "bilinear", "max": "triangle", "gauss": "gaussian"}
_NARROWEST = {"max": 1.0, "gauss": 0.27}  # DCLS's own
_TOLERANCE = 1e-5  # of a kernel's largest number


def from_dcls(module: nn.Module) -> nn.Module:
    """Replaces every ``Dcls2d`` of DCLS 0.1.1 in a network by a layer that gives the same, in place, all or nothing.

    The layers have free taps with a shape for each kernel (``shapes="kernel"``), in DCLS's box (``kernel_size``), and
    the interpolation of its version: "bilinear" (v1), "triangle" (max), "gaussian" (gauss), with a spread for each tap
    and axis. DCLS keeps spreads over 1 (max) and 0.27 (gauss), these layers over 1 and 0.2; positions are not clamped
    to the box. Optimizers made before do not know the new parameters.

    Args:
        module: A network, or a ``Dcls2d`` itself. DCLS need not be installed to read one that is there.

    Returns:
        The same network; where it is itself a ``Dcls2d``, the new layer.

    Raises:
        ValueError: There is no ``Dcls2d``; one has forward hooks, or shares positions with one of another box; one has
            a version other than v1, max and gauss; a layer has one or three dimensions; taps are too far outside of the
            box (``clamp_parameters()`` was not called), so that what DCLS makes of them is not interpolation.
    """
    layers: dict[nn.Module, nn.Module] = {}
    shared: dict[Any, IrregularConv2d] = {}
    for name, each in module.named_modules():
        kind = type(each)
        if kind.__module__ != _PACKAGE or not hasattr(each, "dilated_kernel_size") or not hasattr(each, "weight"):
            continue
        if kind.__name__ != "Dcls2d":
            raise ValueError(f"`module`: {name!r} is a {kind.__name__}; known is Dcls2d, with two dimensions.")
        if hooks := attached_hooks(each):
            raise ValueError(f"`module`: {name!r} has {', '.join(hooks)}, which its new layer would lose; remove them.")
        layers[each] = layer = _convert(each, name)
        for theirs, ours in (("P", "displacement"), ("SIG", "widening")):
            if getattr(layer, ours) is not None:
                _share(layer, ours, shared.setdefault(id(getattr(each, theirs)), layer), name)
    if not layers:
        raise ValueError(f"`module` must have a Dcls2d of DCLS 0.1.1; {type(module).__name__} has none.")
    return replace_modules(module, layers)


def _share(layer: IrregularConv2d, parameter: str, first: IrregularConv2d, name: str) -> None:
    """Keeps positions or spreads shared that several layers of DCLS share."""
    if not torch.equal(getattr(layer, parameter), getattr(first, parameter)):
        raise ValueError(f"`module`: {name!r} shares positions or spreads with a layer that reads them otherwise.")
    setattr(layer, parameter, getattr(first, parameter))


@torch.no_grad()
def _convert(dcls: Any, name: str) -> IrregularConv2d:
    if dcls.version not in _VERSIONS:
        raise ValueError(
            f"`module`: {name!r} has version {dcls.version!r}; known are {', '.join(_VERSIONS)} of DCLS 0.1.1."
        )
    extent = dcls.dilated_kernel_size
    layer = IrregularConv2d(
        dcls.in_channels,
        dcls.out_channels,
        extent,
        dcls.stride,
        dcls.padding,
        groups=dcls.groups,
        bias=dcls.bias is not None,
        padding_mode=dcls.padding_mode,
        device=dcls.weight.device,
        dtype=dcls.weight.dtype,
        shapes="kernel",
        interpolation=_VERSIONS[dcls.version],  # type: ignore[arg-type]
        taps=dcls.kernel_count,
    )
    layer.weight = dcls.weight
    layer.bias = dcls.bias
    positions = _in_our_frame(dcls.P, extent)
    if dcls.version == "v1":  # what lies a part of a pixel outside reads the edge alone
        ends = [torch.tensor([end(size) for size in extent]).to(positions) for end in (_first, _last)]
        positions = positions.clamp(*ends)
    layer.displacement.copy_(positions)
    layer.displacement.requires_grad_(dcls.P.requires_grad)
    if layer.widening is not None:
        spread = _as_pairs(dcls.SIG.abs()) + _NARROWEST[dcls.version]
        layer.widening.copy_(spread - NARROWEST[layer.interpolation])
        layer.widening.requires_grad_(dcls.SIG.requires_grad)
    layer.train(dcls.training)
    _check(dcls, layer, name)
    return layer


def _first(size: int) -> int:
    return -((size - 1) // 2)


def _last(size: int) -> int:
    return size // 2


def _as_pairs(values: Tensor) -> Tensor:
    """DCLS's [2, N, C / G, T], columns first, as [N, C / G, T, 2], rows first."""
    return values.permute(1, 2, 3, 0).flip(-1)


def _in_our_frame(positions: Tensor, extent: tuple[int, int]) -> Tensor:
    """DCLS counts from ``extent // 2``, for columns that of the rows and the other way round."""
    shift = [extent[1] // 2 + _first(extent[0]), extent[0] // 2 + _first(extent[1])]
    return _as_pairs(positions) + torch.tensor(shift).to(positions)


def _check(dcls: Any, layer: IrregularConv2d, name: str) -> None:
    """Compares the kernels that both draw."""
    rows, cols = extent = layer.kernel_size
    box = Box(_first(rows), _first(cols), rows, cols)
    geometry = Geometry((1, 1), (1, 1), (1, 1), (0, 0), layer.groups, layer.reading)
    ours = draw_kernels(layer.weight, layer.read_taps, box, geometry)
    theirs = dcls.DCK(dcls.weight, dcls.P, dcls.SIG)
    difference = (ours - theirs).abs().max().item()
    if not difference <= _TOLERANCE * theirs.abs().max().item():
        raise ValueError(
            f"`module`: taps of {name!r} lie outside of DCLS's box of {extent[0]} x {extent[1]}, so that its kernel is "
            f"another (by {difference:.1e}); call clamp_parameters() of the layer first."
        )

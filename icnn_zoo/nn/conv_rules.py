"""What is known of convolution classes: how each pads its input and makes its weight. A new class is one function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize, prune

from icnn_zoo.ops.geometry import resolve_padding

Padding = tuple[int, int, int, int]


class ConvLike(Protocol):
    """What rules read of a layer that took over a convolution; more of what the convolution held is there by name."""

    @property
    def out_channels(self) -> int: ...
    @property
    def kernel_size(self) -> tuple[int, int]: ...
    @property
    def stride(self) -> tuple[int, int]: ...
    @property
    def padding(self) -> tuple[int, int] | str: ...
    @property
    def dilation(self) -> tuple[int, int]: ...
    @property
    def weight(self) -> Tensor: ...


PaddingRule = Callable[[ConvLike, Tensor], Padding]
WeightRule = Callable[[ConvLike], Tensor]


def static_padding(layer: ConvLike, input: Tensor) -> Padding:
    """Padding (top, bottom, left, right) of nn.Conv2d: the same for every input size."""
    return resolve_padding(layer.padding, layer.kernel_size, layer.stride, layer.dilation)


def dynamic_same_padding(layer: ConvLike, input: Tensor) -> Padding:
    """Padding of timm's Conv2dSame (TensorFlow's SAME): by input size, the extra one at the bottom and right."""
    rows, cols = (
        max((math.ceil(size / stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
        for size, kernel, stride, dilation in zip(
            input.shape[-2:], layer.kernel_size, layer.stride, layer.dilation, strict=True
        )
    )
    return rows // 2, rows - rows // 2, cols // 2, cols - cols // 2


def plain_weight(layer: ConvLike) -> Tensor:
    """The parameter itself."""
    return layer.weight


def standardized_weight(layer: ConvLike) -> Tensor:
    """Weight standardization: every kernel with mean 0 and variance 1 (arXiv:1903.10520; timm's StdConv2d)."""
    return _standardize(layer, None)


def scaled_standardized_weight(layer: ConvLike) -> Tensor:
    """Standardized kernels times a learned gain and a fixed scale (arXiv:2101.08692; timm's ScaledStdConv2d)."""
    held: Any = layer
    return _standardize(layer, (held.gain * held.scale).view(-1))


def _standardize(layer: Any, gain: Tensor | None) -> Tensor:
    # A batch norm over one "batch" whose channels are the kernels, as timm computes it: equal to the last bit.
    kernels = layer.weight.reshape(1, layer.out_channels, -1)
    normed = F.batch_norm(kernels, None, None, weight=gain, training=True, momentum=0.0, eps=layer.eps)
    return normed.reshape_as(layer.weight)


class ConvRules(NamedTuple):
    """What an irregular layer has to know of the class it replaces; both functions are called in every forward.

    The layer holds everything the replaced module held (parameters, buffers, attributes), so a rule can read it. Rules
    are functions of a module, not lambdas, so that networks can be pickled.
    """

    padding: PaddingRule = static_padding
    """(layer, input) to the padding (top, bottom, left, right) in pixels."""
    weight: WeightRule = plain_weight
    """layer to the weight [out_channels, in_channels / groups, kh, kw] to convolve with."""


_Reader = Callable[[Any], ConvRules]
_Function = TypeVar("_Function", bound=_Reader)


def _conv2d(conv: nn.Conv2d) -> ConvRules:
    return ConvRules()


def _conv2d_same(conv: nn.Conv2d) -> ConvRules:
    return ConvRules(padding=dynamic_same_padding)


def _std_conv2d(conv: nn.Conv2d) -> ConvRules:
    return ConvRules(weight=standardized_weight)


def _std_conv2d_same(conv: Any) -> ConvRules:
    return ConvRules(dynamic_same_padding if conv.same_pad else static_padding, standardized_weight)


def _scaled_std_conv2d(conv: nn.Conv2d) -> ConvRules:
    return ConvRules(weight=scaled_standardized_weight)


def _scaled_std_conv2d_same(conv: Any) -> ConvRules:
    return ConvRules(dynamic_same_padding if conv.same_pad else static_padding, scaled_standardized_weight)


# timm's classes go by name: importing timm takes a second and pulls in more than a layer needs.
_READERS: dict[type[nn.Module] | str, _Reader] = {
    nn.Conv2d: _conv2d,
    "timm.layers.conv2d_same.Conv2dSame": _conv2d_same,
    # Keeps the padding of its first input's size; here it follows the size, as in the class it is exported for.
    "timm.layers.conv2d_same.Conv2dSameExport": _conv2d_same,
    "timm.layers.std_conv.StdConv2d": _std_conv2d,
    "timm.layers.std_conv.StdConv2dSame": _std_conv2d_same,
    "timm.layers.std_conv.ScaledStdConv2d": _scaled_std_conv2d,
    "timm.layers.std_conv.ScaledStdConv2dSame": _scaled_std_conv2d_same,
}
_BUILT_IN = frozenset(_READERS)

# A class that has one of these of its own may compute anything.
_COMPUTING = frozenset({"forward", "_conv_forward", "__call__", "_call_impl", "weight", "bias", "__getattr__"})


def register_conv_rules(kind: type[nn.Module]) -> Callable[[_Function], _Function]:
    """Tells :func:`icnn_zoo.convert` how a convolution class of your own computes; a decorator.

    Args:
        kind: The class. It needs nn.Conv2d's attributes (``kernel_size``, ``stride``, ``groups``, ...); subclasses
            that change nothing of its forward are covered.

    Returns:
        A decorator for a function from a module of that class to its :class:`ConvRules`; a second one for the same
        class replaces the first.

    Raises:
        TypeError: ``kind`` is not a class of modules.
        ValueError: ``kind`` is one of the classes that the package knows itself.

    Example:
        >>> import torch, icnn_zoo
        >>> class UnitConv2d(torch.nn.Conv2d):
        ...     def forward(self, input):
        ...         return self._conv_forward(input, self.weight / self.weight.norm(), self.bias)
        >>> def unit_weight(layer):
        ...     return layer.weight / layer.weight.norm()
        >>> @icnn_zoo.register_conv_rules(UnitConv2d)
        ... def unit_conv2d(conv):
        ...     return icnn_zoo.ConvRules(weight=unit_weight)
        >>> conv, image = UnitConv2d(3, 8, 3), torch.randn(1, 3, 9, 9)
        >>> torch.allclose(icnn_zoo.IrregularConv2d.from_conv2d(conv, epsilon=0.0)(image), conv(image), atol=1e-6)
        True
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"`kind` must be a subclass of torch.nn.Module; got {kind!r}.")
    if kind in _BUILT_IN or _dotted_name(kind) in _BUILT_IN:
        raise ValueError(f"`kind`: the rules of {kind.__name__} are built in; register a subclass of your own instead.")

    def register(function: _Function) -> _Function:
        _READERS[kind] = function
        return function

    return register


def find_rules(module: nn.Module) -> ConvRules | None:
    """The rules of a module, None if its class may compute anything.

    A subclass goes by the rules of the nearest class above it that has some, unless it, or a class in between, has a
    forward of its own.
    """
    for kind in type(module).__mro__:
        reader = _READERS.get(kind) or _READERS.get(_dotted_name(kind))
        if reader is not None:
            return reader(module)
        if _COMPUTING & vars(kind).keys():
            return None
    return None


def reason_to_refuse(module: nn.Module) -> str | None:
    """Why a convolution can't be taken over as it is now, and what to do about it; None if it can.

    Args:
        module: A module that is, or looks like, a two-dimensional convolution.
    """
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted; convert the network before torch.jit.script"
    if ".quantized" in type(module).__module__:
        return f"{kind} is quantized, its weights are integers; convert the float network, and quantize it deployed"
    if isinstance(module, LazyModuleMixin):
        return f"{kind} does not know its input channels yet; run the network on one batch first"
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]  # a ModuleDict
        return (
            f"its {names} is parametrized; convert before parametrizing, or remove it with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if prune.is_pruned(module):
        return 'it is pruned; make that permanent first with torch.nn.utils.prune.remove(module, "weight")'
    rules = find_rules(module)
    if rules is None:
        return (
            f"{type(module).__module__}.{type(module).__qualname__} has a forward of its own; known are "
            f"{', '.join(known_conv_classes())}. Describe it with icnn_zoo.register_conv_rules, or leave it regular "
            "by `filter`"
        )
    if module._parameters.get("weight") is None:
        return "its weight is computed, by torch.nn.utils.weight_norm or spectral_norm, and no parameter; remove that"
    if "forward" in vars(module):
        return "its forward was replaced on the instance; convert first, then patch"
    if module._compiled_call_impl is not None:
        return "it is compiled; convert first, then compile"
    return None


def known_conv_classes() -> list[str]:
    """Names of the classes that have rules, for messages."""
    return [kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__ for kind in _READERS]


def _dotted_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"

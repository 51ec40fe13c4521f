"""Turning the convolutions of a network into irregular ones, in place."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from icnn_zoo.layers import IrregularConv2d, padding_rules

Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class ConvertedLayer:
    """A convolution that will be converted."""

    name: str
    """Dotted name in the network, the first one if the module is registered under several."""
    aliases: tuple[str, ...]
    """All dotted names of the module, ``name`` included."""
    kernel_size: tuple[int, int]
    added_parameters: int
    """Numbers in the new ``displacement`` parameter."""


@dataclass(frozen=True)
class SkippedLayer:
    """A module with spatial taps, or a 1x1 convolution, that stays as it is."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class ConversionPlan:
    """What :func:`convert` would do."""

    start: str
    """The resolved name of the first module that may be converted."""
    converted: tuple[ConvertedLayer, ...]
    skipped: tuple[SkippedLayer, ...]

    @property
    def added_parameters(self) -> int:
        """Numbers added to the network in all."""
        return sum(layer.added_parameters for layer in self.converted)

    def __str__(self) -> str:
        rows = [
            (layer.name, "x".join(map(str, layer.kernel_size)), f"converted, +{layer.added_parameters:,} parameters")
            for layer in self.converted
        ]
        rows += [(layer.name, layer.kind, f"skipped: {layer.reason}") for layer in self.skipped]
        width, kind_width = (max((len(row[column]) for row in rows), default=0) for column in range(2))
        lines = [f"{name:<{width}}  {kind:<{kind_width}}  {outcome}" for name, kind, outcome in rows]
        total = f"{len(self.converted)} converted from {self.start!r} on, +{self.added_parameters:,} parameters"
        return "\n".join([*lines, f"{total}; {len(self.skipped)} skipped"])


def convert(
    model: nn.Module,
    start: str,
    *,
    filter: Filter | None = None,
    epsilon: float = 1e-3,
    per_kernel: bool = False,
) -> nn.Module:
    """Replaces every convolution larger than 1x1 from ``start`` on by an irregular one, in place, all or nothing.

    Weight and bias stay the same Parameter objects, so an optimizer made before keeps its references (but does not know
    the new ``displacement``: make it after converting). Training mode, dtype, device and requires_grad are kept; at
    epsilon 0 the output is unchanged. "From ``start`` on" means registration order, the order of
    ``model.named_modules()``, ``start`` itself included. A second call changes nothing.

    Args:
        model: Any network.
        start: Dotted name of the first module to convert: an exact name, else a unique ending of one ("layer3.11",
            "classifier"); see :func:`plan`. "" converts from the very first module.
        filter: Narrows the choice: called with (module, dotted name), False leaves the module regular.
        epsilon: Initial displacement of every tap in pixels.
        per_kernel: Gives every kernel a shape of its own (the full version) instead of one per input channel.

    Returns:
        The same ``model``; where it is itself a convolution, the new layer.

    Raises:
        ValueError: ``start`` names no module, or several; nothing is left to convert; a convolution carries hooks or
            parametrisations, which a new module would lose. The model is then unchanged.

    Example:
        >>> import timm, icnn_zoo
        >>> model = icnn_zoo.convert(timm.create_model("resnet18"), start="layer4")
        >>> list(icnn_zoo.irregular_layers(model))
        ['layer4.0.conv1', 'layer4.0.conv2', 'layer4.1.conv1', 'layer4.1.conv2']
    """
    decided = plan(model, start, filter=filter, per_kernel=per_kernel)
    modules = dict(model.named_modules())
    if not decided.converted:
        already = [name for name in irregular_layers(model) if _follows(model, decided.start, name)]
        if already:
            return model
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in decided.skipped[:5]) or "there is none"
        raise ValueError(
            f"`start`={start!r} leaves no convolution to convert in {type(model).__name__}: {reasons}. "
            f"The last convolution larger than 1x1 is {_last_convertible(model)!r}."
        )
    replacements = {}
    for layer in decided.converted:
        conv = modules[layer.name]
        assert isinstance(conv, nn.Conv2d)
        _refuse_attachments(conv, layer.name)
        replacements[layer.name] = IrregularConv2d.from_conv2d(conv, epsilon=epsilon, per_kernel=per_kernel)
    if "" in replacements:
        return replacements[""]
    for layer in decided.converted:
        for alias in layer.aliases:
            parent, _, child = alias.rpartition(".")
            setattr(model.get_submodule(parent), child, replacements[layer.name])
    return model


def plan(model: nn.Module, start: str, *, filter: Filter | None = None, per_kernel: bool = False) -> ConversionPlan:
    """Says what :func:`convert` would do, without changing anything.

    Args:
        model: Any network.
        start: As in :func:`convert`.
        filter: As in :func:`convert`.
        per_kernel: As in :func:`convert`; only the number of parameters depends on it.

    Returns:
        The plan; ``print`` shows it as a table.

    Raises:
        ValueError: ``start`` names no module, or several.
    """
    first = resolve_start(model, start)
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    converted, skipped = [], []
    for name, module in _from_start(model, first):
        reason = _reason_to_skip(module, name, filter)
        if reason is None:
            assert isinstance(module, nn.Conv2d)
            rows, cols = module.kernel_size
            taps = rows * cols
            shapes = module.weight.shape[0] * module.weight.shape[1] if per_kernel else module.in_channels
            converted.append(ConvertedLayer(name, tuple(aliases[id(module)]), (rows, cols), 2 * taps * shapes))
        elif reason:
            skipped.append(SkippedLayer(name, type(module).__name__, reason))
    return ConversionPlan(first, tuple(converted), tuple(skipped))


def irregular_layers(model: nn.Module) -> dict[str, IrregularConv2d]:
    """The irregular layers of a network by dotted name, in registration order, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, IrregularConv2d)}


def resolve_start(model: nn.Module, start: str) -> str:
    """Finds the module that ``start`` means: an exact dotted name, else the only name that ends with it.

    Raises:
        ValueError: There is no such module (the message lists the nearest names), or several.
    """
    names = [name for name, _ in model.named_modules()]
    if start in names:
        return start
    endings = [name for name in names if name.endswith(f".{start}")]
    if len(endings) == 1:
        return endings[0]
    if endings:
        raise ValueError(f"`start`={start!r} is the ending of several modules, name one: {', '.join(endings[:8])}.")
    near = (
        difflib.get_close_matches(start, names, n=5, cutoff=0.4) or [name for name in names if name.count(".") == 0][1:]
    )
    raise ValueError(f"`start`={start!r} names no module of {type(model).__name__}; the nearest are {', '.join(near)}.")


def _from_start(model: nn.Module, first: str) -> Iterator[tuple[str, nn.Module]]:
    started = False
    for name, module in model.named_modules():
        started = started or name == first
        if started:
            yield name, module


def _follows(model: nn.Module, first: str, name: str) -> bool:
    return any(name == other for other, _ in _from_start(model, first))


def _reason_to_skip(module: nn.Module, name: str, filter: Filter | None) -> str | None:
    """None: convert. A reason: report. An empty string: no convolution, nothing to say."""
    if isinstance(module, IrregularConv2d):
        return ""
    if not isinstance(module, nn.Conv2d):
        is_spatial = isinstance(module, (nn.Conv3d, nn.ConvTranspose2d)) or type(module).__name__ == "CondConv2d"
        return f"{type(module).__name__} is not a plain two-dimensional convolution" if is_spatial else ""
    if tuple(module.kernel_size) == (1, 1):
        return "1x1 kernels stay as they are"
    if parametrize.type_before_parametrizations(module) not in padding_rules():
        known = ", ".join(kind.__name__ for kind in padding_rules())
        return f"{type(module).__name__} has a forward of its own; converted are {known}"
    if filter is not None and not filter(module, name):
        return "left out by `filter`"
    return None


def _refuse_attachments(conv: nn.Conv2d, name: str) -> None:
    if parametrize.is_parametrized(conv):
        raise ValueError(
            f"{name!r} carries parametrisations ({', '.join(conv.__dict__['_modules']['parametrizations'])}); convert "
            "before parametrising, or remove them with torch.nn.utils.parametrize.remove_parametrizations."
        )
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    attached = [kind.strip("_") for kind in hooks if getattr(conv, kind)]
    if attached:
        raise ValueError(
            f"{name!r} carries {', '.join(attached)}, which the new layer would lose; convert first, then add hooks."
        )


def _last_convertible(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if _reason_to_skip(module, name, None) is None]
    return names[-1] if names else "none"

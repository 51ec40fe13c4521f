"""What converting a network would do: which convolutions become irregular, which stay regular, and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn

from icnn_zoo.conversion.start import Order, modules_from, resolve_start
from icnn_zoo.io.tables import text_table
from icnn_zoo.nn.conv_rules import find_rules, reason_to_refuse
from icnn_zoo.nn.irregular_conv import IrregularConv2d
from icnn_zoo.nn.modules import ExampleInput
from icnn_zoo.nn.spreads import Interpolation, SpreadPer, initial_spread, spread_shape
from icnn_zoo.ops.sharing import SHAPES, Shapes, shape_owners

Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class ConvertedLayer:
    """A convolution that will be converted."""

    name: str
    """Dotted name in the network, the first one if the module is registered under several."""
    aliases: tuple[str, ...]
    """All dotted names of the module, ``name`` included."""
    kind: str
    """Class of the module."""
    kernel_size: tuple[int, int]
    added_parameters: int
    """Numbers in the new parameters, ``displacement`` and perhaps ``widening``."""


@dataclass(frozen=True)
class SkippedLayer:
    """A module with taps that stays as it is, or that keeps the network from being converted."""

    name: str
    kind: str
    """Class of the module."""
    reason: str


@dataclass(frozen=True)
class ConversionPlan:
    """What :func:`convert` would do; ``print`` shows it as a table."""

    start: str
    """The resolved name of the first module that may be converted."""
    order: Order
    converted: tuple[ConvertedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    """What stays regular."""
    refused: tuple[SkippedLayer, ...]
    """What makes :func:`convert` raise, unless ``filter`` leaves it out."""
    parameters: int
    """Numbers in the network's parameters before."""

    @property
    def added_parameters(self) -> int:
        """Numbers added to the network in all."""
        return sum(layer.added_parameters for layer in self.converted)

    def to_dict(self) -> dict[str, Any]:
        """The plan as data for JSON."""
        return {**asdict(self), "added_parameters": self.added_parameters}

    def __str__(self) -> str:
        rows = [
            (layer.name, f"{layer.kind} {'x'.join(map(str, layer.kernel_size))}", f"+{layer.added_parameters:,}")
            for layer in self.converted
        ]
        groups: dict[tuple[str, str], list[str]] = {}
        for layer in self.skipped:
            groups.setdefault((layer.kind, layer.reason), []).append(layer.name)
        for (kind, reason), names in groups.items():
            rows.append((names[0] if len(names) == 1 else f"{len(names)} modules", kind, f"skipped: {reason}"))
        rows += [(layer.name, layer.kind, f"refused: {layer.reason}") for layer in self.refused]
        lines = text_table(rows).splitlines()
        counts = f"{len(self.converted)} converted, {len(self.skipped)} skipped, {len(self.refused)} refused"
        share = f" ({self.added_parameters / self.parameters:.2%} of {self.parameters:,})" if self.parameters else ""
        lines.append(f"From {self.start!r} on: {counts}; +{self.added_parameters:,} parameters{share}")
        return "\n".join(lines)


def plan(
    model: nn.Module,
    start: str,
    *,
    filter: Filter | None = None,
    shapes: Shapes = "channel",
    interpolation: Interpolation = "bilinear",
    spread_per: SpreadPer = "tap",
    order: Order = "registration",
    example_input: ExampleInput | None = None,
) -> ConversionPlan:
    """Says what :func:`convert` would do, without changing anything; a network on the meta device will do.

    Args:
        model: Any network.
        start: As in :func:`convert`.
        filter: As in :func:`convert`.
        shapes: As in :func:`convert`; only the number of parameters depends on it, and on what follows.
        interpolation: As in :func:`convert`.
        spread_per: As in :func:`convert`.
        order: As in :func:`convert`.
        example_input: As in :func:`convert`.

    Returns:
        The plan; ``print`` shows it as a table, ``to_dict()`` gives it as data.

    Raises:
        TypeError: ``start`` is not a string or ``filter`` not callable.
        ValueError: ``start`` names no module, or several; ``shapes``, ``interpolation`` or ``spread_per`` is unknown;
            ``order`` and ``example_input`` do not fit.

    Example:
        >>> import timm, icnn_zoo
        >>> print(icnn_zoo.plan(timm.create_model("resnet18"), start="layer4.1"))
        layer4.1.conv1  Conv2d 3x3  +9,216
        layer4.1.conv2  Conv2d 3x3  +9,216
        From 'layer4.1' on: 2 converted, 0 skipped, 0 refused; +18,432 parameters (0.16% of 11,689,512)
    """
    if filter is not None and not callable(filter):
        raise TypeError(f"`filter` must be a function of (module, dotted name); got {filter!r}.")
    initial_spread(interpolation, None)  # each checks its argument, also where no layer is found
    spread_shape(spread_per, (1, 1, 2))
    if shapes not in SHAPES:
        raise ValueError(f"`shapes` must be one of {', '.join(SHAPES)}; got {shapes!r}.")
    first = resolve_start(model, start)
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    inlined = _inlined(model)
    converted: list[ConvertedLayer] = []
    skipped: list[SkippedLayer] = []
    refused: list[SkippedLayer] = []
    for name, module, runs in modules_from(model, first, order, example_input):
        kind = type(module).__name__
        if name in inlined:
            refused.append(SkippedLayer(name, kind, inlined[name]))
            continue
        if not _has_taps(module):
            continue
        reason = _reason_to_skip(module) if runs else "`example_input` does not reach it"
        if reason is None and filter is not None and not filter(module, name):
            reason = "left out by `filter`"
        if reason is not None:
            skipped.append(SkippedLayer(name, kind, reason))
            continue
        reason = reason_to_refuse(module)
        if reason is not None:
            refused.append(SkippedLayer(name, kind, reason))
            continue
        conv: Any = module
        rows, cols = conv.kernel_size
        displacement = (*shape_owners(shapes, conv), rows * cols, 2)
        added = math.prod(displacement)
        if interpolation != "bilinear":
            added += math.prod(spread_shape(spread_per, displacement))
        converted.append(ConvertedLayer(name, tuple(aliases[id(module)]), kind, (rows, cols), added))
    parameters = sum(parameter.numel() for parameter in model.parameters() if not nn.parameter.is_lazy(parameter))
    return ConversionPlan(first, order, tuple(converted), tuple(skipped), tuple(refused), parameters)


def _has_taps(module: nn.Module) -> bool:
    """Whether a module is a convolution of any kind: by class, by rules, or by name (quantized and scripted ones)."""
    if isinstance(module, IrregularConv2d):
        return False
    if isinstance(
        module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    ):
        return True
    name = module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__
    return find_rules(module) is not None or name in ("Conv2d", "CondConv2d")


def _reason_to_skip(module: nn.Module) -> str | None:
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return "transposed: its taps write to the output and do not read the input"
    if isinstance(module, nn.Conv1d):
        return "one-dimensional: it has no rows and columns"
    if isinstance(module, nn.Conv3d):
        return "three-dimensional: a shape has two coordinates"
    if type(module).__name__ == "CondConv2d":
        return "mixes its kernels anew for every image"
    if tuple(getattr(module, "kernel_size", ())) == (1, 1):
        return "1x1 kernels stay as they are"
    return None


def _inlined(model: nn.Module) -> dict[str, str]:
    """Convolutions that a tracer has resolved into a call with their weight: replacing them would have no effect."""
    found = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            if node.op != "get_attr":
                continue
            owner, _, name = str(node.target).rpartition(".")
            weight = getattr(module.get_submodule(owner), name, None)
            if isinstance(weight, nn.Parameter) and weight.dim() == 4 and weight.shape[2:].numel() > 1:
                dotted = ".".join(part for part in (prefix, owner) if part)
                found[dotted] = "a tracer inlined it, its module is not called; convert before tracing"
    return found

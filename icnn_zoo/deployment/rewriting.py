"""Rewriting a network's irregular layers in standard convolutions, for inference anywhere."""

from __future__ import annotations

import copy
import inspect
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from icnn_zoo.conversion.converter import irregular_layers
from icnn_zoo.conversion.rewrite_guards import unguard
from icnn_zoo.deployment.standard_forms import has_standard_form, standard_form
from icnn_zoo.nn.irregular_conv import IrregularConv2d


@dataclass(frozen=True)
class DeployedLayer:
    """How one layer was rewritten."""

    name: str
    """Dotted name in the network, the first one if the module is registered under several."""
    form: str
    """"dense", "taps" or "stacked"; see :mod:`icnn_zoo.deployment.standard_forms`."""
    box: tuple[int, int]
    """Rows and columns of the largest kernel that was drawn."""
    outliers: int
    """(Channel, tap) pairs with a branch of their own."""
    cost: float
    """Modelled time over that of the regular convolution."""
    folded: str | None
    """The normalisation that was folded into the layer."""


@dataclass(frozen=True)
class Deployment:
    """A network in standard convolutions and how its layers were rewritten."""

    model: nn.Module
    layers: tuple[DeployedLayer, ...]

    def __str__(self) -> str:
        if not self.layers:
            return "A regular network: exported as it is."
        rows = [("layer", "form", "box", "outliers", "cost", "folded")]
        for layer in self.layers:
            box = "x".join(map(str, layer.box))
            rows.append((layer.name, layer.form, box, str(layer.outliers), f"{layer.cost:.2f}", layer.folded or "-"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def deploy(model: nn.Module) -> nn.Module:
    """Copies a network with every irregular layer rewritten in standard convolutions.

    The copy computes what ``model.eval()`` computes, for every input size, up to rounding, and runs where
    ``torch.nn`` runs: ONNX, TensorRT, Core ML, without this package. Each layer takes the form that costs least
    (:mod:`icnn_zoo.deployment.standard_forms`): a ``torch.nn.Conv2d``, a ``torch.nn.Sequential``, or a
    ``torch.fx.GraphModule`` that adds up branches of them, which no class of ``torch.nn`` does. A BatchNorm (also
    timm's with an activation) that alone reads an irregular layer's output is folded into it and becomes an
    ``Identity`` (the activation stays), where a trace of the whole network by ``torch.fx`` proves it; a network that
    cannot be traced keeps its norms.

    Args:
        model: A network with irregular layers; it is not changed.

    Returns:
        The copy, in eval mode, no parameter of it requiring a gradient. Taps further than 65536 px away, which no
        feature map reaches, are left out.

    Raises:
        ValueError: The network has no irregular layer; a position is not finite; an irregular layer carries hooks,
            which the copy would lose, or pads by a rule of a person's own.

    Example:
        >>> import timm, torch, icnn_zoo
        >>> model = icnn_zoo.convert(timm.create_model("test_resnet"), start="layer4", epsilon=0.3).eval()
        >>> deployed = icnn_zoo.deploy(model)
        >>> icnn_zoo.irregular_layers(deployed)
        {}
        >>> image = torch.randn(1, 3, 65, 97)
        >>> torch.allclose(deployed(image), model(image), atol=1e-4)
        True
    """
    return rewrite(model).model


@torch.no_grad()
def rewrite(model: nn.Module) -> Deployment:
    """Does what :func:`deploy` does, and says how.

    Args:
        model: A network with irregular layers; it is not changed.

    Returns:
        The copy and the form of each layer; ``print`` shows it as a table.

    Raises:
        ValueError: As :func:`deploy`.
    """
    _check(model)
    result = copy.deepcopy(model).eval().requires_grad_(False)
    unguard(result)
    layers = irregular_layers(result)
    norms = _foldable_norms(result)
    replacements: dict[int, nn.Module] = {}
    report = []
    for name, layer in layers.items():
        weight, bias = layer.weight_rule(layer).double(), None if layer.bias is None else layer.bias.double()
        norm_name = norms.get(name)
        if norm_name is not None:
            norm = result.get_submodule(norm_name)
            weight, bias = _fold(weight, bias, norm)
            replacements[id(norm)] = _without_norm(norm)
        rewritten = standard_form(layer, weight, bias)
        replacements[id(layer)] = rewritten.module
        report.append(DeployedLayer(name, rewritten.form, rewritten.box, rewritten.outliers, rewritten.cost, norm_name))
    return Deployment(replace_modules(result, replacements).eval(), tuple(report))


def _check(model: nn.Module) -> None:
    layers = irregular_layers(model)
    if not layers:
        raise ValueError(
            f"`model` must have irregular layers; {type(model).__name__} has none. Export it as it is, or convert it "
            "first: icnn_zoo.convert(model, start=...)."
        )
    for name, layer in layers.items():
        finite = layer.positions.detach().isfinite()
        if not finite.all():
            raise ValueError(
                f"Positions must be finite to be deployed; layer {name!r} has {int((~finite).sum())} that are not, of "
                f"{finite.numel()}."
            )
        if not has_standard_form(layer):
            raise ValueError(
                f"Layer {name!r} pads its input by {layer.padding_rule.__name__}, which has no standard form; "
                "static_padding and dynamic_same_padding of icnn_zoo.nn.conv_rules have one."
            )
        attached = _attached(layer)
        if attached:
            raise ValueError(
                f"Layer {name!r} carries {', '.join(attached)}, which its standard form would lose; remove them first."
            )


def _attached(module: nn.Module) -> list[str]:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return [kind.strip("_") for kind in kinds if getattr(module, kind)]


def replace_modules(model: nn.Module, replacements: dict[int, nn.Module]) -> nn.Module:
    """Puts modules in the place of others, given by their ids, under all their names; returns the (new) root."""
    if id(model) in replacements:
        return replacements[id(model)]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children leaves out a module's second name
            if child is not None and id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
    return model


class _Tracer(fx.Tracer):
    """Follows a network down to irregular layers and norms; what holds none of them may compute anything."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kinds: tuple[type[nn.Module], ...] = (IrregularConv2d, *_norm_types())
        return isinstance(m, kinds) or not any(isinstance(part, kinds) for part in m.modules())


def _foldable_norms(model: nn.Module) -> dict[str, str]:
    """Maps irregular layers to the norms that alone read their output, both called once, where that can be proved."""
    # An argument with a default stays at it: a proxy would be traced as if it were given.
    arguments = inspect.signature(model.forward).parameters
    defaults = {name: item.default for name, item in arguments.items() if item.default is not item.empty}
    try:
        graph = _Tracer().trace(model, defaults)
    except Exception:  # whatever the network's own code raises when its input is no tensor
        return {}
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # Parameters that the network's own code uses have to stay what they are.
    used = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    modules = dict(model.named_modules())
    found = {}
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], IrregularConv2d) or len(node.users) != 1:
            continue
        (reader,) = node.users
        alone = reader.op == "call_module" and reader.args == (node,) and not reader.kwargs
        if not alone or calls[node.target] != 1 or calls[reader.target] != 1 or {node.target, reader.target} & used:
            continue
        norm = modules[reader.target]
        if type(norm) in _norm_types() and norm.running_var is not None and not _attached(norm):
            found[node.target] = reader.target
    return found


def _norm_types() -> tuple[type[nn.Module], ...]:
    timm_norms = sys.modules.get("timm.layers.norm_act")  # whoever has such a layer has imported timm; we need not
    timm_types: list[type[nn.Module]] = [] if timm_norms is None else [timm_norms.BatchNormAct2d]
    return (nn.BatchNorm2d, nn.SyncBatchNorm, *timm_types)


def _fold(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    shift = shift if norm.bias is None else shift + norm.bias.double()
    return weight * scale[:, None, None, None], shift if bias is None else shift + bias * scale


def _without_norm(norm: nn.Module) -> nn.Module:
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return nn.Identity()
    return nn.Sequential(norm.get_submodule("drop"), norm.get_submodule("act"))

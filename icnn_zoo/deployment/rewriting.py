"""Rewriting a network's irregular layers in standard convolutions, for inference anywhere."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from icnn_zoo.conversion.rewrite_guards import unguard
from icnn_zoo.deployment.norm_folding import fold, foldable_norms, without_norm
from icnn_zoo.deployment.standard_forms import has_standard_form, standard_form
from icnn_zoo.deployment.tensor_call import named_outputs, relative_difference
from icnn_zoo.io.tables import text_table
from icnn_zoo.nn.irregular_conv import IrregularConv2d, irregular_layers
from icnn_zoo.nn.modules import ExampleInput, attached_hooks, call, evaluating, replace_modules
from icnn_zoo.nn.references import unregistered

# Largest allowed difference for an example, over the largest number of an output; of integers none.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


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
    """The normalization that was folded into the layer."""


@dataclass(frozen=True)
class Deployment:
    """A network in standard convolutions and how its layers were rewritten."""

    model: nn.Module
    layers: tuple[DeployedLayer, ...]
    difference: float | None = None
    """Largest difference for the example input, over the largest number of that output; None if there was none."""

    def __str__(self) -> str:
        if not self.layers:
            return "A regular network: exported as it is."
        rows = [("layer", "form", "box", "outliers", "cost", "folded")]
        for layer in self.layers:
            box = "x".join(map(str, layer.box))
            rows.append((layer.name, layer.form, box, str(layer.outliers), f"{layer.cost:.2f}", layer.folded or "-"))
        return text_table(rows)


def deploy(model: nn.Module, example_input: ExampleInput | None = None) -> nn.Module:
    """Copies a network with every irregular layer rewritten in standard convolutions.

    The copy computes what ``model.eval()`` computes, for every input size, up to rounding, and runs where
    ``torch.nn`` runs: ONNX, TensorRT, Core ML, without this package. Each layer takes the form that costs least
    (:mod:`icnn_zoo.deployment.standard_forms`): a ``torch.nn.Conv2d``, a ``torch.nn.Sequential``, or a
    ``torch.fx.GraphModule`` that adds up branches of them, which no class of ``torch.nn`` does. A BatchNorm (also
    timm's with an activation) that alone reads an irregular layer's output is folded into it and becomes an
    ``Identity`` (the activation stays), where a trace by ``torch.fx`` proves it: of the whole network, or, where that
    cannot be traced, of the blocks in it. The latter does not see code outside of a block that calls one of its parts
    alone; an ``example_input`` does. ``fuse`` and its kin, which would have replaced irregular layers, do nothing in
    the copy and return the module.

    Args:
        model: A network with irregular layers; it is not changed.
        example_input: The network's input, a tuple of positional or a mapping of keyword arguments: both networks run
            on it, and their outputs are compared before the copy is returned. None does not compare.

    Returns:
        The copy, in eval mode, no parameter of it requiring a gradient. Taps further than 65536 px away, which no
        feature map reaches, are left out.

    Raises:
        ValueError: The network has no irregular layer, or holds one where a copy cannot follow; a position is not
            finite; an irregular layer carries hooks, which the copy would lose, or pads by a rule of a person's own.
        RuntimeError: The copy gives something else for ``example_input``.

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
    return rewrite(model, example_input).model


@torch.no_grad()
def rewrite(model: nn.Module, example_input: ExampleInput | None = None) -> Deployment:
    """Does what :func:`deploy` does, and says how.

    Args:
        model: A network with irregular layers; it is not changed.
        example_input: As in :func:`deploy`.

    Returns:
        The copy and the form of each layer; ``print`` shows it as a table.

    Raises:
        ValueError: As :func:`deploy`.
        RuntimeError: As :func:`deploy`.
    """
    _check(model)
    result = copy.deepcopy(model).eval().requires_grad_(False)
    unguard(result)
    layers = irregular_layers(result)
    norms = foldable_norms(result)
    replacements: dict[nn.Module, nn.Module] = {}
    report = []
    for name, layer in layers.items():
        weight = layer.weight_rule(layer).cpu().double()  # there are devices without float64
        bias = None if layer.bias is None else layer.bias.cpu().double()
        norm_name = norms.get(name)
        if norm_name is not None:
            norm = result.get_submodule(norm_name)
            weight, bias = fold(weight, bias, norm)
            replacements[norm] = without_norm(norm)
        rewritten = standard_form(layer, weight, bias)
        replacements[layer] = rewritten.module
        report.append(DeployedLayer(name, rewritten.form, rewritten.box, rewritten.outliers, rewritten.cost, norm_name))
    result = replace_modules(result, replacements).eval()
    for where in unregistered(result, IrregularConv2d):
        raise ValueError(
            f"{where} of `model` holds an irregular layer that is not registered, or that a function keeps, which a "
            "copy cannot follow; it would stay irregular. Call the layer by its attribute."
        )
    difference = None if example_input is None else _compare(model, result, example_input)
    return Deployment(result, tuple(report), difference)


def _compare(model: nn.Module, deployed: nn.Module, example_input: ExampleInput) -> float:
    # Networks may change their input in place: each has its own.
    with evaluating(model):
        expected = named_outputs(call(model, copy.deepcopy(example_input)))
    found = named_outputs(call(deployed, copy.deepcopy(example_input)))
    worst = 0.0
    for name, tensor in expected.items():
        allowed = TOLERANCES.get(tensor.dtype, 0.0)
        difference = relative_difference(tensor, found[name])
        if not difference <= allowed:
            raise RuntimeError(
                f"The deployed network differs for `example_input`: {name!r} by {difference:.1e} of its maximum, "
                f"where {allowed:.0e} is allowed. Code outside of a block may call one of its parts alone."
            )
        worst = max(worst, difference)
    return worst


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
        attached = attached_hooks(layer)
        if attached:
            raise ValueError(
                f"Layer {name!r} carries {', '.join(attached)}, which its standard form would lose; remove them first."
            )

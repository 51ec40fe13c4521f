"""Turning the convolutions of a network into irregular ones, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from icnn_zoo.conversion.planning import ConversionPlan, Filter, plan
from icnn_zoo.conversion.rewrite_guards import guard
from icnn_zoo.conversion.start import Order, modules_from
from icnn_zoo.nn.irregular_conv import IrregularConv2d
from icnn_zoo.nn.modules import ExampleInput, replace_modules
from icnn_zoo.nn.references import UnreachableError
from icnn_zoo.nn.spreads import Interpolation, SpreadPer
from icnn_zoo.nn.tap_limits import limit_taps
from icnn_zoo.nn.tap_restriction import Axes, Limit
from icnn_zoo.ops.sharing import Shapes

# Wrappers that took stock of the parameters when they were made, and would not know the new ones.
_WRAPPERS = {
    "DistributedDataParallel": "wrap the converted network",
    "FullyShardedDataParallel": "shard the converted network",
    "FSDPModule": "shard the converted network",
    "OptimizedModule": "compile the converted network",
}


def convert(
    model: nn.Module,
    start: str,
    *,
    filter: Filter | None = None,
    epsilon: float = 1e-3,
    shapes: Shapes = "channel",
    interpolation: Interpolation = "bilinear",
    spread: float | None = None,
    spread_per: SpreadPer = "tap",
    axes: Axes = "both",
    limit: Limit = None,
    taps: int | None = None,
    order: Order = "registration",
    example_input: ExampleInput | None = None,
) -> nn.Module:
    """Replaces every convolution larger than 1x1 from ``start`` on by an irregular one, in place, all or nothing.

    Load pretrained weights first; make the optimizer, wrap, compile and trace afterwards. Weight and bias stay the same
    Parameter objects, so an optimizer made before keeps its references but does not know the new ``displacement``
    (:func:`icnn_zoo.bound_positions` refuses such an optimizer). Training mode, dtype, device, requires_grad, hooks
    and attributes are kept; at epsilon 0 the output is unchanged. A second call changes nothing. A module under
    several names stays one module. References outside of the registered modules (plain lists, tuples, dicts,
    attributes, bound methods, partials, closures) are turned to the new layers too.

    Each kernel keeps its taps: its weights, pretrained perhaps, say nothing of more of them. Layers with free taps are
    made as such, ``IrregularConv2d(..., taps=34)``, in a network of your own; :func:`place_taps` moves the taps of
    converted layers.

    Reparameterize and dilate before converting: ``fuse``, ``fuse_model``, ``reparameterize`` and ``switch_to_deploy``
    of modules that hold a converted layer, ``set_input_size(patch_size=...)`` of a patch embedding, and
    segmentation_models_pytorch's ``make_dilated`` and ``set_in_channels`` would put regular convolutions back or leave
    irregular ones out, and raise from now on (:mod:`icnn_zoo.conversion.rewrite_guards`). Not seen are functions that
    look for ``nn.Conv2d`` in a network given to them, and code that calls ``functional.conv2d`` with the weight of a
    convolution, which goes on without positions; no timm network does. After the first backward,
    :func:`icnn_zoo.check_gradients` says whether every new layer is really used.

    Args:
        model: Any network.
        start: Dotted name of the first module to convert: an exact name, else a unique ending of one ("layer3.11",
            "classifier"), also as timm's ``features_only=True`` renames it; see :func:`plan`. "" converts from the
            very first module.
        filter: Narrows the choice: called with (module, dotted name), False leaves the module regular.
        epsilon: Initial displacement of every tap in pixels.
        shapes: Who shares a shape: "channel" for one per input channel, shared by all kernels, "layer" for one of all,
            "group" for one per group, "kernel" for the full version.
        interpolation: What a tap reads: "bilinear" four pixels, "triangle" and "gaussian" all within reach of a spread
            that is learned; see :class:`icnn_zoo.IrregularConv2d`, also for what follows. A gaussian blurs unless its
            spread is 0.2.
        spread: Initial spread in pixels; None for 1 (triangle) or 0.5 (gaussian).
        spread_per: Who has a spread of its own: each "tap", each "channel" (each shape), or the "layer".
        axes: Which coordinates are learned: "rows", "columns" or "both"; see :func:`icnn_zoo.limit_taps`.
        limit: The most that a coordinate may be away from the regular grid, in pixels, "extent" for the kernel's own
            box, None for no limit; likewise.
        taps: None; a number is refused, see above.
        order: What "from ``start`` on" means, ``start`` itself included. "registration", the order of
            ``model.named_modules()``, is nearly always that of the forward; timm's twins, coat, fasternet,
            efficientvim, ghostnetv2 and hrnet with its classification head register some modules earlier or later than
            they run. "execution" goes by the first calls in a forward of ``example_input``.
        example_input: For order="execution": the network's input, a tuple of positional or a mapping of keyword
            arguments. The network runs on it once, in eval mode and without gradients.

    Returns:
        The same ``model``; where it is itself a convolution, the new layer.

    Raises:
        TypeError: ``start`` is not a string or ``filter`` not callable.
        ValueError: ``start`` names no module, or several; nothing is left to convert; an option has an impossible
            value; a convolution is lazy, quantized, pruned, parametrized, scripted, compiled, on the meta device,
            inlined by a tracer, or of a class with an unknown forward, or a method of it is held that the new layer
            does not have; the network is already wrapped for distributed training or compiled. The model is then
            unchanged.

    Example:
        >>> import timm, icnn_zoo
        >>> model = icnn_zoo.convert(timm.create_model("resnet18"), start="layer4")
        >>> list(icnn_zoo.irregular_layers(model))
        ['layer4.0.conv1', 'layer4.0.conv2', 'layer4.1.conv1', 'layer4.1.conv2']
    """
    if taps is not None:
        raise ValueError(
            f"`taps` must be None: conversion keeps a kernel's weights, which say nothing of other taps; got {taps!r}. "
            f"Make layers with free taps in a network of your own: icnn_zoo.IrregularConv2d(..., taps={taps!r})."
        )
    _refuse_wrapped(model)
    reading: dict[str, Any] = {"shapes": shapes, "interpolation": interpolation, "spread_per": spread_per}
    decided = plan(model, start, filter=filter, order=order, example_input=example_input, **reading)
    if decided.refused:
        refused = decided.refused[0]
        more = f" (and {len(decided.refused) - 1} more, see icnn_zoo.plan)" if len(decided.refused) > 1 else ""
        raise ValueError(f"{refused.name!r} can't be converted: {refused.reason}{more}.")
    if not decided.converted:
        if any(isinstance(module, IrregularConv2d) for _, module, _ in modules_from(model, decided.start)):
            return model
        raise ValueError(_nothing_to_convert(model, start, decided))
    convs = {layer.name: model.get_submodule(layer.name) for layer in decided.converted}
    for name, conv in convs.items():
        if any(parameter.is_meta for parameter in conv.parameters()):
            raise ValueError(
                f"{name!r} is on the meta device and has no numbers to start from; load it first. icnn_zoo.plan works "
                "on meta."
            )
    layers: dict[str, IrregularConv2d] = {
        name: IrregularConv2d.from_conv2d(conv, epsilon=epsilon, spread=spread, **reading)  # type: ignore[arg-type]
        for name, conv in convs.items()
    }
    for layer in layers.values():
        limit_taps(layer, axes=axes, limit=limit)
    if "" in layers:
        return layers[""]
    replacements = {convs[name]: layer for name, layer in layers.items()}
    try:
        replace_modules(model, replacements)
    except UnreachableError as error:
        raise ValueError(
            f"{error} The forward would go on with the regular convolution: leave it by `filter`."
        ) from None
    aliases = [(alias, layers[layer.name]) for layer in decided.converted for alias in layer.aliases]
    guard(model, [alias for alias, _ in aliases])
    return model


def _refuse_wrapped(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("`model` is scripted; convert the network before torch.jit.script.")
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS:
                where = f"`model`'s {name!r}" if name else "`model`"
                raise ValueError(
                    f"{where} is a {kind.__name__}, which would not know the new parameters; convert first, then "
                    f"{_WRAPPERS[kind.__name__]}."
                )
        if module._compiled_call_impl is not None:
            raise ValueError(f"{name or type(module).__name__!r} is compiled; convert first, then compile.")


def _nothing_to_convert(model: nn.Module, start: str, decided: ConversionPlan) -> str:
    reasons = (
        "; ".join(f"{layer.name}: {layer.reason}" for layer in decided.skipped[:5]) or "there is none larger than 1x1"
    )
    everything = plan(model, "").converted
    last = f"The last one in the network is {everything[-1].name!r}." if everything else "The network has none."
    return f"`start`={start!r} leaves no convolution to convert in {type(model).__name__}: {reasons}. {last}"

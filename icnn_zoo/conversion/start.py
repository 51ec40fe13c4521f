"""Which modules of a network come from ``start`` on: names, wrappers that rename, and the two orders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from icnn_zoo.nn.modules import ExampleInput, call, evaluating, find_name

Order = Literal["registration", "execution"]
ORDERS = ("registration", "execution")


def resolve_start(model: nn.Module, start: str) -> str:
    """Finds the module that ``start`` means.

    In this order: an exact dotted name (any alias of a module that is registered twice); the only name that ends with
    it; of several such names the one directly in a wrapper (``model.``, ``body.``, ``graph_module.``, ``module.``);
    the same with its first dot as an underscore, as timm's ``features_only=True`` names stages ("stages.2.1" is
    "stages_2.1" there).

    Args:
        model: Any network.
        start: A dotted name, or the ending of one; "" is the network itself.

    Returns:
        The exact dotted name.

    Raises:
        TypeError: ``start`` is not a string.
        ValueError: There is no such module (the message lists the nearest names), or several.
    """
    if not isinstance(start, str):
        raise TypeError(f"`start` must be the dotted name of a module, such as 'layer3.11'; got {start!r}.")
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    stage = start.replace(".", "_", 1)
    wanted = next((name for name in (start, stage) if any(f".{known}".endswith(f".{name}") for known in names)), start)
    what = f"module of {type(model).__name__}"
    if any(hasattr(getattr(module, "feature_info", None), "out_indices") for module in model.modules()):
        what += ", which ends with the last stage of its `out_indices` (later ones are cut off)"
    return find_name(wanted, names, argument="start", what=what)


def modules_from(
    model: nn.Module, start: str, order: Order = "registration", example_input: ExampleInput | None = None
) -> list[tuple[str, nn.Module, bool]]:
    """Lists ``start`` and what comes after it, each module once, under its first name.

    Args:
        model: Any network.
        start: An exact dotted name.
        order: "registration" is the order of ``model.named_modules()``; a module with several names comes after
            ``start`` if one of its names does. "execution" is the order of first calls in a forward of
            ``example_input``.
        example_input: For "execution": the network's input, a tuple of positional or a mapping of keyword arguments.

    Returns:
        (name, module, whether it runs) in that order; what ``example_input`` does not reach comes last, wherever it is
        registered.

    Raises:
        ValueError: ``order`` does not exist; "execution" lacks an ``example_input``, or the forward does not reach
            ``start``.
    """
    if order not in ORDERS:
        raise ValueError(f"`order` must be one of {', '.join(ORDERS)}; got {order!r}.")
    first_names: dict[int, str] = {}
    for name, module in model.named_modules():
        first_names[id(module)] = name
    if order == "execution":
        return [(first_names[id(module)], module, runs) for module, runs in _called_from(model, start, example_input)]
    if example_input is not None:
        raise ValueError("`example_input` is for order='execution' only; leave it out, or give the order.")
    started = False
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        started = started or name == start
        if started:
            found.setdefault(id(module), module)
    return [(first_names[key], module, True) for key, module in found.items()]


def _called_from(model: nn.Module, start: str, example_input: ExampleInput | None) -> Iterator[tuple[nn.Module, bool]]:
    if example_input is None:
        raise ValueError("order='execution' needs an `example_input` to run the network on, such as a batch of images.")
    calls = _first_calls(model, example_input)
    # A container that is iterated and not called itself starts where its first part does.
    parts = {id(part) for part in model.get_submodule(start).modules()}
    places = [place for place, module in enumerate(calls) if id(module) in parts]
    if not places:
        raise ValueError(f"`start`={start!r} is not called when the network runs on `example_input`.")
    yield from ((module, True) for module in calls[places[0] :])
    reached = {id(module) for module in calls}
    yield from ((module, False) for module in model.modules() if id(module) not in reached)


def _first_calls(model: nn.Module, example_input: ExampleInput) -> list[nn.Module]:
    calls: dict[int, nn.Module] = {}

    def remember(module: nn.Module, args: Any) -> None:
        calls.setdefault(id(module), module)

    handles = [module.register_forward_pre_hook(remember) for module in model.modules()]
    try:
        with evaluating(model), torch.no_grad():
            call(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    return list(calls.values())

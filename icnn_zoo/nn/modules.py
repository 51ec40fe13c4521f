"""Modules of a network: found by name, run in eval mode for a while, replaced."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from icnn_zoo.nn.references import redirect

ExampleInput = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a network takes: one tensor, a tuple of positional or a mapping of keyword arguments."""

# Where wrappers keep the network they wrap: timm's three kinds of feature extractors, DataParallel, torch.compile.
WRAPPERS = ("model", "body", "graph_module", "module", "_orig_mod")


def find_name(wanted: str, names: Sequence[str], *, argument: str, what: str) -> str:
    """Finds the name that a person means: an exact one, or the only one that ends so.

    Of several endings the one directly in a wrapper (``model.``, ``body.``, ``graph_module.``, ``module.``,
    ``_orig_mod.``) is meant.

    Args:
        wanted: A dotted name, or the ending of one.
        names: The names there are.
        argument: The caller's argument, for messages.
        what: What the names are of, such as "module of ResNet", for messages.

    Returns:
        One of ``names``.

    Raises:
        ValueError: None of them is meant (the message lists the nearest), or several could be.
    """
    if wanted in names:
        return wanted
    endings = [name for name in names if name.endswith(f".{wanted}")]
    wrapped = [name for name in endings if set(name.removesuffix(f".{wanted}").split(".")) <= set(WRAPPERS)]
    for found in (endings, wrapped):
        if len(found) == 1:
            return found[0]
    if endings:
        raise ValueError(
            f"`{argument}`={wanted!r} is the ending of several names, give one in full: {', '.join(endings[:8])}."
        )
    top = [name for name in names if name and "." not in name] or list(names[:5])
    near = difflib.get_close_matches(wanted, names, n=5, cutoff=0.4) or top
    raise ValueError(f"`{argument}`={wanted!r} names no {what}; the nearest are {', '.join(near)}.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, in which a forward changes no statistics, and each module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def call(model: nn.Module, example_input: ExampleInput) -> Any:
    """What a network returns for an example of its inputs."""
    if isinstance(example_input, Mapping):
        return model(**example_input)
    return model(*example_input) if isinstance(example_input, tuple) else model(example_input)


def attached_hooks(module: nn.Module) -> list[str]:
    """Kinds of forward hooks that a module carries, which a module in its place would lose."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return [kind.strip("_") for kind in kinds if getattr(module, kind)]


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Puts modules in the place of others, under all their names and wherever else they are held.

    Order of registration stays, which sequences and feature extractors go by.

    Returns:
        The (new) root.

    Raises:
        UnreachableError: A method is held that its replacement does not have; nothing was changed then.
    """
    if model in replacements:
        return replacements[model]
    redirect(model, replacements, change=False)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children leaves out a module's second name
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    redirect(model, replacements)
    return model


def some_of(names: Sequence[str]) -> str:
    """The first three names, for messages."""
    return ", ".join(map(repr, names[:3])) + (" and others" if len(names) > 3 else "")

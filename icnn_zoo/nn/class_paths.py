"""Networks and losses of other packages, or of one's own: named by class path in a configuration, built here."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)

ALLOW = "ICNN_ZOO_ALLOW"
WEIGHTS: Mapping[str, Any] = {  # arguments by which networks ask for weights, and what asks for none
    "encoder_weights": None,
    "weights": None,
    "weights_backbone": None,
    "pretrained": False,
    "pretrained_backbone": False,
}


def read_spec(argument: str, spec: object) -> tuple[str, dict[str, Any]]:
    """Class path and arguments of ``{"class_path": "package.Class", "init_args": {...}}``.

    Raises:
        ValueError: It is something else; the message says what.
    """
    form = f"`{argument}` must be {{class_path: package.Class, init_args: {{...}}}}"
    if not isinstance(spec, Mapping):
        raise ValueError(f"{form}; got {spec!r}.")
    path, arguments = spec.get("class_path"), spec.get("init_args") or {}
    if unknown := [str(key) for key in spec if key not in ("class_path", "init_args")]:
        raise ValueError(f"{form}; got the key {', '.join(unknown)}: arguments of the class go into init_args.")
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")) or "." not in path:
        raise ValueError(f"{form}, with a dotted name as class_path; got {path!r}.")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{form}; got init_args {arguments!r}.")
    return path, dict(arguments)


def find_builder(argument: str, path: str) -> Callable[..., Any]:
    """Imports a class, or a function that makes an object of one.

    Raises:
        ValueError: It cannot be imported; the message says which part, and the nearest name.
    """
    module_path, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_path)
    except ImportError as error:
        missing = getattr(error, "name", None) or module_path
        raise ValueError(
            f"`{argument}`: {path} cannot be imported ({error}). Install the package of {missing!r}, or put the folder "
            "that holds it on PYTHONPATH."
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        near = difflib.get_close_matches(name, [each for each in dir(module) if not each.startswith("_")], n=3)
        raise ValueError(
            f"`{argument}`: {module_path} has no class {name}; the nearest are {', '.join(near) or 'none'}."
        )
    return found


def build(argument: str, spec: object, given: Mapping[str, Any] | None = None, *, weights: bool = False) -> nn.Module:
    """Builds the module that a configuration names.

    Args:
        argument: The configuration's key, for messages.
        spec: ``{"class_path": ..., "init_args": {...}}``.
        given: Arguments that the class gets where it has them; ``init_args`` may not say otherwise.
        weights: Whether the class may fetch the weights that its arguments ask for, by their defaults too.

    Returns:
        The module.

    Raises:
        ValueError: It cannot be imported or built, or is not an nn.Module.
    """
    path, arguments = read_spec(argument, spec)
    builder = find_builder(argument, path)
    known = _parameters(builder)
    for name, value in (given or {}).items():
        if name not in known:
            continue
        if arguments.setdefault(name, value) != value:
            raise ValueError(
                f"`{argument}`: init_args.{name} must be {value!r} here; got {arguments[name]!r}. Leave it out."
            )
    if not weights:
        arguments |= {name: none for name, none in WEIGHTS.items() if name in known}
    try:
        module = builder(**arguments)
    except Exception as error:  # of any kind, in code that is not ours
        raise ValueError(f"`{argument}`: {path} cannot be built with {arguments}: {error}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"`{argument}`: {path} must give a torch.nn.Module; it gave a {type(module).__name__}.")
    return module


def asked_weights(argument: str, spec: object) -> dict[str, Any]:
    """The arguments of a spec that ask for weights."""
    _, arguments = read_spec(argument, spec)
    return {name: arguments[name] for name in WEIGHTS if arguments.get(name)}


def without_weights(argument: str, spec: object) -> dict[str, Any]:
    """The spec without the arguments that ask for weights: what two networks of the same tensors have in common."""
    path, arguments = read_spec(argument, spec)
    return {"class_path": path, "init_args": {key: value for key, value in arguments.items() if key not in WEIGHTS}}


def check_allowed(argument: str, spec: object, allow: Sequence[str] | None, where: str) -> None:
    """Checks that a class which a file names may be imported: the user listed it, or the package that it is in.

    A package allows the subclasses of torch.nn.Module that are defined in it; functions must be listed by name.

    Args:
        argument: What the file calls it.
        spec: ``{"class_path": ..., "init_args": {...}}``.
        allow: Dotted names of packages, modules, classes and functions; None for ``ICNN_ZOO_ALLOW``, separated by
            commas.
        where: The file, for messages.

    Raises:
        ValueError: It is not; nothing was imported that is not listed.
    """
    path, _ = read_spec(argument, spec)
    if allow is None:
        allow = [name.strip() for name in os.environ.get(ALLOW, "").split(",") if name.strip()]
    if isinstance(allow, str):
        raise TypeError(f"`allow` must be a list of dotted names; got {allow!r}.")
    advice = f"give allow=[{path!r}], --allow {path} or {ALLOW}={path}"
    if not any(_is_below(path, name) for name in allow):
        raise ValueError(f"{where} names the {argument} {path}, which is imported only if you allow it: {advice}.")
    if path in allow:
        return
    found = find_builder(argument, path)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{where} names the {argument} {path}, which is not a subclass of torch.nn.Module: {advice}.")
    if not any(_is_below(found.__module__, name) for name in allow):
        raise ValueError(f"{where} names the {argument} {path}, which is defined in {found.__module__}: {advice}.")


def without_memory(make: Callable[[], AnyModule], *, trusted: bool) -> AnyModule:
    """Makes a module without memory for its numbers; a ``trusted`` one that cannot be made so, with memory."""
    try:
        with torch.device("meta"):
            return make()
    except (RuntimeError, NotImplementedError, ValueError):  # such as a number that is read from a tensor
        if not trusted:
            raise
        return make()


def _is_below(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _parameters(builder: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(builder).parameters
    except (TypeError, ValueError):  # of C
        return {}

"""References to modules that ``named_modules`` does not see, found and turned to what takes a module's place.

Networks keep layers in plain lists, tuples and dicts, in attributes set around ``nn.Module``, as bound methods, in
``functools.partial``, and in closures and default arguments of functions. Such a reference goes on calling a layer
that was replaced under its registered name.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

# Objects of these packages hold no layers that a forward would call, but a great deal else.
_OPAQUE = ("builtins", "concurrent", "lightning", "logging", "multiprocessing", "numpy", "pytorch_lightning", "torch")
_REGISTERED = ("_modules", "_parameters", "_buffers")

Visitor = Callable[[nn.Module, str], nn.Module]
"""(module, where it is held) to the module that should be held there."""


class UnreachableError(ValueError):
    """A reference that cannot be turned to another module."""


def redirect(model: nn.Module, replacements: Mapping[nn.Module, nn.Module], *, change: bool = True) -> None:
    """Turns every unregistered reference to a replaced module to its replacement.

    Args:
        model: The network whose modules are searched.
        replacements: Modules and what takes their places.
        change: False only checks that all references could be turned.

    Raises:
        UnreachableError: A method of a replaced module is held that its replacement does not have.
    """
    by_id = {id(old): new for old, new in replacements.items()}
    _Walk(lambda module, where: by_id.get(id(module), module), change).through(model)


def unregistered(model: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    """Modules of a kind that the network holds outside of ``_modules`` only, by where they are held."""
    registered = {id(module) for module in model.modules()}
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, where: str) -> nn.Module:
        if isinstance(module, kind) and id(module) not in registered:
            found[where] = module
        return module

    _Walk(visit, change=False).through(model)
    return found


def unregistered_uses(model: nn.Module) -> list[nn.Module]:
    """All modules that are held outside of ``_modules``, registered or not."""
    found: list[nn.Module] = []

    def visit(module: nn.Module, where: str) -> nn.Module:
        found.append(module)
        return module

    _Walk(visit, change=False).through(model)
    return found


class _Walk:
    def __init__(self, visit: Visitor, change: bool) -> None:
        self.visit = visit
        self.change = change
        self.results: dict[int, Any] = {}
        self.held: list[Any] = []  # so that no other object gets the id of one that was seen

    def through(self, model: nn.Module) -> None:
        named = dict(model.named_modules())
        self.results = {id(module): module for module in named.values()}
        for name, module in named.items():
            self._attributes(module, name or type(module).__name__, _REGISTERED)

    def _attributes(self, holder: Any, where: str, left_out: Iterable[str] = ()) -> None:
        for name, value in list(vars(holder).items()):
            if name not in left_out:
                result = self._value(value, f"{where}.{name}")
                if result is not value and self.change:
                    vars(holder)[name] = result  # around nn.Module's setattr, which would register it

    def _value(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, (str, bytes, int, float, complex, Tensor, type, types.ModuleType)):
            return value
        if isinstance(value, nn.Module):
            visited = self.visit(value, where)
            if visited is not value:
                return visited
        if id(value) not in self.results:
            self.results[id(value)] = value  # for what holds itself
            self.held.append(value)
            self.results[id(value)] = self._inside(value, where)
        return self.results[id(value)]

    def _inside(self, value: Any, where: str) -> Any:
        if isinstance(value, nn.Module):
            self._attributes(value, where, _REGISTERED[1:])
        elif isinstance(value, dict):
            return self._dict(value, where)
        elif isinstance(value, (list, deque)):
            for place, item in enumerate(value):
                result = self._value(item, f"{where}[{place}]")
                if result is not item and self.change:
                    value[place] = result
        elif isinstance(value, (tuple, set, frozenset)):
            return self._fixed(value, where)
        elif isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            func, args, keywords = (self._value(part, where) for part in parts)
            if func is not value.func or args is not value.args:
                return functools.partial(func, *args, **keywords)
        elif isinstance(value, types.MethodType):
            return self._method(value, where)
        elif isinstance(value, types.FunctionType):
            self._function(value, where)
        elif isinstance(value, weakref.ref):
            target = value()
            result = self._value(target, where)
            return value if result is target else weakref.ref(result)
        elif type(value).__module__.partition(".")[0] not in _OPAQUE and hasattr(value, "__dict__"):
            self._attributes(value, where)
        return value

    def _dict(self, value: dict[Any, Any], where: str) -> dict[Any, Any]:
        items = list(value.items())
        results = [(self._value(key, where), self._value(item, f"{where}[{key!r:.40}]")) for key, item in items]
        if self.change and any(old[0] is not new[0] for old, new in zip(items, results, strict=True)):
            value.clear()  # a key was replaced: all in their order again
            value.update(results)
        elif self.change:
            for (key, item), (_, result) in zip(items, results, strict=True):
                if result is not item:
                    value[key] = result
        return value

    def _fixed(self, value: Any, where: str) -> Any:
        items = list(value)
        results = [self._value(item, f"{where}[{place}]") for place, item in enumerate(items)]
        if all(result is item for result, item in zip(results, items, strict=True)):
            return value
        if isinstance(value, set):
            if self.change:
                value.clear()
                value.update(results)
            return value
        return value._make(results) if hasattr(value, "_make") else type(value)(results)

    def _method(self, method: types.MethodType, where: str) -> Any:
        owner, name = method.__self__, method.__func__.__name__
        result = self._value(owner, where)
        if result is owner:
            return method
        if getattr(type(owner), name, None) is not method.__func__:
            return types.MethodType(method.__func__, result)  # a function that was bound by hand
        if not hasattr(result, name):
            raise UnreachableError(
                f"{where} holds the method {name!r} of a {type(owner).__name__}, which {type(result).__name__} does "
                "not have."
            )
        return getattr(result, name)

    def _function(self, function: types.FunctionType, where: str) -> None:
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            result = self._value(content, f"{where} (closure)")
            if result is not content and self.change:
                cell.cell_contents = result
        for name in ("__defaults__", "__kwdefaults__"):
            defaults = getattr(function, name)
            result = self._value(defaults, f"{where} (default argument)")
            if result is not defaults and self.change:
                setattr(function, name, result)
        self._attributes(function, where)

"""Hooks on the steps of optimizers that keep positions within the cell their gradient was taken in (Eq. 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from icnn_zoo.nn.irregular_conv import IrregularConv2d, irregular_layers
from icnn_zoo.nn.modules import some_of
from icnn_zoo.nn.step_watch import StepWatch
from icnn_zoo.nn.tap_restriction import pixel_limits

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
Rule = Callable[[torch.optim.Optimizer, list[Tensor]], list[Tensor]]
"""(the optimizer whose step runs, displacements) to what to subtract from each."""


class BoundHandle:
    """Removes the hooks of :func:`bound_positions`; a context manager as torch's own handles are."""

    def __init__(self, hooks: Sequence[RemovableHandle], watches: Sequence[tuple[IrregularConv2d, StepWatch]]) -> None:
        self._hooks = hooks
        self._watches = watches

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for layer, watch in self._watches:
            if layer.step_watch is watch:
                layer.step_watch = None

    def __enter__(self) -> BoundHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def hook_steps(optimizer: Optimizers, model: nn.Module, bound_epsilon: float, rule: Rule | None) -> BoundHandle:
    """Hooks that bound each step of positions: the optimizer's own, or what ``rule`` gives for a displacement.

    Errors are those of :func:`icnn_zoo.bound_positions`.
    """
    if not bound_epsilon > 0:
        raise ValueError(f"`bound_epsilon` must be positive, or positions on integers never move; got {bound_epsilon}.")
    given = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    for item in given:
        if not isinstance(item, torch.optim.Optimizer):
            raise TypeError(
                "`optimizer` must be a torch.optim.Optimizer, whose steps can be hooked, or a list of them; got "
                f"{type(item).__name__}."
            )
    layers = _check_held(given, model, steps_displacements=rule is None)
    hooks = StepHooks(model, bound_epsilon, rule)
    handles: list[RemovableHandle] = []
    for item in given:
        for inner in with_wrapped(item):
            if not getattr(type(inner).step, "hooked", False):  # timm's Lookahead skips what sets this up
                inner._patch_step_function()
            handles += [inner.register_step_pre_hook(hooks.remember), inner.register_step_post_hook(hooks.bound)]
    watches = [(layer, StepWatch(name)) for name, layer in layers.items()]
    for layer, watch in watches:
        layer.step_watch = watch
        watch.see(layer.displacement)
    return BoundHandle(handles, watches)


def _check_held(
    optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, steps_displacements: bool
) -> dict[str, IrregularConv2d]:
    """The layers that are trained or may be later, after checks."""
    every = irregular_layers(model)
    held = {
        id(parameter): (it, group) for it in optimizers for group in it.param_groups for parameter in group["params"]
    }
    lacking, found = [], False
    for name, layer in every.items():
        for parameter in layer.displacement_parameters():
            if id(parameter) not in held:
                lacking += [name] * parameter.requires_grad
                continue
            found = True
            holder, group = held[id(parameter)]
            _refuse_optimizer(holder, group, name, steps_displacements)
        if not isinstance(layer.displacement, nn.Parameter):
            steps: Any = layer.parametrizations
            if not all(hasattr(step, "right_inverse") for step in steps["displacement"]):
                raise ValueError(
                    f"A parametrization of the displacement of {name!r} has no right_inverse to bound it by."
                )
        if local_part(layer.displacement).shape[-2:] != layer.regular_grid.shape:
            raise ValueError(
                f"The displacement of {name!r} is flattened or cut across taps, as by FullyShardedDataParallel. Leave "
                "it out: ignored_states=icnn_zoo.whole_displacements(model), or use fully_shard."
            )
    if lacking or not found:
        raise ValueError(
            f"`optimizer` lacks the displacement of {some_of(lacking) or 'every layer'}. Convert the network first, "
            "then make the optimizer from its parameters (icnn_zoo.parameter_groups). Of several optimizers, give all "
            "in a list. A displacement that is not to be trained has requires_grad False."
        )
    return every


def _refuse_optimizer(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], name: str, steps_displacements: bool
) -> None:
    """Refuses kinds of optimizers that would make something else of a displacement than a step."""
    for inner in with_wrapped(optimizer):
        kind = type(inner).__name__
        if callable(getattr(inner, "eval", None)):
            raise ValueError(
                f"`optimizer`: {kind} is schedule-free and swaps the displacement of {name!r} for an average that "
                "no bound holds for. Give displacements to an optimizer of their own, such as torch.optim.SGD."
            )
        excluded = group.get("use_fallback", False) or not group.get("use_muon", True)
        if kind.lower().endswith("muon") and steps_displacements and not excluded:
            raise ValueError(
                f"`optimizer`: {kind} would orthogonalize the displacement of {name!r} as if it were a matrix. "
                "Exclude displacements: icnn_zoo.parameter_groups sets use_muon=False on their group. Or use "
                "icnn_zoo.move_positions, or another optimizer for them."
            )


class StepHooks:
    """What one call of :func:`bound_positions` does before and after steps.

    A step takes a few operators for all layers together, not for each: on a GPU they are so small that only their
    number counts.
    """

    def __init__(self, model: nn.Module, bound_epsilon: float, rule: Rule | None) -> None:
        self.model = model
        self.bound_epsilon = bound_epsilon
        self.rule = rule
        self.running: torch.optim.Optimizer | None = None
        self.last: list[_Group] = []
        self._known: WeakKeyDictionary[torch.optim.Optimizer, tuple[set[int], dict[str, IrregularConv2d]]]
        self._known = WeakKeyDictionary()

    @torch.no_grad()
    def remember(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        # A step within a wrapper's. Another's can still be here where it raised an error.
        if self.running is not optimizer and self.running is not None and optimizer in with_wrapped(self.running):
            return
        self.running = optimizer
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        tied: dict[tuple[int, ...], list[IrregularConv2d]] = {}  # layers that share one displacement are bounded once
        for layer in self._layers_for(optimizer, held):
            parameters = tuple(map(id, layer.displacement_parameters()))
            if not held.isdisjoint(parameters):
                tied.setdefault(parameters, []).append(layer)
        together: dict[Any, list[list[IrregularConv2d]]] = {}
        for layers in tied.values():
            together.setdefault(_bounded_with(layers[0]), []).append(layers)
        self.last = [_Group(layers) for layers in together.values()]

    def _layers_for(self, optimizer: torch.optim.Optimizer, held: set[int]) -> list[IrregularConv2d]:
        """The network's layers: those of the last step where the optimizer holds the same and they are in their places.

        A walk through the network in every step takes as long as the rest of this.
        """
        before, layers = self._known.get(optimizer, (set(), {}))
        if before != held or not all(_is_at(self.model, name, layer) for name, layer in layers.items()):
            layers = irregular_layers(self.model)
            self._known[optimizer] = held, layers
        return list(layers.values())

    @torch.no_grad()
    def bound(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if optimizer is not self.running:
            return
        for group in self.last:
            group.bound(self.bound_epsilon, self.rule, optimizer)
        self.running, self.last = None, []


def _is_at(model: nn.Module, name: str, layer: IrregularConv2d) -> bool:
    """Whether a network has this very layer under this name."""
    try:
        return model.get_submodule(name) is layer
    except AttributeError:
        return False


def _bounded_with(layer: IrregularConv2d) -> Any:
    """What a layer has in common with those that are bounded in the same way, their taps one after the other."""
    if layer.interpolation == "gaussian" or layer.limit is not None or not isinstance(layer.displacement, nn.Parameter):
        return id(layer)
    local = local_part(layer.displacement)
    return local.device, local.dtype, local.shape[-2], layer.axes


class _Group:
    """Layers that are bounded together, and where their taps are before a step."""

    def __init__(self, tied: list[list[IrregularConv2d]]) -> None:
        self.tied = tied
        self.layers = [layers[0] for layers in tied]
        locals_ = [local_part(layer.displacement).detach() for layer in self.layers]
        grids = [layer.regular_grid.expand_as(it) for layer, it in zip(self.layers, locals_, strict=True)]
        self.displacement, self.grid = _join(locals_), _join(grids)
        # The very float32 positions that the forward used: floor(grid + displacement) differs from
        # grid + floor(displacement) by rounding.
        self.positions = self.grid + self.displacement

    def bound(self, epsilon: float, rule: Rule | None, optimizer: torch.optim.Optimizer) -> None:
        """Takes the displacements back to where they may be after the optimizer's step, or the rule's."""
        locals_ = [local_part(layer.displacement) for layer in self.layers]
        if rule is None:
            now = _join(locals_)
        else:  # only now, as a closure makes the gradients within the step
            now = self.displacement - _join(rule(optimizer, [layer.displacement for layer in self.layers]))
        layer = self.layers[0]
        low, high = layer.smooth_interval(self.positions)
        for other in self.tied[0][1:]:  # gaussians that share a shape may have spreads of their own
            theirs = other.smooth_interval(self.positions)
            low, high = torch.maximum(low, theirs[0]), torch.minimum(high, theirs[1])
        moved = self.grid + now
        bounded = moved.clamp(low - epsilon, high + epsilon)
        if layer.limit is not None:
            bounded = bounded.clamp(*pixel_limits(layer, layer.limit))
        bounded = torch.where(bounded == moved, now, bounded - self.grid)
        if layer.axes != "both":  # decay, momentum and penalties do not know of it
            frozen = 1 if layer.axes == "rows" else 0
            bounded[..., frozen] = self.displacement[..., frozen]
        results = _split(bounded, locals_)
        if isinstance(layer.displacement, nn.Parameter):
            torch._foreach_copy_(locals_, results)
        elif not torch.equal(bounded, now):
            layer.displacement = bounded  # by the parametrization's right inverse, which rounds
        for layers, result in zip(self.tied, results, strict=True):
            for layer in layers:
                if layer.step_watch is not None:
                    layer.step_watch.see(layer.displacement, result)


def _join(displacements: list[Tensor]) -> Tensor:
    """A copy of displacements [..., T, 2], one after the other; of a single one in its shape."""
    if len(displacements) == 1:
        return displacements[0].clone()
    return torch.cat([each.flatten(0, -3) for each in displacements])


def _split(joined: Tensor, like: list[Tensor]) -> list[Tensor]:
    """What :func:`_join` has joined, in the shapes of ``like``."""
    if len(like) == 1:
        return [joined]
    sizes = [each.shape[:-2].numel() for each in like]
    return [part.view(each.shape) for part, each in zip(joined.split(sizes), like, strict=True)]


def with_wrapped(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """An optimizer and those that it wraps, the innermost last."""
    found = {id(optimizer): optimizer}
    for value in vars(optimizer).values():
        if isinstance(value, torch.optim.Optimizer) and id(value) not in found:
            found.update((id(inner), inner) for inner in with_wrapped(value))
    return list(found.values())


def local_part(tensor: Any) -> Tensor:
    """This process's part of a tensor that FSDP2 shards, otherwise the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole_mean(tensor: Any) -> Tensor:
    """The mean over all numbers of a tensor, of all processes that hold a part of it."""
    if hasattr(tensor, "full_tensor"):
        return tensor.sum().full_tensor() / tensor.numel()
    return tensor.mean()

"""Training a network with irregular layers: parameter groups, the poly policy and the bound of Eq. 7.

Everything here works in any training loop. An exponential or stochastic weight average of displacements needs no bound
of its own: an average of positions lies between them. What Eq. 7 limits is one optimizer step, not the average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.hooks import RemovableHandle

from icnn_zoo.nn.irregular_conv import irregular_layers
from icnn_zoo.ops.interpolation import smooth_interval


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    position_lr: float,
    weight_decay: float = 5e-4,
    head: str | None = "classifier",
    head_lr_factor: float = 10.0,
    head_bias_lr_factor: float = 20.0,
) -> list[dict[str, Any]]:
    """Splits a network's trainable parameters as the paper trains them.

    Args:
        model: The network, already converted.
        lr: Rate of the backbone's weights.
        position_lr: Rate of the positions, in pixels per unit of gradient. The paper uses 50 000 times ``lr``; sweep
            it.
        weight_decay: Decay of weights with two or more dimensions. Positions, biases and norm parameters have none.
        head: Name of the submodule with the raised rates, None for no such submodule. Its displacement belongs to the
            positions like any other.
        head_lr_factor: Rate of the head's weights over ``lr`` (DeepLab's 10).
        head_bias_lr_factor: Rate of the head's biases over ``lr`` (DeepLab's 20).

    Returns:
        Groups for any torch optimizer, empty ones left out, each with a "name": "backbone", "backbone_no_decay" (biases
        and norm parameters), "head", "head_bias", "positions".

    Raises:
        ValueError: ``head`` names no submodule, or a rate or decay is negative.
    """
    for name, value in {"lr": lr, "position_lr": position_lr, "weight_decay": weight_decay}.items():
        if value < 0:
            raise ValueError(f"`{name}` must not be negative; got {value}.")
    children = [name for name, _ in model.named_modules()]
    if head is not None and head not in children:
        choices = ", ".join(name for name in children if name and "." not in name)
        raise ValueError(f"`head`={head!r} names no submodule; top-level ones are {choices}, None is for no head.")
    members: dict[str, list[Tensor]] = {
        name: [] for name in ("backbone", "backbone_no_decay", "head", "head_bias", "positions")
    }
    displacements = {id(layer.displacement) for layer in irregular_layers(model).values()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_head = head is not None and name.startswith(f"{head}.")
        if id(parameter) in displacements:
            group = "positions"
        elif parameter.dim() > 1:
            group = "head" if in_head else "backbone"
        else:
            group = "head_bias" if in_head else "backbone_no_decay"
        members[group].append(parameter)
    rates = {
        "backbone": lr,
        "backbone_no_decay": lr,
        "head": lr * head_lr_factor,
        "head_bias": lr * head_bias_lr_factor,
        "positions": position_lr,
    }
    decayed = ("backbone", "head")
    return [
        {"name": name, "params": params, "lr": rates[name], "weight_decay": weight_decay if name in decayed else 0.0}
        for name, params in members.items()
        if params
    ]


def poly_policy(optimizer: torch.optim.Optimizer, max_steps: int, power: float = 0.9) -> PolynomialLR:
    """The poly policy: every group's rate times ``(1 - step / max_steps) ** power``, to be stepped once per update.

    Raises:
        ValueError: ``max_steps`` is not positive; the policy needs the length of the run.
    """
    if max_steps < 1:
        raise ValueError(f"`max_steps` must be the number of optimizer steps of the run, at least 1; got {max_steps}.")
    return PolynomialLR(optimizer, total_iters=max_steps, power=power)


class BoundHandle:
    """Removes the hooks of :func:`bound_positions`; a context manager as torch's own handles are."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> BoundHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def bound_positions(optimizer: torch.optim.Optimizer, model: nn.Module, *, bound_epsilon: float = 1e-3) -> BoundHandle:
    """Keeps every position within the cell its gradient was taken in, as hooks on the optimizer's step (Eq. 7).

    After a step, element by element, ``floor(P_last) - bound_epsilon <= P <= ceil(P_last) + bound_epsilon``, with
    P_last the position before that step: the gradient of bilinear interpolation is only valid there. Each step may
    cross one cell's border by ``bound_epsilon``, hence move at most one cell further. Correct under gradient
    accumulation (only steps count), under a GradScaler that skips a step (then nothing moved) and in several processes
    (a pure function of equal numbers).

    Args:
        optimizer: Any torch optimizer that holds the displacements.
        model: The converted network.
        bound_epsilon: How far a step may cross the border, in pixels. Positive: at 0 a position on an integer, where
            floor equals ceil, could never move.

    Returns:
        A handle whose ``remove()`` takes the bound off.

    Raises:
        ValueError: ``bound_epsilon`` is not positive, or ``optimizer`` lacks a displacement that requires a gradient
            (it was made before converting), or holds none.
    """
    return _after_steps(optimizer, model, bound_epsilon, rule=None)


def move_positions(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    momentum: float = 0.9,
    memory: float = 0.99,
    threshold: float = 2.0,
    bound_epsilon: float = 1e-3,
) -> BoundHandle:
    """Moves positions by a rule of their own: taps go where their recent gradients agree (Eq. 7 included).

    In place of :func:`bound_positions`: whatever the optimizer does with the weights, each of its steps moves a layer's
    positions P with gradient g by::

        m = momentum * m + (1 - momentum) * g
        v = memory * v + (1 - memory) * g ** 2
        n = v * (1 - momentum) / (1 + momentum)           what m ** 2 is on average if gradients are noise
        trust = max(0, 1 - threshold * n / m ** 2)        n and m ** 2 summed over row and column: one for each tap
        P = P - rate * trust * m / (sqrt(v) + sqrt(mean(v)))      the mean is over the layer

    with m, v and n corrected for their start at 0. It differs from Adam twice. Adam's epsilon is the layer's root mean
    square gradient: the scale of the loss cancels and no tap is faster than the rate, but taps that hardly matter to
    their layer move little. And a mean that noise explains moves nothing: taps without a direction stay where they
    are, in the first steps too, when a new head sends gradients of all kinds.

    The rate is that of the group which holds the displacement ("positions" of :func:`parameter_groups`), with its
    schedule, in pixels; a steady gradient of its layer's usual size moves a tap by half of it a step.
    m, v and the number of steps are kept in ``optimizer.state`` and hence in its state dict. Correct under gradient
    accumulation, a GradScaler (fused optimizers included), clipping, closures, and in several processes, as
    :func:`bound_positions` is. Weight decay does not act on positions.

    Args:
        optimizer: Any torch optimizer that holds the displacements.
        model: The converted network.
        momentum: Of the mean of gradients.
        memory: Of the mean of squared gradients.
        threshold: How many times as large as noise makes it the squared mean must be for a tap to move; 0 moves all.
        bound_epsilon: As in :func:`bound_positions`.

    Returns:
        A handle whose ``remove()`` leaves the positions to the optimizer again, without a bound.

    Raises:
        ValueError: ``momentum`` or ``memory`` is not in [0, 1), ``threshold`` is negative, or as
            :func:`bound_positions`.

    Example:
        >>> import torch, icnn_zoo
        >>> model = icnn_zoo.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), start="0")
        >>> groups = icnn_zoo.parameter_groups(model, lr=1e-3, position_lr=0.1, head=None)
        >>> optimizer = torch.optim.AdamW(groups)
        >>> handle = icnn_zoo.move_positions(optimizer, model)
        >>> image = torch.randn(2, 3, 9, 9)
        >>> for _ in range(4):  # the same image: gradients agree
        ...     optimizer.zero_grad()
        ...     model(image).square().mean().backward()
        ...     optimizer.step()
        >>> bool((model[0].displacement.detach() - model[0].epsilon).abs().max() > 0.05)
        True
    """
    for name, value in {"momentum": momentum, "memory": memory}.items():
        if not 0 <= value < 1:
            raise ValueError(f"`{name}` must be at least 0 and below 1; got {value}.")
    if not threshold >= 0:
        raise ValueError(f"`threshold` must not be negative; got {threshold}.")

    def step(displacement: Tensor) -> Tensor | float:
        gradient = displacement.grad
        overflow = getattr(optimizer, "found_inf", None)  # a fused optimizer skips a scaler's infinities by itself
        if gradient is None or (overflow is not None and bool(overflow)):
            return 0.0
        rate: float = next(
            group["lr"] for group in optimizer.param_groups if any(it is displacement for it in group["params"])
        )
        state = optimizer.state[displacement]
        steps = state["position_steps"] = state.get("position_steps", 0) + 1
        mean = state.setdefault("position_mean", torch.zeros_like(displacement)).lerp_(gradient, 1 - momentum)
        square = state.setdefault("position_square", torch.zeros_like(displacement))
        square.lerp_(gradient.square(), 1 - memory)
        direction, variance = mean / (1 - momentum**steps), square / (1 - memory**steps)
        of_layer = variance.mean()
        if of_layer == 0:
            return 0.0
        of_mean = (1 - momentum) / (1 + momentum) * (1 + momentum**steps) / (1 - momentum**steps)
        noise = of_mean * (variance / of_layer).sum(dim=-1, keepdim=True)
        length = (direction / of_layer.sqrt()).square().sum(dim=-1, keepdim=True)
        trust = torch.where(length > threshold * noise, 1 - threshold * noise / length, 0.0)
        return rate * trust * direction / (variance.sqrt() + of_layer.sqrt())

    return _after_steps(optimizer, model, bound_epsilon, rule=step)


def _after_steps(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    bound_epsilon: float,
    rule: Callable[[Tensor], Tensor | float] | None,
) -> BoundHandle:
    """Hooks that bound each step of positions: the optimizer's own, or what ``rule`` gives for a displacement."""
    if not bound_epsilon > 0:
        raise ValueError(f"`bound_epsilon` must be positive, or positions on integers never move; got {bound_epsilon}.")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    every = irregular_layers(model)
    layers = [layer for layer in every.values() if id(layer.displacement) in held]
    lacking = [name for name, layer in every.items() if layer.displacement.requires_grad and layer not in layers]
    if lacking or not layers:
        names = ", ".join(map(repr, lacking[:3])) or "every layer"
        raise ValueError(
            f"`optimizer` lacks the displacement of {names}{' and others' if len(lacking) > 3 else ''}: convert the "
            "network first, then make the optimizer from its parameters (icnn_zoo.parameter_groups). A displacement "
            "that is not to be trained has requires_grad False."
        )
    last: list[tuple[Tensor, Tensor]] = []

    def remember(*_: object) -> None:
        # The very float32 positions that the forward used: floor(grid + displacement) differs from
        # grid + floor(displacement) by rounding.
        last[:] = [(layer.displacement.detach().clone(), layer.positions.detach()) for layer in layers]

    @torch.no_grad()
    def bound(*_: object) -> None:
        for layer, (displacement, positions) in zip(layers, last, strict=True):
            if rule is not None:  # only now, as a closure makes the gradients within the step
                layer.displacement.copy_(displacement - rule(layer.displacement))
            low, high = smooth_interval(positions)
            bounded = layer.positions.clamp(low - bound_epsilon, high + bound_epsilon)
            layer.displacement.copy_(
                torch.where(bounded == layer.positions, layer.displacement, bounded - layer.regular_grid)
            )
        last.clear()

    return BoundHandle(optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(bound))

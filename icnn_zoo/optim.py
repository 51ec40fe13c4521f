"""Training a network with irregular layers: parameter groups, the poly policy, the rule and the bound of positions.

Everything here works in any training loop. An exponential or stochastic weight average of displacements needs no bound
of its own: an average of positions lies between them. What Eq. 7 limits is one optimizer step, not the average.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from icnn_zoo.nn.irregular_conv import irregular_layers
from icnn_zoo.nn.modules import find_name, some_of
from icnn_zoo.nn.step_hooks import BoundHandle, Optimizers, hook_steps, local_part, whole_mean, with_wrapped


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    position_lr: float,
    weight_decay: float = 5e-4,
    head: str | None = "classifier",
    head_lr_factor: float = 10.0,
    head_bias_lr_factor: float = 20.0,
    spread_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Splits a network's trainable parameters as the paper trains them.

    Args:
        model: The network, already converted.
        lr: Rate of the backbone's weights.
        position_lr: Rate of the positions. With :func:`move_positions` the most that a step moves a tap, in pixels
            (0.1); with :func:`bound_positions` and SGD pixels per unit of gradient (the paper: 50, 50 000 times
            ``lr``), with Adam about pixels a step (0.01 to 0.03).
        weight_decay: Decay of weights with two or more dimensions. Positions, biases and norm parameters have none.
        head: Name of the submodule with the raised rates, or its only ending ("fc" is also found behind DDP and
            torch.compile); None for no such submodule. Its displacement belongs to the positions like any other.
        head_lr_factor: Rate of the head's weights over ``lr`` (DeepLab's 10).
        head_bias_lr_factor: Rate of the head's biases over ``lr`` (DeepLab's 20).
        spread_lr: Rate of the spreads of triangle and gaussian interpolation, in pixels per unit of gradient; None for
            ``lr``. They have no decay.

    Returns:
        Groups for any torch optimizer, empty ones left out, each with a "name": "backbone", "backbone_no_decay" (biases
        and norm parameters), "head", "head_bias", "positions", "spreads". The last two hold the displacements and
        the widenings, or what their parametrizations compute them from; their ``use_muon`` False keeps Muon from
        orthogonalizing them.

    Raises:
        ValueError: ``head`` names no submodule, or a rate or decay is negative.
    """
    rates = {"lr": lr, "position_lr": position_lr, "spread_lr": lr if spread_lr is None else spread_lr}
    for name, value in {**rates, "weight_decay": weight_decay}.items():
        if value < 0:
            raise ValueError(f"`{name}` must not be negative; got {value}.")
    if head is not None:
        names = [name for name, _ in model.named_modules(remove_duplicate=False)]
        head = find_name(head, names, argument="head", what="submodule (None is for no head)")
    members: dict[str, list[Tensor]] = {
        name: [] for name in ("backbone", "backbone_no_decay", "head", "head_bias", "positions", "spreads")
    }
    layers = irregular_layers(model).values()
    displacements = {id(parameter) for layer in layers for parameter in layer.displacement_parameters()}
    widenings = {id(parameter) for layer in layers for parameter in layer.spread_parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_head = head is not None and name.startswith(f"{head}.")
        if id(parameter) in displacements:
            group = "positions"
        elif id(parameter) in widenings:
            group = "spreads"
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
        "spreads": rates["spread_lr"],
    }
    decayed = ("backbone", "head")
    groups: list[dict[str, Any]] = [
        {"name": name, "params": params, "lr": rates[name], "weight_decay": weight_decay if name in decayed else 0.0}
        for name, params in members.items()
        if params
    ]
    for named in groups:
        if named["name"] in ("positions", "spreads"):
            named["use_muon"] = False
    return groups


class PolyPolicy(LRScheduler):
    """Rates that fall to 0 by a power of the share of steps to come; see :func:`poly_policy`.

    Its state is the step alone: rates, length and power are the configuration's, so that a run that goes on with other
    ones follows them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_steps: int, power: float) -> None:
        self.max_steps, self.power = max_steps, power
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        factor = max(0.0, 1 - self.last_epoch / self.max_steps) ** self.power
        return [rate * factor for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def poly_policy(optimizer: torch.optim.Optimizer, max_steps: int, power: float = 0.9) -> PolyPolicy:
    """The poly policy: every group's rate times ``(1 - step / max_steps) ** power``, to be stepped once per update.

    Raises:
        ValueError: ``max_steps`` is not positive; the policy needs the length of the run.
    """
    if max_steps < 1:
        raise ValueError(f"`max_steps` must be the number of optimizer steps of the run, at least 1; got {max_steps}.")
    return PolyPolicy(optimizer, max_steps, power)


def keep_options(optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Keeps an optimizer's rates, decay, momentum and other options as they are when a state is loaded into it.

    A state dict holds the options of the run that saved it; here it brings what was learned (momenta and counts), and
    the configuration decides how to go on. A learning rate schedule, loaded after it, sets the rate of its step.

    Returns:
        A handle whose ``remove()`` gives torch's behavior back.
    """

    def hook(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved = state_dict["param_groups"]
        if len(saved) != len(optimizer.param_groups):
            return state_dict  # torch says so
        groups = [
            {**own, "params": of_state["params"]} for own, of_state in zip(optimizer.param_groups, saved, strict=True)
        ]
        return {**state_dict, "param_groups": groups}

    return optimizer.register_load_state_dict_pre_hook(hook)


def check_gradients(model: nn.Module) -> None:
    """Checks, after a backward, that every displacement to be trained received a gradient.

    One that did not belongs to a layer that the forward does not call, or whose result the loss does not see: its shape
    would stay regular without a word. Call it once, after the first backward.

    Args:
        model: The converted network.

    Raises:
        ValueError: The network has no irregular layer, or a displacement that requires a gradient has none.

    Example:
        >>> import torch, icnn_zoo
        >>> model = icnn_zoo.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), start="0")
        >>> model(torch.randn(2, 3, 9, 9)).square().mean().backward()
        >>> icnn_zoo.check_gradients(model)
    """
    layers = irregular_layers(model)
    if not layers:
        raise ValueError(f"`model` must have irregular layers; {type(model).__name__} has none. See icnn_zoo.convert.")
    lacking = [
        name
        for name, layer in layers.items()
        if any(parameter.requires_grad and parameter.grad is None for parameter in layer.displacement_parameters())
    ]
    if lacking:
        raise ValueError(
            f"The displacement of {some_of(lacking)} received no gradient: no backward went through the layer. Call "
            "this after a backward; if it was, the forward does not use the layer: leave it regular by `filter`, or "
            "freeze it with displacement.requires_grad_(False)."
        )


def bound_positions(optimizer: Optimizers, model: nn.Module, *, bound_epsilon: float = 1e-3) -> BoundHandle:
    """Keeps every position within the cell its gradient was taken in, as hooks on the optimizer's step (Eq. 7).

    After a step, element by element, ``floor(P_last) - bound_epsilon <= P <= ceil(P_last) + bound_epsilon``, with
    P_last the position before that step: the gradient of bilinear interpolation is only valid there. Each step may
    cross one cell's border by ``bound_epsilon``, hence move at most one cell further. Correct under gradient
    accumulation (only steps count), under a GradScaler that skips a step (then nothing moved), in several processes
    (a pure function of equal numbers), and for displacements that FSDP2 (``fully_shard``) shards. Which displacements
    the optimizer holds is read in every step, so groups may be added later.

    An optimizer that wraps others (Lookahead, SAM) is hooked with all of them: the outermost step that runs is what is
    bounded. Hooks do not survive a copy or pickling of the optimizer: a layer that trains warns if its positions left
    their cells without them.

    Args:
        optimizer: The optimizer that holds the displacements, or all of them in a list.
        model: The converted network.
        bound_epsilon: How far a step may cross the border, in pixels. Positive: at 0 a position on an integer, where
            floor equals ceil, could never move.

    Returns:
        A handle whose ``remove()`` takes the bound off.

    Raises:
        TypeError: ``optimizer`` is not a torch optimizer.
        ValueError: ``bound_epsilon`` is not positive; a displacement that requires a gradient is in no ``optimizer``,
            or none is; an optimizer would orthogonalize displacements (Muon) or is schedule-free; a parametrization of
            a displacement cannot be inverted; displacements are flattened by FSDP1.
    """
    return hook_steps(optimizer, model, bound_epsilon, rule=None)


def move_positions(
    optimizer: Optimizers,
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
        optimizer: The optimizer that holds the displacements, or all of them in a list.
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

    for name_, layer in irregular_layers(model).items():
        if not isinstance(layer.displacement, nn.Parameter):
            raise ValueError(
                f"The displacement of {name_!r} is parametrized and has no gradient of its own for the rule; use "
                "bound_positions, or remove the parametrization."
            )

    def move(keeper: torch.optim.Optimizer, displacement: Tensor) -> Tensor:
        gradient = displacement.grad
        if gradient is None:
            return torch.zeros_like(local_part(displacement))
        rate: float = next(
            group["lr"] for group in keeper.param_groups if any(it is displacement for it in group["params"])
        )
        state = keeper.state[displacement]
        steps = state["position_steps"] = state.get("position_steps", 0) + 1
        for name in ("position_mean", "position_square"):
            if name not in state:
                state[name] = torch.zeros_like(displacement)
        mean = state["position_mean"].lerp_(gradient, 1 - momentum)
        square = state["position_square"].lerp_(gradient.square(), 1 - memory)
        of_layer = whole_mean(square) / (1 - memory**steps)
        direction, variance = local_part(mean) / (1 - momentum**steps), local_part(square) / (1 - memory**steps)
        of_mean = (1 - momentum) / (1 + momentum) * (1 + momentum**steps) / (1 - momentum**steps)
        noise = of_mean * (variance / of_layer).sum(dim=-1, keepdim=True)
        length = (direction / of_layer.sqrt()).square().sum(dim=-1, keepdim=True)
        trust = torch.where(length > threshold * noise, 1 - threshold * noise / length, 0.0)
        step = rate * trust * direction / (variance.sqrt() + of_layer.sqrt())
        return torch.where(of_layer == 0, 0.0, step)

    def rule(optimizer: torch.optim.Optimizer, displacements: list[Tensor]) -> list[Tensor]:
        # A fused optimizer skips a scaler's infinities by itself. To count steps, this waits for the GPU.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return [torch.zeros_like(local_part(displacement)) for displacement in displacements]
        keeper = with_wrapped(optimizer)[-1]  # whose state a wrapper's state dict holds
        return [move(keeper, displacement) for displacement in displacements]

    return hook_steps(optimizer, model, bound_epsilon, rule=rule)

"""Where numbers stopped being finite."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn


def all_finite(values: Tensor) -> bool:
    """Whether no element is infinite or NaN, without a copy of the tensor's size."""
    least, most = torch.aminmax(values.detach())  # both are NaN where any element is
    return bool(torch.isfinite(least) & torch.isfinite(most))


def raise_not_finite_loss(loss: Tensor, network: nn.Module, images: Tensor, step: int, advice: str) -> NoReturn:
    """Ends a run whose loss is not finite.

    Raises:
        FloatingPointError: Always; the message says the step, the layer and what to try.
    """
    raise FloatingPointError(
        f"the loss of step {step} is {float(loss)}: {find_nonfinite(network, images)}. Nothing of this step is kept; "
        f"checkpoints are of earlier ones. {advice}, or set trainer.gradient_clip_val; a half precision may be too "
        "narrow."
    )


def check_output(values: Tensor, network: nn.Module, images: Tensor) -> None:
    """Checks that a network's output is finite.

    Raises:
        FloatingPointError: It is not; the message says the layer and what to try.
    """
    if not all_finite(values):
        raise FloatingPointError(
            f"the network's output is not finite: {find_nonfinite(network, images)}. Take a checkpoint of an earlier "
            "step, train with lower rates, or evaluate with trainer.precision 32-true."
        )


@torch.no_grad()
def find_nonfinite(network: nn.Module, images: Tensor) -> str:
    """Says in words where a network's numbers stop being finite: in a weight, else in the first such layer's output.

    Args:
        network: The network, as it is.
        images: What to run it on, [B, C, H, W].

    Returns:
        Such as "the weight of backbone.layer3.0.conv1 is not finite".
    """
    for name, value in network.state_dict().items():
        if value.is_floating_point() and value.numel() and not all_finite(value):
            layer, _, kind = name.rpartition(".")
            return f"the {kind} of {layer} is not finite"
    if not all_finite(images.float()):
        return "the images are not finite"
    found: list[str] = []

    def check(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not found and not all_finite(output):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(check(name)) for name, module in network.named_modules() if name]
    try:
        network.forward(images)  # not the compiled one, in which no hook runs
    finally:
        for handle in hooks:
            handle.remove()
    return f"the output of {found[0]} is the first that is not finite" if found else "its last output is not finite"

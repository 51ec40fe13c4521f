"""Where numbers stopped being finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def all_finite(values: Tensor) -> bool:
    """Whether no element is infinite or NaN, without a copy of the tensor's size."""
    least, most = torch.aminmax(values.detach())  # both are NaN where any element is
    return bool(torch.isfinite(least) & torch.isfinite(most))


@torch.no_grad()
def find_nonfinite(network: nn.Module, images: Tensor) -> str:
    """Says in words where a network's numbers stop being finite: in a weight, else in the first such layer's output.

    Args:
        network: The network, as it is.
        images: What to run it on, [B, 3, H, W].

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

"""Shared helpers of the tests."""

import os

# Before anything imports albumentations: it would ask the network for a newer version.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import matplotlib
import pytest
import torch
from torch import nn

matplotlib.use("agg")
torch.set_num_threads(2)


def wake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Randomises constant parameters and statistics (zero-initialised norms hide the layers before them), in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "displacement" in name or not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            if tensor.max() == tensor.min():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 0.5 + 0.75)
    return model


@pytest.fixture
def waken():
    return wake


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

"""Checks one timm architecture: converting keeps its function, its positions matter, and it deploys."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import icnn_zoo
from icnn_zoo.deployment.rewriting import rewrite

# Relative to the largest output, in float64.
TOLERANCE = 1e-8
# By how much moving all taps by 0.2 to 0.6 px has to change the output at least.
MOVED = 1e-6


def timm_names() -> list[str]:
    """The names of timm's own architectures, without those that other packages registered, as this one does."""
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("timm.")]


class Unfit(Exception):
    """The architecture can't be checked, and why."""


def check(
    name: str, max_pixels: int = 600_000, report: Callable[[str], None] = lambda step: None, **options: Any
) -> dict[str, Any]:
    """Runs all checks on an architecture, converted from its very first convolution.

    In float64, on an image that is not square and odd if the architecture takes one: the output at epsilon 0 equals the
    regular network's, in eval and in train mode; moved positions change it; every displacement gets a finite gradient,
    and of every layer some are not zero; the deployed network gives the moved network's output.

    Args:
        name: timm name.
        max_pixels: Largest image, in pixels, to try.
        report: Called with what is done next.
        options: More arguments of timm.create_model, such as features_only and output_stride.

    Returns:
        What was found: sizes, numbers of layers, and the relative differences.

    Raises:
        Unfit: There is nothing to convert, or the architecture takes no image up to ``max_pixels``.
        AssertionError: A check failed; the message says which.
    """
    report("build")
    torch.manual_seed(0)
    model, images = build(name, max_pixels, **options)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    decided = icnn_zoo.plan(model, "")
    assert not decided.refused, decided.refused
    if not decided.converted:
        raise Unfit("it has no convolution larger than 1x1")
    report("regular")
    wake(model)
    model.double()
    _clear_caches(model)
    images = images.double()
    with _momentum(model, 1.0), torch.no_grad():
        model.train()(images)  # statistics that fit the woken parameters
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = {mode: run(model, images, mode) for mode in ("eval", "train")}
    model.load_state_dict(state)
    report("convert")
    icnn_zoo.convert(model, "", epsilon=0.0)
    found = {mode: difference(run(model, images, mode), expected[mode]) for mode in ("eval", "train")}
    for mode, error in found.items():
        assert error <= TOLERANCE, f"converted at epsilon 0, in {mode} mode, the output is off by {error:.1e}"
    model.load_state_dict(state, strict=False)
    report("move")
    move(model)
    model.eval()
    outputs = leaves(model(images))
    changed = difference([output.detach() for output in outputs], expected["eval"])
    assert changed >= MOVED, f"moving every tap changes the output by {changed:.1e} only"
    torch.stack([(output * torch.randn_like(output)).sum() for output in outputs]).sum().backward()
    uncalled = check_gradients(model)
    report("deploy")
    moved = [output.detach() for output in outputs]
    del outputs
    model.zero_grad(set_to_none=True)
    _clear_caches(model)
    deployed = rewrite(model)
    with torch.no_grad():
        error = difference(leaves(deployed.model(images)), moved)
    assert error <= TOLERANCE, f"the deployed network is off by {error:.1e}"
    return {
        "parameters": parameters,
        "added_parameters": decided.added_parameters,
        "image": list(images.shape[-2:]),
        "layers": len(decided.converted),
        "uncalled_layers": uncalled,
        "folded_norms": sum(layer.folded is not None for layer in deployed.layers),
        "difference_eval": found["eval"],
        "difference_train": found["train"],
        "difference_deployed": error,
        "change_moved": changed,
    }


def build(name: str, max_pixels: int, **options: Any) -> tuple[nn.Module, Tensor]:
    """Makes an architecture and a batch of two images for it.

    The first of these that it takes in both modes: 97x131, 96x128, 160x160; then, rebuilt for it, a small image that
    is not square; then the size it is made for.
    """
    options = options if "features_only" in options else {"num_classes": 8, **options}
    model = timm.create_model(name, **options)
    height, width = timm.get_pretrained_cfg(name).input_size[-2:]
    sizes = [(97, 131), (96, 128), (160, 160)]
    for size in sizes:
        if _takes(model, name, size):
            return model, _images(name, size)
    for size in ((96, 128), (112, 140), (192, 256), (256, 256)):
        try:
            resized = timm.create_model(name, img_size=size, **options)
        except Exception:  # whatever an architecture's own code raises for an argument or a size it does not take
            continue
        if _takes(resized, name, size):
            return resized, _images(name, size)
    if height * width > max_pixels:
        raise Unfit(f"it takes images of {height}x{width} px only, more than {max_pixels:,} pixels")
    if not _takes(model, name, (height, width)):
        raise Unfit(f"its own code raises on every size tried, {height}x{width} px included")
    return model, _images(name, (height, width))


def _images(name: str, size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, timm.get_pretrained_cfg(name).input_size[0], *size, generator=generator)


def _takes(model: nn.Module, name: str, size: tuple[int, int]) -> bool:
    images = _images(name, size)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        with torch.no_grad():
            for mode in (False, True):
                model.train(mode)(images)
    except Exception:  # whatever an architecture's own code raises for a size it does not take
        return False
    finally:
        model.load_state_dict(state)
    return True


def wake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Randomises constant parameters and statistics (zero-initialized norms hide the layers before them), in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "displacement" in name or not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            if tensor.max() == tensor.min():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 0.5 + 0.75)
    return model


def move(model: nn.Module, seed: int = 0) -> None:
    """Moves every tap by 0.2 to 0.6 px in both coordinates, to either side."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in icnn_zoo.irregular_layers(model).values():
            numbers = torch.rand(2, *layer.displacement.shape, generator=generator, dtype=layer.displacement.dtype)
            layer.displacement.copy_((0.2 + 0.4 * numbers[0]) * (numbers[1] - 0.5).sign())


def check_gradients(model: nn.Module) -> list[str]:
    """Asserts finite gradients of all displacements, not all zero in a layer; returns the layers that did not run."""
    uncalled = []
    for name, layer in icnn_zoo.irregular_layers(model).items():
        gradient = layer.displacement.grad
        if gradient is None:
            uncalled.append(name)
            continue
        assert gradient.isfinite().all(), f"{name}.displacement has a gradient that is not finite"
        assert gradient.count_nonzero(), f"{name}.displacement has no gradient but zeros"
    return uncalled


def run(model: nn.Module, images: Tensor, mode: str) -> list[Tensor]:
    """All tensors the network returns, without gradients; dropout draws the same numbers in every call."""
    torch.manual_seed(0)
    with torch.no_grad():
        return leaves(model.train(mode == "train")(images))


def leaves(output: Any) -> list[Tensor]:
    """The tensors in whatever a network returns."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def difference(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference over the largest expected number, of all tensors; infinite if a number is not finite."""
    assert len(outputs) == len(expected)
    worst = 0.0
    for output, truth in zip(outputs, expected, strict=True):
        assert output.shape == truth.shape
        error = float((output - truth).abs().max() / truth.abs().max())
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


@contextmanager
def _momentum(model: nn.Module, momentum: float) -> Iterator[None]:
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = momentum
    try:
        yield
    finally:
        for norm, value in zip(norms, before, strict=True):
            norm.momentum = value


def _clear_caches(model: nn.Module) -> None:
    # levit, tiny_vit, efficientformer and efficientvit_msra keep results of a forward in eval mode: .double() does not
    # reach them, and deepcopy refuses them when they have a gradient.
    for module in model.modules():
        cache = getattr(module, "attention_bias_cache", None)
        if cache is not None:
            cache.clear()

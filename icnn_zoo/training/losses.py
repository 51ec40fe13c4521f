"""What training minimizes: the cross-entropy over all processes, or any losses by class path, weighted."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from icnn_zoo.nn.class_paths import build

Spec = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
Weights = Sequence[float] | str | None
_CLASS_WEIGHTS = ("weight", "class_weights")  # as torch and segmentation_models_pytorch call them


class PixelLoss:
    """A loss of logits [B, num_classes, H, W] and labels [B, H, W] that does not see pixels of ``ignore_index``.

    Args:
        spec: None for the cross-entropy, summed over the valid pixels of all processes and divided by their number
            (with ``weights`` by the sum of theirs); else ``{"class_path": ..., "init_args": {...}}`` of an nn.Module
            from logits and labels to a number, or a list of those, each with a "weight" (1 if not given) by which it
            enters the sum. A class gets ``ignore_index`` if it has that argument. Processes average such losses.
        num_classes: Classes.
        ignore_index: Label that does not stand for a class.
        weights: One number for each class, None for 1; "auto" for 1 too, until the classes were counted.

    Raises:
        ValueError: A class that cannot be built or has no use for ``weights``; one that takes no such logits and
            labels, sees pixels of ``ignore_index``, or has parameters of its own, which nothing would train.
    """

    def __init__(self, spec: Spec, num_classes: int, ignore_index: int, weights: Weights = None) -> None:
        self.ignore_index = ignore_index
        if weights == "auto":
            weights = [1.0] * num_classes
        if isinstance(weights, str):
            raise ValueError(f"`class_weights` must be auto, a list of numbers or null; got {weights!r}.")
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        if self.weights is not None and (len(self.weights) != num_classes or not (self.weights >= 0).all()):
            raise ValueError(
                f"`class_weights` must be auto or {num_classes} numbers that are not negative, one for each class; got "
                f"{len(self.weights)}: {list(weights or ())[:10]}."
            )
        self.terms: list[tuple[float, nn.Module]] = []
        for place, term in enumerate([spec] if isinstance(spec, Mapping) else spec or []):
            name = "loss" if isinstance(spec, Mapping) else f"loss[{place}]"
            factor = term.get("weight", 1.0) if isinstance(term, Mapping) else 1.0
            if not isinstance(factor, (int, float)) or isinstance(factor, bool):
                raise ValueError(f"`{name}.weight` must be a number; got {factor!r}.")
            module = _build(name, term, ignore_index, self.weights)
            _check(name, module, num_classes, ignore_index)
            self.terms.append((float(factor), module))

    def __call__(self, logits: Tensor, labels: Tensor, world_size: int = 1) -> Tensor:
        """The loss, a number. What each of ``world_size`` processes calls with its own pixels is averaged by DDP."""
        if self.terms:
            if not (labels != self.ignore_index).any():  # where many losses divide 0 by 0
                return logits.sum() * 0
            return sum(
                (factor * _moved(module, logits)(logits, labels) for factor, module in self.terms), logits.new_zeros(())
            )
        weights = None if self.weights is None else self.weights.to(logits.device)
        total = F.cross_entropy(logits, labels, weights, ignore_index=self.ignore_index, reduction="sum")
        valid = labels != self.ignore_index
        number = valid.sum() if weights is None else weights[labels[valid]].sum()
        if world_size > 1:
            torch.distributed.all_reduce(number)
        # Distributed training averages gradients over processes; times their number makes that the global sum.
        return total * world_size / (number.clamp(min=1) if weights is None else number.clamp(min=1e-12))


def balanced_weights(pixels: np.ndarray) -> list[float]:
    """Weights of classes from their numbers of pixels: the median of the numbers over each.

    A class without pixels has weight 1.

    References:
        Median frequency balancing: Eigen and Fergus, "Predicting depth, surface normals and semantic labels" (2015).

    Example:
        >>> import numpy as np
        >>> balanced_weights(np.array([400, 100, 50, 0]))
        [0.25, 1.0, 2.0, 1.0]
    """
    found = pixels[pixels > 0]
    if not len(found):
        raise ValueError("`class_weights`=auto needs labeled pixels; the training masks have none.")
    return [float(np.median(found) / number) if number else 1.0 for number in pixels]


def _build(name: str, term: object, ignore_index: int, weights: Tensor | None) -> nn.Module:
    spec = {key: value for key, value in term.items() if key != "weight"} if isinstance(term, Mapping) else term
    module = build(name, spec, {"ignore_index": ignore_index})
    if weights is not None:
        module = _weighted(name, spec, module, ignore_index, weights)
    if any(True for _ in module.parameters()):
        raise ValueError(f"`{name}`: {type(module).__name__} has parameters, which nothing would train.")
    return module


def _weighted(name: str, spec: Any, module: nn.Module, ignore_index: int, weights: Tensor) -> nn.Module:
    import inspect

    known = inspect.signature(type(module)).parameters
    for argument in _CLASS_WEIGHTS:
        if argument in known:
            value = weights if argument == "weight" else weights.tolist()
            spec = {**spec, "init_args": {**(spec.get("init_args") or {}), argument: value}}
            return build(name, spec, {"ignore_index": ignore_index})
    raise ValueError(
        f"`class_weights`: {type(module).__name__} takes none ({' or '.join(_CLASS_WEIGHTS)}); leave them out, or take "
        "torch.nn.CrossEntropyLoss."
    )


def _check(name: str, module: nn.Module, num_classes: int, ignore_index: int) -> None:
    """Tries a loss on a few pixels, half of them without a class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_classes, (2, 8, 8), generator=generator)
    labels[:, 4:] = ignore_index
    logits = torch.randn(2, num_classes, 8, 8, generator=generator).requires_grad_()
    kind = type(module).__name__
    hint = "It must take logits [B, num_classes, H, W] and labels [B, H, W], some of them the ignore index"
    try:
        value = copy.deepcopy(module).cpu()(logits, labels)
        assert value.dim() == 0, f"it gives numbers of shape {list(value.shape)}: set reduction to mean"
        assert bool(value.isfinite()), f"it gives {float(value)}"
        (slope,) = torch.autograd.grad(value, logits)
    except Exception as error:  # of any kind, in code that is not ours
        raise ValueError(f"`{name}`: {kind} cannot be used: {error}. {hint} {ignore_index}.") from error
    if slope[:, :, 4:].any() or not slope.isfinite().all():
        raise ValueError(
            f"`{name}`: {kind} learns from pixels labeled {ignore_index}, which have no class. Take a loss with "
            "`ignore_index`, such as segmentation_models_pytorch.losses.DiceLoss, or set data.ignore_value null."
        )


def _moved(module: nn.Module, logits: Tensor) -> nn.Module:
    """The loss on the device of the logits; its weights are the only tensors that it may have."""
    return module.to(logits.device) if any(True for _ in module.buffers()) else module

"""Networks with any inputs and outputs as functions from tensors to named tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from icnn_zoo.nn.modules import ExampleInput


def named_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors in what a network returns, by name.

    Args:
        output: A tensor, or tensors in sequences, mappings (such as transformers' ModelOutput) and dataclasses, nested.
            None is left out.

    Returns:
        Tensors by key, and by position in a sequence: "output", "output_1", "aux", "levels.0".

    Raises:
        ValueError: There is something else in it, or no tensor at all.
    """
    found: dict[str, Tensor] = {}
    for place, tensor in _leaves(output, ()):
        name = ".".join(map(str, place))
        found[f"output_{name}" if place and isinstance(place[0], int) else name or "output"] = tensor
    if not found:
        raise ValueError(f"`model` must return a tensor or several; got {type(output).__name__}.")
    return found


def _leaves(output: Any, place: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Tensor]]:
    if isinstance(output, Tensor):
        yield place, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _leaves(value, (*place, str(key)))
    elif isinstance(output, (list, tuple)):
        for number, value in enumerate(output):
            yield from _leaves(value, (*place, number))
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from _leaves(getattr(output, field.name), (*place, field.name))
    elif output is not None:
        where = ".".join(map(str, place))
        raise ValueError(
            f"`model` must return tensors, in sequences, mappings or dataclasses; got {type(output).__name__}"
            + (f" at {where!r}." if where else ".")
        )


class TensorCall(nn.Module):
    """A network as a function from tensors to a tuple of tensors, for an example of its inputs.

    Args:
        model: The network.
        example_input: Its input, a tuple of positional or a mapping of keyword arguments. What is not a tensor in it
            stays as it is.

    Attributes:
        inputs: The tensors of the example, in order, by name.
    """

    def __init__(self, model: nn.Module, example_input: ExampleInput) -> None:
        super().__init__()
        self.model = model
        if isinstance(example_input, Mapping):
            args, kwargs = tuple[Any, ...](), dict(example_input)
        else:
            args, kwargs = example_input if isinstance(example_input, tuple) else (example_input,), {}
        parameters = list(inspect.signature(model.forward).parameters)
        self.inputs: dict[str, Tensor] = {}
        named = [(parameters[min(place, len(parameters) - 1)], value) for place, value in enumerate(args)]
        for name, value in [*named, *kwargs.items()]:
            tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
            for tensor in tensors:  # of a list, or of a forward with *args, under numbered names
                is_alone = len(tensors) == 1 and name not in self.inputs
                self.inputs[name if is_alone else f"{name}_{len(self.inputs)}"] = tensor
        if not self.inputs:
            raise ValueError("`example_input` must have a tensor in it; got none.")
        leaves, self.structure = pytree.tree_flatten((args, kwargs))
        self.kept = [(isinstance(leaf, Tensor), None if isinstance(leaf, Tensor) else leaf) for leaf in leaves]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named(*tensors).values())

    def named(self, *tensors: Tensor) -> dict[str, Tensor]:
        """What :meth:`forward` returns, by name."""
        given = iter(tensors)
        leaves = [next(given) if is_tensor else leaf for is_tensor, leaf in self.kept]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return named_outputs(self.model(*args, **kwargs))


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference over the largest expected number; NaN where one is not finite and the other is.

    Raises:
        RuntimeError: The shapes differ.
    """
    if expected.shape != found.shape:
        raise RuntimeError(f"shape {tuple(found.shape)} in place of {tuple(expected.shape)}")
    if expected.numel() == 0 or torch.equal(expected, found):
        return 0.0
    expected, found = expected.double(), found.double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))

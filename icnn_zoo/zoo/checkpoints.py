"""A published checkpoint as it is read: card and tensors, held against each other before anything large is built."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icnn_zoo.conversion.planning import plan
from icnn_zoo.models.segmentation import SegmentationModel
from icnn_zoo.nn.class_paths import check_allowed, without_memory
from icnn_zoo.nn.spreads import spread_shape
from icnn_zoo.ops.sharing import shape_owners
from icnn_zoo.zoo.cards import Card, Conversion
from icnn_zoo.zoo.indices import Entry
from icnn_zoo.zoo.registry import Registry
from icnn_zoo.zoo.weights import check_fit, parse_weights, widened

_HEADER = 10_000_000  # bytes that the names of a safetensors file may take


@dataclass(frozen=True)
class Checkpoint:
    """What a registry has of a checkpoint.

    Attributes:
        card: The card.
        data: The verified bytes of the safetensors file.
        tensors: Its tensors, of the names and shapes that the card's network has.
    """

    card: Card
    data: bytes
    tensors: dict[str, Tensor]


def read_checkpoint(place: Registry, entry: Entry, allow: Sequence[str] | None = None) -> Checkpoint:
    """Reads card and weights; ``allow`` is that of :func:`icnn_zoo.load_checkpoint`.

    Raises:
        ValueError: They are not what the index promises, do not fit each other, or hold NaN or infinities.
        FileNotFoundError: A file is missing.
        RuntimeError: The registry cannot be reached, or the cache not be written.
    """
    card = place.read_card(entry)
    shapes = outline(card, allow)
    size = sum(tensor.nbytes for tensor in shapes.values())
    if not size / 2 <= card.weights.size <= size + _HEADER:  # half of it in 16 bits
        raise ValueError(
            f"the card of {card.name} and its weights disagree: its network has {size} bytes of numbers, the file "
            f"{card.weights.size} bytes."
        )
    data = place.read_weights(entry)
    tensors = widened(parse_weights(data, entry.name), shapes)
    check_tensors(card, tensors, shapes)
    return Checkpoint(card, data, tensors)


def check_tensors(card: Card, tensors: dict[str, Tensor], shapes: dict[str, Tensor]) -> None:
    """Checks that tensors have the names, shapes and dtypes of a card's network, and that all numbers are finite.

    Raises:
        ValueError: They have not; the message names the first.
    """
    check_fit(shapes, tensors, f"the card of {card.name}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"the weights of {card.name} hold NaN or infinities in {name}.")


def outline(card: Card, allow: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a card's network by name, with shapes and dtypes but without memory for their numbers.

    Args:
        card: The card.
        allow: As in :func:`icnn_zoo.load_checkpoint`.

    Raises:
        ValueError: The card describes no network that can be built, or one whose class may not be imported.
    """
    check_arguments(card)
    if card.spec is not None:
        check_allowed("network", card.spec, allow, f"the card of {card.name}")
    arguments = {"backbone": None, **card.network, "num_classes": len(card.classes), "mean": card.mean, "std": card.std}
    try:
        model = without_memory(lambda: SegmentationModel(**arguments), trusted=card.spec is not None)
        state: dict[str, Tensor] = dict(model.state_dict())
        if card.conversion is not None:
            state |= _displacements(model, card.conversion)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"the card of {card.name} describes no network that can be built: {error}") from error
    return state


def _displacements(model: SegmentationModel, conversion: Conversion) -> dict[str, Tensor]:
    found = {}
    for layer in plan(model, conversion.start).converted:
        owners = shape_owners(conversion.shapes, model.get_submodule(layer.name))
        taps = math.prod(layer.kernel_size)
        displacement = (*owners, taps, 2)
        found[f"{layer.name}.displacement"] = torch.empty(displacement, device="meta")
        if conversion.interpolation != "bilinear":
            widening = spread_shape(conversion.spread_per, displacement)
            found[f"{layer.name}.widening"] = torch.empty(widening, device="meta")
    return found


def check_arguments(card: Card) -> None:
    """Checks that this version knows all arguments of a card's network.

    Raises:
        ValueError: It does not; the message names them.
    """
    unknown = set(card.network) - network_arguments() - {"backbone"}
    if unknown:
        raise ValueError(
            f"the card of {card.name} has network arguments that this version of icnn_zoo does not know: "
            f"{', '.join(sorted(unknown))}. Upgrade: pip install --upgrade icnn-zoo."
        )


def network_arguments() -> set[str]:
    """The arguments of a network beside backbone and number of classes."""
    return set(inspect.signature(SegmentationModel).parameters) - {"backbone", "num_classes"}

"""Creates, loads and verifies networks."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icnn_zoo.conversion.converter import convert
from icnn_zoo.nn.spreads import Interpolation, SpreadPer
from icnn_zoo.nn.tap_restriction import Axes, Limit
from icnn_zoo.nn.tying import tie_by_name
from icnn_zoo.ops.sharing import Shapes
from icnn_zoo.zoo.cards import Card
from icnn_zoo.zoo.checkpoints import check_tensors, network_arguments, outline, read_checkpoint
from icnn_zoo.zoo.golden import check_golden
from icnn_zoo.zoo.indices import Entry
from icnn_zoo.zoo.pretrained import ZOO, load_pretrained
from icnn_zoo.zoo.registry import Registries, Registry, find_checkpoint
from icnn_zoo.zoo.segmenter import Segmenter
from icnn_zoo.zoo.weights import widened


def create_model(
    backbone: str | None,
    num_classes: int,
    *,
    start: str | None = None,
    epsilon: float = 1e-3,
    shapes: Shapes = "channel",
    interpolation: Interpolation = "bilinear",
    spread: float | None = None,
    spread_per: SpreadPer = "tap",
    axes: Axes = "both",
    limit: Limit = None,
    tied: Sequence[Sequence[str]] = (),
    pretrained: bool | str | Path = False,
    pretrained_partial: bool = False,
    classes: Sequence[str] | None = None,
    palette: Sequence[Sequence[int]] | None = None,
    **network: Any,
) -> Segmenter:
    """Makes a segmentation network, with learnable shapes from ``start`` on.

    Args:
        backbone: Any timm name that can be dilated ("resnet101", "tf_efficientnet_lite0"); None with a ``network``.
        num_classes: Classes, background included.
        start: First module to make irregular: a backbone module ("layer3.11"), "classifier" for the head alone, None
            for a regular network.
        epsilon: Initial displacement of every tap in pixels.
        shapes: Who shares a shape, as in :func:`icnn_zoo.convert`, also for what follows.
        interpolation: What a tap reads.
        spread: Initial spread in pixels.
        spread_per: Who has a spread of its own.
        axes: Which coordinates are learned.
        limit: How far they may go.
        tied: Groups of irregular layers, by name, that share one displacement (:func:`icnn_zoo.tie_shapes`).
        pretrained: True for timm's weights of the backbone, a file, ``"zoo:NAME"`` for a checkpoint of the zoo (see
            :func:`icnn_zoo.zoo.pretrained.load_pretrained`), False for random weights.
        pretrained_partial: Accepts a file that lacks tensors of the backbone, which is refused otherwise.
        classes: Names by index, background first; None for numbers.
        palette: RGB, 0 to 255, by class; None for PASCAL VOC's colors.
        **network: Further arguments of :class:`icnn_zoo.models.SegmentationModel`: output_stride, head, or
            ``network={"class_path": ..., "init_args": {...}}`` in the place of a backbone.

    Returns:
        The network in training mode; ``predict`` labels an image.

    Raises:
        TypeError: An argument that SegmentationModel does not have.
        ValueError: A backbone, ``start`` or other choice that does not exist; the message names the nearest.
        FileNotFoundError: ``pretrained`` names a file that is not there.

    Example:
        >>> import icnn_zoo, numpy
        >>> model = icnn_zoo.create_model("test_resnet", 3, start="layer4", classes=["sky", "land", "sea"])
        >>> list(icnn_zoo.irregular_layers(model))
        ['backbone.layer4.0.conv1', 'backbone.layer4.0.conv2', 'classifier']
        >>> model.predict(numpy.zeros((50, 70, 3), numpy.uint8)).shape
        (50, 70)
    """
    _check_arguments(network)
    model = Segmenter(backbone, num_classes, classes=classes, palette=palette, **network)
    if start is not None:
        reading: dict[str, Any] = {"interpolation": interpolation, "spread": spread, "spread_per": spread_per}
        convert(model, start, epsilon=epsilon, shapes=shapes, axes=axes, limit=limit, **reading)
        tie_by_name(model, tied)
    if pretrained:
        load_pretrained(model, pretrained, classes, partial=pretrained_partial)
    return model


def load_checkpoint(
    name: str,
    *,
    sha256: str | None = None,
    device: str | torch.device = "cpu",
    registry: Registries = None,
    cache: str | Path | None = None,
    progress: bool = True,
    allow: Sequence[str] | None = None,
) -> Segmenter:
    """Loads a published network, ready to use.

    Weights are verified against their SHA-256 before they are parsed, and are data only: nothing in a registry is run.

    Args:
        name: ``arch.tag``, as :func:`icnn_zoo.list_checkpoints` has it, or its address in any registry,
            ``hf://user/repo/arch.tag``; either with ``@sha256:...`` behind it, which pins it.
        sha256: Pins the name to a hash: that of card.json, which holds the weights' own and so pins everything, or
            that of the weights. None takes whatever the registry has under the name.
        device: Where to put the network.
        registry: Folders or URLs to search in order; None for ``ICNN_ZOO_REGISTRY`` (separated by commas), and
            without it the checkpoints of this package. "default" names those too.
        cache: Folder for downloads; None for ``ICNN_ZOO_CACHE``, and without it the platform's.
        progress: Shows a bar while downloading, on a terminal.
        allow: Packages, modules and classes, by dotted name, that a card may name as its network's class. Nothing else
            is imported because a card says so. None for ``ICNN_ZOO_ALLOW`` (separated by commas), and without it none.

    Returns:
        The network in eval mode, with ``classes``, ``palette``, ``card`` and ``predict``.

    Raises:
        ValueError: No such checkpoint (the message has the nearest), a network of a class that is not allowed, a file
            that is not what the registry promises (both hashes), or one of a newer version of this package.
        FileNotFoundError: A registry without an index, or without a file that it lists.
        RuntimeError: A registry cannot be reached, the cache cannot be written, or the device does not exist.
    """
    torch.empty(0, device=device)  # an unknown device should not cost a download
    place, entry = find_checkpoint(_bare(name), sha256=sha256, registry=registry, cache=cache, progress=progress)
    model, _ = rebuild(place, entry, allow)
    return model.to(device)


def rebuild(place: Registry, entry: Entry, allow: Sequence[str] | None = None) -> tuple[Segmenter, Card]:
    """The network of an entry, in eval mode on the CPU, and its card; ``allow`` as in :func:`load_checkpoint`.

    Raises:
        ValueError: Card and weights disagree, or are not what the index promises.
        FileNotFoundError: A file is missing.
        RuntimeError: The registry cannot be reached, or the cache not be written.
    """
    checkpoint = read_checkpoint(place, entry, allow)
    return assemble(checkpoint.card, checkpoint.tensors, allow), checkpoint.card


def assemble(card: Card, tensors: Mapping[str, Tensor], allow: Sequence[str] | None = None) -> Segmenter:
    """The network that a card describes with these weights, in eval mode on the CPU.

    ``allow`` is that of :func:`load_checkpoint`.

    Raises:
        ValueError: They do not belong together; the message names the first tensors.
    """
    where = f"the card of {card.name}"
    wanted = outline(card, allow)
    tensors = widened(tensors, wanted)
    check_tensors(card, tensors, wanted)
    try:
        conversion = {} if card.conversion is None else card.conversion.model_dump()
        with torch.random.fork_rng(devices=[]):  # loading should not change what is drawn next
            model = create_model(
                num_classes=len(card.classes),
                classes=card.classes,
                palette=card.colors,
                mean=card.mean,
                std=card.std,
                **{"backbone": None, **card.network},
                **conversion,
            )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} describes no network that can be built: {error}") from error
    model.load_state_dict(tensors)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != card.weights.parameters:
        raise ValueError(f"{where} says {card.weights.parameters} parameters; the network has {parameters}.")
    model.card = card
    return model.eval()


def verify_checkpoint(
    name: str,
    *,
    registry: Registries = None,
    cache: str | Path | None = None,
    allow: Sequence[str] | None = None,
) -> float:
    """Checks a published checkpoint from end to end: index, card, hashes, weights, golden output.

    Args:
        name: ``arch.tag``.
        registry: As in :func:`load_checkpoint`.
        cache: As in :func:`load_checkpoint`.
        allow: As in :func:`load_checkpoint`.

    Returns:
        The largest difference to the golden logits, over the largest of them.

    Raises:
        ValueError: As :func:`load_checkpoint`; also another output than the golden one.
        FileNotFoundError: As :func:`load_checkpoint`.
        RuntimeError: As :func:`load_checkpoint`.
    """
    model, card = rebuild(*find_checkpoint(_bare(name), registry=registry, cache=cache), allow)
    try:
        return check_golden(model, card.golden)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _bare(name: str) -> str:
    return name.removeprefix(ZOO)


def _check_arguments(network: Mapping[str, Any]) -> None:
    known = network_arguments()
    for name in network:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)
            raise TypeError(f"create_model has no argument `{name}`; the nearest are {', '.join(near)}.")

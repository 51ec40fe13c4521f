"""Starting weights: what ``pretrained`` names, loaded into a network and counted by name."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from icnn_zoo.io.addresses import is_address
from icnn_zoo.models.segmentation import SegmentationModel
from icnn_zoo.nn.class_paths import read_spec
from icnn_zoo.nn.irregular_conv import irregular_layers
from icnn_zoo.nn.tap_limits import limit_taps
from icnn_zoo.zoo.checkpoints import read_checkpoint
from icnn_zoo.zoo.registry import Registries, find_checkpoint
from icnn_zoo.zoo.weights import read_file, state_of

ZOO = "zoo:"
_BACKBONE, _NETWORK = "backbone.", "network."
_PREFIXES = ("module", "_orig_mod", "model", "network", "backbone", "encoder")  # that others put before timm's names
# A regular network lacks the first and a bilinear one the second, old files the third.
_UNCOUNTED = ("displacement", "widening", "num_batches_tracked")


@dataclass(frozen=True)
class Loaded:
    """What became of starting weights.

    Attributes:
        source: Where they are from.
        loaded: Names of the network's tensors that were loaded.
        missing: Names of the network's tensors that the source lacks, and that stay as they were.
        unused: Names of the source's tensors that the network has no use for.
        fresh: Names of the head's tensors where they stay as they were: the classes differ, or the source has no head.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    fresh: tuple[str, ...] = ()

    def __str__(self) -> str:
        displacements = sum(name.endswith(".displacement") for name in self.loaded)
        head = "new" if self.fresh else "loaded"
        return (
            f"{self.source}: {len(self.loaded)} tensors loaded (of them {displacements} displacements; the head is "
            f"{head}), {len(self.missing)} missing{_some(self.missing)}, {len(self.unused)} unused{_some(self.unused)}"
        )


def load_pretrained(
    model: SegmentationModel,
    source: bool | str | Path = True,
    classes: Sequence[str] | None = None,
    *,
    partial: bool = False,
    registry: Registries = None,
    cache: str | Path | None = None,
) -> Loaded:
    """Loads starting weights into a network, before or after converting it.

    The head is loaded where it and the classes are the same, and else stays as it is. Displacements are loaded for the
    layers that have them on both sides: layers that are irregular only in ``model`` keep theirs, layers that are
    irregular only in the source become regular.

    Args:
        model: The network.
        source: True for timm's default weights of the backbone, which are downloaded (of another network those that its
            arguments ask for); ``"zoo:NAME"`` for a checkpoint of the zoo, or an address with its name at the end
            (``"hf://user/repo/NAME"``); a run folder, of which best.ckpt is taken, else last.ckpt; else a file: a
            checkpoint of this package (.ckpt), or weights (safetensors, pth) of the backbone under timm's names, or of
            another network under its own, with or without what other packages put before them (``encoder.``,
            ``backbone.``, ``model.``, ``module.``). Files are read as data; nothing in them is run.
        classes: The network's class names; None compares only their number.
        partial: Accepts a source that lacks tensors of the backbone; they stay as they are.
        registry: As in :func:`icnn_zoo.load_checkpoint`, for names of the zoo.
        cache: Likewise.

    Returns:
        What was loaded, by name.

    Raises:
        FileNotFoundError: There is no such file, or no checkpoint in the folder.
        ValueError: The source lacks tensors of the backbone, or has other shapes; the message names them.
        RuntimeError: A download failed.
    """
    head = model.head_names()
    if isinstance(source, bool):
        if not source:
            raise ValueError("`pretrained` must name weights, or be True for timm's; got False.")
        if model.spec is not None:
            return _load(model, model.own_weights(), f"{model.backbone_name}'s own", fresh=(), partial=partial)
        return _load(model, _fetched(model), f"timm's {model.backbone_name}", fresh=head, partial=partial)
    if isinstance(source, str) and (source.startswith(ZOO) or is_address(source)):
        return load_start(model, source, classes, partial=partial, registry=registry, cache=cache)
    source = _checkpoint_in(Path(source))
    if not Path(source).is_file():
        hint = " Make it with: icnn-zoo prepare efficientnet-lite0 --root data" if "lite0" in str(source) else ""
        raise FileNotFoundError(f"`pretrained`: there is no file {str(source)!r}.{hint}")
    where = f"`pretrained`={source}"
    content = read_file(source)
    made: Any = content.get("hyper_parameters")
    theirs = made if isinstance(made, dict) else {}
    _check_origin(model, where, _architecture(theirs), theirs.get("mean"), theirs.get("std"))
    tensors = _own_names(model, state_of(content, where))
    same = _has_head(model, tensors) and _same_classes(model, classes, theirs.get("class_names"), model.num_classes)
    return _load(model, tensors, where, fresh=() if same else head, partial=partial)


def load_start(
    model: SegmentationModel,
    name: str,
    classes: Sequence[str] | None = None,
    *,
    partial: bool = False,
    registry: Registries = None,
    cache: str | Path | None = None,
) -> Loaded:
    """Loads a published checkpoint into a network that is to be trained on.

    The backbone must be the same. What becomes of head and displacements is said in :func:`load_pretrained`.

    Args:
        model: The network.
        name: ``arch.tag``, with or without ``zoo:`` in front and ``@sha256:...`` behind.
        classes: The network's class names; None compares only their number.
        partial: As in :func:`load_pretrained`.
        registry: As in :func:`icnn_zoo.load_checkpoint`.
        cache: As in :func:`icnn_zoo.load_checkpoint`.

    Returns:
        What was loaded, by name.

    Raises:
        ValueError: As :func:`icnn_zoo.load_checkpoint`; also another backbone, normalization, or kind of shapes.
        FileNotFoundError: As :func:`icnn_zoo.load_checkpoint`.
        RuntimeError: As :func:`icnn_zoo.load_checkpoint`.
    """
    name = name.removeprefix(ZOO)
    place, entry = find_checkpoint(name, registry=registry, cache=cache)
    allow = [] if model.spec is None else [model.backbone_name]  # the class of the network itself
    checkpoint = read_checkpoint(place, entry, allow)
    card = checkpoint.card
    where = f"`pretrained`={name if is_address(name) else ZOO + name}"
    _check_origin(model, where, card.architecture, card.mean, card.std)
    same = _has_head(model, checkpoint.tensors) and _same_classes(model, classes, card.classes, len(card.classes))
    return _load(model, checkpoint.tensors, where, fresh=() if same else model.head_names(), partial=partial)


def _checkpoint_in(source: Path) -> Path:
    """The checkpoint of a run folder; anything else as it is."""
    found = [source / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")] if source.is_dir() else []
    if source.is_dir() and not any(file.is_file() for file in found):
        raise FileNotFoundError(
            f"`pretrained`: the folder {str(source)!r} is not that of a run (runs/<name>/version_<n>): it has no "
            "checkpoints/best.ckpt or last.ckpt."
        )
    return next((file for file in found if file.is_file()), source)


def _check_origin(model: SegmentationModel, where: str, backbone: Any, mean: Any, std: Any) -> None:
    """Checks what a source says of the network that it is of; None where it says nothing."""
    if backbone is not None and backbone != model.backbone_name:
        raise ValueError(f"{where} is of {backbone}, the network is {model.backbone_name}.")
    for key, theirs in (("mean", mean), ("std", std)):
        own = getattr(model, key).flatten().cpu()
        if theirs is None or len(theirs) != len(own):  # of other channels, to which weights are adapted
            continue
        if not torch.allclose(own, torch.tensor(theirs)):
            raise ValueError(
                f"{where} was trained with {key} {list(theirs)}, the network has "
                f"{[round(value, 6) for value in own.tolist()]}: set {key} to the former."
            )


def _architecture(options: Mapping[str, Any]) -> Any:
    spec = options.get("network")
    return options.get("backbone") if spec is None else read_spec("network", spec)[0]


def _fetched(model: SegmentationModel) -> Mapping[str, Tensor]:
    try:
        return model.own_weights()
    except OSError as error:  # what the hub's client raises is of many kinds, all of them these
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RuntimeError(
            f"`pretrained`: timm's weights of {model.backbone_name} cannot be fetched from its hub ({reason}). Give a "
            "file (--model.pretrained FILE), or false to begin at random."
        ) from error


def _has_head(model: SegmentationModel, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a source has the network's head, by names and shapes."""
    own = model.state_dict()
    names = [name for name in model.head_names() if _counts(name)]
    return all(name in tensors and tensors[name].shape == own[name].shape for name in names)


def _same_classes(model: SegmentationModel, own: Sequence[str] | None, theirs: Any, number: int) -> bool:
    if own is None or theirs is None:
        return number == model.num_classes
    return tuple(own) == tuple(theirs)


def _own_names(model: SegmentationModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file under the network's own names; those without a counterpart keep theirs."""
    wanted = {_flat(name): name for name in model.state_dict()}

    def counterparts(names: Iterable[str], prefix: str, inner: str) -> dict[str, str]:
        """Own names by the file's, where the network has ``inner`` in the place of ``prefix``."""
        pairs = ((name, _flat(inner + name.removeprefix(prefix))) for name in names if name.startswith(prefix))
        return {name: wanted[flat] for name, flat in pairs if flat in wanted}

    prefixes = sorted({prefix for name in tensors for prefix in _leading(name)}, key=len)
    ways = [counterparts(tensors, prefix, inner) for prefix in prefixes for inner in ("", _BACKBONE, _NETWORK)]
    best = max(ways, key=len)
    lacking = [name for name in set(wanted.values()) - set(best.values()) if name.startswith(_BACKBONE)]
    if any(_counts(name) for name in lacking):
        theirs = _by_timm(model, tensors)
        names = counterparts(theirs, "", _BACKBONE)
        if len(names) > len(best):
            tensors, best = theirs, names
    return {best.get(name, name): tensor for name, tensor in tensors.items()}


def _leading(name: str) -> list[str]:
    """The prefixes of a name that packages add: "", "model.", "model.backbone."."""
    found = [""]
    for part in name.split("."):
        if part not in _PREFIXES:
            break
        found.append(f"{found[-1]}{part}.")
    return found


def _flat(name: str) -> str:
    return name.replace(".", "_")  # timm's feature extractors join parts of a name so


def _by_timm(model: SegmentationModel, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What timm makes of a file that has the names of the network's first publication; nothing where it cannot."""
    with torch.device("meta"):
        network = timm.create_model(model.backbone_name, **model.backbone_args)
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return {}
    try:
        converted: Mapping[str, Tensor] = convert(dict(tensors), network)
    except Exception:  # of any kind, where the file is of another network
        return {}
    return converted


def _counts(name: str) -> bool:
    return name.rpartition(".")[2] not in _UNCOUNTED


def _load(
    model: SegmentationModel, tensors: Mapping[str, Tensor], where: str, *, fresh: Collection[str], partial: bool
) -> Loaded:
    state = model.state_dict()
    wanted = [name for name in state if name not in fresh]
    loaded = {name: _adapted(tensors[name], state[name]) for name in wanted if name in tensors}
    for name, tensor in loaded.items():
        if tensor.shape != state[name].shape or tensor.is_floating_point() != state[name].is_floating_point():
            raise ValueError(
                f"{where} does not fit the network: {name} must be {state[name].dtype} {list(state[name].shape)}; the "
                f"source has {tensor.dtype} {list(tensor.shape)}."
            )
    missing = [name for name in wanted if name not in tensors and _counts(name)]
    report = Loaded(
        where, tuple(loaded), tuple(missing), tuple(name for name in tensors if name not in loaded), tuple(fresh)
    )
    counted = [name for name in loaded if _counts(name)]
    if not counted or (missing and not partial):
        advice = "pretrained_partial=True accepts that" if counted else "nothing in it has the network's names"
        raise ValueError(
            f"{where} has {len(counted)} of {len(counted) + len(missing)} tensors of the network "
            f"({model.backbone_name}): missing{_some(missing)}; it has others{_some(report.unused)}; {advice}."
        )
    model.load_state_dict({**state, **loaded})
    for layer in irregular_layers(model).values():
        if (layer.axes, layer.limit) != ("both", None):  # the source's taps may have gone elsewhere
            limit_taps(layer, axes=layer.axes, limit=layer.limit)
    return report


def _adapted(tensor: Tensor, own: Tensor) -> Tensor:
    """The weights of a first convolution for another number of channels than the three of photographs, as timm does."""
    if tensor.dim() != 4 or own.dim() != 4 or tensor.shape[1] != 3 or own.shape[1] == 3:
        return tensor
    if (tensor.shape[0], *tensor.shape[2:]) != (own.shape[0], *own.shape[2:]):
        return tensor
    adapted: Tensor = timm.models.adapt_input_conv(own.shape[1], tensor)
    return adapted


def _some(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return f" ({', '.join(names[:3])}{more})"

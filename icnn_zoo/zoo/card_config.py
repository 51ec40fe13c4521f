"""What of a card's configuration may be used: plain values for this package's own network and data, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from icnn_zoo.nn.class_paths import check_allowed
from icnn_zoo.zoo.cards import Card, check_plain

# By name, since importing them is what must not depend on a card.
DATA_MODULES: Final = frozenset(
    f"icnn_zoo.data.{name}DataModule"
    for name in ("Shapes", "DrawnVOC", "VOC2012", "PascalContext", "Cityscapes", "Folder", "Lines", "Documents")
)
_OF_ITS_MACHINE: Final = ("pretrained", "pretrained_partial", "compile")
_OF_TRAINING: Final = ("loss", "class_weights")
# The largest numbers that evaluating on a card's data may take; for what is not named, 10,000.
_BOUNDS: Final = {
    "seed": 2**63,
    "seed_everything": 2**32,
    "num_train": 10**6,
    "num_val": 10**5,
    "num_test": 10**5,
    "objects": 100,
    "object_size": 16,
    "scales": 8,
    "image_size": 4096,
    "crop_size": 4096,
    "eval_size": 8192,
    "batch_size": 1024,
    "eval_batch_size": 1024,
    "num_workers": 64,
    "window_batch": 64,
}


def run_config(card: Card, allow: Sequence[str] | None = None) -> dict[str, Any]:
    """The parts of a run's configuration that a card may decide: seed, network and data.

    A configuration is a program: it names classes to build and checkpoints to read. A card comes from elsewhere, so
    only this package's own data modules are taken, by name, with plain values of bounded size; how to train and where
    to write stay with whoever runs it.

    Args:
        card: The card.
        allow: As in :func:`icnn_zoo.load_checkpoint`: a network of another package is given out only if it is listed.

    Returns:
        "seed_everything", "model" and "data", those of them that the card has.

    Raises:
        ValueError: It has another kind of data module, a value that is not plain, or one out of bounds.
    """
    found = card.training.config
    config: dict[str, Any] = {"seed_everything": found.get("seed_everything", card.training.seed)}
    _check({"seed_everything": config["seed_everything"]}, card, "")
    if "model" in found:
        model = _mapping(found["model"], card, "model")
        left_out = (*_OF_ITS_MACHINE, *_OF_TRAINING, "network", "backbone_args")
        config["model"] = {key: value for key, value in model.items() if key not in left_out}
        _check(config["model"], card, "model.")
        if card.network.get("backbone_args"):  # checked with the card
            config["model"]["backbone_args"] = dict(card.network["backbone_args"])
        if card.spec is not None:
            check_allowed("network", card.spec, allow, f"the card of {card.name}")
            config["model"] |= {"backbone": None, "network": dict(card.spec)}
    if "data" in found:
        data = _mapping(found["data"], card, "data")
        path, arguments = data.get("class_path"), _mapping(data.get("init_args") or {}, card, "data.init_args")
        if not isinstance(path, str) or path not in DATA_MODULES or set(data) - {"class_path", "init_args"}:
            raise ValueError(
                f"the card of {card.name}: data.class_path must be a data module of this package, "
                f"{', '.join(sorted(DATA_MODULES))}; got {str(path)[:100]!r}."
            )
        _check(arguments, card, "data.init_args.")
        config["data"] = {"class_path": path, "init_args": dict(arguments)}
    return config


def _mapping(value: Any, card: Card, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"the card of {card.name}: {name} must be a section of values; got a {type(value).__name__}.")
    return value


def _check(values: Mapping[str, Any], card: Card, prefix: str) -> None:
    for key, value in values.items():
        check_plain(value, f"the card of {card.name}: {prefix}{key}", _BOUNDS.get(key, 10_000))

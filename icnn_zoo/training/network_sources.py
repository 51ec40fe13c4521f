"""The network that a name means: a checkpoint of a run, the config of one, or a checkpoint of the zoo."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from icnn_zoo.io.addresses import is_address
from icnn_zoo.ops.sharing import rename_per_kernel
from icnn_zoo.training.checkpoints import NO_LOSS, check_network, check_size, read_checkpoint, read_task, task_options
from icnn_zoo.training.given_options import name_weights
from icnn_zoo.training.run_folder import RunFolder, find_ckpt
from icnn_zoo.training.run_metrics import Series, read_metrics
from icnn_zoo.training.task import SegmentationTask
from icnn_zoo.zoo.card_config import run_config
from icnn_zoo.zoo.cards import NAME, Card
from icnn_zoo.zoo.indices import CARD, WEIGHTS, Entry
from icnn_zoo.zoo.registry import Registries, Registry, find_checkpoint

_CONFIGS = (".yaml", ".yml")
_SUFFIXES = (*_CONFIGS, ".ckpt", ".safetensors")


@dataclass(frozen=True)
class Source:
    """A network that a person named: a checkpoint of a run, the config of one, or a checkpoint of the zoo.

    Attributes:
        title: What to call it.
        file: The checkpoint (.ckpt) or config (.yaml); None for one of the zoo.
        published: Its registry and entry there; None for a file.
        allow: As in :func:`icnn_zoo.load_checkpoint`.
    """

    title: str
    file: Path | None = None
    published: tuple[Registry, Entry] | None = None
    allow: Sequence[str] | None = None

    def card(self) -> Card | None:
        """The card of a checkpoint of the zoo, None for a file."""
        return None if self.published is None else self.published[0].read_card(self.published[1])

    def weights(self) -> str:
        """Says in a line which weights the network has; those of a config alone may be random."""
        if self.published is not None:
            return f"{self.published[1].name} of {self.published[0]}"
        if self.file is not None and self.file.suffix == ".ckpt":
            return name_weights(False, self.file, read_checkpoint(self.file, mmap=True).get("global_step"))
        model = (self.config() or {}).get("model")
        return name_weights(model.get("pretrained", False) if isinstance(model, dict) else False)

    def config(self) -> dict[str, Any] | None:
        """The configuration of the run, None where there is none beside the checkpoint."""
        if self.file is None:
            card = self.card()
            return None if card is None else run_config(card, self.allow)
        path = self.file if self.file.suffix in _CONFIGS else RunFolder.around(self.file).config
        return _read_yaml(path) if path.is_file() else None

    def metrics(self) -> dict[str, Series]:
        """What the run logged up to this checkpoint; nothing for a config."""
        card = self.card()
        if card is not None:
            return {name: list(series) for name, series in card.training.curves.items()}
        if self.file is None or self.file.suffix in _CONFIGS:
            return {}
        table = RunFolder.around(self.file).metrics
        if not table.is_file():
            return {}
        return read_metrics(table, read_checkpoint(self.file, mmap=True)["global_step"])


def find_source(
    source: str | Path,
    *,
    registry: Registries = None,
    cache: str | Path | None = None,
    allow: Sequence[str] | None = None,
) -> Source:
    """Finds what a name means, without reading the network.

    Args:
        source: A Lightning checkpoint (.ckpt); a run folder (``runs/<name>/version_<n>``: its best.ckpt, else
            last.ckpt); a config (.yaml, .yml); a checkpoint of the zoo, as ``arch.tag`` with or without ``zoo:`` in
            front, its address (``hf://user/repo/arch.tag``), or its folder.
        registry: As in :func:`icnn_zoo.load_checkpoint`, for names of the zoo.
        cache: Likewise.
        allow: Likewise, for networks of other packages that a card or a checkpoint names.

    Returns:
        The source.

    Raises:
        FileNotFoundError: There is no such file, or a folder that holds no checkpoint, or one without its card.
        ValueError: A file of another kind, or no checkpoint of that name in the zoo; the message has the nearest.
    """
    text, path = str(source), Path(source)
    bare = text.removeprefix("zoo:")
    named = not path.exists() and path.suffix not in _SUFFIXES and re.fullmatch(f"{NAME}(@.*)?", text)
    if bare != text or is_address(text) or named:
        return Source(bare, published=find_checkpoint(bare, registry=registry, cache=cache), allow=allow)
    if path.is_file() and path.name == WEIGHTS:
        path = path.parent
    if path.is_dir():
        if (path / WEIGHTS).is_file() or (path / CARD).is_file():
            return _from_folder(path, cache, allow)
        path = find_ckpt(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {text!r}; name a checkpoint (.ckpt), a run folder, a config (.yaml) or a checkpoint of "
            "the zoo (icnn-zoo list)."
        )
    if path.suffix not in (".ckpt", *_CONFIGS):
        raise ValueError(f"The source must be a checkpoint (.ckpt) or a config (.yaml); got {text!r}.")
    title = f"{path.parent.parent.parent.name}, {path.name}" if path.suffix == ".ckpt" else path.stem
    return Source(title, file=path, allow=allow)


def load_task(source: str | Path | Source, *, allow: Sequence[str] | None = None) -> SegmentationTask:
    """Builds the task that a checkpoint or a config describes, in eval mode on the CPU.

    Args:
        source: What :func:`find_source` takes, or what it found. The task has the weights of a checkpoint; for a
            config they are random or pretrained, as its ``seed_everything`` and ``model.pretrained`` say.
        allow: As in :func:`find_source`, where ``source`` is not one yet.

    Returns:
        The task; ``task.model`` is the network.

    Raises:
        FileNotFoundError: See :func:`find_source`.
        ValueError: The file is neither, or of something else; the message says what is missing.
    """
    found = source if isinstance(source, Source) else find_source(source, allow=allow)
    if found.file is None:
        assert found.published is not None
        return _from_zoo(*found.published, found.allow)
    if found.file.suffix in _CONFIGS:
        return _from_config(found.file)
    return _from_checkpoint(found.file, found.allow)


def load_start_of(source: Source) -> SegmentationTask | None:
    """The task as its training began, where that was from weights; None where every displacement was ``epsilon``.

    Raises:
        FileNotFoundError: The weights that it began with are no longer there.
        ValueError: A published network was trained on from one with shapes of its own, which its card does not hold.
    """
    model = (source.config() or {}).get("model")
    pretrained = model.get("pretrained") if isinstance(model, dict) else None
    if not isinstance(pretrained, str):
        return None
    if source.file is None:
        if pretrained.startswith("zoo:") or pretrained.endswith(".ckpt"):
            raise ValueError(f"{source.title} began with {pretrained}: name the run, whose displacements began there.")
        return None
    config = source.file if source.file.suffix in _CONFIGS else RunFolder.around(source.file).config
    return _from_config(config)


def _from_folder(folder: Path, cache: str | Path | None, allow: Sequence[str] | None) -> Source:
    for name, what in ((CARD, "card"), (WEIGHTS, "weights")):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no {name}: a published checkpoint is read by its {what} too. Fetch the folder "
                "whole, or name the checkpoint (.ckpt) of a run."
            )
    folder = folder.resolve()
    published = find_checkpoint(folder.name, registry=folder.parent, cache=cache)
    return Source(folder.name, published=published, allow=allow)


def _from_zoo(place: Registry, entry: Entry, allow: Sequence[str] | None) -> SegmentationTask:
    from icnn_zoo.zoo.networks import rebuild

    network, card = rebuild(place, entry, allow)
    conversion = {"start": None} if card.conversion is None else card.conversion.model_dump()
    # How it was trained and how it evaluates come from the run's config, the network from the card.
    arguments = {
        **rename_per_kernel(run_config(card, allow).get("model", {})),
        **card.network,
        **conversion,
        "num_classes": len(card.classes),
        "class_names": card.classes,
        "mean": card.mean,
        "std": card.std,
        "pretrained": False,
    }
    try:
        task = SegmentationTask(**arguments)
    except TypeError as error:
        raise ValueError(f"the card of {entry.name} describes no SegmentationTask of this version: {error}") from error
    task.model.load_state_dict(network.state_dict())
    return task.eval()


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not valid YAML: {error}") from error
    return config if isinstance(config, dict) else {}


def _from_checkpoint(source: Path, allow: Sequence[str] | None) -> SegmentationTask:
    checkpoint = read_task(source)
    check_network(checkpoint, source, allow)
    check_size(SegmentationTask, checkpoint, source)
    try:
        task = SegmentationTask(**{**task_options(checkpoint), **NO_LOSS})
        task.load_state_dict(checkpoint["state_dict"])
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{str(source)!r} is not a checkpoint of a SegmentationTask: {error}") from error
    return task.eval()


def _from_config(source: Path) -> SegmentationTask:
    from icnn_zoo.training.lightning_cli import ZooCLI

    config = _read_yaml(source)
    missing = [key for key in ("model", "data") if key not in config]
    if missing:
        raise ValueError(f"{str(source)!r} is not a config of a run: it has no section {' and no '.join(missing)}.")
    cli = ZooCLI.build(config, accelerator="cpu")
    task: SegmentationTask = cli.model
    if task.pretrained:
        task.load_pretrained()
    return task.eval()

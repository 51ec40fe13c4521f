"""Publishing a run's network into a registry: stripped, described, read back, compared, and only then listed."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from icnn_zoo._version import __version__
from icnn_zoo.io.addresses import join, shown
from icnn_zoo.io.downloads import cache_folder
from icnn_zoo.io.files import sync, write_whole
from icnn_zoo.models.segmentation import SegmentationModel
from icnn_zoo.publishing.about import read_about
from icnn_zoo.publishing.card_making import make_card, read_config, training_of
from icnn_zoo.publishing.pushing import push, read_index, write_listing
from icnn_zoo.publishing.targets import FolderTarget, Target, open_target
from icnn_zoo.training.network_sources import load_task
from icnn_zoo.training.run_folder import find_ckpt
from icnn_zoo.zoo.card_readme import readme
from icnn_zoo.zoo.cards import Card, check_name, dump, parse
from icnn_zoo.zoo.golden import golden_logits
from icnn_zoo.zoo.hub_card import front_matter
from icnn_zoo.zoo.indices import CARD, INDEX, README, WEIGHTS, Entry, File
from icnn_zoo.zoo.networks import assemble
from icnn_zoo.zoo.weights import parse_weights

_STAGING = ".staging-"


def publish(
    source: str | Path,
    name: str,
    to: str | Path,
    about: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    half: bool = False,
    allow: Sequence[str] | None = None,
) -> Path | str:
    """Adds the network of a run to a registry.

    Training state is left behind. What was written is read back and must give exactly the outputs of the original. The
    checkpoint is listed only then, in one step: a kill before leaves the registry as it was.

    Args:
        source: A run folder, ``runs/<name>/version_<n>`` (its best.ckpt, else last.ckpt), or a .ckpt of one. The run's
            config.yaml must be beside its checkpoints.
        name: ``arch.tag`` with the backbone's timm name as arch.
        to: The registry: a folder, which is made where it is missing; ``hf://user/repo``, a repository of Hugging Face,
            which is made too; or a place that fsspec writes to (``s3://bucket/folder``). Elsewhere than in a folder the
            checkpoint is made in the cache first and then copied, the index last; a copy that was killed or refused
            goes on where it was when this is called again.
        about: What a checkpoint does not say of itself, :class:`icnn_zoo.publishing.about.About`: a YAML file, or the
            same as a mapping.
        overrides: Arguments for measuring metrics, such as "--data.init_args.root=elsewhere".
        half: Stores kernels in 16 bits, in half the space; displacements, biases and norm layers keep all bits. What is
            published, and measured where ``about`` does not say a metric, is the network with rounded kernels, and
            loads in 32 bits.
        allow: As in :func:`icnn_zoo.load_checkpoint`, for a run with a network of another package.

    Returns:
        The checkpoint's folder, or its address.

    Raises:
        FileNotFoundError: The source, its config.yaml or a picture is missing.
        OSError: There is no space left, or a file cannot be written; nothing was published.
        RuntimeError: The place cannot be written; the message names it and why.
        ValueError: The name exists; the card would miss something, which the message names; the network does not come
            back as it was.
    """
    target = open_target(to)
    target.check()
    check_name(name)
    if not isinstance(target, FolderTarget):
        return _publish_elsewhere(source, name, target, about, overrides, half, allow)
    _check_new(name, target)
    wanted, pictures = read_about(about)
    file = find_ckpt(Path(source))
    config = read_config(file)
    task = load_task(file, allow=allow)
    training = training_of(file, config, wanted)
    tensors = _plain_tensors(task.model)
    if half:
        tensors = {name: tensor.half() if _is_kernel(name, tensor) else tensor for name, tensor in tensors.items()}
        task.model.load_state_dict(tensors)
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    card = make_card(name, task, wanted, training, data, overrides)
    target.folder.mkdir(parents=True, exist_ok=True)
    with target.lock():
        return _add(target.folder, card, data, pictures, wanted.pictures, task.model)


def _publish_elsewhere(
    source: str | Path,
    name: str,
    target: Target,
    about: str | Path | Mapping[str, Any],
    overrides: Sequence[str],
    half: bool,
    allow: Sequence[str] | None,
) -> str:
    wanted, pictures = read_about(about)
    file = find_ckpt(Path(source))
    # All that it is made from: what was made once is sent until it arrives, without measuring again.
    parts = [file.read_bytes(), *(picture.read_bytes() for picture in pictures.values())]
    parts.append(repr((__version__, name, read_config(file), wanted, list(overrides), half)).encode())
    origin = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    staged = cache_folder() / "outgoing" / origin
    if name not in _names(FolderTarget(str(staged))):
        _check_new(name, target)
        publish(source, name, staged, about, overrides=overrides, half=half, allow=allow)
    push(staged, name, open_target(target.url))  # opened anew: the index may have changed meanwhile
    shutil.rmtree(staged)
    return join(target.url, name)


def _names(target: Target) -> set[str]:
    return {entry.name for entry in read_index(target).checkpoints}


def _check_new(name: str, target: Target) -> None:
    if name in _names(target):
        raise ValueError(
            f"`name`: {name} is published in {shown(target.url)!r} already, and stays as it is; choose another tag."
        )


def _plain_tensors(model: SegmentationModel) -> dict[str, torch.Tensor]:
    # Copies: safetensors refuses tied shapes, which share memory.
    state = model.state_dict()
    return {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def _is_kernel(name: str, tensor: torch.Tensor) -> bool:
    return name.endswith(".weight") and tensor.dim() > 1


def _add(
    folder: Path,
    card: Card,
    data: bytes,
    pictures: Mapping[str, Path],
    captions: Mapping[str, str],
    original: SegmentationModel,
) -> Path:
    # Of a process that was killed: the lock says that none is at work.
    for left in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(left)
    for file in map(Path, (INDEX, README)):
        for left in folder.glob(f".{file.stem}-*{file.suffix}"):
            left.unlink()
    registry = FolderTarget(str(folder))
    index = read_index(registry)
    target = folder / card.name
    if any(entry.name == card.name for entry in index.checkpoints):
        raise ValueError(f"`name`: {card.name} was published in {str(folder)!r} meanwhile; choose another tag.")
    if target.exists():
        # Moved in by a process that was killed before it could list it.
        known = {WEIGHTS, CARD, README, *pictures}
        strange = (
            [path.name for path in target.iterdir() if path.name not in known] if target.is_dir() else [target.name]
        )
        if strange:
            raise ValueError(f"{str(target)!r} is in the way and holds {', '.join(strange)}; move it elsewhere.")
        shutil.rmtree(target)
    staging = folder / f"{_STAGING}{secrets.token_hex(4)}"
    staging.mkdir()  # with the mode of the user's mask, as any folder
    try:
        text = dump(card)
        write_whole(staging / WEIGHTS, data)
        write_whole(staging / CARD, text)
        page = front_matter([card]) + readme(card, {Path(name).name: what for name, what in captions.items()})
        write_whole(staging / README, page)
        for name, path in pictures.items():
            shutil.copyfile(path, staging / name)
            sync(staging / name)
        _read_back(staging, card.name, original)
        sync(staging)
        os.rename(staging, target)
        sync(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    entry = Entry(
        name=card.name,
        summary=" ".join(card.description.split())[:200],
        card=File(sha256=hashlib.sha256(text).hexdigest(), size=len(text)),
        weights=File(sha256=card.weights.sha256, size=card.weights.size),
    )
    write_listing(registry, index.changed(entry), {}, f"Publish {card.name}")
    return target


def _read_back(staging: Path, name: str, original: SegmentationModel) -> None:
    card = parse(Card, (staging / CARD).read_bytes(), name)
    allow = [] if card.spec is None else [card.architecture]  # the original is of that class
    model = assemble(card, parse_weights((staging / WEIGHTS).read_bytes(), name), allow)
    for seed in (card.golden.seed, card.golden.seed + 1):
        before, after = (golden_logits(network, seed, card.golden.size) for network in (original, model))
        if not torch.equal(before, after):
            raise ValueError(
                f"{name} does not come back as it was: outputs for golden image {seed} differ by "
                f"{(before - after).abs().max():.1e}. Nothing was published."
            )

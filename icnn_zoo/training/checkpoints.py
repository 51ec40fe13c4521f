"""Checkpoints of runs as files: written whole or not at all, read without running any code of theirs."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from icnn_zoo.io.files import replacing
from icnn_zoo.io.transports import is_local, local_path
from icnn_zoo.nn.class_paths import check_allowed, without_memory
from icnn_zoo.ops.sharing import rename_per_kernel

NO_LOSS = {"loss": None, "class_weights": None}  # of a task that is not trained: no class is imported for it


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, syncs it and moves it there, so that no kill or full disk harms the last.

    Lightning writes to the temporary folder, and copies over the target where that is on another filesystem. Reading
    never runs code of a file: see :func:`read_checkpoint`. Addresses of other machines are written as Lightning does.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if not is_local(str(path)) or storage_options is not None:
            return super().save_checkpoint(checkpoint, path, storage_options)
        file = Path(local_path(str(path)))
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path)


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Reads a checkpoint of tensors and plain values to the CPU; a file that would need code to run is refused.

    Args:
        path: A file, or an address that fsspec knows.
        mmap: Leaves tensors of a local file on the disk until they are used.

    Returns:
        What the file holds.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or of another kind; the message names the newest whole checkpoint beside it.
    """
    place = str(path)
    if is_local(place) and not Path(local_path(place)).is_file():
        raise FileNotFoundError(f"there is no checkpoint {place!r}.")
    try:
        checkpoint: Any = _load(place, mmap)
    except Exception as error:  # of many kinds for a file that is not a checkpoint
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        other = _newest_beside(Path(local_path(place))) if is_local(place) else None
        raise ValueError(
            f"{place!r} cannot be read as a checkpoint of tensors and plain values: {reason}"
            + ("" if other is None else f" The newest whole one beside it is {str(other[1])!r}, of step {other[0]}.")
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{place!r} is not a checkpoint of a run: it holds a {type(checkpoint).__name__}.")
    return checkpoint


def read_task(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint of a task as :func:`read_checkpoint`, and checks that it has options and weights.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or of something else; the message says what is missing.
    """
    checkpoint = read_checkpoint(path)
    kinds = {"hyper_parameters": "options", "state_dict": "weights"}
    missing = [key for key in kinds if not isinstance(checkpoint.get(key), dict)]
    if missing:
        raise ValueError(
            f"{str(path)!r} is not a checkpoint of a run of this package: it has no {' and no '.join(missing)}. Name "
            "runs/<name>/version_<n>/checkpoints/last.ckpt."
        )
    return checkpoint


def task_options(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a checkpoint's task was made with, without Lightning's own entries."""
    options = rename_per_kernel(checkpoint["hyper_parameters"])
    return {key: value for key, value in options.items() if not str(key).startswith("_")}


def check_network(checkpoint: Mapping[str, Any], source: str | Path, allow: Sequence[str] | None = None) -> None:
    """Checks that a network of another package may be imported because a checkpoint says so.

    Args:
        checkpoint: What :func:`read_task` gave.
        source: File to name in messages.
        allow: As in :func:`icnn_zoo.load_checkpoint`.

    Raises:
        ValueError: It may not.
    """
    spec = checkpoint["hyper_parameters"].get("network")
    if spec is not None:
        check_allowed("network", spec, allow, repr(str(source)))


def check_size(task: Callable[..., nn.Module], checkpoint: Mapping[str, Any], source: str | Path) -> None:
    """Checks that a checkpoint holds the tensors that its options ask for, before memory is given to any of them.

    The network's class must have been allowed, see :func:`check_network`.

    Args:
        task: Class of the task.
        checkpoint: What :func:`read_task` gave.
        source: File to name in messages.

    Raises:
        ValueError: Tensors are missing, of another shape, or larger than what the file holds of them.
    """
    # The regular network, which can be made without memory; positions and spreads are at most 4 times its weights.
    options = {**task_options(checkpoint), **NO_LOSS, "start": None, "pretrained": False}
    try:
        outline = without_memory(lambda: task(**options), trusted=options.get("network") is not None)
        expected = {name: value.shape for name, value in outline.state_dict().items()}
    except (TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{str(source)!r} is not a checkpoint of a {task.__name__}: {error}") from error
    found = checkpoint["state_dict"]
    for name, shape in expected.items():
        value = found.get(name)
        if not isinstance(value, Tensor) or value.shape != shape:
            has = tuple(value.shape) if isinstance(value, Tensor) else "none"
            raise ValueError(
                f"{str(source)!r} does not hold the network that its options describe: {name} is {has} where they ask "
                f"for {tuple(shape)}."
            )
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise ValueError(f"{str(source)!r} is damaged: it holds less of {name} than its shape says.")


def _load(place: str, mmap: bool) -> Any:
    if is_local(place):
        return torch.load(local_path(place), map_location="cpu", weights_only=True, mmap=mmap)
    with fsspec.open(place, "rb") as file:
        return torch.load(io.BytesIO(file.read()), map_location="cpu", weights_only=True)


def _newest_beside(damaged: Path) -> tuple[int, Path] | None:
    """Step and file of the checkpoint beside a damaged one that got furthest; None where none can be read."""
    found = []
    for file in damaged.parent.glob("*.ckpt"):
        if file == damaged:
            continue
        try:
            found.append((int(_load(str(file), mmap=True)["global_step"]), file))
        except Exception:  # damaged too
            continue
    return max(found, default=None)

"""What a person gave on the command line or in YAML, beside what a checkpoint holds: which of them decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icnn_zoo.io.transports import is_local
from icnn_zoo.training.run_folder import RunFolder

LINKED = ("num_classes", "ignore_index", "class_names")  # the data say them


def remembered(options: Mapping[str, Any], given: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The options of a checkpoint that nobody gave anew.

    Args:
        options: Those of the checkpoint.
        given: Those of the command line and of config files.
        known: Names that the task of this version has; others are of an earlier one.
    """
    return {
        name: value for name, value in options.items() if name in known and name not in given and name not in LINKED
    }


def check_agreement(
    architecture: Sequence[str], options: Mapping[str, Any], checkpoint: Mapping[str, Any], source: str = "checkpoint"
) -> None:
    """Checks that a network is the one that a checkpoint is of.

    Args:
        architecture: Names of the options that decide which tensors a network has, or what they mean.
        options: Those of the network.
        checkpoint: Those of the checkpoint.
        source: What to call it in messages.

    Raises:
        ValueError: They disagree, or have the same classes in another order; the message says both.
    """
    for name in architecture:
        if name in options and name in checkpoint and options[name] != checkpoint[name]:
            raise ValueError(
                f"`{name}`: the {source} is of a network with {checkpoint[name]!r}, this one has {options[name]!r}. "
                "Leave it out to take the checkpoint's, or give another checkpoint."
            )
    ours, theirs = options.get("class_names"), checkpoint.get("class_names")
    if ours and theirs and list(ours) != list(theirs) and sorted(ours) == sorted(theirs):
        raise ValueError(
            f"the classes of the data are those of the {source} in another order: {', '.join(ours)} here, "
            f"{', '.join(theirs)} there. Scores would compare unlike classes."
        )


def name_weights(pretrained: bool | str, ckpt_path: str | Path | None = None, step: int | None = None) -> str:
    """Says in a line which weights a network has.

    Args:
        pretrained: As the task has it.
        ckpt_path: A checkpoint, whose weights take the place of those.
        step: The step of the checkpoint, None if unknown.
    """
    if ckpt_path is not None:
        return f"{ckpt_path}{'' if step is None else f', step {step}'}"
    if not pretrained:
        return "random"
    return "timm's for the backbone, a random head" if pretrained is True else str(pretrained)


def check_source(ckpt_path: str | None) -> None:
    """Checks that a checkpoint to start from exists, before anything is made.

    Raises:
        FileNotFoundError: It does not.
    """
    if not ckpt_path or ckpt_path in ("best", "last", "hpc") or not is_local(ckpt_path):
        return
    if not Path(ckpt_path).is_file():
        raise FileNotFoundError(f"`ckpt_path`: there is no file {ckpt_path!r}.")


def check_trained(command: str, ckpt_path: str | None, pretrained: bool | str, configs: Sequence[str]) -> None:
    """Checks that weights to evaluate are not random.

    Args:
        command: "validate", "test" or "predict".
        ckpt_path: The checkpoint, None for none.
        pretrained: As the task has it.
        configs: Config files of the command line; one in a run folder tells where its checkpoint is.

    Raises:
        ValueError: There is neither a checkpoint nor a published network.
    """
    if ckpt_path and ckpt_path not in ("best", "last", "hpc"):
        return
    if not ckpt_path and isinstance(pretrained, str) and pretrained.startswith("zoo:"):
        return
    runs = [RunFolder(Path(config).parent) for config in configs]
    found = [file for run in runs for file in (run.best, run.last) if file.is_file()]
    example = str(found[0]) if found else "runs/<name>/version_<n>/checkpoints/best.ckpt"
    raise ValueError(
        f"{command} would score random weights: give a file of trained ones, --ckpt_path {example}, or a network of "
        "the zoo, --model.pretrained zoo:NAME."
        + (f" {ckpt_path!r} means a checkpoint of training in the same process." if ckpt_path else "")
    )

"""What a person gave on the command line or in YAML, beside what a checkpoint holds: which of them decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icnn_zoo.io.label_pictures import check_classes
from icnn_zoo.io.transports import is_local
from icnn_zoo.nn.class_paths import without_weights
from icnn_zoo.training.run_folder import RunFolder

LINKED = ("num_classes", "ignore_index", "class_names", "in_channels")  # the data say them
_NAMED = ("network", "loss")  # classes that only the user names


def remembered(options: Mapping[str, Any], given: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The options of a checkpoint that nobody gave anew.

    Args:
        options: Those of the checkpoint.
        given: Those of the command line and of config files.
        known: Names that the task of this version has; others are of an earlier one.
    """
    return {
        name: value
        for name, value in options.items()
        if name in known and name not in given and name not in (*LINKED, *_NAMED)
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
        if name in options and name in checkpoint and _plain(options[name]) != _plain(checkpoint[name]):
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


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Checks that an option is one of a few words.

    Raises:
        ValueError: It is not.
    """
    if value not in known:
        raise ValueError(f"`{name}` must be {' or '.join(known)}; got {value!r}.")


def named_classes(number: int, names: Sequence[str] | None) -> tuple[str, ...]:
    """The names of classes, numbers where there are none.

    Raises:
        ValueError: More classes than label maps can hold, not as many names, or names that do not do.
    """
    if not 2 <= number <= 256:
        raise ValueError(f"`num_classes` must be 2 to 256, as label maps have 8 bits; got {number}.")
    if names is not None and len(names) != number:
        raise ValueError(f"`class_names` must have num_classes = {number} names; got {len(names)}.")
    return check_classes("class_names", names or [str(index) for index in range(number)])


def check_given(command: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Checks that classes which a checkpoint names are named in what the user gave: nothing else imports them.

    Args:
        command: "fit", or another one, which needs no loss.
        saved: The options of the checkpoint.
        given: Those of the command line and of config files.

    Raises:
        ValueError: They are not.
    """
    for name in ("network", "loss") if command == "fit" else ("network",):
        if saved.get(name) is not None and given.get(name) is None:
            raise ValueError(
                f"`{name}`: the checkpoint was made with {saved[name]}, which is imported only if you name it: "
                "give it in the config (-c, the run's own config.yaml has it) or on the command line."
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


def _plain(value: Any) -> Any:
    return without_weights("network", value) if isinstance(value, Mapping) and "class_path" in value else value


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

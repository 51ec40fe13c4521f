"""Scores from a confusion matrix, and their names in logs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor


def iou_and_accuracy(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """IoU of every class and pixel accuracy from a confusion matrix [true, predicted].

    Returns:
        IoU [num_classes], NaN for a class that neither occurs nor is predicted, and the share of right pixels.
    """
    counts = confusion.cpu().double()  # not every device has 64 bits, which counts of pixels need
    right = counts.diagonal()
    iou = right / (counts.sum(0) + counts.sum(1) - right)
    return iou.float().to(confusion.device), (right.sum() / counts.sum()).float().to(confusion.device)


def background_miou(confusion: Tensor) -> float:
    """The mIoU that predicting class 0 everywhere would have on the same labels."""
    background = torch.zeros_like(confusion)
    background[:, 0] = confusion.sum(dim=1)
    return float(iou_and_accuracy(background)[0].nanmean())


def iou_names(split: str, classes: Sequence[str]) -> list[str]:
    """Names of the IoU of classes in logs, such as "val/IoU/dog".

    Loggers refuse some characters (MLflow brackets and letters beyond ASCII): those become "_", with the number of the
    class where that makes two names the same.
    """
    plain = [re.sub(r"[^\w .:/-]", "_", name, flags=re.ASCII) or "_" for name in classes]
    return [
        f"{split}/IoU/{name}" if plain.count(name) == 1 else f"{split}/IoU/{name}_{index}"
        for index, name in enumerate(plain)
    ]

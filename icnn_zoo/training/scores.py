"""Scores from a confusion matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def iou_and_accuracy(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """IoU of every class and pixel accuracy from a confusion matrix [true, predicted].

    Returns:
        IoU [num_classes], NaN for a class that neither occurs nor is predicted, and the share of right pixels.
    """
    confusion = confusion.double()
    right = confusion.diagonal()
    iou = right / (confusion.sum(0) + confusion.sum(1) - right)
    return iou.float(), (right.sum() / confusion.sum()).float()


def background_miou(confusion: Tensor) -> float:
    """The mIoU that predicting class 0 everywhere would have on the same labels."""
    background = torch.zeros_like(confusion)
    background[:, 0] = confusion.sum(dim=1)
    return float(iou_and_accuracy(background)[0].nanmean())

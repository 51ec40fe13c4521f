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


def class_scores(split: str, classes: Sequence[str], confusion: Tensor) -> dict[str, Tensor | float]:
    """What is logged of a confusion matrix [true, predicted], by name.

    "IoU", "Dice", "precision" and "recall" of every class, NaN where there is nothing to divide by; "mIoU" and "mDice",
    means over the classes that occur or are predicted; "mIoU_background" and "pixel_accuracy".
    """
    counts = confusion.cpu().double()
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou, accuracy = iou_and_accuracy(confusion)
    dice = 2 * right / (true + predicted)
    values: dict[str, Tensor | float] = {}
    for score, of_classes in (("IoU", iou), ("Dice", dice), ("precision", right / predicted), ("recall", right / true)):
        numbers = of_classes.float().to(confusion.device)
        values |= zip(score_names(split, classes, score), numbers, strict=True)
    values[f"{split}/mIoU"] = iou.nanmean()
    values[f"{split}/mDice"] = dice.nanmean().float().to(confusion.device)
    values[f"{split}/mIoU_background"] = background_miou(confusion)
    values[f"{split}/pixel_accuracy"] = accuracy
    return values


def score_names(split: str, classes: Sequence[str], score: str = "IoU") -> list[str]:
    """Names of a score of classes in logs, such as "val/IoU/dog".

    Loggers refuse some characters (MLflow brackets and letters beyond ASCII): those become "_", with the number of the
    class where that makes two names the same.
    """
    plain = [re.sub(r"[^\w .:/-]", "_", name, flags=re.ASCII) or "_" for name in classes]
    return [
        f"{split}/{score}/{name}" if plain.count(name) == 1 else f"{split}/{score}/{name}_{index}"
        for index, name in enumerate(plain)
    ]

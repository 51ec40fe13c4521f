"""Label maps of many images, and of images larger than memory: in batches, in windows, in bands of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from icnn_zoo.io.overviews import Rows
from icnn_zoo.models.evaluation import Evaluation, window_starts
from icnn_zoo.models.segmentation import SegmentationModel
from icnn_zoo.nn.modules import evaluating


class Segmented(NamedTuple):
    """What a network says of an image: its labels, uint8 [H, W], and on request probabilities, float32 [C, H, W]."""

    labels: np.ndarray
    probabilities: np.ndarray | None


@torch.inference_mode()
def segment_images(
    model: SegmentationModel,
    images: Iterable[np.ndarray],
    *,
    evaluation: Evaluation | None = None,
    batch: int = 1,
    longest_side: int | None = None,
    probabilities: bool = False,
) -> Iterator[Segmented]:
    """Labels images one after the other, in eval mode, on the network's device.

    Args:
        model: The network.
        images: Arrays [H, W, C], values in 0 to 255. They are taken as they are needed.
        evaluation: Windows, mirroring and scales; None runs each image in one forward.
        batch: Images that the network gets at once, where successive ones have one size.
        longest_side: Scales larger images down to this many pixels for the network; None never does.
        probabilities: Whether to give them.

    Yields:
        The results, in the images' order.

    Raises:
        ValueError: ``batch`` or ``longest_side`` is below 1, or the network has more than 256 classes.
    """
    for name, value in (("batch", batch), ("longest_side", longest_side)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1; got {value}.")
    if model.num_classes > 256:
        raise ValueError(f"label maps hold up to 256 classes; the network has {model.num_classes}.")
    way = evaluation or Evaluation()
    with evaluating(model):
        for group in _groups(images, batch):
            size = group[0].shape[:2]
            smaller = [_scaled(image, longest_side) for image in group]
            pixels = model.preprocess(_tensor(smaller).to(model.mean.device))
            scores = way.scores(model.full_logits, pixels)
            if scores.shape[-2:] != size:
                scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
            labels = scores.argmax(dim=1).to(torch.uint8).cpu().numpy()
            if probabilities and way.scales == (1.0,):  # of several scales, scores are probabilities
                scores = scores.softmax(dim=1)
            for place in range(len(group)):
                yield Segmented(labels[place], scores[place].float().cpu().numpy() if probabilities else None)


@torch.inference_mode()
def label_bands(model: SegmentationModel, image: Rows, *, window: int, batch: int = 1) -> Iterator[np.ndarray]:
    """Labels an image of any size in bands of rows, in memory that is that of a row of windows.

    Windows overlap by a third, and a pixel's label is that of the window whose edges it is farther from: logits of
    neighbors are not averaged, as whole rows of them would have to be kept.

    Args:
        model: The network.
        image: The image.
        window: Side of the windows in pixels.
        batch: Windows that the network gets at once.

    Yields:
        Labels, uint8 [n, W], from top to bottom.

    Raises:
        ValueError: ``window`` or ``batch`` is below 1.
    """
    Evaluation("sliding", window, batch)
    height, width = image.shape[:2]
    tops, lefts = (window_starts(max(extent, window), window) for extent in (height, width))
    rows, cols = _cuts(tops, window, height), _cuts(lefts, window, width)
    with evaluating(model):
        for top, first, last in zip(tops, rows[:-1], rows[1:], strict=True):
            pixels = image.rows(top, min(top + window, height))
            band = np.empty((last - first, width), np.uint8)
            for start in range(0, len(lefts), batch):
                places = range(start, min(start + batch, len(lefts)))
                parts = [pixels[:, lefts[place] : lefts[place] + window] for place in places]
                logits = model.full_logits(model.preprocess(_tensor(parts).to(model.mean.device)))
                for place, labels in zip(places, logits.argmax(dim=1).to(torch.uint8).cpu().numpy(), strict=True):
                    here = slice(cols[place], cols[place + 1])
                    left = lefts[place]
                    band[:, here] = labels[first - top : last - top, here.start - left : here.stop - left]
            yield band


def _cuts(starts: Sequence[int], window: int, extent: int) -> list[int]:
    """Where one window's labels end and the next one's begin: in the middle of what both see."""
    middles = [(after + before + window) // 2 for before, after in pairwise(starts)]
    return [0, *middles, extent]


def _groups(images: Iterable[np.ndarray], number: int) -> Iterator[list[np.ndarray]]:
    group: list[np.ndarray] = []
    for image in images:
        if group and (len(group) == number or image.shape != group[0].shape):
            yield group
            group = []
        group.append(image)
    if group:
        yield group


def _tensor(images: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def _scaled(image: np.ndarray, longest_side: int | None) -> np.ndarray:
    height, width = image.shape[:2]
    scale = 1.0 if longest_side is None else min(1.0, longest_side / max(height, width))
    if scale == 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in image.transpose(2, 0, 1)]
    resized: Any = [np.asarray(plane.resize(size, Image.Resampling.BILINEAR)) for plane in planes]
    return np.stack(resized, axis=-1)

"""Label maps of whole images: in one forward, or in windows, mirrored and at several scales, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Network = Callable[[Tensor], Tensor]  # images [B, C, H, W] to logits [B, num_classes, H, W] at the same size


def window_starts(extent: int, window: int) -> list[int]:
    """Where the windows along one side begin.

    They lie ``ceil(2 / 3 * window)`` apart, and the last is pulled back to end with the image (PSPNet's evaluation).

    Args:
        extent: Pixels of the image's side, at least ``window``.
        window: Pixels of the window's.

    Returns:
        First pixels, ascending.
    """
    stride = -(-2 * window // 3)  # in integers: 2 / 3 * 3 can be above 2
    number = -(-(extent - window) // stride) + 1
    return [min(index * stride, extent - window) for index in range(number)]


def whole_logits(network: Network, images: Tensor, *, flip: bool = False) -> Tensor:
    """Logits of images in one forward; with ``flip`` the mean of those and of the mirrored images' mirrored back.

    Args:
        network: Images [B, C, H, W] to logits [B, num_classes, H, W].
        images: Normalized, [B, C, H, W].
        flip: Whether to run the mirrored images too.

    Returns:
        Logits [B, num_classes, H, W].
    """
    logits = network(images)
    return logits.add(network(images.flip(-1)).flip(-1)).div_(2) if flip else logits


def sliding_logits(
    network: Network,
    images: Tensor,
    *,
    window: int,
    flip: bool = False,
    window_batch: int = 1,
) -> Tensor:
    """Logits of images from square windows that overlap by a third, averaged where they do.

    Memory is bounded by the result, ``4 * B * num_classes * H * W`` bytes, and what ``window_batch`` windows need:
    windows are added in place.

    Args:
        network: Images [B, C, window, window] to logits [B, num_classes, window, window].
        images: Normalized, [B, C, H, W]. Where they are smaller than the window they are padded to it at the right and
            bottom with 0, which is the mean color, and the padding's logits are cut off.
        window: Pixels of the window's side.
        flip: Whether each window is run mirrored too.
        window_batch: Windows that the network gets at once, of each image.

    Returns:
        Logits [B, num_classes, H, W].

    References:
        Windows: PSPNet's evaluation; the mean of logits over windows: DeepLab ports and mmsegmentation.
    """
    height, width = images.shape[-2:]
    images = F.pad(images, (0, max(window - width, 0), 0, max(window - height, 0)))
    rows, cols = window_starts(images.shape[-2], window), window_starts(images.shape[-1], window)
    total: Tensor | None = None
    for places in _chunks([(row, col) for row in rows for col in cols], window_batch):
        parts = torch.cat([images[..., row : row + window, col : col + window] for row, col in places])
        for (row, col), part in zip(places, whole_logits(network, parts, flip=flip).chunk(len(places)), strict=True):
            if total is None:
                total = part.new_zeros(len(images), part.shape[1], *images.shape[-2:])
            total[..., row : row + window, col : col + window] += part
    assert total is not None
    total /= _coverage(rows, window, total.shape[-2], total)[:, None]
    total /= _coverage(cols, window, total.shape[-1], total)
    return total[..., :height, :width]


def multi_scale(logits: Network, images: Tensor, scales: Sequence[float]) -> Tensor:
    """Class scores of images at several scales.

    One scale of 1 gives the logits as they are. Otherwise the images are scaled with aligned corners to
    ``round((side - 1) * scale) + 1``, their logits are scaled back, and softmax probabilities are averaged over the
    scales. Means over windows and mirror images are taken of logits, before, as in PSPNet and mmsegmentation.

    Args:
        logits: Images [B, C, h, w] of any size to logits [B, num_classes, h, w].
        images: Normalized, [B, C, H, W].
        scales: Positive factors.

    Returns:
        Scores [B, num_classes, H, W].
    """
    if tuple(scales) == (1.0,):
        return logits(images)
    size = images.shape[-2:]
    total: Tensor | None = None
    for scale in scales:
        smaller = [round((side - 1) * scale) + 1 for side in size]
        part = logits(F.interpolate(images, smaller, mode="bilinear", align_corners=True))
        part = F.interpolate(part, size, mode="bilinear", align_corners=True)
        # Softmax in place: at 2048x1024 every further copy of 19 classes is 152 MiB.
        part -= part.amax(dim=1, keepdim=True)
        part = part.exp_()
        part /= part.sum(dim=1, keepdim=True)
        total = part if total is None else total.add_(part)
    assert total is not None
    total /= len(scales)
    return total


@dataclass(frozen=True)
class Evaluation:
    """How a network looks at whole images.

    Attributes:
        evaluation: "whole" runs an image in one forward, "sliding" in overlapping windows.
        window: Side of the windows in pixels. They lie two thirds of it apart.
        window_batch: Windows that the network gets at once.
        flip: Averages the logits with those of the mirrored image.
        scales: Factors of image size, probabilities averaged; (1.0,) for none.
    """

    evaluation: str = "whole"
    window: int = 713
    window_batch: int = 1
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        check_evaluation(self.evaluation, self.window, self.scales, self.window_batch)

    def scores(self, network: Network, images: Tensor) -> Tensor:
        """Class scores [B, num_classes, H, W] of normalized images [B, C, H, W]; see :func:`multi_scale`."""
        if self.evaluation == "sliding":
            options = {"window": self.window, "window_batch": self.window_batch, "flip": self.flip}
            logits: Network = partial(sliding_logits, network, **options)  # type: ignore[arg-type]
        else:
            logits = partial(whole_logits, network, flip=self.flip)
        return multi_scale(logits, images, self.scales)


def check_evaluation(evaluation: str, window: int, scales: Sequence[float], window_batch: int) -> None:
    """Checks the options of evaluating.

    Raises:
        ValueError: An unknown way, or a number out of its range.
    """
    if evaluation not in ("whole", "sliding"):
        raise ValueError(f"`evaluation` must be whole or sliding; got {evaluation!r}.")
    for name, value in (("window", window), ("window_batch", window_batch)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1; got {value}.")
    if not scales or not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise ValueError(f"`scales` must be one or more positive factors; got {list(scales)}.")


def _chunks(places: list[tuple[int, int]], number: int) -> Iterator[list[tuple[int, int]]]:
    for first in range(0, len(places), number):
        yield places[first : first + number]


def _coverage(starts: Sequence[int], window: int, extent: int, like: Tensor) -> Tensor:
    """How many windows meet each pixel of a side; over an image it is the product of both sides' numbers."""
    counts = like.new_zeros(extent)
    for start in starts:
        counts[start : start + window] += 1
    return counts

"""Golden answers: what a published network says to an image that a formula draws, and whether it still does."""

from __future__ import annotations

import torch
from torch import Tensor

from icnn_zoo.models.segmentation import SegmentationModel
from icnn_zoo.zoo.cards import Golden

SIZE = (97, 129)  # 16k + 1 on both sides, so that logits lie on pixels at output strides 8 and 16
LOGITS = 64
TOLERANCE = 1e-3
AGREEMENT = 0.98


def golden_image(seed: int, size: tuple[int, int], channels: int = 3) -> Tensor:
    """An image that needs no file: ramps in every channel over patches of 16 px.

    Channel k at row r and column c is (7 r + 13 (k + 1) c + 29 (r // 16) (c // 16) + 53 k + 97 seed) modulo 256.

    Args:
        seed: Chooses the image.
        size: Height and width in pixels.
        channels: How many.

    Returns:
        uint8 [1, channels, height, width].

    Example:
        >>> from icnn_zoo.zoo.golden import golden_image
        >>> golden_image(0, (2, 3))[0, 1].tolist()
        [[53, 79, 105], [60, 86, 112]]
    """
    row = torch.arange(size[0])[None, :, None]
    col = torch.arange(size[1])[None, None, :]
    channel = torch.arange(channels)[:, None, None]
    values = 7 * row + 13 * (channel + 1) * col + 29 * (row // 16) * (col // 16) + 53 * channel + 97 * seed
    return (values % 256).to(torch.uint8)[None]


def golden_logits(model: SegmentationModel, seed: int = 0, size: tuple[int, int] = SIZE) -> Tensor:
    """The logits [num_classes, h, w] of a network, in eval mode, for the golden image."""
    image = golden_image(seed, size, model.in_channels).to(model.mean.device)
    with torch.inference_mode():
        return model(model.preprocess(image))[0].float().cpu()


def golden_of(model: SegmentationModel, seed: int = 0, size: tuple[int, int] = SIZE) -> Golden:
    """The golden answer of a network: some logits, spread evenly, and its labels at the logits' resolution.

    Raises:
        ValueError: The network gives infinities or NaN.
    """
    logits = golden_logits(model, seed, size)
    if not logits.isfinite().all():
        raise ValueError("the network must give finite logits; it gives infinities or NaN.")
    return Golden(
        seed=seed,
        size=size,
        logits=tuple(float(f"{value:.8g}") for value in _chosen(logits, LOGITS).tolist()),
        tolerance=TOLERANCE,
        labels=tuple(" ".join(map(str, row)) for row in logits.argmax(dim=0).tolist()),
        agreement=AGREEMENT,
    )


def check_golden(model: SegmentationModel, golden: Golden) -> float:
    """Checks a network's answer against the golden one, up to rounding.

    Args:
        model: The network, in eval mode.
        golden: What it answered when it was published.

    Returns:
        The largest difference of the compared logits over the largest of them.

    Raises:
        ValueError: It answers something else; the message says how far off.
    """
    logits = golden_logits(model, golden.seed, golden.size)
    labels = torch.tensor([[int(label) for label in row.split()] for row in golden.labels])
    if labels.shape != logits.shape[1:]:
        raise ValueError(f"golden labels are {list(labels.shape)}, the network's {list(logits.shape[1:])}.")
    expected = torch.tensor(golden.logits)
    difference = (_chosen(logits, len(expected)) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    agreement = (logits.argmax(dim=0) == labels).float().mean()
    # Written so that NaN fails too.
    if not (difference <= golden.tolerance and agreement >= golden.agreement):
        raise ValueError(
            f"the network does not give its golden output: logits differ by {difference:.1e} of the largest "
            f"(allowed {golden.tolerance:.1e}), labels agree in {agreement:.1%} (needed {golden.agreement:.1%})."
        )
    return float(difference)


def _chosen(logits: Tensor, number: int) -> Tensor:
    places = [index * (logits.numel() - 1) // max(number - 1, 1) for index in range(number)]
    return logits.flatten()[places]

"""Which input pixels one output pixel depends on: Figure 5 of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor, nn

from icnn_zoo.nn.modules import evaluating

Pixel = tuple[int, int]


def input_gradient(
    network: nn.Module, image: Tensor, pixels: Sequence[Pixel], class_indices: Sequence[int | None] | None = None
) -> Tensor:
    """Derivatives of output pixels with respect to the input image.

    The output is what the network says at image size: scores of a lower resolution are interpolated as the network
    does it, so a pixel has the same coordinates in image and output.

    Args:
        network: Takes images [B, C, H, W] and gives scores [B, classes, H', W']. It runs in eval mode, as batch
            statistics would tie every pixel to every other; its mode is put back.
        image: Image [C, H, W], in the range that the network takes (0 to 255 for a SegmentationTask).
        pixels: P output pixels (row, col).
        class_indices: For each pixel the class whose score is derived; None, for one or for all, sums over classes.

    Returns:
        Derivatives [P, 3, H, W], float32, computed in the network's own precision. Positions of the irregular layers
        are held as they are.

    Raises:
        ValueError: A pixel outside the image, a class that the network does not have, another number of classes than
            of pixels, or an image of another shape.

    Example:
        >>> import torch
        >>> from icnn_zoo.analysis import input_gradient
        >>> network = torch.nn.Conv2d(3, 2, 3, padding=1, bias=False)
        >>> gradient = input_gradient(network, torch.rand(3, 9, 9), [(4, 5)], [1])
        >>> bool((gradient[0, :, 3:6, 4:7] == network.weight[1]).all())
        True
    """
    if image.ndim != 3:
        raise ValueError(f"`image` must be one image [3, H, W]; got the shape {list(image.shape)}.")
    for pixel in pixels:
        check_pixel(pixel, image.shape[-2:])
    if class_indices is not None and len(class_indices) != len(pixels):
        raise ValueError(f"`class_indices` must be one for each of {len(pixels)} pixels; got {len(class_indices)}.")
    like = next((parameter for parameter in network.parameters() if parameter.is_floating_point()), image.float())
    # Also where the caller has turned gradients off, as Lightning does around validation.
    with evaluating(network), torch.inference_mode(False), torch.enable_grad():
        images = image.detach().to(like).repeat(len(pixels), 1, 1, 1).requires_grad_()
        scores = image_scores(network, images)
        total = scores.new_zeros(())
        for index, (row, col) in enumerate(pixels):
            chosen = None if class_indices is None else class_indices[index]
            if chosen is not None and not 0 <= chosen < scores.shape[1]:
                raise ValueError(f"`class_indices` must be from 0 to {scores.shape[1] - 1}; got {chosen}.")
            at_pixel = scores[index, :, row, col]
            total = total + (at_pixel.sum() if chosen is None else at_pixel[chosen])
        if not total.requires_grad:  # of no pixel, or of a network that does not look at its input
            return torch.zeros_like(images, dtype=torch.float32, requires_grad=False)
        # Images of a batch do not see each other in eval mode, so one backward serves all pixels.
        (gradient,) = torch.autograd.grad(total, images, materialize_grads=True)
    return gradient.detach().float()


def heatmap(
    network: nn.Module, image: Tensor, pixels: Sequence[Pixel], class_indices: Sequence[int | None] | None = None
) -> Tensor:
    """How much every input pixel counts for output pixels: absolute derivatives, summed over the colors.

    Args:
        network: See :func:`input_gradient`, as for the other arguments.
        image: Image [C, H, W].
        pixels: P output pixels (row, col).
        class_indices: For each pixel the class, None for the sum over classes.

    Returns:
        Heatmaps [P, H, W], float32, at least 0; exactly 0 where the output does not depend on the input.

    Raises:
        ValueError: See :func:`input_gradient`.
    """
    return input_gradient(network, image, pixels, class_indices).abs().sum(dim=1)


def image_scores(network: nn.Module, images: Tensor) -> Tensor:
    """Scores of a network at image size [B, classes, H, W], by its own ``full_logits`` if it has one."""
    full_logits: Any = getattr(getattr(network, "model", network), "full_logits", None)
    if full_logits is not None:
        return full_logits(images, network)
    scores = network(images)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if scores.shape[-2:] == images.shape[-2:]:
        return scores
    return F.interpolate(scores, size=images.shape[-2:], mode="bilinear", align_corners=False)


def check_pixel(pixel: Sequence[int], size: Sequence[int]) -> None:
    """Checks that a pixel (row, col) lies in an image of a size (H, W).

    Raises:
        ValueError: It does not; the message has the nearest one that does.
    """
    if all(0 <= place < extent for place, extent in zip(pixel, size, strict=True)):
        return
    nearest = [min(max(place, 0), extent - 1) for place, extent in zip(pixel, size, strict=True)]
    raise ValueError(
        f"`pixel` must be a (row, col) inside the image of {size[0]} rows and {size[1]} columns; got "
        f"{tuple(pixel)}. The nearest inside is {tuple(nearest)}."
    )


def plot_heatmaps(
    image: np.ndarray, maps: Mapping[str, np.ndarray | Tensor], pixel: Pixel, *, smoothing: float | None = None
) -> Figure:
    """Lays heatmaps of one output pixel over the image, one panel per network (Figure 5 of the paper).

    Every map is divided by its own sum, so that networks whose scores differ in scale can be compared, and all panels
    share one color scale, which ends at the highest 0.5 % of pixels.

    Args:
        image: RGB image uint8 [H, W, 3].
        maps: For each panel its title and the heatmap [H, W] of :func:`heatmap`.
        pixel: The output pixel (row, col), marked by a cross in a ring.
        smoothing: Standard deviation in pixels of a Gaussian blur of what is drawn, as networks that step over pixels
            give speckled gradients; None for 1 % of the shorter side, 0 for none.

    Returns:
        A figure with the image, one overlay per map and a color bar, apart from pyplot.

    Raises:
        ValueError: A pixel outside the image, no map, or one of another size or with values that are not finite.
    """
    check_pixel(pixel, image.shape[:2])
    if not maps:
        raise ValueError("`maps` must hold at least one heatmap; got none.")
    height, width = image.shape[:2]
    sigma = min(height, width) / 100 if smoothing is None else smoothing
    shares = {name: _share(_checked(name, values, (height, width)), sigma) for name, values in maps.items()}
    # A map that is zero almost everywhere has its quantile at zero.
    top = max(float(np.quantile(share, 0.995)) or float(share.max()) for share in shares.values()) or 1.0
    side = 3.3
    # A panel is at most four times as high as wide: that of a strip of 1 x 3000 pixels would be 250 meters high.
    size = side * (1 + len(shares)) + 0.7, side * min(height / width, 4) + 0.45
    figure = Figure(figsize=size, layout="constrained")
    panels = [figure.add_subplot(1, 1 + len(shares), index + 1) for index in range(1 + len(shares))]
    panels[0].imshow(image)
    panels[0].set_title("image", fontsize=9)
    # The image stays recognizable in gray below, and color means gradient only.
    gray = image.astype(np.float64) @ (0.299, 0.587, 0.114) / 255
    for axes, (name, share) in zip(panels[1:], shares.items(), strict=True):
        strength = np.clip(share / top, 0, 1)
        axes.imshow(0.15 + 0.6 * gray, cmap="gray", vmin=0, vmax=1)
        drawn = axes.imshow(strength, cmap="inferno", vmin=0, vmax=1, alpha=np.clip(2 * strength, 0, 0.92))
        axes.set_title(name, fontsize=9)
    for axes in panels:
        _mark(axes, pixel)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
    bar = figure.colorbar(drawn, ax=panels[-1], shrink=0.9, pad=0.03)
    bar.set_ticks([0.0, 0.5, 1.0], labels=["0", f"{0.5 * top:.0e}", f"{top:.0e}"])
    bar.ax.tick_params(labelsize=6.5)
    bar.set_label("share of the gradient per pixel", fontsize=7)
    return figure


def _checked(name: str, values: np.ndarray | Tensor, size: tuple[int, int]) -> np.ndarray:
    array: np.ndarray = torch.as_tensor(values).detach().cpu().double().numpy()
    if array.shape != size:
        raise ValueError(f"`maps`: {name!r} must have the image's size {list(size)}; got {list(array.shape)}.")
    if not np.isfinite(array).all():
        raise ValueError(f"`maps`: {name!r} has values that are not finite: are the network's weights finite?")
    return array


def _share(values: np.ndarray, smoothing: float) -> np.ndarray:
    blurred: np.ndarray = cv2.GaussianBlur(values, (0, 0), smoothing) if smoothing > 0 else values
    return blurred / (blurred.sum() or 1.0)


def _mark(axes: Any, pixel: Pixel) -> None:
    outline = [withStroke(linewidth=3, foreground="black")]  # to be seen on any image
    for marker, size in (("o", 11), ("+", 7)):
        axes.plot(
            pixel[1], pixel[0], marker, ms=size, mfc="none", mec="#7df9ff", mew=1.3, path_effects=outline, label="pixel"
        )

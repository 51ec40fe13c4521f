"""The effective receptive field: how far a network looks in fact, averaged over images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from icnn_zoo.analysis.colors import INK
from icnn_zoo.analysis.heatmaps import Pixel, check_pixel, heatmap

_LINE_COLORS = ("#2f6fde", "#d9541e", "#188a58", "#8a4fc4")


@dataclass(frozen=True)
class ReceptiveField:
    """Where the gradient of an output pixel lies, averaged over images.

    Attributes:
        shares: Share of the gradient [2R + 1, 2C + 1] at every offset (row, col) from the output pixel, which is in
            the middle; sums to 1.
        num_images: Images it was averaged over.
    """

    shares: np.ndarray
    num_images: int

    def radius(self, share: float) -> float:
        """Radius in input pixels of the disk around the output pixel that holds a share of the gradient.

        Args:
            share: From 0 to 1, such as 0.5.

        Raises:
            ValueError: ``share`` is out of its range.
        """
        if not 0 < share <= 1:
            raise ValueError(f"`share` must be above 0 and at most 1; got {share}.")
        distance, cumulated = self._by_distance()
        return float(distance[min(int(np.searchsorted(cumulated, share - 1e-9)), len(distance) - 1)])

    def share_within(self, radius: float) -> float:
        """Share of the gradient in the disk of a radius in input pixels."""
        distance, cumulated = self._by_distance()
        inside = int(np.searchsorted(distance, radius, side="right"))
        return float(cumulated[inside - 1]) if inside else 0.0

    def summary(self) -> dict[str, float]:
        """Radii in pixels that hold 50, 90 and 95 % of the gradient, and the root mean square distance."""
        distance = _distances(self.shares.shape)
        result = {f"radius_{share}": self.radius(share / 100) for share in (50, 90, 95)}
        return result | {"rms": float(np.sqrt((self.shares * distance**2).sum()))}

    def _by_distance(self) -> tuple[np.ndarray, np.ndarray]:
        distance = _distances(self.shares.shape).ravel()
        order = distance.argsort(kind="stable")
        return distance[order], self.shares.ravel()[order].cumsum()


def effective_receptive_field(
    network: nn.Module, images: Iterable[Tensor], *, pixel: Pixel | None = None, class_index: int | None = None
) -> ReceptiveField:
    """Averages the heatmap of one output pixel over images (Luo et al., 2016, on arXiv 1701.04128).

    Every image counts the same: its heatmap is divided by its sum. Images may differ in size; what lies beyond one
    counts as 0, so use images larger than what the network looks at.

    Args:
        network: See :func:`icnn_zoo.analysis.input_gradient`.
        images: Images [C, H, W] in the range that the network takes.
        pixel: The output pixel (row, col), None for the middle of each image.
        class_index: The class whose score is derived, None for the sum over classes.

    Returns:
        The averaged field around the pixel.

    Raises:
        ValueError: No image, a pixel outside an image, or an output that depends on no pixel of an image, or not
            finitely.

    Example:
        >>> import torch
        >>> from icnn_zoo.analysis import effective_receptive_field
        >>> network = torch.nn.Conv2d(3, 2, 5, padding=2, bias=False)
        >>> _ = torch.nn.init.ones_(network.weight)
        >>> effective_receptive_field(network, [torch.rand(3, 21, 21)]).radius(1.0) == 8**0.5  # to a 5x5 box's corner
        True
    """
    total, number = np.zeros((1, 1)), 0
    for image in images:
        height, width = image.shape[-2:]
        row, col = (height // 2, width // 2) if pixel is None else pixel
        check_pixel((row, col), (height, width))
        values = heatmap(network, image, [(row, col)], [class_index])[0].cpu().double().numpy()
        if not 0 < values.sum() < np.inf:
            raise ValueError(
                f"the output at pixel {(row, col)} does not depend on the image, or not finitely: its absolute "
                f"gradient sums to {values.sum():g}. Take another pixel or class, or a network whose weights are "
                "finite and not all 0."
            )
        # As far to either side as the image goes, but rows and columns apart: a square of a strip would be huge.
        rows, cols = max(row, height - 1 - row), max(col, width - 1 - col)
        canvas = np.zeros((2 * rows + 1, 2 * cols + 1))
        canvas[rows - row : rows - row + height, cols - col : cols - col + width] = values / values.sum()
        total, number = _add(total, canvas), number + 1
    if not number:
        raise ValueError("`images` must hold at least one image; got none.")
    return ReceptiveField(total / number, number)


def plot_receptive_fields(fields: Mapping[str, ReceptiveField]) -> Figure:
    """Compares effective receptive fields: a map for each, and how much of the gradient lies within which radius.

    Args:
        fields: For each network its name and its field.

    Returns:
        A figure, apart from pyplot: maps with circles that hold 50 and 90 % of the gradient, on one color scale, and
        one panel of curves.

    Raises:
        ValueError: There is no field.
    """
    if not fields:
        raise ValueError("`fields` must hold at least one receptive field; got none.")
    number = len(fields)
    figure = Figure(figsize=(3.2 * number + 3.6, 3.3), layout="constrained")
    reach = max(_reach(field) for field in fields.values())
    top = max(float(np.quantile(field.shares[field.shares > 0], 0.995)) for field in fields.values())
    for index, (name, field) in enumerate(fields.items()):
        axes = figure.add_subplot(1, number + 1, index + 1)
        rows, cols = (side / 2 for side in field.shares.shape)
        extent = (-cols, cols, rows, -rows)
        axes.set_facecolor("black")
        axes.imshow(np.sqrt(field.shares / top), cmap="inferno", vmin=0, vmax=1, extent=extent)
        for share, style in ((0.5, "-"), (0.9, "--")):
            radius = field.radius(share)
            angle = np.linspace(0, 2 * np.pi, 181)
            label = f"{share:.0%}: {radius:.1f} px"
            axes.plot(radius * np.cos(angle), radius * np.sin(angle), style, color="#7df9ff", lw=1.2, label=label)
        axes.set(xlim=(-reach, reach), ylim=(reach, -reach), aspect="equal")
        axes.set_xlabel("column (px)", fontsize=8)
        axes.set_ylabel("row (px)", fontsize=8)
        axes.set_title(f"{name}, {field.num_images} images" if field.num_images > 1 else name, fontsize=9)
        axes.legend(fontsize=7, loc="upper right", framealpha=0.85)
        axes.tick_params(labelsize=7)
    axes = figure.add_subplot(1, number + 1, number + 1)
    for color, (name, field) in zip(_LINE_COLORS * number, fields.items(), strict=False):
        radii = np.linspace(0, reach, 100)
        axes.plot(radii, [field.share_within(radius) for radius in radii], color=color, label=name)
    axes.set(ylim=(0, 1.02), xlim=(0, reach))
    axes.set_xlabel("radius (px)", fontsize=8)
    axes.set_ylabel("share of the gradient within", fontsize=8)
    axes.legend(fontsize=7, loc="lower right")
    axes.grid(True, color="#e9ecef")
    axes.tick_params(labelsize=7, color=INK)
    return figure


def _reach(field: ReceptiveField) -> float:
    return min(1.15 * field.radius(0.98) + 1, max(field.shares.shape) / 2)


def _distances(shape: tuple[int, ...]) -> np.ndarray:
    """Distances [rows, cols] from the middle of an array of odd sides."""
    rows, cols = (np.arange(side) - side // 2 for side in shape)
    return np.hypot(rows[:, None], cols)


def _add(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The sum of two arrays of odd sides, middle on middle."""
    shape = np.maximum(first.shape, second.shape)
    total = np.zeros(shape)
    for part in (first, second):
        top, left = (shape - part.shape) // 2
        total[top : top + part.shape[0], left : left + part.shape[1]] += part
    return total

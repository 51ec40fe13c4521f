"""Figures of kernel shapes: Figure 4 of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from icnn_zoo.analysis.colors import INK, tap_colors
from icnn_zoo.analysis.kernel_shapes import LayerShapes, layer_shapes
from icnn_zoo.analysis.statistics import principal_axes, tap_covariances

MOST_POINTS = 20_000  # in one panel; more only make it slow, as they lie on top of each other
_PANEL_INCHES = 3.2


def plot_shapes(model: nn.Module, layers: Sequence[str] | None = None) -> Figure:
    """Draws the learned positions of every irregular layer, seen along the channels (Figure 4, left, of the paper).

    Every point is a tap of one shape, colored by its place in the regular kernel. Crosses mark the regular grid, the
    dashed box its receptive field, ellipses two standard deviations of each cloud around its mean; dotted are the mean
    spreads of triangle and gaussian taps, as radii. Few far taps lie outside the panel and are counted in its corner.
    Points are fewer and fainter where there are many shapes; means, ellipses and that count are always those of all
    shapes. Free taps have no clouds: their box is the extent, and spreads are those of some shapes.

    Args:
        model: A network with irregular layers, or one such layer.
        layers: Names of the layers, in full or a unique ending; None for all.

    Returns:
        A figure with one panel per layer, apart from pyplot: ``figure.savefig("shapes.svg")`` writes it.

    Raises:
        ValueError: See :func:`icnn_zoo.analysis.layer_shapes`.

    Example:
        >>> import icnn_zoo
        >>> from icnn_zoo.analysis import plot_shapes
        >>> figure = plot_shapes(icnn_zoo.IrregularConv2d(8, 16, 3))
        >>> figure.axes[0].get_xlabel()
        'column (px)'
    """
    return draw_shapes(layer_shapes(model, layers))


def plot_shapes_3d(model: nn.Module, layers: Sequence[str] | None = None) -> Figure:
    """Draws the learned positions over row, column and channel (Figure 4, right, of the paper).

    Thin lines are the regular grid, one per tap through all channels. In the full version the upright axis counts
    kernels times channels.

    Args:
        model: A network with irregular layers, or one such layer.
        layers: Names of the layers, in full or a unique ending; None for all.

    Returns:
        A figure with one panel per layer, apart from pyplot.

    Raises:
        ValueError: See :func:`icnn_zoo.analysis.layer_shapes`.
    """
    all_shapes = layer_shapes(model, layers)
    figure, panels = _panels(len(all_shapes), projection="3d")
    for axes, shapes in zip(panels, all_shapes, strict=True):
        _draw_in_space(axes, shapes)
    return figure


def draw_shapes(
    all_shapes: Sequence[LayerShapes], title: str | None = None, reaches: Sequence[float] | None = None
) -> Figure:
    """What :func:`plot_shapes` does, for shapes at hand; ``reaches`` fixes the panels' limits, see :func:`reach`."""
    figure, panels = _panels(len(all_shapes))
    for index, (axes, shapes) in enumerate(zip(panels, all_shapes, strict=True)):
        draw_layer(axes, shapes, reach(shapes) if reaches is None else reaches[index])
    if title:
        figure.suptitle(title, fontsize=11, color=INK)
    return figure


def reach(shapes: LayerShapes) -> float:
    """Half the side of a panel in pixels: holds the regular kernel, and all but one in 200 of the learned positions."""
    # Not between two taps, as of few taps a single far one would be more than one in 200.
    learned = float(np.quantile(abs(shapes.positions).max(axis=-1), 0.995, method="higher"))
    return max(float(abs(np.stack(shapes.box)).max()) + 0.3, 1.05 * learned)


def _panels(number: int, **kwargs: Any) -> tuple[Figure, list[Any]]:
    cols = min(number, 3 if number != 4 else 2)
    rows = -(-number // cols)
    figure = Figure(figsize=(_PANEL_INCHES * cols, (_PANEL_INCHES + 0.15) * rows), layout="constrained")
    panels = [figure.add_subplot(rows, cols, index + 1, **kwargs) for index in range(number)]
    return figure, panels


def draw_layer(axes: Axes, shapes: LayerShapes, half: float) -> None:
    """One panel of :func:`plot_shapes`; ``half`` is half its side in pixels, see :func:`reach`."""
    num_shapes, taps = shapes.positions.shape[:2]
    colors = tap_colors(shapes.kernel_size, taps)
    shown = shapes.thinned(max(1, MOST_POINTS // taps))
    # Shape after shape, so that no tap's cloud covers its neighbors'.
    points = shown.positions.reshape(-1, 2)
    axes.scatter(
        points[:, 1],
        points[:, 0],
        s=np.clip(1500 / len(shown.positions), 2.5, 16),
        c=np.tile(colors, (len(shown.positions), 1)),
        alpha=float(np.clip(7 / np.sqrt(len(shown.positions)), 0.12, 0.8)),
        linewidths=0,
        rasterized=True,  # an SVG of thousands of points would be slow to open
        label="taps",
    )
    least, greatest = shapes.box
    height, width = greatest - least
    axes.add_patch(Rectangle((least[1], least[0]), width, height, fill=False, ls="--", lw=0.8, ec=INK, alpha=0.7))
    rows, cols = np.unique(shapes.grid, axis=0).T
    axes.scatter(cols, rows, marker="+", s=36, c="black", linewidths=0.9, label="regular grid")
    if num_shapes > 1 and not shapes.has_free_taps:
        axes.add_collection(_ellipses(axes, shapes, colors))
    if shapes.spread is not None:
        axes.add_collection(_spreads(axes, shapes, colors))
    axes.set(xlim=(-half, half), ylim=(half, -half), aspect="equal", xlabel="column (px)", ylabel="row (px)")
    axes.set_title(_title(shapes, len(shown.positions)), fontsize=8)
    away = int((abs(shapes.positions) > half).any(axis=-1).sum())
    if away:
        text = axes.text(0.985, 0.015, f"{away} farther away", transform=axes.transAxes, ha="right", va="bottom")
        text.set(fontsize=6.5, color=INK, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})
    _quiet(axes)


def _ellipses(axes: Axes, shapes: LayerShapes, colors: np.ndarray) -> EllipseCollection:
    lengths, widths, angles = np.transpose([principal_axes(matrix) for matrix in tap_covariances(shapes)])
    means = shapes.positions.mean(axis=0)
    return EllipseCollection(
        4 * lengths,
        4 * widths,
        angles,
        units="xy",
        offsets=means[:, ::-1],
        offset_transform=axes.transData,
        facecolors="none",
        edgecolors=0.6 * colors,  # darker than the points they lie on
        linewidths=1.0,
        label="two standard deviations",
    )


def _spreads(axes: Axes, shapes: LayerShapes, colors: np.ndarray) -> EllipseCollection:
    taps, centers, radii = shapes.spread_circles()
    return EllipseCollection(
        2 * radii[:, 1],
        2 * radii[:, 0],
        np.zeros(len(taps)),
        units="xy",
        offsets=centers[:, ::-1],
        offset_transform=axes.transData,
        facecolors="none",
        edgecolors=0.8 * colors[taps],
        linewidths=1.0,
        linestyles="dotted",
        label="spread",
    )


def _draw_in_space(axes: Any, shapes: LayerShapes) -> None:
    num_shapes, taps = shapes.positions.shape[:2]
    colors = tap_colors(shapes.kernel_size, taps)
    shown = shapes.thinned(max(1, MOST_POINTS // 2 // taps))
    places = np.linspace(0, num_shapes - 1, len(shown.positions))
    points = shown.positions.reshape(-1, 2)
    axes.scatter(
        points[:, 1],
        points[:, 0],
        np.repeat(places, taps),
        s=np.clip(1000 / len(places), 1.5, 9),
        c=np.tile(colors, (len(places), 1)),
        alpha=float(np.clip(7 / np.sqrt(len(places)), 0.15, 0.8)),
        linewidths=0,
        rasterized=True,
        depthshade=False,
    )
    for row, col in np.unique(shapes.grid, axis=0):
        axes.plot([col, col], [row, row], [0, max(1, num_shapes - 1)], color=INK, lw=0.7, alpha=0.8)
    half = reach(shapes)
    axes.set(xlim=(-half, half), ylim=(half, -half), zlim=(0, max(1, num_shapes - 1)))
    axes.set_xlabel("column (px)", fontsize=7, labelpad=-4)
    axes.set_ylabel("row (px)", fontsize=7, labelpad=-4)
    axes.set_zlabel("channel", fontsize=7, labelpad=-4)
    axes.set_title(_title(shapes, len(places)), fontsize=8, pad=0)
    axes.tick_params(labelsize=6, pad=-2)
    axes.set_box_aspect((1, 1, 1.25), zoom=0.88)
    axes.view_init(elev=22, azim=-62)


def _title(shapes: LayerShapes, drawn: int) -> str:
    name = shapes.name.removeprefix("model.").removeprefix("backbone.")
    count = f"{shapes.total} shapes" if shapes.total != 1 else "1 shape"
    if drawn < shapes.total:
        count += f", {drawn} drawn"
    return f"{name}\n{count}" if name else count


def _quiet(axes: Axes) -> None:
    """Leaves only what tells something."""
    axes.tick_params(labelsize=7, length=2, color=INK)
    axes.xaxis.label.set_fontsize(7)
    axes.yaxis.label.set_fontsize(7)
    for spine in axes.spines.values():
        spine.set_color("#c5ccd3")
    axes.grid(True, color="#e9ecef", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.locator_params(integer=True, nbins=7)

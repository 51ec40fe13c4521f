"""Numbers that say what learned shapes look like, so that the paper's two statements can be checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text
from scipy.stats import spearmanr
from torch import nn

from icnn_zoo.analysis.displacement import dead_taps
from icnn_zoo.analysis.kernel_shapes import LayerShapes, layer_shapes
from icnn_zoo.analysis.signal import SignalShare, signal_shares
from icnn_zoo.nn.irregular_conv import IrregularConv2d, irregular_layers

COLUMNS = (
    "kernel",
    "shapes",
    "center shift",
    "length",
    "width",
    "anisotropy",
    "elongation",
    "outside",
    "dead",
    "signal",
)


@dataclass(frozen=True)
class ShapeStatistics:
    """How the shapes of one layer lie. Lengths are in pixels of the layer's input.

    A *cloud* is where one tap lies in all shapes of the layer; Figure 4 of the paper draws one color per cloud.

    Attributes:
        name: Dotted name of the layer.
        kernel_size: Taps (rows, columns).
        num_shapes: Number of shapes.
        tap_mean: Mean displacement of every tap [T, 2], (row, col): how far a cloud's center is from its regular place.
        tap_covariance: Covariance of every tap's displacement [T, 2, 2]: how a cloud spreads.
        center_shift: Length of ``tap_mean``, averaged over the taps. The paper: centers stay.
        length: Standard deviation of a cloud along its own longer axis, averaged over the taps.
        width: The same along the shorter axis.
        anisotropy: ``length`` over ``width``, None where the width is 0. Round clouds of S shapes have about
            1 + 1.25 / sqrt(S) for hundreds of shapes, more for fewer: chance makes one of their axes the longer one.
        angle: Direction of the longer axis of all clouds together in degrees, 0 along the columns, 90 along the rows,
            in (-90, 90].
        elongation: How much longer than wide a single shape is: the ratio of the standard deviations of its taps along
            its own two axes, averaged over the shapes; 1 for a regular square kernel, None for kernels of one row or
            column. The paper: deeper layers grow longer and narrower.
        regular_elongation: The elongation of the regular grid.
        outside: Share of the taps that lie, rounded to whole pixels, outside the regular kernel's box, or the extent.
        dead: Share of the taps that read nothing but zeros, None if the input's size was not given.
        signal: Share of the squared displacement that other trainings from the same weights have in common with this
            one, None if none were given.
    """

    name: str
    kernel_size: tuple[int, int]
    num_shapes: int
    tap_mean: list[list[float]]
    tap_covariance: list[list[list[float]]]
    center_shift: float
    length: float
    width: float
    anisotropy: float | None
    angle: float
    elongation: float | None
    regular_elongation: float | None
    outside: float
    dead: float | None
    signal: SignalShare | None = None

    @property
    def short_name(self) -> str:
        """The name without "model." and "backbone.", "layer" for a layer by itself."""
        return self.name.removeprefix("model.").removeprefix("backbone.") or "layer"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that JSON can hold."""
        return asdict(self)


def shape_statistics(
    model: nn.Module,
    input_sizes: Mapping[str, tuple[int, int]] | None = None,
    layers: Sequence[str] | None = None,
    repeats: Sequence[nn.Module] = (),
    start: nn.Module | None = None,
) -> list[ShapeStatistics]:
    """Describes the shapes of every irregular layer by numbers.

    Args:
        model: A network with irregular layers, or one such layer.
        input_sizes: Size (H, W) of each layer's input, see :class:`icnn_zoo.analysis.InputSizes`; without it dead taps
            are not counted.
        layers: Names of the layers, None for all.
        repeats: Other trainings of the network, which began with the same weights and saw other data: they tell how
            much of the displacement is signal, see :func:`icnn_zoo.analysis.signal_share`.
        start: What they began with, where that was not ``epsilon`` everywhere; see
            :func:`icnn_zoo.analysis.signal_shares`.

    Returns:
        One entry per layer, in the order of registration.

    Raises:
        ValueError: See :func:`icnn_zoo.analysis.layer_shapes` and :func:`icnn_zoo.analysis.signal_shares`.

    Example:
        >>> import torch, icnn_zoo
        >>> from icnn_zoo.analysis import shape_statistics
        >>> layer = icnn_zoo.IrregularConv2d(64, 8, 3)
        >>> _ = torch.nn.init.normal_(layer.displacement[..., 1].detach(), std=0.5)  # along the columns only
        >>> statistics = shape_statistics(layer)[0]
        >>> round(statistics.length, 1), round(statistics.width, 1), round(statistics.angle)
        (0.5, 0.0, 0)
    """
    sizes = input_sizes or {}
    modules = {"": model} if isinstance(model, IrregularConv2d) else irregular_layers(model)
    signals = signal_shares([model, *repeats], start=start) if repeats else {}
    result = []
    for shapes in layer_shapes(model, layers):
        size = sizes.get(shapes.name)
        dead = None if size is None else float(dead_taps(modules[shapes.name], size).float().mean())
        result.append(describe(shapes, dead, signals.get(shapes.name)))
    return result


def describe(shapes: LayerShapes, dead: float | None = None, signal: SignalShare | None = None) -> ShapeStatistics:
    """The statistics of one layer's shapes; what needs more than the shapes is given."""
    displacement = shapes.displacement
    mean = displacement.mean(axis=0)
    covariance = tap_covariances(shapes)
    length, width = np.mean([principal_axes(matrix)[:2] for matrix in covariance], axis=0).tolist()
    least, greatest = shapes.box
    outside = ((shapes.positions < least) | (shapes.positions > greatest)).any(axis=-1)
    return ShapeStatistics(
        name=shapes.name,
        kernel_size=shapes.kernel_size,
        num_shapes=len(displacement),
        tap_mean=mean.tolist(),
        tap_covariance=covariance.tolist(),
        center_shift=float(np.linalg.norm(mean, axis=-1).mean()),
        length=length,
        width=width,
        anisotropy=length / width if width > 1e-9 else None,
        angle=principal_axes(covariance.mean(axis=0))[2],
        elongation=_elongation(shapes.positions) if min(shapes.kernel_size) > 1 else None,
        regular_elongation=_elongation(shapes.grid[None]),
        outside=float(outside.mean()),
        dead=dead,
        signal=signal,
    )


def tap_covariances(shapes: LayerShapes) -> np.ndarray:
    """Covariance of every tap's displacement over the shapes [T, 2, 2], zero for a layer of one shape."""
    centered = shapes.displacement - shapes.displacement.mean(axis=0)
    covariance: np.ndarray = np.einsum("sti,stj->tij", centered, centered) / max(1, len(centered) - 1)
    return covariance


def principal_axes(covariance: np.ndarray) -> tuple[float, float, float]:
    """Standard deviations along both axes of a covariance [2, 2] of (row, col), and the longer one's angle in degrees.

    The angle counts from the columns' direction towards growing rows, which on a picture is clockwise.
    """
    variances, axes = np.linalg.eigh(covariance)
    length, width = math.sqrt(max(0.0, variances[1])), math.sqrt(max(0.0, variances[0]))
    row, col = axes[:, 1]
    angle = math.degrees(math.atan2(row, col))
    return length, width, angle - 180 if angle > 90 else angle + 180 if angle <= -90 else angle


def _elongation(positions: np.ndarray) -> float | None:
    """Longer over shorter standard deviation of each shape's own taps, averaged over shapes [S, T, 2]."""
    centered = positions - positions.mean(axis=1, keepdims=True)
    variances = np.linalg.eigvalsh(np.einsum("sti,stj->sij", centered, centered))
    if (variances[:, 0] <= 1e-9 * np.maximum(variances[:, 1], 1e-9)).any():
        return None
    return float(np.sqrt(variances[:, 1] / variances[:, 0]).mean())


def depth_trends(statistics: Sequence[ShapeStatistics]) -> dict[str, float | None]:
    """Holds the paper's two statements (section 4.3, Figure 4) against the numbers.

    Args:
        statistics: Those of all layers, from shallow to deep.

    Returns:
        "center_shift_over_length", the greatest over all layers: well below 1 if centers stay. "length" and
        "anisotropy", the rank correlation (Spearman) of a layer's depth with that statistic: above 0 if clouds grow
        longer, and narrower for their length, with depth; likewise "elongation". None for fewer than three layers.
    """
    shifts = [entry.center_shift / entry.length for entry in statistics if entry.length > 0]
    trends: dict[str, float | None] = {"center_shift_over_length": max(shifts) if shifts else None}
    for key in ("length", "anisotropy", "elongation"):
        values = [value for entry in statistics if (value := getattr(entry, key)) is not None]
        trends[key] = _rank_correlation(values) if len(values) >= 3 else None
    return trends


def _rank_correlation(values: Sequence[float]) -> float:
    """Spearman's correlation of the values with their place; 0 where all values are equal."""
    if np.ptp(values) == 0:
        return 0.0
    return float(spearmanr(np.arange(len(values)), values).statistic)


def statistics_table(statistics: Sequence[ShapeStatistics]) -> Table:
    """The statistics as a table for the terminal, one row per layer."""
    table = Table(title="Shapes, in pixels of each layer's input", title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("layer", no_wrap=True)
    known = known_columns(statistics)
    for column in known:
        heading = {"anisotropy": "aniso-\ntropy", "elongation": "elon-\ngation"}.get(column, column)  # fits 80 columns
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    for entry in statistics:
        table.add_row(Text(entry.short_name), *(cells(entry)[column] for column in known))
    return table


def known_columns(statistics: Sequence[ShapeStatistics]) -> list[str]:
    """The columns after the name, without those that need more than the shapes where that was not given."""
    return [
        column
        for column in COLUMNS
        if column not in ("dead", "signal") or any(getattr(entry, column) is not None for entry in statistics)
    ]


def cells(entry: ShapeStatistics) -> dict[str, str]:
    """One layer's numbers as text, by column."""

    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    signal = entry.signal
    values = (
        "x".join(map(str, entry.kernel_size)),
        str(entry.num_shapes),
        f"{entry.center_shift:.3f}",
        f"{entry.length:.3f}",
        f"{entry.width:.3f}",
        text(entry.anisotropy, ".2f"),
        text(entry.elongation, ".2f"),
        f"{entry.outside:.1%}",
        text(entry.dead, ".1%"),
        "-" if signal is None else f"{signal.share:.0%}" if signal.significant else "none",
    )
    return dict(zip(COLUMNS, values, strict=True))

"""Training curves of a run, laid out for drawing as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from icnn_zoo.training.run_metrics import Series, thinned

_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 8, 22
_MOST_POINTS = 300


def curve_pictures(metrics: Mapping[str, Series]) -> list[dict[str, Any]]:
    """The figures of a run, as data for the page: loss, mIoU and displacements, as far as they were logged."""
    layers = {
        name.removeprefix("displacement/mean/").removeprefix("backbone."): series
        for name, series in metrics.items()
        if name.startswith("displacement/mean/")
    }
    figures = [
        ("Training loss", "", {"loss": metrics.get("train/loss", [])}),
        ("Validation mIoU", "", {"mIoU": metrics.get("val/mIoU", [])}),
        ("Mean displacement by layer", "px", layers),
    ]
    return [
        _figure(title, unit, drawn)
        for title, unit, lines in figures
        if (drawn := {name: series for name, series in lines.items() if len(series) > 1})
    ]


def _figure(title: str, unit: str, lines: Mapping[str, Series]) -> dict[str, Any]:
    colors = _depth_colors(len(lines))
    steps = [step for series in lines.values() for step, _ in series]
    values = [value for series in lines.values() for _, value in series]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    low, high = min(0.0, min(values)), max(values)
    ticks = _ticks(low, high)
    high = max(high, ticks[-1], low + 1e-12)

    def x(step: float) -> float:
        return round(_LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    ends = ", ".join(f"{name} from {series[0][1]:.3g} to {series[-1][1]:.3g}" for name, series in lines.items())
    return {
        "caption": f"{title} ({unit})" if unit else title,
        "label": f"{title} over steps {first} to {last}: {ends} {unit}".strip(),
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "ticks": [{"y": y(tick), "text": f"{tick:g}"} for tick in ticks],
        "ends": [
            {"x": x(first), "anchor": "start", "text": f"step {first}"},
            {"x": x(last), "anchor": "end", "text": str(last)},
        ],
        "lines": [
            {
                "points": " ".join(f"{x(step)},{y(value)}" for step, value in thinned(series, _MOST_POINTS)),
                "color": color,
            }
            for color, series in zip(colors, lines.values(), strict=True)
        ],
        "legend": list(zip(colors, lines, strict=True)) if len(lines) > 1 else [],
    }


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from ``low`` to ``high``."""
    if high - low < 1e-30:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    return [round(step * index, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _depth_colors(number: int) -> Sequence[str]:
    """From blue for the shallowest to orange for the deepest, of a lightness for white and for black."""
    if number == 1:
        return ["var(--accent)"]
    return [f"oklch(0.65 0.15 {(255 - 205 * index / (number - 1)) % 360:.0f})" for index in range(number)]

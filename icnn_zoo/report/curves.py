"""Training curves and scores of a run, as SVG and HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from icnn_zoo.training.run_metrics import Series, thinned

_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 8, 22
_MOST_POINTS = 300


def curve_pictures(metrics: Mapping[str, Series]) -> str:
    """The figures of a run: loss, mIoU and displacements, as far as they were logged."""
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
    return "".join(
        _figure(title, unit, drawn)
        for title, unit, lines in figures
        if (drawn := {name: series for name, series in lines.items() if len(series) > 1})
    )


def _figure(title: str, unit: str, lines: Mapping[str, Series]) -> str:
    colors = _depth_colors(len(lines))
    steps = [step for series in lines.values() for step, _ in series]
    values = [value for series in lines.values() for _, value in series]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    low, high = min(0.0, min(values)), max(values)
    ticks = _ticks(low, high)
    high = max(high, ticks[-1], low + 1e-12)

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks:
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick:g}</text>')
    for step, anchor in ((first, "start"), (last, "end")):
        label = f"step {step}" if step == first else str(step)
        parts.append(f'<text x="{x(step):.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{label}</text>')
    for color, series in zip(colors, lines.values(), strict=True):
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in thinned(series, _MOST_POINTS))
        parts.append(f'<polyline points="{points}" stroke="{color}"/>')
    ends = ", ".join(f"{name} from {series[0][1]:.3g} to {series[-1][1]:.3g}" for name, series in lines.items())
    label = escape(f"{title} over steps {first} to {last}: {ends} {unit}".strip(), quote=True)
    keys = ""
    if len(lines) > 1:
        entries = (
            f'<li><i style="background:{color}"></i>{escape(name)}</li>'
            for color, name in zip(colors, lines, strict=True)
        )
        keys = f'<ul class="keys">{"".join(entries)}</ul>'
    caption = escape(f"{title} ({unit})" if unit else title)
    return (
        f'<figure class="curve"><figcaption>{caption}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>{keys}</figure>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from ``low`` to ``high``."""
    if high <= low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    return [round(step * index, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _depth_colors(number: int) -> Sequence[str]:
    """From blue for the shallowest to orange for the deepest, of a lightness for white and for black."""
    if number == 1:
        return ["var(--accent)"]
    return [f"oklch(0.65 0.15 {(255 - 205 * index / (number - 1)) % 360:.0f})" for index in range(number)]

"""Which pixels a coordinate reads, with which weights and slopes: plain numbers, for the reference."""

from __future__ import annotations

import math

from icnn_zoo.ops import interpolation


def bilinear(position: float) -> list[tuple[int, float, tuple[float, ...]]]:
    """List the integers next to a position, with g(position, integer) and its slope.

    The origin is an integer, so the cell and the fraction are those of the position alone; adding first would
    only round.
    """
    cell, fraction = interpolation.split(position)
    read = zip(interpolation.OFFSETS, interpolation.weights(fraction), interpolation.slopes(fraction), strict=True)
    return [(int(cell) + offset, weight, (slope,)) for offset, weight, slope in read]


def wide(kind: str, position: float, spread: float, extent: int | None) -> list[tuple[int, float, tuple[float, ...]]]:
    """List the integers within reach of a position, with their weight and its slopes by position and spread.

    The weight is u(k) / (sum of u over all that are read), so its slopes follow by the rule of quotients.
    """
    reach = spread if kind == "triangle" else 5 * spread
    pixels = [
        k
        for k in range(math.floor(position - reach), math.ceil(position + reach) + 1)
        if -reach < k - position <= reach
    ]
    if extent is not None:
        pixels = [k for k in pixels if 0 <= k + (extent - 1) // 2 < extent]
    raw = []
    for k in pixels:
        distance = k - position
        if kind == "triangle":
            raw.append((spread - abs(distance), 1.0 if distance > 0 else -1.0, 1.0))
        else:
            value = math.exp(-(distance**2) / (2 * spread**2))
            raw.append((value, value * distance / spread**2, value * distance**2 / spread**3))
    total, by_position, by_spread = (sum(column) for column in zip(*raw, strict=True)) if raw else (0.0, 0.0, 0.0)
    if total <= 0:
        return []
    return [
        (k, u / total, ((p - u / total * by_position) / total, (s - u / total * by_spread) / total))
        for k, (u, p, s) in zip(pixels, raw, strict=True)
    ]

"""What a run logged: its metrics.csv."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

Series = list[tuple[int, float]]


def read_metrics(path: Path, last_step: int | None = None) -> dict[str, Series]:
    """Reads what Lightning's CSVLogger wrote: for each metric its (step, value) pairs, finite values only.

    Args:
        path: The file.
        last_step: Leaves out what was logged after this step; None leaves out nothing.
    """
    series: dict[str, Series] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            try:
                step = int(float(row.pop("step")))
            except (KeyError, TypeError, ValueError):
                continue  # a line without a step belongs to no place on the curves
            if last_step is not None and step > last_step:
                continue
            for name, text in row.items():
                try:
                    value = float(text)
                except (TypeError, ValueError):
                    continue  # most cells are empty: every logger call is a line of its own
                if math.isfinite(value):
                    series.setdefault(name, []).append((step, value))
    return series


def thinned(series: Sequence[tuple[int, float]], most: int) -> Series:
    """At most ``most`` points of a curve, evenly chosen, with the first and the last."""
    if len(series) <= most:
        return list(series)
    places = sorted({round(index * (len(series) - 1) / (most - 1)) for index in range(most)})
    return [series[place] for place in places]

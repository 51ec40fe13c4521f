"""The table of an experiment from the results of its runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from icnn_zoo.experiments.catalog import EXPERIMENTS, Experiment
from icnn_zoo.io.files import write_whole

_METRIC_NAMES = {"mIoU": "mIoU", "pixel_accuracy": "accuracy"}
_LEAST_TO_RESAMPLE = 5  # a bootstrap of fewer seeds says nothing


def write_table(name: str, out: Path) -> Path:
    """Writes ``OUT/NAME.md`` and ``OUT/NAME.json`` from the results below ``OUT/NAME``.

    The experiment's metric in per cent, mean and sample standard deviation over the seeds. The gain over the baseline
    row is taken seed by seed, where both have the seed, with a 95 % interval for its mean (Student's t over the seeds).
    The JSON has a bootstrap interval beside it, for 5 seeds or more. Of the paper, only its gains are known here: the
    numbers of single rows are not.

    Returns:
        The Markdown file.
    """
    experiment = EXPERIMENTS[name]
    results = {row: _read(out / name / row) for row in experiment.rows}
    summary: dict[str, Any] = {"title": experiment.title, "paper": {"gain": experiment.paper_gain, "mIoU": None}}
    summary["rows"] = {}
    summary["config"] = next((record["config"] for of_seeds in results.values() for record in of_seeds.values()), None)
    for row, of_seeds in results.items():
        baseline = experiment.rows[row].baseline or experiment.regular
        cells: dict[str, Any] = {
            "start": experiment.rows[row].start,
            "command": experiment.rows[row].command(),
            "baseline": None if row == baseline else baseline,
            "seeds": sorted(of_seeds),
        }
        summary["rows"][row] = cells
        for split in experiment.evaluations:
            key = f"{split}/{experiment.metric}"
            cells[key] = _statistics([100 * of_seeds[seed]["metrics"][key] for seed in sorted(of_seeds)])
            shared = sorted(set(of_seeds) & set(results[baseline])) if row != baseline else []
            gains = [
                100 * (of_seeds[seed]["metrics"][key] - results[baseline][seed]["metrics"][key]) for seed in shared
            ]
            cells[f"{split}/gain"] = _statistics(gains)
        if displacement := _mean_displacement(list(of_seeds.values())):
            cells["displacement"] = displacement
    write_whole(out / f"{name}.json", json.dumps(summary, indent=2) + "\n")
    return write_whole(out / f"{name}.md", _markdown(name, experiment, summary))


def _read(folder: Path) -> dict[int, dict[str, Any]]:
    """The results of a row by seed."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("seed_*/result.json"))]
    return {record["seed"]: record for record in records}


def _markdown(name: str, experiment: Experiment, summary: dict[str, Any]) -> str:
    metric = _METRIC_NAMES[experiment.metric]
    columns = [title for split in experiment.evaluations for title in (f"{split} {metric}", f"{split} gain")]
    lines = [f"# {name}: {experiment.title}", "", "| row | " + " | ".join([*columns, "seeds"]) + " |"]
    lines.append("| --- " * (len(columns) + 2) + "|")
    for row, cells in summary["rows"].items():
        numbers = []
        for split in experiment.evaluations:
            numbers += [_cell(cells[f"{split}/{experiment.metric}"]), _gain(cells[f"{split}/gain"])]
        lines.append("| " + " | ".join([row, *numbers, _seeds(cells["seeds"])]) + " |")
    over = "the regular row" + (" of the same pages" if any(row.baseline for row in experiment.rows.values()) else "")
    lines += [
        "",
        "In per cent: mean and sample standard deviation over the seeds, weights of the last step. Gains over "
        f"{over}, seed by seed: mean and its 95 % interval (Student's t).",
    ]
    if experiment.paper_gain is not None:
        lines.append(
            f"The paper's gain of the irregular over the regular network: +{experiment.paper_gain} mIoU. Its numbers "
            "row by row are not in this package."
        )
    return "\n".join(lines) + "\n"


def _cell(values: Mapping[str, Any]) -> str:
    if not values["values"]:
        return "-"
    return f"{values['mean']:.2f}" if values["std"] is None else f"{values['mean']:.2f} ± {values['std']:.2f}"


def _gain(values: Mapping[str, Any]) -> str:
    if not values["values"]:
        return "-"
    interval = "" if values["interval"] is None else f" [{values['interval'][0]:.2f}, {values['interval'][1]:.2f}]"
    return f"{values['mean']:.2f}{interval}"


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) > 3 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds)) or "not run"


def _statistics(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and 95 % intervals of the mean, None where there are too few values."""
    many = len(values) > 1
    std = statistics.stdev(values) if many else None
    interval = bootstrap = None
    if std is not None:
        reach = float(stats.t.ppf(0.975, len(values) - 1)) * std / len(values) ** 0.5
        interval = [statistics.fmean(values) - reach, statistics.fmean(values) + reach]
    if len(values) >= _LEAST_TO_RESAMPLE:
        draws = np.random.default_rng(0).choice(values, (10000, len(values)))
        bootstrap = [float(end) for end in np.quantile(draws.mean(axis=1), (0.025, 0.975))]
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": std,
        "interval": interval,
        "bootstrap": bootstrap,
        "values": values,
    }


def _mean_displacement(records: list[dict[str, Any]]) -> dict[str, float]:
    """Statistics of the positions in the last log of training, averaged over the seeds that have them."""
    known = [record["displacement"] for record in records if record.get("displacement")]
    return {key: statistics.fmean(values[key] for values in known) for key in (known[0] if known else {})}

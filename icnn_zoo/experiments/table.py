"""The table of an experiment, from the results of its runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icnn_zoo.experiments.catalog import EXPERIMENTS, Experiment
from icnn_zoo.io.files import write_whole


def write_table(name: str, out: Path) -> Path:
    """Writes ``OUT/NAME.md`` and ``OUT/NAME.json`` from the results below ``OUT/NAME``.

    mIoU in per cent, mean and sample standard deviation over the seeds; the gain over the regular row is taken seed by
    seed, where both have the seed. Of the paper, only its gains are known here: the numbers of single rows are not.

    Returns:
        The Markdown file.
    """
    experiment = EXPERIMENTS[name]
    results: dict[str, dict[int, dict[str, float]]] = {row: {} for row in experiment.starts}
    for row in experiment.starts:
        for file in sorted((out / name / row).glob("seed_*/result.json")):
            record = json.loads(file.read_text(encoding="utf-8"))
            results[row][record["seed"]] = record["metrics"]
    regular = next(iter(experiment.rows))
    summary: dict[str, Any] = {"title": experiment.title, "paper": {"gain": experiment.paper_gain, "mIoU": None}}
    summary["rows"] = {}
    for row, of_seeds in results.items():
        cells: dict[str, Any] = {"start": experiment.starts[row], "seeds": sorted(of_seeds)}
        summary["rows"][row] = cells
        for split in experiment.splits:
            key = f"{split}/mIoU"
            cells[key] = _statistics([100 * metrics[key] for _, metrics in sorted(of_seeds.items())])
            shared = sorted(set(of_seeds) & set(results[regular])) if row != regular else []
            gains = [100 * (of_seeds[seed][key] - results[regular][seed][key]) for seed in shared]
            cells[f"{split}/gain"] = _statistics(gains)
    write_whole(out / f"{name}.json", json.dumps(summary, indent=2) + "\n")
    return write_whole(out / f"{name}.md", _markdown(name, experiment, summary))


def _markdown(name: str, experiment: Experiment, summary: dict[str, Any]) -> str:
    columns = [title for split in experiment.splits for title in (f"{split} mIoU", f"{split} gain")]
    lines = [f"# {name}: {experiment.title}", "", "| start | " + " | ".join([*columns, "seeds"]) + " |"]
    lines.append("| --- " * (len(columns) + 2) + "|")
    for row, cells in summary["rows"].items():
        numbers = [cells[f"{split}/{key}"] for split in experiment.splits for key in ("mIoU", "gain")]
        seeds = ", ".join(map(str, cells["seeds"])) or "not run"
        lines.append("| " + " | ".join([row, *map(_cell, numbers), seeds]) + " |")
    lines += [
        "",
        "Mean and sample standard deviation over the seeds; weights of the last step; gain over regular, seed by seed.",
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


def _statistics(values: list[float]) -> dict[str, Any]:
    """Mean and sample standard deviation, None where there are too few values."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }

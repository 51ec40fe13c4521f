"""Puts training runs side by side: a table, their curves, and pictures of prediction beside truth.

python benchmarks/training_report.py --out FOLDER regular=runs/a/version_0 irregular=runs/b/version_0

A second folder after a comma is that of `lightning test` with the run's checkpoint. Copies each run's config.yaml and
metrics.csv (and test_metrics.csv) into FOLDER/NAME, so that every number of the table can be checked.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

STATISTICS = ("mean", "p95", "max", "dead")


def read_curve(run: Path, column: str) -> list[tuple[int, float]]:
    """(step, value) rows of a metric in a run's metrics.csv."""
    with (run / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]


def summarise(run: Path) -> dict[str, object]:
    """The numbers of one run: validation scores over time, the last displacement statistics, test scores if any."""
    curve = read_curve(run, "val/mIoU")
    summary: dict[str, object] = {
        "val_mIoU": [[step + 1, value] for step, value in curve],
        "val_mIoU_last": curve[-1][1],
        "val_mIoU_best": max(value for _, value in curve),
        "val_mIoU_background": read_curve(run, "val/mIoU_background")[-1][1],
        "train_loss_last_100_steps": float(np.mean([value for _, value in read_curve(run, "train/loss")[-10:]])),
    }
    with (run / "metrics.csv").open() as file:
        columns = csv.DictReader(file).fieldnames or []
    displacement = {name: read_curve(run, name)[-1][1] for name in columns if name.startswith("displacement/")}
    if displacement:
        summary["displacement_last"] = displacement
    return summary


def table(summaries: dict[str, dict[str, object]]) -> str:
    """The summaries as a Markdown table; displacements of the most displaced layer."""
    lines = [
        "| run | val mIoU, last | val mIoU, best | test mIoU, last | displacement in px: mean, 95 %, max | dead taps |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, summary in summaries.items():
        moved = summary.get("displacement_last")
        cells = ["-", "-"]
        if isinstance(moved, dict):
            values = {key: moved.get(f"displacement/{key}", 0.0) for key in STATISTICS}
            cells = [f"{values['mean']:.2f}, {values['p95']:.2f}, {values['max']:.2f}", f"{100 * values['dead']:.1f} %"]
        keys = ("val_mIoU_last", "val_mIoU_best", "test_mIoU")
        scores = [f"{100 * float(str(summary[key])):.1f}" if key in summary else "-" for key in keys]
        lines.append("| " + " | ".join([name, *scores, *cells]) + " |")
    return "\n".join(lines)


def draw_curves(runs: dict[str, Path]) -> Figure:
    """Validation mIoU and the mean displacement over the steps of training."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, run) in enumerate(runs.items()):
        colour = f"C{number}"
        left.plot(*zip(*read_curve(run, "val/mIoU"), strict=True), colour, marker="o", markersize=3, label=name)
        moved = read_curve(run, "displacement/mean")
        if moved:
            right.plot(*zip(*moved, strict=True), colour)
    left.set(xlabel="step", ylabel="validation mIoU")
    right.set(xlabel="step", ylabel="mean displacement, px\n(most displaced layer)")
    left.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def join_pictures(runs: dict[str, Path], number: int) -> Image.Image:
    """Rows of image, truth and every run's prediction, from the pictures left by the last validation."""
    folders = [run / "pictures" for run in runs.values()]
    last = sorted(folders[0].glob("step_*.png"))[-1].name.split("_")[1]
    rows = []
    for name in sorted(path.name for path in folders[0].glob(f"step_{last}_*.png"))[:number]:
        strips = [np.asarray(Image.open(folder / name)) for folder in folders]
        third = strips[0].shape[1] // 3
        rows.append(np.concatenate([strips[0][:, : 2 * third], *(strip[:, 2 * third :] for strip in strips)], axis=1))
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    """Writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN_FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=4)
    options = parser.parse_args()
    folders = {name: value.split(",") for name, value in (run.split("=", 1) for run in options.runs)}
    runs = {name: Path(value[0]) for name, value in folders.items()}
    summaries = {}
    for name, run in runs.items():
        (options.out / name).mkdir(parents=True, exist_ok=True)
        for file in ("config.yaml", "metrics.csv"):
            shutil.copy(run / file, options.out / name / file)
        summaries[name] = summarise(run)
        for test in folders[name][1:]:
            shutil.copy(Path(test) / "metrics.csv", options.out / name / "test_metrics.csv")
            summaries[name]["test_mIoU"] = read_curve(Path(test), "test/mIoU")[-1][1]
    (options.out / "summary.json").write_text(json.dumps(summaries, indent=2) + "\n")
    draw_curves(runs).savefig(options.out / "curves.png", dpi=110)
    join_pictures(runs, options.pictures).save(options.out / "predictions.png")
    print(table(summaries))


if __name__ == "__main__":
    main()

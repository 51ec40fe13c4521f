"""Sums up the runs of ``icnn-zoo reproduce``: one JSON with every number, curves, and predictions side by side.

python benchmarks/training_report.py runs/reproduce/drawn-voc --out docs/results/drawn_voc

Pictures are of one seed: image, truth, and the prediction of every row named by --rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from icnn_zoo.training.run_metrics import Series, read_metrics, thinned

POINTS = 60  # of a curve
CURVES = ("train/loss", "val/mIoU", "displacement/mean", "displacement/dead")


def attempts(folder: Path) -> list[Path]:
    """The folders of a run's starts, in their order."""
    return sorted(folder.glob("attempt_*"), key=lambda path: int(path.name.partition("_")[2]))


def read_run(folder: Path) -> dict[str, Series]:
    """What a run logged over all its attempts; a step that was repeated counts once, as it was repeated."""
    joined: dict[str, dict[int, float]] = {}
    for attempt in attempts(folder):
        for name, series in read_metrics(attempt / "metrics.csv").items():
            joined.setdefault(name, {}).update(series)
    return {name: sorted(values.items()) for name, values in joined.items()}


def summarise(folder: Path) -> dict[str, Any]:
    """The result of a run, its curves, and where its positions were at the end."""
    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    logged = read_run(folder)
    best = max(value for _, value in logged["val/mIoU"])
    return {
        "metrics": record["metrics"],
        "val/mIoU best on the way": best,
        "curves": {name: thinned(logged[name], POINTS) for name in CURVES if name in logged},
        "displacement at the end": {
            name.removeprefix("displacement/"): series[-1][1]
            for name, series in logged.items()
            if name.startswith("displacement/")
        },
        "attempts": record["attempts"],
        "finished": record["finished"],
        "versions": record["versions"],
        "overrides": record["overrides"],
        "config": record["config"],
    }


def spread(values: list[float]) -> str:
    """Mean in per cent, with the sample standard deviation if there are two values or more."""
    mean = f"{100 * statistics.fmean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.2f}"


def table(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """All rows in Markdown: mIoU in per cent, gains over the regular row seed by seed, displacement in pixels."""
    titles = ("row", "seeds", "val mIoU", "gain", "test mIoU", "gain", "displacement: mean, 95 %, max", "dead taps")
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    regular = rows.get("regular", {})
    for name, runs in rows.items():
        cells = [name, ", ".join(runs)]
        for split in ("val", "test"):
            scores = {seed: run["metrics"][f"{split}/mIoU"] for seed, run in runs.items()}
            base = {seed: run["metrics"][f"{split}/mIoU"] for seed, run in regular.items()}
            gains = [score - base[seed] for seed, score in scores.items() if seed in base]
            cells += [spread(list(scores.values())), spread(gains) if gains and name != "regular" else "-"]
        moved = [run["displacement at the end"] for run in runs.values()]
        if all("mean" in entry for entry in moved):
            numbers = [statistics.fmean(entry[key] for entry in moved) for key in ("mean", "p95", "max")]
            cells.append(", ".join(f"{number:.2f}" for number in numbers))
            cells.append(f"{100 * statistics.fmean(entry['dead'] for entry in moved):.1f} %")
        else:
            cells += ["-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_curves(rows: dict[str, dict[str, dict[str, Any]]]) -> Figure:
    """Validation mIoU, training loss and the most displaced layer's mean displacement over the steps, a line a seed."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for number, (name, runs) in enumerate(rows.items()):
        for place, run in enumerate(runs.values()):
            for axes, key in zip(panels, ("val/mIoU", "train/loss", "displacement/mean"), strict=True):
                series = run["curves"].get(key)
                if series:
                    label = name if place == 0 else None
                    axes.plot(*zip(*series, strict=True), f"C{number}", lw=1.2, alpha=0.8, label=label)
    titles = ("validation mIoU", "training loss", "mean displacement, px\n(most displaced layer)")
    for axes, title in zip(panels, titles, strict=True):
        axes.set(xlabel="step", ylabel=title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e9ecef")
    panels[1].set_yscale("log")
    panels[0].legend(frameon=False)
    return figure


def join_pictures(folders: dict[str, Path], number: int) -> Image.Image:
    """Rows of image, truth and every run's prediction, from the pictures that the last validation left."""
    last = {name: attempts(folder)[-1] / "pictures" for name, folder in folders.items()}
    step = max(path.name.split("_")[1] for path in next(iter(last.values())).glob("step_*.png"))
    names = sorted(path.name for path in next(iter(last.values())).glob(f"step_{step}_*.png"))[:number]
    rows = []
    for name in names:
        strips = [np.asarray(Image.open(folder / name)) for folder in last.values()]
        third = strips[0].shape[1] // 3
        rows.append(np.concatenate([strips[0][:, : 2 * third], *(strip[:, 2 * third :] for strip in strips)], axis=1))
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    """Writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="OUT/TABLE of icnn-zoo reproduce")
    parser.add_argument("--out", type=Path, required=True, help="folder for summary.json, curves.png, predictions.png")
    parser.add_argument("--rows", nargs="+", default=["regular", "blocks.4"], help="rows whose predictions are shown")
    parser.add_argument("--seed", default="0", help="whose predictions")
    parser.add_argument("--pictures", type=int, default=4)
    options = parser.parse_args()
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for result in sorted(options.folder.glob("*/seed_*/result.json")):
        row, seed = result.parts[-3], result.parts[-2].removeprefix("seed_")
        rows.setdefault(row, {})[seed] = summarise(result.parent)
    if "regular" not in rows:
        parser.error(f"there is no finished regular run in {options.folder}")
    rows = {"regular": rows.pop("regular"), **rows}
    # Configurations and versions are those of the table, not of each run.
    shared: dict[str, Any] = {"machine": {"processor": platform.machine(), "cores": os.cpu_count()}}
    for key in ("config", "overrides", "versions"):
        values = [run.pop(key) for runs in rows.values() for run in runs.values()]
        if any(value != values[0] for value in values):
            parser.error(f"the runs differ in their {key}: they are no one experiment")
        shared[key] = values[0]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "summary.json").write_text(json.dumps({**shared, "rows": rows}) + "\n", encoding="utf-8")
    draw_curves(rows).savefig(options.out / "curves.png", dpi=110)
    shown = {row: options.folder / row / f"seed_{options.seed}" for row in options.rows}
    join_pictures(shown, options.pictures).save(options.out / "predictions.png")
    print(table(rows))


if __name__ == "__main__":
    main()

"""Tables, signal shares and curves of the trainings of position_rules.py.

python benchmarks/position_rules_report.py

Prints tables in Markdown, writes curves.png and signal.json, which keeps what it says of runs that ``--folder`` lacks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from position_rules import RESULTS, TASKS, read_runs

from icnn_zoo.analysis import signal_share

SETTLED = 40  # steps after which training losses are compared
WINDOW = 20  # steps of the running mean of losses


def report(options: argparse.Namespace) -> None:
    """Prints the tables and writes signal.json and curves.png, from runs.jsonl and the runs' displacements."""
    runs = read_runs(options.out / "runs.jsonl")
    signal_path = options.out / "signal.json"
    signal = json.loads(signal_path.read_text()) if signal_path.exists() else {}
    for name in TASKS:
        for rule in dict.fromkeys(run["rule"] for run in runs if run["task"] == name and run["displacement"]):
            files = sorted(options.folder.glob(f"{name}_{rule}_*.npz"))
            learns = not rule.startswith(("walk", "frozen"))  # whose noise is the same for all seeds
            if len(files) > 1 and TASKS[name].pretrained and learns:  # from random weights channels do not correspond
                signal.setdefault(name, {})[rule] = _signal([dict(np.load(file)) for file in files])
    signal_path.write_text(json.dumps(signal, indent=1) + "\n")
    tables = [_table(name, runs) for name in TASKS if any(run["task"] == name for run in runs)] + [
        _signal_table(name, rules) for name, rules in signal.items()
    ]
    print("\n\n".join(tables))
    _draw(runs).savefig(options.out / "curves.png", dpi=110)


def _signal(trainings: list[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    shares = {layer: signal_share([training[layer] for training in trainings]) for layer in trainings[0]}
    return {
        layer: {key: round(float(value), 4) for key, value in vars(share).items()} | {"trainings": len(trainings)}
        for layer, share in shares.items()
    }


def _gains(name: str, rule: str, runs: list[dict[str, Any]], key: Callable[[dict[str, Any]], float]) -> list[float]:
    values = {run["seed"]: key(run) for run in runs if (run["task"], run["rule"]) == (name, rule)}
    base = {run["seed"]: key(run) for run in runs if (run["task"], run["rule"]) == (name, "regular")}
    return [value - base[seed] for seed, value in values.items() if seed in base]


def _settled(run: dict[str, Any]) -> float:
    return statistics.fmean(run["losses"][SETTLED:])


def _table(name: str, runs: list[dict[str, Any]]) -> str:
    """Markdown: training loss, its difference to regular on the same batches, accuracy over the steps, movement."""
    of_task = [run for run in runs if run["task"] == name]
    steps = list(dict.fromkeys(step for run in of_task for step in run["accuracy"]))
    titles = ["rule", "seeds", "training loss", "minus regular", *(f"accuracy, step {step}" for step in steps)]
    titles += ["mean displacement by layer, px"]
    lines = [f"**{name}**", "", "| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    for rule in dict.fromkeys(run["rule"] for run in of_task):
        rows = [run for run in of_task if run["rule"] == rule]
        gains = _gains(name, rule, runs, _settled)
        cells = [rule, ", ".join(str(run["seed"]) for run in rows), _spread([_settled(run) for run in rows], 3)]
        cells += [_spread(gains, 3, sign="+") if gains and rule != "regular" else "-"]
        cells += [_spread([100 * run["accuracy"][step] for run in rows], 1) for step in steps]
        moved = [[layer["mean"] for layer in run["displacement"].values()] for run in rows]
        cells += [" ".join(f"{statistics.fmean(layer):.2f}" for layer in zip(*moved, strict=True)) or "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _signal_table(name: str, rules: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: a row for each layer, a column for each rule: share, interval, and what chance gives."""
    lines = [
        f"**Signal share, {name}**",
        "",
        "| layer | " + " | ".join(rules) + " |",
        "| --- " * (len(rules) + 1) + "|",
    ]
    for layer in next(iter(rules.values())):
        cells = []
        for shares in rules.values():
            it = shares[layer]
            text = f"{it['share']:.0%} [{it['low']:.0%}, {it['high']:.0%}]"
            cells.append(text if it["share"] > it["chance"] else f"none ({text}, chance {it['chance']:.0%})")
        lines.append(f"| {layer.removeprefix('backbone.')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int, sign: str = "") -> str:
    mean = format(statistics.fmean(values), f"{sign}.{digits}f")
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _draw(runs: list[dict[str, Any]]) -> Figure:
    """Accuracy over the steps in both tasks of lines; training loss minus regular, smoothed, in drawn-voc."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    tasks = [name for name in TASKS if any(run["task"] == name for run in runs)]
    panels = np.atleast_1d(figure.subplots(1, len(tasks)))
    rules = list(dict.fromkeys(run["rule"] for run in runs))
    for axes, name in zip(panels, tasks, strict=True):
        base = {run["seed"]: run for run in runs if (run["task"], run["rule"]) == (name, "regular")}
        named: set[str] = set()
        for run in runs:
            if run["task"] != name:
                continue
            style = {
                "color": f"C{rules.index(run['rule']) % 10}",
                "ls": "-:"[rules.index(run["rule"]) >= 10],
                "lw": 1.2,
            }
            style["label"] = None if run["rule"] in named else run["rule"]
            if TASKS[name].pages:
                axes.plot(
                    [int(step) for step in run["accuracy"]], [100 * it for it in run["accuracy"].values()], **style
                )
            elif run["rule"] != "regular" and run["seed"] in base:
                difference = np.subtract(run["losses"], base[run["seed"]]["losses"])
                width = 20
                axes.plot(
                    np.arange(width, len(difference) + 1),
                    np.convolve(difference, np.ones(width) / width, "valid"),
                    **style,
                )
            else:
                continue
            named.add(run["rule"])
        accuracy_panel = TASKS[name].pages > 0
        axes.set(title=name, xlabel="step", ylabel="accuracy, %" if accuracy_panel else "training loss minus regular")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e9ecef")
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("data"), help="where the runs left their displacements")
    parser.add_argument("--out", type=Path, default=RESULTS)
    report(parser.parse_args())


if __name__ == "__main__":
    main()

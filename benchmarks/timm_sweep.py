"""Converts every timm architecture and checks that its function is kept, that positions matter, and that it deploys.

python benchmarks/timm_sweep.py --jobs 2

First every architecture is built on the meta device and planned. Then :mod:`timm_check` runs on one architecture of
each (model class, set of convolution classes), the smallest first, and then on all others, each in a process of its own
with a limit of time and memory. After every architecture the results are written, to ``docs/results/timm_sweep.json``
and a table beside it; a later call goes on where the last one stopped (``--again failed`` repeats those that failed).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import timm_check
import torch

import icnn_zoo
from icnn_zoo.conversion.planning import SkippedLayer

OUTPUT = Path(__file__).parents[1] / "docs" / "results" / "timm_sweep.json"
STATUSES = ("passed", "skipped", "failed", "not run")
Row = dict[str, Any]


def describe() -> dict[str, Any]:
    """Machine and versions: results of different ones do not go into one table."""
    match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return {
        "machine": f"{match.group(1) if match else platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
        "seed": 0,
        "dtype": "float64",
        "tolerance": timm_check.TOLERANCE,
        "least_change": timm_check.MOVED,
    }


def plan(name: str) -> Row:
    """What converting an architecture from its first convolution would do, on the meta device."""
    with torch.device("meta"):
        model = timm.create_model(name)
    decided = icnn_zoo.plan(model, "")
    return {
        "status": "not run",
        "class": type(model).__name__,
        "convolutions": sorted({layer.kind for layer in decided.converted}),
        "parameters": decided.parameters,
        "planned": len(decided.converted),
        "planned_parameters": decided.added_parameters,
        "aliases": sum(len(layer.aliases) - 1 for layer in decided.converted),
        "skipped": _count(decided.skipped),
        "refused": _count(decided.refused),
    }


def _count(layers: tuple[SkippedLayer, ...]) -> dict[str, int]:
    return dict(Counter(f"{layer.kind}: {layer.reason}" for layer in layers))


def order(rows: dict[str, Row]) -> list[str]:
    """One architecture of each kind, the smallest, then the others, from small to large."""
    by_size = sorted(rows, key=lambda name: (rows[name]["parameters"], name))
    kinds: dict[tuple[str, ...], str] = {}
    for name in by_size:
        kinds.setdefault((rows[name]["class"], *rows[name]["convolutions"]), name)
    first = set(kinds.values())
    return [name for name in by_size if name in first] + [name for name in by_size if name not in first]


@dataclass
class Job:
    """An architecture that is being checked in a process of its own."""

    name: str
    process: Any
    receiver: multiprocessing.connection.Connection
    begin: float = field(default_factory=time.monotonic)
    step: str = "start"
    result: Row | None = None

    def listen(self) -> None:
        """Takes what the process has sent."""
        try:
            while self.receiver.poll():
                kind, value = self.receiver.recv()
                if kind == "step":
                    self.step = value
                else:
                    self.result = value
        except EOFError:
            return


def start(name: str, options: argparse.Namespace) -> Job:
    """Starts the check of an architecture."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(name, sender, options), daemon=True)
    process.start()
    sender.close()
    return Job(name, process, receiver)


def _child(name: str, sender: multiprocessing.connection.Connection, options: argparse.Namespace) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (options.gigabytes * 2**30, options.gigabytes * 2**30))
    torch.set_num_threads(1)
    begin = time.perf_counter()
    try:
        row = {
            "status": "passed",
            **timm_check.check(name, options.max_pixels, lambda step: sender.send(("step", step))),
        }
    except timm_check.Unfit as reason:
        row = {"status": "skipped", "reason": str(reason)}
    except Exception as error:  # a row of the table, whatever it is
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        no_memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        reason = f"it does not fit in {options.gigabytes} GB" if no_memory else text
        row = {"status": "skipped" if no_memory else "failed", "reason": reason}
    sender.send(("result", {**row, "seconds": round(time.perf_counter() - begin, 1)}))


def sweep(names: list[str], options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """Checks architectures, several at once, and yields each with its results as it ends."""
    waiting, running = list(names), list[Job]()
    end = time.monotonic() + options.minutes * 60
    while (waiting and time.monotonic() < end) or running:
        while waiting and len(running) < options.jobs and time.monotonic() < end:
            running.append(start(waiting.pop(0), options))
        multiprocessing.connection.wait([job.process.sentinel for job in running], timeout=1)
        for job in list(running):
            job.listen()
            seconds = time.monotonic() - job.begin
            if job.process.is_alive() and job.result is None:
                if seconds < options.timeout:
                    continue
                job.process.kill()
                job.result = {"status": "skipped", "reason": f"over {options.timeout} s, in step {job.step!r}"}
            job.process.join()
            job.listen()
            running.remove(job)
            crash = {"status": "failed", "reason": f"exit code {job.process.exitcode} in step {job.step!r}"}
            yield job.name, {"seconds": round(seconds, 1), **(job.result or crash)}


def table(results: Row) -> str:
    """The results as Markdown."""
    rows: dict[str, Row] = results["architectures"]
    counts = Counter(row["status"] for row in rows.values())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# timm's architectures: planned, and checked",
        "",
        "Made by `python benchmarks/timm_sweep.py`; the numbers of every architecture are in `timm_sweep.json`.",
        f"{results['machine']}; {versions}; float64, seed 0, two images of 97x131 px where an architecture takes them.",
        "",
        "Passed means: converted from the first convolution at epsilon 0, the output equals the regular network's in "
        f"eval and in train mode to {results['tolerance']:.0e} of its largest number, every constant parameter "
        "randomized before; moving every tap by 0.2 to 0.6 px changes it by at least "
        f"{results['least_change']:.0e}; every displacement gets a finite gradient and every layer one that is not "
        "zero; the deployed network gives the moved network's output to the same tolerance.",
        "",
        f"{len(rows)} architectures planned, {sum(bool(row['planned']) for row in rows.values())} with something to "
        f"convert; {', '.join(f'{counts[status]} {status}' for status in STATUSES)}.",
        "",
        "| class | convolutions | planned | passed | skipped | failed | not run | largest difference | least change |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows.values():
        groups.setdefault((row["class"], ", ".join(row["convolutions"]) or "none"), []).append(row)
    for (kind, convolutions), members in sorted(groups.items()):
        status = Counter(row["status"] for row in members)
        passed = [row for row in members if row["status"] == "passed"]
        keys = ("difference_eval", "difference_train", "difference_deployed")
        worst = f"{max(row[key] for row in passed for key in keys):.0e}" if passed else ""
        least = f"{min(row['change_moved'] for row in passed):.0e}" if passed else ""
        cells = [kind, convolutions, str(len(members)), *(str(status[name] or "") for name in STATUSES), worst, least]
        lines.append(f"| {' | '.join(cells)} |")
    for title, statuses in (("Failed", ("failed",)), ("Skipped", ("skipped",))):
        found: dict[str, list[str]] = {}
        for name, row in rows.items():
            if row["status"] in statuses:
                found.setdefault(row["reason"], []).append(name)
        if found:
            lines += ["", f"## {title}", ""]
            lines += [f"- {reason}: {', '.join(names)}" for reason, names in sorted(found.items())]
    left = Counter(reason for row in rows.values() for reason in row["skipped"] | row["refused"])
    lines += ["", "## Modules that stay regular", ""]
    lines += [f"- {reason} ({count} architectures)" for reason, count in sorted(left.items())]
    uncalled = {name: row["uncalled_layers"] for name, row in rows.items() if row.get("uncalled_layers")}
    if uncalled:
        lines += ["", "## Layers that the forward does not call", ""]
        lines += [f"- {name}: {', '.join(layers)}" for name, layers in uncalled.items()]
    missing = sorted(name for name, row in rows.items() if row["status"] == "not run")
    if missing:
        lines += ["", "## Planned, not run", "", ", ".join(missing) + "."]
    return "\n".join(lines) + "\n"


def write(results: Row, path: Path) -> None:
    """Writes the results and the table beside them; what was there stays until the new file is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = results["architectures"].items()
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows)
    head = json.dumps({key: value for key, value in results.items() if key != "architectures"}, indent=1)[:-2]
    for target, text in (
        (path, f'{head},\n "architectures": {{\n{lines}\n }}\n}}\n'),
        (path.with_suffix(".md"), table(results)),
    ):
        temporary = target.with_name(f".{target.name}.part")
        temporary.write_text(text)
        temporary.replace(target)


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures to run (default: all that have not run)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="results file; its folder gets the table too")
    parser.add_argument("--jobs", type=int, default=1, help="architectures at once, of one thread each (default: 1)")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no architecture after this time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one architecture (default: 600)")
    parser.add_argument("--gigabytes", type=int, default=12, help="memory for one architecture (default: 12)")
    parser.add_argument("--max-pixels", type=int, default=600_000, help="largest image to try (default: 600000)")
    parser.add_argument("--again", choices=STATUSES[:3], action="append", default=[], help="repeat those that ...")
    options = parser.parse_args()
    results: Row = {**describe(), "architectures": {}}
    if options.output.exists():
        before = json.loads(options.output.read_text())
        if any(before[key] != results[key] for key in results if key != "architectures"):
            raise SystemExit(f"{options.output} is of another machine or other versions; move it away to start anew.")
        results = before
    rows = results["architectures"]
    for name in timm_check.timm_names():
        if name not in rows:
            rows[name] = plan(name)
            if not rows[name]["planned"]:
                rows[name] |= {"status": "skipped", "reason": "it has no convolution larger than 1x1"}
    write(results, options.output)
    todo = [name for name in order(rows) if rows[name]["status"] in ("not run", *options.again)]
    todo = [name for name in todo if name in options.names] if options.names else todo
    for name, row in sweep(todo, options):
        rows[name] = {key: rows[name][key] for key in PLANNED} | row
        write(results, options.output)
        print(f"{row['status']:<8} {row['seconds']:>6.1f} s  {name}  {row.get('reason', '')}", flush=True)


PLANNED = ("class", "convolutions", "planned", "planned_parameters", "aliases", "skipped", "refused", "parameters")

if __name__ == "__main__":
    main()

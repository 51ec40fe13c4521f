"""The paper's tables, row by row and seed by seed: runs what is missing and writes what there is.

Every run is a subprocess of the command line in a folder of its own, ``OUT/TABLE/ROW/seed_N``, which gets

- ``request.json`` when it begins: what it is, so that a table never mixes two experiments;
- ``attempt_K``: config, metrics and checkpoints of each start; a run goes on from the last checkpoint of them all;
- ``result.json`` when it has been evaluated: metrics, config, versions. A folder that has it is never run again.
"""

from __future__ import annotations

import csv
import datetime
import inspect
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from icnn_zoo.experiments.catalog import EXPERIMENTS, Experiment, find_config
from icnn_zoo.experiments.table import write_table
from icnn_zoo.io.files import write_whole
from icnn_zoo.ops.sharing import rename_per_kernel
from icnn_zoo.training.run_folder import RunFolder

_PACKAGES = ("icnn-zoo", "torch", "torchvision", "lightning", "timm", "albumentations", "numpy")


def reproduce(
    name: str,
    *,
    rows: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    out: Path = Path("runs/reproduce"),
    config: Path | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Runs the rows of a table that have no result yet, and writes the table after each of them.

    Args:
        name: Name of the experiment, see :data:`icnn_zoo.experiments.catalog.EXPERIMENTS`.
        rows: Names of the rows to run; None for all.
        seeds: Seeds of each row: of weights, order and augmentation. None for the experiment's own.
        out: Folder of the runs and tables.
        config: YAML file; None for the experiment's, which comes with the package.
        overrides: Further arguments for every run, such as ``["--trainer.max_steps", "100"]``.

    Returns:
        The Markdown file; a JSON file of the same name lies beside it.

    Raises:
        FileNotFoundError: There is no such config.
        ValueError: An unknown row, a repeated seed, several processes, or a folder that holds another experiment.
        RuntimeError: On Windows; or a run failed. What it had saved is kept, and the next call goes on from there.
    """
    if sys.platform.startswith("win"):
        raise RuntimeError(
            "`reproduce` runs on Linux and macOS: Windows hands no lock of a folder on to what trains in it. Use WSL, "
            "or `icnn-zoo fit` row by row."
        )
    experiment = EXPERIMENTS[name]
    chosen = list(experiment.rows) if rows is None else list(rows)
    unknown = [row for row in chosen if row not in experiment.rows]
    if unknown:
        raise ValueError(f"`rows` must be of {', '.join(experiment.rows)}; got {', '.join(unknown)}.")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"`rows` must be one or more, each once; got {chosen}.")
    wanted = {row: list(experiment.seeds_of(row) if seeds is None else seeds) for row in chosen}
    for values in wanted.values():
        if not values or len(set(values)) < len(values) or min(values) < 0:
            raise ValueError(f"`seeds` must be one or more, each once, and not negative; got {values}.")
    if os.environ.get("WORLD_SIZE", "1") != "1" or os.environ.get("SLURM_NTASKS", "1") != "1":
        raise ValueError(
            "reproduce starts every run itself: call it once, without torchrun or srun, and say how many devices each "
            "run may use: -- --trainer.devices 8. For several machines run `icnn-zoo fit` row by row."
        )
    config = find_config(experiment.config) if config is None else config
    if not config.is_file():
        raise FileNotFoundError(f"`config`: there is no file {str(config)!r}.")
    folder = out / name
    # Seed by seed: after the first seed the table has all its rows.
    every = sorted(set().union(*wanted.values()))
    runs = [
        _Run(experiment, row, seed, folder, config, tuple(overrides))
        for seed in every
        for row in chosen
        if seed in wanted[row]
    ]
    _check_folder(folder, runs[0])
    table = write_table(name, out)
    for number, run in enumerate(runs, start=1):
        if run.result.is_file():
            continue
        print(f"[{number} of {len(runs)}] {name}, {run.row}, seed {run.seed}: {run.folder}", flush=True)
        run()
        table = write_table(name, out)
    return table


@dataclass(frozen=True)
class _Run:
    """One row with one seed."""

    experiment: Experiment
    row: str
    seed: int
    table_folder: Path
    config: Path
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return self.table_folder / self.row / f"seed_{self.seed}"

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def request(self) -> dict[str, Any]:
        return {
            "row": self.row,
            "start": self.experiment.rows[self.row].start,
            "command": self.experiment.rows[self.row].command(),
            "seed": self.seed,
            "config": yaml.safe_load(self.config.read_text(encoding="utf-8")),  # without its comments
            "overrides": list(self.overrides),
        }

    def __call__(self) -> None:
        """Trains from where the last attempt ended, evaluates, and writes the result."""
        import fcntl

        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RuntimeError(
                    f"{str(self.folder)!r} is in use: another process runs it at this moment."
                ) from error
            if not self.result.is_file():  # which another process may have written meanwhile
                self._run(lock.fileno())

    def _run(self, lock: int) -> None:
        write_whole(self.folder / "request.json", json.dumps(self.request, indent=2))
        checkpoint = self._last_checkpoint()
        if checkpoint is None or not self._is_finished(checkpoint):
            resume = [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
            self._lightning("fit", f"attempt_{len(self._attempts())}", lock, *resume)
            checkpoint = self._last_checkpoint()
            if checkpoint is None or not self._is_finished(checkpoint):
                raise RuntimeError(
                    f"training ended before its last step; see {str(self.folder)!r}, and run this again."
                )
        training = RunFolder.around(checkpoint)
        metrics: dict[str, float | None] = {}
        for name in self.experiment.evaluations:
            split = "test" if name in self.experiment.variants else name
            found = _metrics_of_last_step(training, name)
            if not found:
                verb = {"val": "validate", "test": "test"}[split]
                arguments = self.experiment.variants.get(name, ())
                self._lightning(verb, name, lock, "--ckpt_path", str(checkpoint), *arguments)
                found = _last_metrics(RunFolder(self.folder / name), f"{split}/")
            metrics |= {f"{name}/{key.removeprefix(f'{split}/')}": value for key, value in found.items()}
        record = {
            **self.request,
            "metrics": metrics,
            "displacement": _last_metrics(training, "displacement/"),
            "resolved_config": training.config.read_text(encoding="utf-8"),
            "attempts": len(self._attempts()),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        write_whole(self.result, json.dumps(record, indent=2))

    def _lightning(self, verb: str, attempt: str, lock: int, *arguments: str) -> None:
        # A subprocess: it gives back all memory, its crash is not ours, and Lightning can start further ones of it.
        row = self.experiment.rows[self.row]
        program = ["-m", "icnn_zoo.experiments.peers" if row.peer else "icnn_zoo.cli"]
        command = [sys.executable, *program, verb, "--config", str(self.config), *self.overrides]
        command += ["--seed_everything", str(self.seed), "--data.init_args.seed", str(self.seed)]
        command += [*row.command(), *arguments]
        logger = "--trainer.logger.init_args"
        command += [f"{logger}.save_dir", str(self.table_folder), f"{logger}.name", f"{self.row}/seed_{self.seed}"]
        command += [f"{logger}.version", attempt]
        # The run holds the lock too: it may outlive this process, and must not get a second one beside it.
        done = subprocess.run(command, pass_fds=(lock,))
        if done.returncode:
            raise RuntimeError(
                f"`{verb}` of {self.row} with seed {self.seed} failed with exit status {done.returncode} (its messages "
                "are above). The next call goes on from its last checkpoint."
            )

    def _attempts(self) -> list[Path]:
        return sorted(self.folder.glob("attempt_*"), key=lambda path: int(path.name.partition("_")[2]))

    def _last_checkpoint(self) -> Path | None:
        found = [RunFolder(path).last for path in self._attempts()]
        return next((path for path in reversed(found) if path.is_file()), None)

    def _is_finished(self, checkpoint: Path) -> bool:
        from icnn_zoo.training.checkpoints import read_checkpoint

        trainer = yaml.safe_load(RunFolder.around(checkpoint).config.read_text(encoding="utf-8"))["trainer"]
        if (trainer.get("max_steps") or -1) < 0:
            raise ValueError("reproduce needs the length of a run as trainer.max_steps.")
        return read_checkpoint(checkpoint, mmap=True)["global_step"] >= trainer["max_steps"]


def _check_folder(folder: Path, run: _Run) -> None:
    """Raises ValueError where any run of a table was begun with another config or other overrides."""
    for place in sorted(folder.glob("*/seed_*")):
        files = [place / "request.json", place / "result.json"]  # a result alone may have come from elsewhere
        file = next((file for file in files if file.is_file()), None)
        before = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
        for key in ("config", "overrides") if before else ():
            now = run.request[key]
            if key == "config" and "model" in now:
                before[key]["model"], now["model"] = _said(before[key]["model"]), _said(now["model"])
            if before[key] != now:
                shown = "another file" if key == "config" else f"{before[key]}, now {now}"
                raise ValueError(
                    f"{str(place)!r} was begun with another experiment: its {key} is {shown}. One table holds "
                    "one experiment: repeat that, or give another `--out`."
                )


def _said(model: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a config that are not the defaults, which an earlier version may not have had by name."""
    from icnn_zoo.training.task import SegmentationTask

    defaults = inspect.signature(SegmentationTask).parameters
    options = rename_per_kernel(model)
    return {key: value for key, value in options.items() if key not in defaults or value != defaults[key].default}


def _metrics_of_last_step(training: RunFolder, split: str) -> dict[str, float | None]:
    """What training itself found at its last step, where it validated then; else nothing."""
    steps = yaml.safe_load(training.config.read_text(encoding="utf-8"))["trainer"]["max_steps"]
    return _last_metrics(training, f"{split}/", least_step=steps - 1)


def _last_metrics(run: RunFolder, prefix: str, least_step: int = 0) -> dict[str, float | None]:
    """The last row of a run's metrics.csv that has metrics of a name, from some step on; empty for none."""
    if not run.metrics.is_file():
        return {}
    with run.metrics.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    for row in reversed(rows):
        numbers = {name: float(value) for name, value in row.items() if name.startswith(prefix) and value}
        if numbers and int(row["step"]) >= least_step:
            # A class that neither occurs nor is predicted has no IoU, and JSON has no NaN.
            return {name: None if math.isnan(value) else value for name, value in numbers.items()}
    return {}

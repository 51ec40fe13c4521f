"""Measures the operator on this machine's GPU and writes a folder to send back: `python -m benchmarks.gpu`.

Parts run one after the other, each in a process with a time limit: card (what is here), gate (are results right?),
layers (single layers against cuDNN and deform_conv2d), step (a training step of a ResNet-101) and tests (the suite's).
What is done is kept in the folder: where time was short, the same command goes on. `--rehearse` does it all in
Triton's interpreter on a CPU, with tiny sizes; its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Seconds that a part may take, starting included. They add up to less than 400: a call may be limited to that.
LIMITS = {"card": 20, "gate": 75, "layers": 115, "step": 85, "tests": 95}
UNFINISHED = 3  # what a part exits with that goes on where it stopped
ATTEMPTS = 3  # of a part that does not finish in its time


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts that are not done yet; returns 0 when all are, 3 when there is more to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="the folder to write and to send back")
    parser.add_argument("--seconds", type=float, default=400, help="start no part that may end later than this")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS), help="only these, again if done")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny sizes, all in this process")
    options = parser.parse_args(argv)
    begin = time.monotonic()
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before kernels are defined
    options.out.mkdir(parents=True, exist_ok=True)
    record = options.out / "parts.json"
    states = json.loads(record.read_text()) if record.is_file() else {}
    if options.parts != list(LIMITS):
        states = {part: state for part, state in states.items() if part not in options.parts}
    for part in options.parts:
        if is_over(states.get(part)):
            continue
        if time.monotonic() - begin + LIMITS[part] > options.seconds:
            print(f"{part}: no time left; the same command goes on from here", flush=True)
            continue
        started = time.monotonic()
        status = rehearse(part, options.out) if options.rehearse else run(part, options.out)
        attempts = states.get(part, {}).get("attempts", 0) + 1
        states[part] = {"status": status, "seconds": round(time.monotonic() - started, 1), "attempts": attempts}
        record.write_text(json.dumps(states, indent=1) + "\n")
        print(f"{part}: {status} in {states[part]['seconds']} s", flush=True)
    from benchmarks.gpu import report

    text = report.write(options.out, states)
    print(text, flush=True)
    finished = all(is_over(states.get(part)) for part in options.parts)
    archive = shutil.make_archive(str(options.out), "zip", options.out)
    print(f"Send back {archive}" if finished else f"Not all is done: the same command goes on. So far: {archive}")
    return 0 if finished else UNFINISHED


def is_over(state: dict[str, Any] | None) -> bool:
    """Whether a part is not to be run again."""
    return state is not None and (state["status"] in ("done", "failed") or state["attempts"] >= ATTEMPTS)


def run(part: str, folder: Path) -> str:
    """Runs a part in a process of its own; what it prints goes to its log."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.getenv("PYTHONPATH"))))}
    command = [sys.executable, "-m", f"benchmarks.gpu.{part}", str(folder.resolve()), str(LIMITS[part] - 10)]
    if part == "tests":
        options = ["--noconftest", "-p", "no:cacheprovider", "-W", "default", "-o", "addopts=", "-q", "--tb=short"]
        options += ["-n", "6"] if importlib.util.find_spec("xdist") else []
        command = [sys.executable, "-m", "pytest", *options, "tests/ops/test_ops_cuda.py"]
    with (folder / f"{part}.log").open("w") as log:
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=LIMITS[part])
        except subprocess.TimeoutExpired:
            return "timed out"
    return {0: "done", UNFINISHED: "unfinished"}.get(done.returncode, "failed")


def rehearse(part: str, folder: Path) -> str:
    """Runs a part here, in tiny sizes; a failure is an error."""
    with (folder / f"{part}.log").open("w") as log, contextlib.redirect_stdout(log):
        if part != "tests":
            importlib.import_module(f"benchmarks.gpu.{part}").main(folder, 1e9, rehearsal=True)
    return "done"


if __name__ == "__main__":
    sys.exit(main())

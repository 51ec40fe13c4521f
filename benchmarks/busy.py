"""What a training step costs beside other programs, by how PyTorch's threads wait.

A thread that waits for others first spins, then sleeps. Spinning is quick to end on an idle machine; on a busy one it
takes the processor from the very thread that it waits for. Each setting runs in a process of its own, as it is read
when PyTorch is loaded: PyTorch's default, ``GOMP_SPINCOUNT=1000`` (what the programs ``icnn-zoo`` and ``lightning``
set) and ``OMP_WAIT_POLICY=passive``, with all threads, and one thread for scale; each with nothing beside it and with
two programs for every processor. Settings take turns, round by round. "regular" is four convolutions of 64 channels
with batch norms, forward and backward; "irregular" is the same with this package's layers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import icnn_zoo

sys.path.insert(0, str(Path(__file__).parent))
from measuring import environment

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SETTINGS: dict[str, tuple[bool, dict[str, str]]] = {  # name: all threads, environment
    "default": (True, {}),
    "GOMP_SPINCOUNT=1000": (True, {"GOMP_SPINCOUNT": "1000"}),
    "OMP_WAIT_POLICY=passive": (True, {"OMP_WAIT_POLICY": "passive"}),
    "one thread": (False, {}),
}
STEPS_S = 2.0


def network(irregular: bool) -> nn.Module:
    """Four convolutions with batch norms."""
    torch.manual_seed(0)
    kind = icnn_zoo.IrregularConv2d if irregular else nn.Conv2d
    return nn.Sequential(
        *[part for _ in range(4) for part in (kind(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())]
    )


def steps(seconds: float) -> dict[str, dict[str, float]]:
    """Wall and CPU seconds of a step of both networks, in this process."""
    result = {}
    images = torch.randn(2, 64, 33, 33)
    for name in ("regular", "irregular"):
        model = network(name == "irregular")
        for _ in range(2):
            model(images).sum().backward()
        wall, cpu, count = time.perf_counter(), time.process_time(), 0
        while count == 0 or time.perf_counter() - wall < seconds:
            model(images).sum().backward()
            count += 1
        result[name] = {
            "wall": (time.perf_counter() - wall) / count,
            "cpu": (time.process_time() - cpu) / count,
        }
    return result


def in_a_process(setting: str, threads: int, seconds: float) -> dict[str, dict[str, float]]:
    """The same in a process of its own."""
    every, wanted = SETTINGS[setting]
    inherited = {name: value for name, value in os.environ.items() if name not in WAITING}
    command = [sys.executable, __file__, "--child", str(threads if every else 1), "--seconds", str(seconds)]
    done = subprocess.run(command, env=inherited | wanted, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes the JSON; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--seconds", type=float, default=STEPS_S, help="for the steps of one network")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(device="cpu", dtype="float32")
    args = parser.parse_args(argv)
    if args.child:
        torch.set_num_threads(args.child)
        print(json.dumps(steps(args.seconds)))
        return 0
    report: dict[str, Any] = environment(args, ("torch",)) | {"rows": []}
    print(f"{'ms a step, wall (CPU)':32}{'regular':>20}{'irregular':>20}")
    for programs in (0, 2 * (os.cpu_count() or 1)):
        beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
        try:
            rounds = [
                {name: in_a_process(name, args.threads, args.seconds) for name in SETTINGS} for _ in range(args.repeats)
            ]
        finally:
            for program in beside:
                program.kill()
                program.wait()
        print(f"beside {programs} busy programs")
        for name in SETTINGS:
            row: dict[str, Any] = {"beside": programs, "setting": name, "rounds": [round_[name] for round_ in rounds]}
            report["rows"].append(row)
            cells = ""
            for kind in ("regular", "irregular"):
                wall, cpu = (
                    statistics.median(round_[kind][clock] * 1e3 for round_ in row["rounds"])
                    for clock in ("wall", "cpu")
                )
                cells += f"{wall:>11.1f} ({cpu:.1f})".rjust(20)
            print(f"  {name:30}{cells}", flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

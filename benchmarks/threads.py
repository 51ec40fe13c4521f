"""How the native backend's work divides among threads: counted, modeled for up to 128, measured on the cores at hand.

A call's work is a few phases, each cut into units that free threads take one by one. For every number of threads the
program makes the call with a stand-in for PyTorch's pool that runs the units one after the other and times each. The
model is then that pool on as many idle cores: a free thread takes the next unit, a phase ends with its last one, and
what Python does around the phases is serial. All of it is CPU time, so that a busy machine does no harm. "Imbalance" is
the longest thread's time over the mean. Not in the model: memory bandwidth and clock rates that busy cores share.

Beside it stands the measured speed-up of the same call, for numbers of threads up to the cores of this machine.
"""

from __future__ import annotations

import argparse
import ctypes
import heapq
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent))
from measuring import environment, timed
from peers import SHAPES, Case, Shape

from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.native_backend import NativeBackend, build

LAYERS: dict[str, Shape] = {
    "layer3": SHAPES["layer3"],
    "layer3, 16 images": replace(SHAPES["layer3"], batch=16),
    "layer4": SHAPES["layer4"],
    "classifier": SHAPES["classifier"],
    "depthwise, 672 channels": SHAPES["depthwise5"],
    "depthwise, 32 channels": Shape(16, 32, 32, 40, groups=32),
    "full version": SHAPES["full"],
}
THREADS = (1, 2, 4, 8, 16, 32, 64, 128)
WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


class Run(ctypes.Structure):
    """``run_t`` of csrc/plane.h, as far as it is read here."""

    _fields_ = [
        ("work", WORK),
        ("task", ctypes.c_void_p),
        ("units", ctypes.c_int64),
        ("scratch_length", ctypes.c_int64),
    ]


class Phase(NamedTuple):
    """The threads that it is worth, the seconds of its units, and what running and timing them one by one took."""

    threads: int
    units: list[float]
    spent: float


@contextmanager
def profiled(threads: int) -> Iterator[list[Phase]]:
    """Calls of the native backend run serially, as if with so many threads; gives their phases."""
    phases: list[Phase] = []

    def parallel(body: int, data: int, threads: int, flags: int) -> None:
        run = ctypes.cast(data, ctypes.POINTER(Run)).contents
        clock = time.thread_time
        start = clock()
        scratch = torch.empty(run.scratch_length, dtype=torch.float64)
        work, task, place = run.work, run.task, scratch.data_ptr()
        seconds = []
        for unit in range(run.units):
            begin = clock()
            work(task, unit, place)
            seconds.append(clock() - begin)
        phases.append(Phase(threads, seconds, clock() - start))

    callback = PARALLEL(parallel)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    with (
        mock.patch.object(build, "find_parallel", return_value=address),
        mock.patch.object(torch, "get_num_threads", return_value=threads),
    ):
        yield phases


def makespan(seconds: Sequence[float], threads: int) -> float:
    """When the last of so many threads is done, each taking the next unit whenever it is free."""
    free = [0.0] * threads
    for unit in seconds:
        heapq.heapreplace(free, free[0] + unit)
    return max(free)


def calls(shape: Shape) -> dict[str, Callable[[], Any]]:
    """Forward and backward of the native backend alone, without autograd."""
    case, backend = Case(shape, "cpu"), NativeBackend()
    sizes = shape.geometry
    pad = sizes["padding"]
    geometry = Geometry.of(
        (shape.size, shape.size),
        (shape.kernel, shape.kernel),
        (shape.stride, shape.stride),
        (pad, pad, pad, pad),
        (shape.dilation, shape.dilation),
        shape.groups,
    )
    arguments = (case.input, case.weight.flatten(2), case.positions)
    return {
        "forward": lambda: backend.forward(*arguments, None, geometry),
        "backward": lambda: backend.backward(case.grad, *arguments, geometry, (True, True, True)),
    }


def model(call: Callable[[], Any], overhead: float, repeats: int) -> list[dict[str, Any]]:
    """Units, imbalance and modeled speed-up for every number of threads."""
    rows: list[dict[str, Any]] = []
    for threads in THREADS[1:]:
        runs, serial = [], math.inf
        for _ in range(repeats):
            with profiled(threads) as phases:
                begin = time.thread_time()
                call()
                serial = min(serial, time.thread_time() - begin - sum(phase.spent for phase in phases))
            runs.append(phases)
        used = [phase.threads for phase in runs[0]]
        units = [
            [max(min(times) - overhead, 0.0) for times in zip(*(phase.units for phase in same), strict=True)]
            for same in zip(*runs, strict=True)
        ]
        seconds = [sum(times) for times in units]
        longest = [makespan(times, count) for times, count in zip(units, used, strict=True)]
        ideal = sum(time_ / count for time_, count in zip(seconds, used, strict=True))
        rows.append(
            {
                "threads": threads,
                "used": used,
                "units": [len(times) for times in units],
                "seconds": seconds,
                "serial_seconds": serial,  # of it phases that are worth one thread only
                "imbalance": sum(longest) / ideal if ideal else 1.0,
                "modeled_speed_up": (serial + sum(seconds)) / (serial + sum(longest)),
            }
        )
    return rows


def measured_seconds(call: Callable[[], Any], counts: Sequence[int], repeats: int) -> dict[int, float]:
    """Median seconds by number of threads, all numbers in turn."""
    times: dict[int, list[float]] = {count: [] for count in counts}
    before = torch.get_num_threads()
    try:
        for round_ in range(repeats + 1):
            for count in counts:
                torch.set_num_threads(count)
                seconds = timed(call, "cpu")
                if round_ > 0:  # the first warms up
                    times[count].append(seconds)
    finally:
        torch.set_num_threads(before)
    return {count: statistics.median(values) for count, values in times.items()}


def call_overhead() -> float:
    """Seconds that timing one unit adds."""
    nothing = WORK(lambda task, unit, scratch: None)
    through_c = ctypes.cast(ctypes.cast(nothing, ctypes.c_void_p), WORK)  # dearer than C: half of it is the way back
    seconds = []
    for _ in range(5):
        begin = time.thread_time()
        for _ in range(1000):
            time.thread_time()
            through_c(None, 0, None)
        seconds.append((time.thread_time() - begin) / 1000)
    return min(seconds) / 2


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table for each layer and writes the JSON; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--quick", action="store_true", help="tiny layers, one round: checks that the benchmark runs")
    parser.set_defaults(device="cpu", dtype="float32")
    args = parser.parse_args(argv)
    reason = NativeBackend().unavailable(torch.device("cpu"))
    if reason is not None:
        print(f"There is nothing to measure: the native backend cannot run: {reason}")
        return 1
    repeats = 1 if args.quick else args.repeats
    counts = [count for count in THREADS if count <= (os.cpu_count() or 1)]
    overhead = call_overhead()
    report: dict[str, Any] = environment(args, ("torch",)) | {"layers": []}
    print(f"{'':34}threads: " + "".join(f"{count:>7}" for count in THREADS[1:]))
    for name in args.layers:
        shape = LAYERS[name].shrunk() if args.quick else LAYERS[name]
        for direction, call in calls(shape).items():
            seconds = measured_seconds(call, counts, repeats)
            rows = model(call, overhead, repeats)
            record = {"name": name, "text": str(shape), "direction": direction, "seconds": seconds, "modeled": rows}
            report["layers"].append(record)
            print(f"{name}, {direction}, {seconds[1] * 1e3:.3g} ms with one thread")
            longest = [max(zip(row["seconds"], row["units"], strict=True))[1] if row["units"] else 1 for row in rows]
            print(f"{'units of the longest phase':>42} " + "".join(f"{units:>7}" for units in longest))
            print(f"{'imbalance':>42} " + "".join(f"{row['imbalance']:>7.2f}" for row in rows))
            print(f"{'speed-up, modeled':>42} " + "".join(f"{row['modeled_speed_up']:>7.2f}" for row in rows))
            speed_ups = "".join(f"{seconds[1] / seconds[count]:>7.2f}" for count in counts[1:])
            print(f"{'measured':>42} {speed_ups}", flush=True)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

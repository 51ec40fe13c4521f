"""Times a training step of a ResNet-101, regular and converted from layer3.11 on, in turn, and where its time goes.

Then the same with forward and backward as CUDA graphs (``torch.cuda.make_graphed_callables``), which no CPU holds back.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import training_step

import icnn_zoo
from benchmarks.gpu import rehearsing

NETWORK = {
    "backbone": "resnet101",
    "start": "layer3.11",
    "output-stride": 8,
    "size": 321,
    "batch-size": 16,
    "dtype": "bfloat16",
    "device": "cuda",
    "rounds": 8,
    "threads": 8,
}
REHEARSED = NETWORK | {
    "backbone": "resnet18",
    "start": "layer4.1",
    "size": 33,
    "batch-size": 1,
    "dtype": "float32",
    "device": "cpu",
    "rounds": 1,
    "threads": 1,
}


def busy(step: training_step.Step) -> dict[str, Any]:
    """Milliseconds that kernels run in a step, how many, and the longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
    events = [event for event in profiled.key_averages() if event.self_device_time_total]
    longest = sorted(events, key=lambda event: -event.self_device_time_total)[:20]
    return {
        "kernels_ms": sum(event.self_device_time_total for event in events) / 1e3,
        "kernels": sum(event.count for event in events),
        "longest": [f"{event.key[:80]} x{event.count}: {event.self_device_time_total:.0f} us" for event in longest],
    }


STAGED = ", staged"


def make_step(options: argparse.Namespace, name: str) -> training_step.Step:
    """The step of a network, by its name."""
    start = None if name == "regular" else options.start[0]
    step = training_step.Step(options, start, channels_last=True)
    if name.endswith(STAGED):
        for layer in icnn_zoo.irregular_layers(step.model).values():
            layer.backend = "staged"
    return step


def graphed(options: argparse.Namespace, names: Sequence[str]) -> dict[str, list[float]]:
    """Seconds of steps whose forward and backward are CUDA graphs."""
    steps = {name: make_step(options, name) for name in names}
    for step in steps.values():
        with torch.autocast("cuda", getattr(torch, options.dtype), cache_enabled=False):
            torch.cuda.make_graphed_callables(step.model, (step.images,))
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(step())
    return times


def main(folder: Path, seconds: float, *, rehearsal: bool = False) -> None:
    """Writes step.json."""
    settings = REHEARSED if rehearsal else NETWORK
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    options = training_step.parse(words)
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    result = training_step.measure(options)
    print(*training_step.table(result), sep="\n", flush=True)
    (folder / "step.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.device == "cuda":
        irregular = f"irregular from {options.start[0]}"
        result |= {"busy": {}, "graphed_seconds_per_step": {}, "reasons": {}}

        def attempt(what: str, measure: Callable[[], None]) -> None:
            """One failure ends nothing."""
            try:
                measure()
            except RuntimeError as error:
                result["reasons"][what] = f"{type(error).__name__}: {error}"[:500]
            (folder / "step.json").write_text(json.dumps(result, indent=1) + "\n")

        def find_busy(name: str) -> None:
            step = make_step(options, name)
            step()
            result["busy"][name] = busy(step)

        def find_graphed(name: str) -> None:
            result["graphed_seconds_per_step"][name] = graphed(options, ("regular", name))

        with rehearsing.backend(rehearsal):
            for name in ("regular", irregular):
                attempt(f"busy, {name}", functools.partial(find_busy, name))
            attempt("graphs", functools.partial(find_graphed, irregular))
            attempt(f"busy{STAGED}", functools.partial(find_busy, irregular + STAGED))
            attempt(f"graphs{STAGED}", functools.partial(find_graphed, irregular + STAGED))
        print(json.dumps(result["busy"], indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))

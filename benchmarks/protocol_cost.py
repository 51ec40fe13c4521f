"""Seconds and peak memory of the paper's largest steps: training at crop 473, and a 2048x1024 image in windows of 713.

python benchmarks/protocol_cost.py --json docs/results/protocol_cost_cpu_2cores.json

Each part runs in a process of its own, so that its peak memory (``ru_maxrss``: everything that the process ever held,
Python and PyTorch included) is its own. Both are the network of ``configs/cityscapes.yaml``: ResNet-101 at output
stride 8, irregular from layer3.11 on, frozen norms, 19 classes. "train" is forward, loss at logit resolution, backward,
the optimizer's step and the bound of Eq. 7, on one crop; "evaluate" is logits of all windows, averaged, and the argmax.
"idle" has the network and its imports alone, and no step: what the others' memory begins with.
torch is imported within functions, as a child's peak begins with the memory of the process that started it.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PARTS = ("idle", "train", "evaluate")
NUM_CLASSES = 19


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs one part in this process.

    Returns:
        "seconds", a list of ``rounds`` times after one round that is not counted for "train" (it makes the optimizer's
        state), and "peak_mib".
    """
    import torch

    from icnn_zoo.training.task import SegmentationTask

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    task = SegmentationTask(
        options.backbone,
        NUM_CLASSES,
        start=options.start,
        dilation_rule=options.dilation_rule,
        freeze_norm=True,
        evaluation="sliding",
        window=options.window,
    )
    parts: dict[str, Callable[[], None]] = {"idle": lambda: None}
    parts |= {"train": _training(task, options), "evaluate": _evaluation(task, options)}
    run, seconds = parts[options.part], []
    if options.part == "train":
        run()
    for _ in range(options.rounds):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _training(task: Any, options: argparse.Namespace) -> Callable[[], None]:
    import torch
    import torch.nn.functional as F

    import icnn_zoo
    from icnn_zoo.models import shrink_labels

    def run() -> None:
        if not made:
            groups = icnn_zoo.parameter_groups(task.model, lr=1e-6, position_lr=1e-6)
            made.append(torch.optim.SGD(groups, lr=1e-6, momentum=0.9))
            icnn_zoo.bound_positions(made[0], task.model)
        images = torch.randint(0, 256, (1, 3, options.crop, options.crop), dtype=torch.uint8)
        labels = torch.randint(0, NUM_CLASSES, (1, options.crop, options.crop))
        loss = F.cross_entropy(task.train()(images), shrink_labels(labels, 8), ignore_index=255)
        made[0].zero_grad()
        loss.backward()
        made[0].step()

    made: list[torch.optim.Optimizer] = []
    return run


def _evaluation(task: Any, options: argparse.Namespace) -> Callable[[], None]:
    import torch

    height, width = options.image

    def run() -> None:
        image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
        with torch.inference_mode():
            labels = task.eval().predict_step({"image": image}, 0)
        assert labels.shape == (1, height, width)

    return run


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet101")
    parser.add_argument("--start", default="layer3.11")
    parser.add_argument("--dilation-rule", default="caffe")
    parser.add_argument("--crop", type=int, default=473, help="pixels of the training crop, 8k + 1")
    parser.add_argument("--image", type=int, nargs=2, default=(1024, 2048), metavar=("H", "W"))
    parser.add_argument("--window", type=int, default=713)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=PARTS, help="run one part in this process and print its JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every part in a subprocess, prints a line for each and writes the JSON; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    if options.part:
        print(json.dumps(measure(options)))
        return 0
    results = {}
    for part in PARTS:
        command = [sys.executable, __file__, *arguments, "--part", part]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{part} failed:\n{done.stderr}")
            return 1
        results[part] = result = json.loads(done.stdout.splitlines()[-1])
        print(f"{part:<10} {min(result['seconds']):8.2f} s (best of {options.rounds}), {result['peak_mib']:7.0f} MiB")
    if options.json:
        record = {"machine": _machine(options), "versions": _versions(), "settings": _settings(options)}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**record, "results": results}, indent=2) + "\n")
    return 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name not in ("json", "part", "threads")}


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = f"{len(names)} x {names[0]}" if names else platform.processor()
    return {"processor": platform.machine(), "cpu": cpu, "threads": options.threads}


def _versions() -> dict[str, str]:
    import timm
    import torch

    import icnn_zoo

    versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
    return {**versions, "icnn_zoo": icnn_zoo.__version__}


if __name__ == "__main__":
    sys.exit(main())

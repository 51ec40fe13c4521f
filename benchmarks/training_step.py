"""Seconds per training step of a regular and an irregular network, in turn in one run.

python benchmarks/training_step.py --backbone tf_efficientnet_lite0 --start blocks.4 --json results.json

Each round times one step (forward, backward, optimizer, the bound of Eq. 7) of every network, so that a drift of the
machine's speed hits all alike; the ratio is taken round by round. ``--displacement`` spreads the positions as training
does, since the cost of depthwise layers grows with the box around their taps. ``--checkpoint`` takes them from a run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import icnn_zoo
from icnn_zoo.models import SegmentationModel


class Step:
    """One training step of a network on random data."""

    def __init__(self, options: argparse.Namespace, start: str | None, channels_last: bool) -> None:
        torch.manual_seed(0)
        self.model = SegmentationModel(options.backbone, options.num_classes, output_stride=options.output_stride)
        if start is not None:
            icnn_zoo.convert(self.model, start)
            self._displace(options)
        self.images = torch.randn(options.batch_size, 3, options.size, options.size, device=options.device)
        self.labels = torch.randint(options.num_classes, (options.batch_size, options.size, options.size)).to(
            options.device
        )
        self.model.to(options.device)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        groups = icnn_zoo.parameter_groups(self.model, lr=1e-6, position_lr=1e-6)
        self.optimizer = torch.optim.SGD(groups, lr=1e-6, momentum=0.9)
        if start is not None:
            icnn_zoo.bound_positions(self.optimizer, self.model)

    def _displace(self, options: argparse.Namespace) -> None:
        if options.checkpoint:
            state = torch.load(options.checkpoint, map_location="cpu", weights_only=False)["state_dict"]
            self.model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
        else:
            with torch.no_grad():
                for layer in icnn_zoo.irregular_layers(self.model).values():
                    layer.displacement.uniform_(-options.displacement, options.displacement)

    def __call__(self) -> float:
        """Takes the step and returns its seconds."""
        begin = time.perf_counter()
        logits = self.model.upsample(self.model(self.images), self.labels.shape[-2:])
        self.optimizer.zero_grad()
        F.cross_entropy(logits, self.labels).backward()
        self.optimizer.step()
        if self.images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def main() -> None:
    """Times the steps, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--start", default="blocks.4")
    parser.add_argument("--output-stride", type=int, default=16)
    parser.add_argument("--size", type=int, default=129)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--num-classes", type=int, default=21)
    parser.add_argument("--displacement", type=float, default=0.9, help="spread of positions in pixels")
    parser.add_argument("--checkpoint", type=Path, help="take the positions from a Lightning checkpoint")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = {
        "regular": Step(options, None, channels_last=True),
        f"irregular from {options.start}": Step(options, options.start, channels_last=True),
    }
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(step())
    regular = times["regular"]
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, regular, strict=True)]
        print(
            f"{name:<28} {statistics.median(values):.3f} s/step (min {min(values):.3f}, max {max(values):.3f}), "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    if options.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        settings.pop("json")
        settings["checkpoint"] = options.checkpoint.name if options.checkpoint else None
        record = {
            "machine": {"processor": platform.machine(), "cpu": _cpu_name(), "threads": options.threads},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "icnn_zoo": icnn_zoo.__version__,
            },
            "settings": settings,
            "seconds_per_step": times,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if (info.is_file())
        else []
    )
    return f"{len(names)} x {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    main()

"""Seconds and memory of a training step of a regular and an irregular network, in turn in one run.

python benchmarks/training_step.py --backbone tf_efficientnet_lite0 --start blocks.4 --json results.json

First a gate: with every tap on the regular grid the converted network must give the regular one's logits. Then each
round times one step (forward, backward, optimizer, the bound of Eq. 7) of every network, so that a drift of the
machine's speed hits all alike; the ratio is taken round by round. ``--displacement`` spreads the positions as training
does. ``--checkpoint`` takes them from a run. ``--start`` may name several, and after commas an interpolation and who
shares a shape (``classifier,gaussian,kernel``). ``--peers`` adds networks with a peer's
layers in the place of the first. Half precision is autocast. Memory is the peak above what is held between steps, on
CUDA. The networks of configs/documents.yaml, on one core as their runs:

    python benchmarks/training_step.py --backbone resnet10t --output-stride 8 --batch-size 8 --num-classes 9 \
        --backbone-args '{"channels": [32, 64, 128, 256], "stem_width": 16}' --threads 1 \
        --start layer3 layer4 layer4.0.conv2 classifier classifier,gaussian classifier,gaussian,kernel
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import icnn_zoo
from icnn_zoo.models import SegmentationModel

TOLERANCE = 1e-4  # largest difference of logits / largest logit, float32


class Step:
    """One training step of a network on random data."""

    def __init__(
        self, options: argparse.Namespace, start: str | None, channels_last: bool, peer: str | None = None
    ) -> None:
        torch.manual_seed(0)
        self.model = make_model(options)
        if start is not None:
            icnn_zoo.convert(self.model, **read_start(start))
            self._displace(options)
        if peer is not None:
            from icnn_zoo.experiments.peers import replace_layers  # needs Lightning

            replace_layers(self.model, read_start(options.start[0])["start"], peer)
        self.options = options
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
            state = torch.load(options.checkpoint, map_location="cpu", weights_only=True)["state_dict"]
            self.model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
        else:
            with torch.no_grad():
                for layer in icnn_zoo.irregular_layers(self.model).values():
                    layer.displacement.uniform_(-options.displacement, options.displacement)

    def __call__(self) -> float:
        """Takes the step and returns its seconds."""
        if self.images.is_cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        kind, dtype = self.images.device.type, getattr(torch, self.options.dtype)
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            logits = self.model.upsample(self.model(self.images), self.labels.shape[-2:])
            loss = F.cross_entropy(logits.float(), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def memory_mib(self) -> float | None:
        """Peak of the memory that one step needs above what is held between steps; None but on CUDA."""
        if not self.images.is_cuda:
            return None
        self.optimizer.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def make_model(options: argparse.Namespace) -> SegmentationModel:
    """The regular network."""
    return SegmentationModel(
        options.backbone,
        options.num_classes,
        output_stride=options.output_stride,
        backbone_args=options.backbone_args,
    )


def read_start(text: str) -> dict[str, str]:
    """What ``convert`` takes, of "START,INTERPOLATION,SHAPES"."""
    return dict(zip(("start", "interpolation", "shapes"), text.split(","), strict=False))


def gate(options: argparse.Namespace) -> float:
    """Largest difference of the logits, relative to the largest, of the converted networks with no displacement."""
    images = torch.randn(1, 3, 65, 65, device=options.device, generator=torch.Generator(options.device).manual_seed(0))
    worst = 0.0
    for start in options.start:
        torch.manual_seed(0)
        model = make_model(options).to(options.device).eval()
        # TF32, on for convolutions by default, would be seen as an error.
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            expected = model(images)
            choice = read_start(start)
            # A gaussian's least spread: its neighbors weigh 4e-6 there.
            spread = 0.2 if choice.get("interpolation") == "gaussian" else None
            icnn_zoo.convert(model, **choice, epsilon=0.0, spread=spread)
            worst = max(worst, ((model(images) - expected).abs().max() / expected.abs().max()).item())
    return worst


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times all networks, round by round.

    Raises:
        RuntimeError: The gate is red.
    """
    difference = gate(options)
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"WRONG logits of {options.backbone} on the regular grid: off by {difference:.1e} of the largest"
        )
    steps = {
        "regular": Step(options, None, channels_last=True),
        **{f"irregular from {start}": Step(options, start, channels_last=True) for start in options.start},
        **{f"{peer} from {options.start[0]}": Step(options, None, True, peer) for peer in options.peers},
    }
    for step in steps.values():
        step()
    memory = {name: step.memory_mib() for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(step())
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    settings.pop("json", None)
    settings["checkpoint"] = options.checkpoint.name if options.checkpoint else None
    return {"gate": difference, "settings": settings, "seconds_per_step": times, "memory_mib": memory}


def table(result: dict[str, Any]) -> list[str]:
    """A line for each network."""
    lines = []
    regular = result["seconds_per_step"]["regular"]
    for name, values in result["seconds_per_step"].items():
        ratios = [value / base for value, base in zip(values, regular, strict=True)]
        memory = result["memory_mib"][name]
        lines.append(
            f"{name:<28} {statistics.median(values):.3f} s/step (min {min(values):.3f}, max {max(values):.3f}), "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            + ("" if memory is None else f", {memory:.0f} MiB")
        )
    return lines


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--backbone-args", type=json.loads, help="JSON for timm")
    parser.add_argument("--start", nargs="+", default=["blocks.4"])
    parser.add_argument("--output-stride", type=int, default=16)
    parser.add_argument("--size", type=int, default=129)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--num-classes", type=int, default=21)
    parser.add_argument("--displacement", type=float, default=0.9, help="spread of positions in pixels")
    parser.add_argument("--checkpoint", type=Path, help="take the positions from a Lightning checkpoint")
    parser.add_argument("--peers", nargs="*", choices=("deformable", "dilation"), default=[])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def main() -> int:
    """Times the steps, prints the table and writes the JSON; returns the exit status."""
    options = parse()
    torch.set_num_threads(options.threads)
    try:
        result = measure(options)
    except RuntimeError as error:
        print(error)
        return 1
    print(*table(result), sep="\n")
    if options.json:
        record = {
            "machine": {"processor": platform.machine(), "cpu": _cpu_name(), "threads": options.threads},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "icnn_zoo": icnn_zoo.__version__,
            },
            **result,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())

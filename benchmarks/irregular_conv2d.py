"""Times `icnn_zoo.irregular_conv2d` and its peers against `torch.nn.functional.conv2d` of the same shape.

A correctness gate runs first: outputs and gradients of every shape, in float32, against torchvision's deform_conv2d
(an offset group per input channel, constant over space) at real positions, and against conv2d on the regular grid. If
a comparison fails, it prints which, no speed at all, and exits with status 1.

Then every peer is timed once in turn in each round, and ratios to conv2d are taken within a round, so that drift of
the machine cancels; printed are the median over rounds and min..max. A measurement repeats a quick call for 50 ms.
"forward" is without gradients; "fwd+bwd" adds those of input, weight and, where there are any, positions. What a peer
derives from positions (offsets, dense kernels) is part of its time. TF32 is off; half precision is autocast.
"icnn_zoo" is the backend that is chosen automatically, "icnn_zoo torch" the one in standard operators. Last comes a
training step of a ResNet-101 at output stride 8, regular and converted from layer3.11 on (training_step.py).

Memory is the peak above what was held before one call: max_memory_allocated on CUDA, on Linux CPUs the peak of the
resident size (VmHWM, reset before the call; below 1 MiB it says little), otherwise left out.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

import icnn_zoo
from icnn_zoo.ops import operators

sys.path.insert(0, str(Path(__file__).parent))
import training_step

SEED = 0
LINUX = sys.platform == "linux"
MEASUREMENT_S = 0.05  # a quick call is repeated for about this long
SLOW_S, SLOW_ROUNDS = 5.0, 3  # slower calls take part in the first rounds only
OFF_INTEGER = 0.01  # distance of positions from integers, where bilinear interpolation has kinks
COMPARED = ("output", "input gradient", "weight gradient", "position gradient")
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # largest difference / largest value


@dataclass(frozen=True)
class Shape:
    """Sizes of one case: B, C, N, H = W; positions are the regular grid + uniform(-spread, spread) pixels."""

    batch: int
    channels: int
    outputs: int
    size: int
    kernel: int = 3
    dilation: int = 1
    groups: int = 1
    stride: int = 1
    spread: float = 0.75
    per_kernel: bool = False

    def shrunk(self) -> Shape:
        """The same kind of shape with about 16 channels on an 11 x 11 map."""
        scale = max(1, self.channels // 16)
        groups = self.channels // scale if self.groups == self.channels else max(1, self.groups // scale)
        outputs = groups if self.groups == self.outputs else max(2, self.outputs // scale)
        return replace(self, batch=1, channels=self.channels // scale, outputs=outputs, groups=groups, size=11)

    @property
    def geometry(self) -> dict[str, Any]:
        """Keyword arguments of conv2d but for groups; the padding keeps the size at stride 1."""
        return {"stride": self.stride, "padding": self.dilation * (self.kernel // 2), "dilation": self.dilation}

    def __str__(self) -> str:
        words = f"B{self.batch} C{self.channels} N{self.outputs} {self.size}x{self.size}"
        words += f" k{self.kernel} d{self.dilation} g{self.groups} s{self.stride} ±{self.spread:g} px"
        return words + (" per kernel" if self.per_kernel else "")


SHAPES = {
    "layer3": Shape(2, 256, 256, 41),
    "layer3-d2": Shape(2, 256, 256, 41, dilation=2),
    "layer3-d4": Shape(2, 256, 256, 41, dilation=4),
    "layer4": Shape(1, 512, 512, 41, dilation=4),
    "classifier": Shape(1, 2048, 21, 41, dilation=12),
    "depthwise5": Shape(4, 672, 672, 20, kernel=5, groups=672),
    "convnext7": Shape(4, 384, 384, 20, kernel=7, groups=384),
    "grouped": Shape(2, 256, 256, 41, groups=32),
    "stride2": Shape(2, 256, 256, 41, stride=2),
    "spread8": Shape(2, 256, 256, 41, spread=8.0),
    "full": Shape(1, 64, 64, 41, per_kernel=True),
}


class Case:
    """Float32 tensors of a shape, drawn on the CPU so that every device gets the same; ``grad`` is of the output."""

    def __init__(self, shape: Shape, device: str) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.shape = shape
        fan_in, taps = shape.channels // shape.groups, shape.kernel**2
        steps = (torch.arange(shape.kernel) - (shape.kernel - 1) // 2) * float(shape.dilation)
        self.grid = torch.cartesian_prod(steps, steps).to(device)
        lead = (shape.outputs, fan_in) if shape.per_kernel else (shape.channels,)
        moved = self.grid.cpu() + (torch.rand(*lead, taps, 2, generator=generator) * 2 - 1) * shape.spread
        self.positions = (moved.floor() + (moved % 1).clamp(OFF_INTEGER, 1 - OFF_INTEGER)).to(device)
        out = (shape.size - 1) // shape.stride + 1
        self.input = torch.randn(shape.batch, shape.channels, shape.size, shape.size, generator=generator).to(device)
        weight = torch.randn(shape.outputs, fan_in, shape.kernel, shape.kernel, generator=generator)
        self.weight = weight.to(device) / (fan_in * taps) ** 0.5
        self.grad = torch.randn(shape.batch, shape.outputs, out, out, generator=generator).to(device)

    def leaves(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh leaves input, weight and positions that require gradients."""
        input, weight, positions = (t.clone().requires_grad_() for t in (self.input, self.weight, positions))
        return input, weight, positions


def conv2d(input: Tensor, weight: Tensor, positions: Tensor, case: Case) -> Tensor:
    """The baseline: taps on the regular grid."""
    return F.conv2d(input, weight, **case.shape.geometry, groups=case.shape.groups)


def irregular(input: Tensor, weight: Tensor, positions: Tensor, case: Case) -> Tensor:
    """This package's operator."""
    return icnn_zoo.irregular_conv2d(input, weight, positions, **case.shape.geometry, groups=case.shape.groups)


def irregular_torch(input: Tensor, weight: Tensor, positions: Tensor, case: Case) -> Tensor:
    """This package's operator in standard PyTorch operators."""
    geometry = case.shape.geometry
    return icnn_zoo.irregular_conv2d(input, weight, positions, **geometry, groups=case.shape.groups, backend="torch")


def deform_conv2d(input: Tensor, weight: Tensor, positions: Tensor, case: Case) -> Tensor:
    """torchvision's, offsets constant over space; the full version copies the input channels for every output."""
    shape = case.shape
    if shape.per_kernel:
        per_group, fan_in = shape.outputs // shape.groups, shape.channels // shape.groups
        channels = torch.arange(shape.outputs) // per_group * fan_in
        input = input[:, (channels[:, None] + torch.arange(fan_in)).flatten().to(input.device)]
    offsets = (positions - case.grid).reshape(1, -1, 1, 1).expand(input.shape[0], -1, *case.grad.shape[-2:])
    return torchvision.ops.deform_conv2d(input, offsets, weight, **shape.geometry)


def unfold_gemm(input: Tensor, weight: Tensor, positions: Tensor, case: Case) -> Tensor:
    """The regular convolution as im2col and a matrix product, for scale."""
    shape = case.shape
    columns = F.unfold(input, shape.kernel, **shape.geometry).unflatten(1, (shape.groups, -1))
    output = weight.flatten(1).unflatten(0, (shape.groups, -1)) @ columns
    return output.flatten(1, 2).unflatten(-1, case.grad.shape[-2:])


class Dcls:
    """DCLS v1 (bilinear): dense kernels with room for every tap, where its normalisation divides by one."""

    def __init__(self, case: Case) -> None:
        shape = case.shape
        reach = math.ceil(case.positions.abs().max().item())
        side = 2 * reach + 1
        # Per weight and cell: two coordinates and about as much again for products, masks and the backward.
        need = 12 * 2 * 4 * side**2 * case.weight.numel()
        free = counter("meminfo", "MemAvailable") if LINUX else need
        free = torch.cuda.mem_get_info()[0] if case.input.is_cuda else free
        if need > free:
            raise MemoryError(f"dense {side}x{side} kernels need about {need >> 30} GiB, {free >> 30} GiB are free")
        from DCLS.construct.modules import Dcls2d

        sizes = {"stride": shape.stride, "padding": reach, "dilated_kernel_size": side, "groups": shape.groups}
        logging.disable(logging.WARNING)  # which kernel it uses
        module = Dcls2d(shape.channels, shape.outputs, shape.kernel**2, bias=False, version="v1", **sizes)
        logging.disable(logging.NOTSET)
        positions = case.positions
        if not shape.per_kernel:
            positions = positions.unflatten(0, (shape.groups, 1, -1))
            positions = positions.expand(-1, shape.outputs // shape.groups, -1, -1, -1).flatten(0, 1)
        module.weight.data = case.weight.flatten(2).clone()
        module.P.data = positions.permute(3, 0, 1, 2).flip(0).contiguous()  # DCLS puts columns first
        self.module = module.to(case.input.device)

    def __call__(self, input: Tensor, weight: Tensor, positions: Tensor, case: Case) -> Tensor:
        """Uses the module's own weight and positions."""
        return self.module(input)


Operator = Callable[[Tensor, Tensor, Tensor, Case], Tensor]
PEERS: dict[str, Callable[[Case], Operator]] = {
    "conv2d": lambda case: conv2d,
    "icnn_zoo": lambda case: irregular,
    "icnn_zoo torch": lambda case: irregular_torch,
    "deform_conv2d": lambda case: deform_conv2d,
    "DCLS": Dcls,
    "unfold+GEMM": lambda case: unfold_gemm,
}
REGULAR = (conv2d, unfold_gemm)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value; NaN where there is one."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()


def gate(name: str, shape: Shape, device: str) -> list[tuple[str, float]]:
    """Compares output and gradients of at most two images: (comparison, error relative to the maximum)."""
    case = Case(replace(shape, batch=min(shape.batch, 2)), device)
    rows = []
    for reference, positions in ((deform_conv2d, case.positions), (conv2d, case.grid.expand_as(case.positions))):
        results = []
        for operator in (irregular, reference):
            leaves = case.leaves(positions)
            output = operator(*leaves, case)
            results.append((output.detach(), *torch.autograd.grad(output, leaves, case.grad, allow_unused=True)))
        for what, actual, expected in zip(COMPARED, *results, strict=True):
            if expected is not None:  # conv2d has no positions
                rows.append((f"{name}: {what} against {reference.__name__}", distance(actual, expected)))
    return rows


def counter(file: str, field: str) -> int:
    """A Linux counter in bytes."""
    lines = Path("/proc", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def timed(call: Callable[[], Any], device: str, calls: int = 1) -> float:
    """Seconds per call."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize()
    return (time.perf_counter() - start) / calls


def measured(call: Callable[[], Any], device: str) -> tuple[float, float | None]:
    """Seconds and peak extra MiB (None where it cannot be measured) of one call."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return timed(call, device), (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that stays resident would hide an allocation
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux with glibc, or not allowed
        return timed(call, device), None
    before = counter("self/status", "VmRSS")
    return timed(call, device), (counter("self/status", "VmHWM") - before) / 2**20


def make_call(operator: Operator, case: Case, args: argparse.Namespace, backward: bool) -> Callable[[], Tensor]:
    """A call without arguments that runs a forward, or forward and backward; returns the output."""
    input, weight, positions = leaves = case.leaves(case.positions)
    wanted: Sequence[Tensor] = leaves[:2] if operator in REGULAR else leaves
    if isinstance(operator, Dcls):
        wanted = (input, *operator.module.parameters())

    def call() -> Tensor:
        with torch.set_grad_enabled(backward):
            with torch.autocast(args.device, getattr(torch, args.dtype), enabled=args.dtype != "float32"):
                output = operator(input, weight, positions, case)
            if backward:
                torch.autograd.grad(output, wanted, case.grad.to(output.dtype))
        return output

    return call


def prepare(record: dict[str, Any], case: Case, args: argparse.Namespace) -> None:
    """Builds a peer's call, warms it up, measures memory and checks the output; raises where it cannot run."""
    operator = PEERS[record["peer"]](case)
    call = make_call(operator, case, args, record["mode"] != "forward")
    for _ in range(2):  # the second call is free of one-time caches
        seconds, record["memory_mib"] = measured(call, args.device)
        if seconds > SLOW_S:
            break
    if seconds > args.cap:
        raise RuntimeError(f"too slow: {seconds:.0f} s, cap {args.cap:g} s")
    with torch.no_grad():
        expected = (conv2d if operator in REGULAR else irregular)(*case.leaves(case.positions), case)
    error, tolerance = distance(call().detach().float(), expected), TOLERANCE[args.dtype]
    if not error <= tolerance:
        raise RuntimeError(f"wrong: output differs by {error:.1e} of the maximum, tolerance {tolerance:g}")
    record |= {"call": call, "seconds": seconds, "calls": 1 if args.quick else max(1, round(MEASUREMENT_S / seconds))}


def run_shape(name: str, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """Times all peers on one shape in interleaved rounds."""
    case = Case(shape, args.device)
    modes = ("forward", "fwd+bwd") if args.backward else ("forward",)
    records: list[dict[str, Any]] = [{"peer": peer, "mode": mode, "reason": None} for peer in PEERS for mode in modes]
    for record in records:
        record |= {"memory_mib": None, "times_ms": [], "ratios": []}
        try:
            prepare(record, case, args)
        except (ImportError, MemoryError, RuntimeError, TypeError) as error:
            record["reason"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:160]
    for round_ in range(2 if args.quick else args.repeats):
        turn = round_ % len(records)
        for record in records[turn:] + records[:turn]:
            skip = record["reason"] or (record["seconds"] > SLOW_S and round_ >= SLOW_ROUNDS)
            record["times_ms"].append(None if skip else timed(record["call"], args.device, record["calls"]) * 1e3)
    for record in records:
        baseline = records[modes.index(record["mode"])]  # conv2d comes first
        pairs = zip(record["times_ms"], baseline["times_ms"], strict=True)
        record["ratios"] = [mine / other for mine, other in pairs if mine is not None and other is not None]
        record.pop("call", None)
    return {"name": name, "shape": asdict(shape), "text": str(shape), "records": records}


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions, date, seed and settings."""
    versions = {"python": platform.python_version(), "icnn_zoo": icnn_zoo.__version__}
    for package in ("torch", "torchvision", "timm", "DCLS"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    backend = operators.choose_backend("auto", device, dtype).__name__.rpartition(".")[2].removesuffix("_backend")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        versions["git"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    info = Path("/proc/cpuinfo").read_text().splitlines() if LINUX else []
    cpu = next((line.partition(": ")[2] for line in info if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    return {
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu},
        "versions": versions,
        "backend": backend,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": SEED,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
    }


def table(result: dict[str, Any], markdown: bool) -> Iterator[str]:
    """Lines of one shape: one for each peer, or a row of a Markdown table with the ratios of both modes in a cell."""
    texts: dict[str, list[tuple[str, str, str]]] = {}
    reasons = []
    for record in result["records"]:
        reasons += [f"{record['peer']} {record['mode']}: {record['reason']}"] if record["reason"] else []
        times, ratios = [value for value in record["times_ms"] if value is not None], record["ratios"]
        middle = f"{statistics.median(times):.4g} ms" if times else "-"
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})" if ratios else "-"
        memory = "-" if record["memory_mib"] is None else f"{record['memory_mib']:.0f} MiB"
        texts.setdefault(record["peer"], []).append((middle, spread, memory))
    if markdown:
        cells = [" / ".join(text[peer != "conv2d"] for text in modes) for peer, modes in texts.items()]
        yield f"| `{result['name']}` {result['text']} | {' | '.join(cells)} | {'<br>'.join(reasons)} |"
        return
    yield f"{result['name']}: {result['text']}"
    for peer, modes in texts.items():
        yield f"  {peer:<15}" + " |".join(f"{text[0]:>10} {text[1]:>22} {text[2]:>9}" for text in modes)
    yield from (f"  {reason}" for reason in reasons)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the gate and then the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--backward", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--cap", type=float, default=20.0, help="seconds above which a call is too slow to be timed")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--network", action=argparse.BooleanOptionalAction, default=True, help="time a training step")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds: checks that the benchmark runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
    shapes = {name: SHAPES[name].shrunk() if args.quick else SHAPES[name] for name in args.shapes}

    checks = [check for name, shape in shapes.items() for check in gate(name, shape, args.device)]
    network = network_options(args) if args.network else None
    if network is not None:
        checks.append((f"{network.backbone}: logits on the regular grid", training_step.gate(network)))
    tolerance = TOLERANCE["float32"]
    failures = [check for check in checks if not check[1] <= tolerance]  # NaN fails too
    for what, error in failures:
        print(f"WRONG {what}: off by {error:.2e} of the maximum, tolerance {tolerance:g}")
    if failures:
        return 1
    worst = max(checks, key=lambda check: check[1])
    print(f"Gate: {len(checks)} comparisons passed (tolerance {tolerance:g}); worst {worst[0]}, {worst[1]:.1e}")

    report: dict[str, Any] = environment(args) | {"gate": checks, "shapes": []}
    print(" ".join(f"{key} {value}" for part in ("machine", "versions") for key, value in report[part].items()))
    if args.markdown:
        print("\n| shape | " + " | ".join(PEERS) + " | not run |\n|" + " --- |" * (len(PEERS) + 2))
    else:
        print(f"  {'':15}{'forward, ratio to conv2d (min..max), memory':>43} | fwd+bwd")
    for name, shape in shapes.items():
        report["shapes"].append(run_shape(name, shape, args))
        print(*table(report["shapes"][-1], args.markdown), sep="\n", flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    if network is not None:
        report["training_step"] = training_step.measure(network)
        print(*training_step.table(report["training_step"]), sep="\n")
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def network_options(args: argparse.Namespace) -> argparse.Namespace:
    """The training step of the paper's network, small on a CPU."""
    size, batch_size = (33, 1) if args.quick else (321, 16) if args.device == "cuda" else (129, 2)
    arguments = {
        "backbone": "resnet18" if args.quick else "resnet101",
        "start": "layer4" if args.quick else "layer3.11",
        "output-stride": 8,
        "size": size,
        "batch-size": batch_size,
        "rounds": 2 if args.quick else args.repeats,
        "threads": args.threads,
        "device": args.device,
        "dtype": args.dtype,
    }
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    return training_step.parse(words)


if __name__ == "__main__":
    sys.exit(main())

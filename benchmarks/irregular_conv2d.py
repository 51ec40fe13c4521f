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
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import training_step
from measuring import MEASUREMENT_S, TOLERANCE, distance, environment, measured, timed
from peers import PEERS, REGULAR, SHAPES, Case, Dcls, Operator, Shape, conv2d, deform_conv2d, irregular

GPU_BATCH = 16  # the shapes' own, for CPUs, would time launches
SLOW_S, SLOW_ROUNDS = 5.0, 1  # slower calls take part in the first rounds only
COMPARED = ("output", "input gradient", "weight gradient", "position gradient")


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
    outputs: list[Tensor] = []
    for _ in range(2):  # the second call is free of one-time caches
        outputs.clear()
        seconds, record["memory_mib"] = measured(lambda: outputs.append(call().detach()), args.device)
        if seconds > SLOW_S:
            break
    if seconds > args.cap:
        raise RuntimeError(f"too slow: {seconds:.0f} s, cap {args.cap:g} s")
    with torch.no_grad():
        expected = (conv2d if operator in REGULAR else irregular)(*case.leaves(case.positions), case)
    error, tolerance = distance(outputs[0].float(), expected), TOLERANCE[args.dtype]
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
    parser.add_argument("--batch", type=int, help=f"images of every shape; {GPU_BATCH} on CUDA, else each shape's own")
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
    batch = args.batch or (GPU_BATCH if args.device == "cuda" else None)
    if batch:
        shapes = {name: replace(shape, batch=batch) for name, shape in shapes.items()}

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

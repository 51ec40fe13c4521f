"""Times irregular layers and what `icnn_zoo.deploy` makes of them against the regular convolution of the same sizes.

A correctness gate runs first: the deployed form of every layer must give the layer's output, in PyTorch and, where onnx
and onnxruntime are installed, in onnxruntime, which must also give the regular convolution's. If a comparison fails, it
prints which, no speed at all, and exits with status 1.

Then everything is timed once in turn in each round, and ratios are taken within a round, so that drift of the machine
cancels: PyTorch's to conv2d in PyTorch, onnxruntime's to conv2d in onnxruntime. Printed are the median over rounds and
min..max, and beside them the form that was chosen and its modeled cost: the ratio on which the choice rests. Float32
on a CPU, without gradients, all with the same number of threads; a measurement repeats a quick call for 50 ms.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import logging
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import icnn_zoo
from icnn_zoo.deployment.rewriting import DeployedLayer, rewrite

sys.path.insert(0, str(Path(__file__).parent))
from measuring import MEASUREMENT_S, TOLERANCE, distance, environment, timed
from peers import Case, Shape

LAYERS = {
    "dense": Shape(2, 256, 256, 41),
    "spread3": Shape(2, 256, 256, 41, spread=3.0),
    "dilated": Shape(2, 256, 256, 41, dilation=4),
    "stride2": Shape(2, 256, 256, 41, stride=2),
    "depthwise5": Shape(4, 672, 672, 20, kernel=5, groups=672),
    "grouped": Shape(2, 256, 256, 41, groups=32),
    "classifier": Shape(1, 2048, 21, 41, dilation=12),
    "outliers": Shape(2, 256, 256, 41),
}
OUTLIERS, OUTLIER_PX = {"outliers": 8}, 12.0  # channels whose first tap ran away, and how far to the right
REGULAR, IRREGULAR, DEPLOYED = "conv2d", "icnn_zoo", "deployed"
NEEDED = ("onnx", "onnxscript", "onnxruntime")


Run = Callable[[], Tensor]


class Layer:
    """A regular convolution, the irregular layer of its weight, and the layer's deployed form."""

    def __init__(self, name: str, shape: Shape) -> None:
        case = Case(shape, "cpu")
        self.name, self.shape, self.input = name, shape, case.input
        arguments = (shape.channels, shape.outputs, shape.kernel)
        options = shape.geometry | {"groups": shape.groups, "bias": False}
        regular = nn.Conv2d(*arguments, **options)
        layer = icnn_zoo.IrregularConv2d(*arguments, **options)
        with torch.no_grad():
            for module in (regular, layer):
                module.weight.copy_(case.weight)
            layer.displacement.copy_(case.positions - case.grid)
            layer.displacement[: OUTLIERS.get(name, 0), 0, 1] += OUTLIER_PX
        deployment = rewrite(layer)
        self.report: DeployedLayer = deployment.layers[0]
        self.modules = {REGULAR: regular.eval(), IRREGULAR: layer.eval(), DEPLOYED: deployment.model}

    def __str__(self) -> str:
        outliers = OUTLIERS.get(self.name, 0)
        return str(self.shape) + (f", {outliers} taps {OUTLIER_PX:g} px further" if outliers else "")


def why_no_onnx() -> str | None:
    """Why nothing can run in onnxruntime, or None."""
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    return f'it needs {", ".join(missing)}: pip install "icnn-zoo[export]"' if missing else None


def exported(module: nn.Module, input: Tensor) -> bytes:
    """The module as ONNX, for inputs of this size."""
    file = io.BytesIO()
    logging.disable(logging.WARNING)  # of the exporter about its own insides
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # likewise
        torch.onnx.export(module, (input,), dynamo=True, input_names=["images"], verbose=False).save(file)
    logging.disable(logging.NOTSET)
    return file.getvalue()


def in_onnxruntime(file: bytes, input: Tensor) -> Run:
    """A call of an ONNX file in onnxruntime, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {"images": input.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def runs(layer: Layer, onnx: bool) -> dict[tuple[str, str], Run]:
    """Everything that is timed, by runtime and name."""

    def in_pytorch(module: nn.Module) -> Run:
        return lambda: module(layer.input)

    calls = {("PyTorch", name): in_pytorch(module) for name, module in layer.modules.items()}
    if onnx:
        for name in (REGULAR, DEPLOYED):
            file = exported(layer.modules[name], layer.input)
            calls["onnxruntime", name] = in_onnxruntime(file, layer.input)
    return calls


def gate(layer: Layer, calls: dict[tuple[str, str], Run]) -> list[tuple[str, float]]:
    """Compares outputs: (comparison, error relative to the maximum)."""
    rows = []
    for (runtime, name), call in calls.items():
        truth = REGULAR if name == REGULAR else IRREGULAR
        if (runtime, name) != ("PyTorch", truth):
            error = distance(call(), calls["PyTorch", truth]())
            rows.append((f"{layer.name}: {name} in {runtime} against {truth}", error))
    return rows


def run_layer(layer: Layer, calls: dict[tuple[str, str], Run], args: argparse.Namespace) -> dict[str, Any]:
    """Times everything of one layer in interleaved rounds."""
    records: list[dict[str, Any]] = []
    for (runtime, name), call in calls.items():
        seconds = min(timed(call, "cpu") for _ in range(2))  # the first call fills caches
        repeats = 1 if args.quick else max(1, round(MEASUREMENT_S / seconds))
        records.append({"runtime": runtime, "name": name, "times_ms": [], "call": call, "calls": repeats})
    for round_ in range(2 if args.quick else args.repeats):
        turn = round_ % len(records)
        for record in records[turn:] + records[:turn]:
            record["times_ms"].append(timed(record["call"], "cpu", record["calls"]) * 1e3)
    baselines = {record["runtime"]: record["times_ms"] for record in records if record["name"] == REGULAR}
    for record in records:
        pairs = zip(record["times_ms"], baselines[record["runtime"]], strict=True)
        record["ratios"] = [mine / other for mine, other in pairs]
        record |= {"median_ms": statistics.median(record["times_ms"]), "ratio": statistics.median(record["ratios"])}
        del record["call"]
    result = {"name": layer.name, "shape": asdict(layer.shape), "text": str(layer)}
    return result | {"deployed": asdict(layer.report), "records": records}


def table(result: dict[str, Any]) -> list[str]:
    """Lines of one layer: the form and its modeled cost, then one line for each time."""
    deployed = result["deployed"]
    box = "x".join(map(str, deployed["box"]))
    form = f"{deployed['form']}, box {box}, {deployed['outliers']} outliers, modeled cost {deployed['cost']:.2f}"
    lines = [f"{result['name']}: {result['text']}", f"  {form}"]
    for record in result["records"]:
        ratios = record["ratios"]
        spread = f"{record['ratio']:.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        lines.append(f"  {record['runtime']:<12} {record['name']:<9} {record['median_ms']:>8.4g} ms {spread:>22}")
    return lines


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the gate and then the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--onnx", action=argparse.BooleanOptionalAction, default=True, help="time onnxruntime too")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--quick", action="store_true", help="tiny layers, two rounds: checks that the benchmark runs")
    parser.set_defaults(device="cpu", dtype="float32")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    reason = why_no_onnx() if args.onnx else "--no-onnx"
    layers = [Layer(name, LAYERS[name].shrunk() if args.quick else LAYERS[name]) for name in args.layers]
    calls = [runs(layer, onnx=reason is None) for layer in layers]

    checks = [check for layer, timed_ in zip(layers, calls, strict=True) for check in gate(layer, timed_)]
    tolerance = TOLERANCE["float32"]
    failures = [check for check in checks if not check[1] <= tolerance]  # NaN fails too
    for what, error in failures:
        print(f"WRONG {what}: off by {error:.2e} of the maximum, tolerance {tolerance:g}")
    if failures:
        return 1
    worst = max(checks, key=lambda check: check[1])
    print(f"Gate: {len(checks)} comparisons passed (tolerance {tolerance:g}); worst {worst[0]}, {worst[1]:.1e}")

    report: dict[str, Any] = environment(args, ("torch", *NEEDED))
    report |= {"gate": checks, "onnxruntime_not_run": reason, "layers": []}
    print(" ".join(f"{key} {value}" for part in ("machine", "versions") for key, value in report[part].items()))
    if reason is not None:
        print(f"onnxruntime is not run: {reason}")
    print(f"  {'':22}{'median, ratio to conv2d (min..max)':>35}")
    for layer, timed_ in zip(layers, calls, strict=True):
        report["layers"].append(run_layer(layer, timed_, args))
        print(*table(report["layers"][-1]), sep="\n", flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

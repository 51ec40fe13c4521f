"""Whole networks: a training step and inference, regular and irregular, in every form that a network is run in.

One table, one run. For each network: a training step (training_step.py), regular and irregular; inference in PyTorch,
regular, irregular and deployed (`icnn_zoo.deploy`); regular and irregular by `torch.compile` (``--compiled``, as
compiling takes a minute a network); regular and deployed in onnxruntime and in OpenVINO, where these are installed.
Positions are spread as training does. First comes a gate: on the regular grid the converted network must give the
regular one's logits, and every form must give those of the network that it is made from. All take turns in each round,
ratios are those within a round to the regular network in the same runtime; printed are their medians, and the median of
the times. With the defaults it takes about seven minutes on two cores, most of it exports and compilations.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import icnn_zoo

sys.path.insert(0, str(Path(__file__).parent))
import training_step
from deploy import exported, in_onnxruntime, why_no_onnx
from measuring import TOLERANCE, distance, environment, timed

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Network:
    """A backbone, what is converted of it, and the images of a training step and of inference."""

    backbone: str
    start: str
    output_stride: int
    batch_size: int = 2
    size: int = 129


NETWORKS = {
    "ResNet-101": Network("resnet101", "layer3.11", 8),
    "ConvNeXt-T": Network("convnext_tiny", "stages.2", 16),
    "EfficientNet-Lite0": Network("tf_efficientnet_lite0", "blocks.4", 16, batch_size=4),
    "CSPDarknet-53 (YOLOv4)": Network("cspdarknet53", "stages.3", 16),
}
QUICK = {"quick": Network("test_resnet", "layer4", 16, batch_size=1, size=65)}
REGULAR, IRREGULAR, DEPLOYED = "regular", "irregular", "deployed"


def step_options(network: Network, args: argparse.Namespace) -> argparse.Namespace:
    """What training_step.py is asked."""
    options = training_step.parse([])
    asked = {name: getattr(network, name) for name in ("backbone", "output_stride", "batch_size", "size")}
    asked["start"] = [network.start]
    return argparse.Namespace(**vars(options) | asked | {"rounds": args.repeats, "threads": args.threads})


def in_openvino(file: bytes, input: Tensor) -> Run:
    """A call of an ONNX file in OpenVINO, with as many threads as PyTorch has."""
    import openvino

    with tempfile.NamedTemporaryFile(suffix=".onnx") as place:
        place.write(file)
        place.flush()
        model = openvino.Core().read_model(place.name)
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda: torch.from_numpy(compiled([input.numpy()])[0])


def forms(network: Network, step: Callable[[str | None], nn.Module], name: str, args: argparse.Namespace) -> list[Any]:
    """Everything that infers: (runtime, form, call)."""
    images = torch.randn(1, 3, network.size, network.size, generator=torch.Generator().manual_seed(0))
    models = {REGULAR: step(None).eval(), IRREGULAR: step(network.start).eval()}
    models[DEPLOYED] = icnn_zoo.deploy(models[IRREGULAR], images)

    def in_pytorch(module: nn.Module) -> Run:
        return lambda: module(images)

    calls: list[tuple[str, str, Run]] = [("PyTorch", form, in_pytorch(module)) for form, module in models.items()]
    if name in args.compiled:
        calls += [("torch.compile", form, in_pytorch(torch.compile(models[form]))) for form in (REGULAR, IRREGULAR)]
    for form in (REGULAR, DEPLOYED):
        if why_no_onnx() is None:
            file = exported(models[form], images)
            calls.append(("onnxruntime", form, in_onnxruntime(file, images)))
            if importlib.util.find_spec("openvino") is not None:
                calls.append(("OpenVINO", form, in_openvino(file, images)))
    return calls


def infer(calls: list[Any], repeats: int) -> list[dict[str, Any]]:
    """Times all calls in turn, with their ratios to the regular network in the same runtime.

    Raises:
        RuntimeError: An output is not that of the network that it was made from.
    """
    truths = {form: call() for runtime, form, call in calls if runtime == "PyTorch"}
    truths[DEPLOYED] = truths[IRREGULAR]
    records: list[dict[str, Any]] = []
    for runtime, form, call in calls:
        error = distance(call(), truths[form])
        if not error <= 10 * TOLERANCE["float32"]:  # a hundred layers
            raise RuntimeError(f"WRONG {form} in {runtime}: off by {error:.1e} of the largest")
        records.append({"runtime": runtime, "form": form, "error": error, "seconds": []})
    for _ in range(repeats):
        for record, (_, _, call) in zip(records, calls, strict=True):
            record["seconds"].append(timed(call, "cpu"))
    return records


def add_ratios(records: list[dict[str, Any]]) -> None:
    """Adds to each record its ratios to the regular network in the same runtime."""
    regular = {record["runtime"]: record["seconds"] for record in records if record["form"] == REGULAR}
    for record in records:
        pairs = zip(record["seconds"], regular[record["runtime"]], strict=True)
        record["ratios"] = [mine / base for mine, base in pairs]


def measure(name: str, network: Network, args: argparse.Namespace) -> dict[str, Any]:
    """Everything of one network.

    Raises:
        RuntimeError: A gate is red.
    """
    options = step_options(network, args)
    trained = training_step.measure(options)

    def model(start: str | None) -> nn.Module:
        return training_step.Step(options, start, channels_last=False).model

    steps = [
        {"runtime": "training step", "form": form, "seconds": seconds}
        for form, seconds in zip((REGULAR, IRREGULAR), trained["seconds_per_step"].values(), strict=True)
    ]
    with torch.no_grad():
        records = steps + infer(forms(network, model, name, args), args.repeats)
    add_ratios(records)
    return {"name": name, "network": vars(network), "gate": trained["gate"], "records": records}


def rows(results: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table: a line for each runtime and form; in the cells milliseconds and the ratio."""
    kinds = dict.fromkeys((record["runtime"], record["form"]) for result in results for record in result["records"])
    lines = ["| | " + " | ".join(result["name"] for result in results) + " |", "| --- |" + " --- |" * len(results)]
    for runtime, form in sorted(kinds, key=lambda kind: [record[0] for record in kinds].index(kind[0])):
        cells = []
        for result in results:
            found = [record for record in result["records"] if (record["runtime"], record["form"]) == (runtime, form)]
            medians = [(statistics.median(r["seconds"]) * 1e3, statistics.median(r["ratios"])) for r in found]
            cells.append("".join(f"{time_:.0f} ms, {ratio:.2f}" for time_, ratio in medians) or "-")
        lines.append(f"| {runtime}, {form} | " + " | ".join(cells) + " |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes the JSON; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--compiled", nargs="*", choices=NETWORKS, default=["ConvNeXt-T", "EfficientNet-Lite0"])
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--quick", action="store_true", help="a tiny network: checks that the benchmark runs")
    parser.set_defaults(device="cpu", dtype="float32")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = environment(args, ("torch", "timm", "onnx", "onnxruntime", "openvino")) | {"networks": []}
    for name, network in (QUICK if args.quick else {name: NETWORKS[name] for name in args.networks}).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of exporters about their own insides
                report["networks"].append(measure(name, network, args))
        except RuntimeError as error:
            print(f"{name}: {error}")
            return 1
        print(f"{name} is measured", flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(*rows(report["networks"]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Times triangle and gaussian interpolation over bilinear, and networks of DCLS over what `from_dcls` makes of them.

Three parts, each behind a gate of correctness (status 1, and no speed, if it fails):

- "layer3": `irregular_conv2d` with a shape per channel at the layer3 shape of irregular_conv2d.py (B2 C256 N256 41x41,
  3x3 taps within 0.75 px of the grid), over bilinear. Gate: the torch backend.
- "block": the depthwise convolution of each stage of ConvNeXt-T-DCLS, 34 taps in 17x17, DCLS over ours.
- "network": all of ConvNeXt-T-DCLS (timm's convnext_tiny, every 7x7 replaced), likewise. Gates: outputs, and gradients
  of the positions, these in float64: in float32 a tap or two lie on a pixel by rounding in one network and beside it in
  the other, where bilinear slopes jump.

Calls take turns in each round, and ratios are taken within a round; printed are the median over rounds and min..max.
"forward" is without gradients, "step" a forward and backward with gradients of the input and all parameters.

    python benchmarks/interpolation.py --output docs/results/interpolation_cpu.json
    python benchmarks/interpolation.py --device cuda --batch 16 --output interpolation_gpu.json
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from measuring import SEED, TOLERANCE, distance, environment, timed
from peers import SHAPES, Case, conv2d

import icnn_zoo

TAPS, EXTENT = 34, 17
STAGES = {"stage 1": (96, 56), "stage 2": (192, 28), "stage 3": (384, 14), "stage 4": (768, 7)}  # at 224 x 224
VERSIONS = ("v1", "max", "gauss")
READINGS: dict[str, dict[str, Any]] = {
    "bilinear": {},
    "triangle 1.0": {"interpolation": "triangle", "spread": 1.0},
    "triangle 1.5": {"interpolation": "triangle", "spread": 1.5},
    "gaussian 0.27": {"interpolation": "gaussian", "spread": 0.27},
    "gaussian 0.5": {"interpolation": "gaussian", "spread": 0.5},
    "gaussian 1.0": {"interpolation": "gaussian", "spread": 1.0},
}
Call = Callable[[bool], Any]  # with gradients or without


def gate(name: str, actual: Tensor, expected: Tensor) -> None:
    """Ends the program if two results differ."""
    error = distance(actual, expected)
    if not error <= TOLERANCE["float32"]:
        sys.exit(f"{name}: differs by {error:.1e} of the maximum, {TOLERANCE['float32']:.0e} is allowed")


def compare(calls: dict[str, Call], base: str, rounds: int, device: str, **row: Any) -> list[dict[str, Any]]:
    """Times calls in turn; rows with the seconds of each and their ratio to those of ``base``."""
    rows = []
    for mode in ("forward", "step"):
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call(mode == "step")
        for _ in range(rounds):
            for name, call in calls.items():
                seconds[name].append(timed(partial(call, mode == "step"), device))
        for name, values in seconds.items():
            ratios = [value / other for value, other in zip(values, seconds[base], strict=True)]
            middle = statistics.median(ratios)
            rows.append({**row, "mode": mode, "what": name, "over": base, "seconds": values, "ratio": middle})
            spread = f"{min(ratios):.2f}..{max(ratios):.2f}"
            label = " ".join(map(str, row.values()))
            print(f"{label:24} {mode:8} {name:14} {statistics.median(values) * 1e3:9.1f} ms {middle:6.2f} {spread}")
    return rows


def layer3(shrink: bool, rounds: int, device: str) -> list[dict[str, Any]]:
    """Rows of one layer with a shape per channel."""
    case = Case(SHAPES["layer3"].shrunk() if shrink else SHAPES["layer3"], device)

    def make(options: dict[str, Any]) -> Call:
        def call(learns: bool) -> Tensor:
            given = dict(options)
            if "spread" in given:
                given["spread"] = torch.full_like(case.positions, given["spread"]).requires_grad_(learns)
            leaves = case.leaves(case.positions) if learns else (case.input, case.weight, case.positions)
            with torch.set_grad_enabled(learns):
                output = icnn_zoo.irregular_conv2d(*leaves, **case.shape.geometry, **given)
            if learns:
                output.backward(case.grad)
            return output

        return call

    def regular(learns: bool) -> None:
        leaves = case.leaves(case.positions)
        with torch.set_grad_enabled(learns):
            output = conv2d(*leaves, case)
        if learns:
            output.backward(case.grad)

    calls = {name: make(options) for name, options in READINGS.items()}
    for name, call in calls.items():
        gate(f"layer3, {name}", call(False), make({**READINGS[name], "backend": "torch"})(False))
    return compare({"conv2d": regular, **calls}, "bilinear", rounds, device, part="layer3")


def make_dcls(channels: int, version: str) -> nn.Module:
    """A depthwise Dcls2d whose taps lie all over its box, as trained ones do."""
    from DCLS.construct.modules import Dcls2d

    logging.disable(logging.WARNING)  # which kernel it uses
    module = Dcls2d(
        channels, channels, TAPS, padding=EXTENT // 2, dilated_kernel_size=EXTENT, groups=channels, version=version
    )
    logging.disable(logging.NOTSET)
    with torch.no_grad():
        module.P.normal_(std=EXTENT / 5)
        module.clamp_parameters()
    return module


def pair(name: str, theirs: nn.Module, images: Tensor, rounds: int, **row: Any) -> list[dict[str, Any]]:
    """DCLS's network and ours of it: gates, then times."""
    ours = icnn_zoo.from_dcls(copy.deepcopy(theirs))
    gate_gradients(name, copy.deepcopy(theirs).double(), images[:1].double())

    def make(network: nn.Module) -> Call:
        def call(learns: bool) -> Tensor:
            network.zero_grad()
            with torch.set_grad_enabled(learns):
                output = network(images.clone().requires_grad_(learns))
            if learns:
                output.square().mean().backward()
            return output.detach()

        return call

    calls = {"DCLS": make(theirs), "icnn_zoo": make(ours)}
    gate(f"{name}, output", calls["icnn_zoo"](True), calls["DCLS"](True))
    return compare(calls, "icnn_zoo", rounds, images.device.type, **row)


def gate_gradients(name: str, theirs: nn.Module, images: Tensor) -> None:
    """Ends the program if the gradients of the positions differ."""
    ours = icnn_zoo.from_dcls(copy.deepcopy(theirs))
    for model in (theirs, ours):
        model(images).square().mean().backward()
    moved = [parameter for key, parameter in theirs.named_parameters() if key.split(".")[-1] == "P"]
    for of_theirs, layer in zip(moved, icnn_zoo.irregular_layers(ours).values(), strict=True):
        assert of_theirs.grad is not None
        assert layer.displacement.grad is not None
        own = layer.displacement.grad.flip(-1).permute(3, 0, 1, 2)
        inside = (of_theirs.abs() < EXTENT // 2).all(0)  # the derivative at an edge of the box is another one there
        gate(f"{name}, gradient of positions", own[:, inside], of_theirs.grad[:, inside])


def network(version: str) -> nn.Module:
    """ConvNeXt-T-DCLS."""
    model = timm.create_model("convnext_tiny").eval()  # no dropped paths: both compute the same
    for block in [module for module in model.modules() if hasattr(module, "conv_dw")]:
        block.conv_dw = make_dcls(block.conv_dw.in_channels, version)
    return model


def main() -> None:
    """Runs all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="of each part")
    parser.add_argument("--batch", type=int, default=2, help="images of blocks and networks")
    parser.add_argument("--size", type=int, default=224, help="side of the network's images")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shrink", action="store_true", help="tiny shapes, for a test")
    parser.add_argument("--output", type=Path, help="JSON to write")
    args = parser.parse_args()
    args.dtype = "float32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(SEED)
    rows = layer3(args.shrink, args.rounds, args.device)
    for version in VERSIONS[-1:] if args.shrink else VERSIONS:
        for stage, (channels, size) in STAGES.items():
            if args.shrink:
                channels, size = channels // 24, size // 7 + 1
            images = torch.randn(args.batch, channels, size, size, device=args.device)
            row = {"part": "block", "version": version, "stage": stage}
            theirs = make_dcls(channels, version).to(args.device)
            rows += pair(f"{stage}, {version}", theirs, images, args.rounds, **row)
        if not args.shrink:
            images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
            row = {"part": "network", "version": version}
            rows += pair(f"network, {version}", network(version).to(args.device), images, args.rounds, **row)
    if args.output is not None:
        args.output.write_text(json.dumps({"environment": environment(args), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

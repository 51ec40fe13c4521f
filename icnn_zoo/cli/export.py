"""``icnn-zoo export``: networks as ONNX."""

from __future__ import annotations

import argparse

from icnn_zoo.cli.options import NETWORK, Command, add_allow, add_registry, check_output, named_where
from icnn_zoo.io.files import user_path


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Input: images [B, C, H, W] in 0..255; output: logits at the output stride."
    parser.add_argument("source", help=NETWORK)
    parser.add_argument("--to", type=user_path, required=True, help="file to write, such as model.onnx")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(257, 321),
        metavar=("H", "W"),
        help="image size to check and time with; the file takes any (default: 257 321)",
    )
    add_registry(parser)
    add_allow(parser)
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def _export(options: argparse.Namespace) -> None:
    """Writes a network as ONNX in standard convolutions, checks it against onnxruntime, and times both."""
    check_output(options.to, options.force, (".onnx",))

    from icnn_zoo.deployment.onnx_export import export_onnx
    from icnn_zoo.models import PixelsToLogits
    from icnn_zoo.training.network_sources import find_source, load_task

    source = find_source(options.source, **named_where(options))
    model = load_task(source).model
    network = PixelsToLogits(model)
    print(f"Weights: {source.weights()}")
    print(export_onnx(network, options.to, (model.in_channels, *options.size), overwrite=options.force))


COMMANDS = {"export": Command(_export, _export_options)}

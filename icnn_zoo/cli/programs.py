"""The command line: one LightningCLI, reached as ``lightning`` and as ``icnn-zoo``, and the zoo's own commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from icnn_zoo.cli.pictures import erf, heatmap, shapes
from icnn_zoo.cli.zoo import ZOO_COMMANDS

ArgsType = Sequence[str] | None
ORDERS = ("registration", "execution")  # those of icnn_zoo.plan, which is not imported to print a help text


def lightning_main(args: ArgsType = None) -> None:
    """The program ``lightning``: fit, validate, test and predict."""
    _run_lightning(args)


def zoo_main(args: ArgsType = None) -> None:
    """The program ``icnn-zoo``: the zoo's own commands, else what ``lightning`` does."""
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments and arguments[0] in COMMANDS:
        try:
            COMMANDS[arguments[0]](arguments[1:])
        except (FileNotFoundError, ValueError, RuntimeError, ImportError) as error:
            raise SystemExit(f"icnn-zoo {arguments[0]}: {error}") from error
        return
    if not arguments or arguments[0] in ("-h", "--help"):
        print("The zoo's own commands (icnn-zoo COMMAND --help):")
        for name, command in COMMANDS.items():
            print(f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}")
        print()
    _run_lightning(args)


def _prepare(arguments: Sequence[str]) -> None:
    """Fetches a dataset or pretrained weights and stores them ready for training."""
    from icnn_zoo.data.preparation.catalog import DATASETS, OPTIONS, prepare

    parser = argparse.ArgumentParser(prog="icnn-zoo prepare", description=_prepare.__doc__)
    parser.add_argument("name", choices=sorted(DATASETS), help="what to prepare")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder to store it in (default: data)")
    for option, explanation in OPTIONS.items():
        parser.add_argument(f"--{option.replace('_', '-')}", action="store_true", help=explanation)
    print(prepare(**vars(parser.parse_args(arguments))))


def _plan(arguments: Sequence[str]) -> None:
    """Shows what converting a timm network would change."""
    parser = argparse.ArgumentParser(prog="icnn-zoo plan", description=_plan.__doc__)
    parser.add_argument("backbone", help="timm name, such as resnet101")
    parser.add_argument("--start", required=True, help="first module to convert, such as layer3.11; '' for all")
    parser.add_argument("--per-kernel", action="store_true", help="count one shape per kernel, not per input channel")
    parser.add_argument("--features-only", action="store_true", help="as a feature extractor, without classifier")
    parser.add_argument("--output-stride", type=int, choices=(8, 16, 32), help="dilate the feature extractor")
    parser.add_argument("--order", choices=ORDERS, default="registration", help="what comes after --start")
    parser.add_argument("--json", action="store_true", help="print the plan as data")
    options = parser.parse_args(arguments)

    import json

    import timm
    import torch

    from icnn_zoo.conversion.converter import plan
    from icnn_zoo.models.segmentation import check_backbone

    check_backbone(options.backbone)
    kwargs: dict[str, Any] = {"features_only": True} if options.features_only or options.output_stride else {}
    if options.output_stride:
        kwargs["output_stride"] = options.output_stride
    with torch.device("meta"):
        try:
            model = timm.create_model(options.backbone, **kwargs)
        except (TypeError, AssertionError) as error:
            raise ValueError(f"timm cannot build {options.backbone} with {kwargs}: {error}") from error
        runs = options.order == "execution"
        size: tuple[int, ...] = getattr(timm.get_pretrained_cfg(options.backbone), "input_size", (3, 224, 224))
        images = torch.zeros(1, *size) if runs else None
    result = plan(model, options.start, per_kernel=options.per_kernel, order=options.order, example_input=images)
    print(json.dumps(result.to_dict(), indent=2) if options.json else result)


def _export(arguments: Sequence[str]) -> None:
    """Writes a network as ONNX in standard convolutions, checks it against onnxruntime, and times both."""
    parser = argparse.ArgumentParser(
        prog="icnn-zoo export",
        description=f"{_export.__doc__} Input: RGB images [B, 3, H, W] in 0..255; output: logits at the output stride.",
    )
    parser.add_argument("source", help="checkpoint of a run or of the zoo, or a config (.yaml)")
    parser.add_argument("--to", type=Path, required=True, help="file to write, such as model.onnx")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(257, 321),
        metavar=("H", "W"),
        help="image size to check and time with; the file takes any (default: 257 321)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    options = parser.parse_args(arguments)

    from icnn_zoo.deployment.onnx_export import PixelsToLogits, export_onnx
    from icnn_zoo.training.network_sources import load_task

    network = PixelsToLogits(load_task(options.source).model)
    print(export_onnx(network, options.to, (3, *options.size), overwrite=options.force))


def _reproduce(arguments: Sequence[str]) -> None:
    """Runs the rows of a table of the paper that are missing, and writes the table."""
    from icnn_zoo.experiments.runner import EXPERIMENTS, reproduce

    rows = "; ".join(f"{name}: {', '.join(experiment.starts)}" for name, experiment in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(
        prog="icnn-zoo reproduce",
        description=f"{_reproduce.__doc__} Interrupted runs go on, finished ones are kept.",
        epilog=f"What follows -- goes to every run, such as -- --trainer.devices 4. Rows of {rows}.",
    )
    parser.add_argument("name", choices=list(EXPERIMENTS), help="which table")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="rows to run (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="seeds of each row (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder of the runs and tables")
    parser.add_argument("--config", type=Path, help="YAML file (default: the experiment's in configs/)")
    # Parsed apart, as argparse would give what follows -- to a positional argument.
    own, overrides = list(arguments), []
    if "--" in own:
        place = own.index("--")
        own, overrides = own[:place], own[place + 1 :]
    options = parser.parse_args(own)
    table = reproduce(**vars(options), overrides=overrides)
    print(f"{table.read_text(encoding='utf-8')}\nTable: {table.resolve()}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "prepare": _prepare,
    "plan": _plan,
    "export": _export,
    "shapes": shapes,
    "heatmap": heatmap,
    "erf": erf,
    "reproduce": _reproduce,
    **ZOO_COMMANDS,
}


def _run_lightning(args: ArgsType) -> Any:
    from icnn_zoo.training.lightning_cli import ZooCLI

    return ZooCLI.run(args)

"""``icnn-zoo plan``: what converting a network would change."""

from __future__ import annotations

import argparse
from typing import Any

from icnn_zoo.cli.options import Command

# Those of icnn_zoo.plan, which is not imported to print a help text.
ORDERS = ("registration", "execution")
SHAPES = ("layer", "group", "channel", "kernel")


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backbone", help="timm name, such as resnet101")
    parser.add_argument("--start", required=True, help="first module to convert, such as layer3.11; '' for all")
    parser.add_argument("--shapes", choices=SHAPES, default="channel", help="who shares a shape")
    parser.add_argument("--features-only", action="store_true", help="as a feature extractor, without classifier")
    parser.add_argument("--output-stride", type=int, choices=(8, 16, 32), help="dilate the feature extractor")
    parser.add_argument("--order", choices=ORDERS, default="registration", help="what comes after --start")
    parser.add_argument("--json", action="store_true", help="print the plan as data")


def _plan(options: argparse.Namespace) -> None:
    """Shows what converting a timm network would change."""
    import json

    import timm
    import torch

    import icnn_zoo
    from icnn_zoo.models.backbones import check_backbone

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
    result = icnn_zoo.plan(model, options.start, shapes=options.shapes, order=options.order, example_input=images)
    print(json.dumps(result.to_dict(), indent=2) if options.json else result)


COMMANDS = {"plan": Command(_plan, _plan_options)}

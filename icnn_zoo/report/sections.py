"""What the sections of the page show, as plain data for its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from icnn_zoo.analysis.heatmaps import image_scores
from icnn_zoo.analysis.statistics import ShapeStatistics, cells, known_columns
from icnn_zoo.io.label_pictures import colored
from icnn_zoo.io.rasters import visible
from icnn_zoo.nn.irregular_conv import irregular_layers
from icnn_zoo.report.payload import data_uri
from icnn_zoo.report.samples import Sample
from icnn_zoo.training.scores import score_names
from icnn_zoo.training.task import SegmentationTask
from icnn_zoo.zoo.cards import Card

Row = tuple[str, str]
_SMALL = 200  # pixels of an image's longer side below which it is shown with sharp pixels


def header_section(task: SegmentationTask, scores: Mapping[str, float]) -> dict[str, Any]:
    """What it is and its most important numbers."""
    layers = irregular_layers(task.model)
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    positions = sum(layer.displacement.numel() for layer in layers.values())
    tiles = [
        (f"{split} mIoU", f"{100 * scores[key]:.1f} %")
        for split in ("val", "test")
        if (key := f"{split}/mIoU") in scores
    ]
    tiles += [("classes", str(len(task.class_names))), ("parameters", f"{parameters:,}")]
    if layers:
        tiles += [("irregular layers", str(len(layers))), ("taps with a position", f"{positions // 2:,}")]
    where = "of its own" if task.start is None else f"from {task.start or 'the first layer'} on"
    start = f"learnable shapes {where}" if layers else "regular convolutions"
    return {"backbone": task.model.backbone_name, "start": start, "tiles": tiles}


def card_section(card: Card) -> dict[str, Any]:
    """Where a checkpoint of the zoo comes from."""
    rows = [(f"{metric.name}: {metric.value:.4f}", metric.protocol) for metric in card.metrics]
    rows += [
        ("training data", f"{card.dataset.name}, {card.dataset.split} ({card.dataset.licence})"),
        ("attribution", card.dataset.attribution),
        ("trained", f"{card.training.steps} steps, seed {card.training.seed}"),
        ("commit", card.training.commit or "unknown"),
        ("packages", ", ".join(f"{name} {version}" for name, version in card.training.packages.items())),
        ("weights", f"{card.weights.size / 1e6:.1f} MB, {card.weights.licence}"),
        ("sha256", card.weights.sha256),
    ]
    return {"description": card.description, "rows": rows}


def predictions_section(task: SegmentationTask, samples: Sequence[Sample], palette: np.ndarray) -> dict[str, Any]:
    """Images, truth where it is known, predictions, and a legend of the classes that occur."""
    figures, seen = [], set()
    for index, sample in enumerate(samples):
        image = torch.from_numpy(sample.image.copy()).permute(2, 0, 1)[None]
        with torch.no_grad():
            labels = image_scores(task, image).argmax(dim=1)[0].cpu().numpy()
        pictures = [{"what": "image", "uri": data_uri(visible(sample.image), quality=85)}]
        for what, values in (("truth", sample.mask), ("prediction", labels)):
            if values is not None:
                seen |= set(np.unique(values).tolist())
                pictures.append({"what": what, "uri": data_uri(colored(np.asarray(values), palette))})
        height, width = sample.image.shape[:2]
        figures.append(
            {
                "index": index,
                "name": sample.name,
                "height": height,
                "width": width,
                "small": max(height, width) < _SMALL,
                "pictures": pictures,
            }
        )
    known = sorted(index for index in seen if index < len(palette))  # not the label that is ignored
    legend = [(f"#{bytes(palette[index]).hex()}", task.class_names[index]) for index in known]
    return {"figures": figures, "legend": legend}


def shapes_section(statistics: Sequence[ShapeStatistics], trends: Mapping[str, float | None]) -> dict[str, Any]:
    """Statistics of the shapes, which the script draws."""
    columns = known_columns(statistics)
    layers = [{"name": entry.short_name, "cells": [cells(entry)[column] for column in columns]} for entry in statistics]
    return {"layers": layers, "columns": ("layer", *columns), "trends": _sentence(trends)}


def iou_section(class_names: Sequence[str], scores: Mapping[str, float]) -> dict[str, Any] | None:
    """IoU of every class in percent, as bars; None where it was not measured."""
    for split in ("val", "test"):
        keys = zip(class_names, score_names(split, class_names), strict=True)
        found = {name: scores[key] for name, key in keys if key in scores}
        if found:
            return {"split": split, "bars": [(name, f"{100 * value:.1f}") for name, value in found.items()]}
    return None


def settings_section(settings: Mapping[str, Any]) -> list[Row]:
    """All arguments of the network and its training."""
    return [(name, str(value)) for name, value in sorted(settings.items()) if not name.startswith("_")]


def _sentence(trends: Mapping[str, float | None]) -> str:
    shift = trends["center_shift_over_length"]
    parts = []
    if shift is not None:
        parts.append(
            f"Centers of the clouds moved by at most {shift:.2f} of a cloud's length (the paper: centers stay)."
        )
    depth = [
        f"{name} {value:+.2f}" for name in ("length", "anisotropy", "elongation") if (value := trends[name]) is not None
    ]
    if depth:
        parts.append(
            f"Rank correlation with depth: {', '.join(depth)} (the paper: deeper layers grow longer and narrower)."
        )
    return " ".join(parts)

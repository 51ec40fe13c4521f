"""The sections of the page, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import torch

from icnn_zoo.analysis.heatmaps import image_scores
from icnn_zoo.analysis.statistics import COLUMNS, ShapeStatistics, cells
from icnn_zoo.io.label_pictures import colored
from icnn_zoo.nn.irregular_conv import irregular_layers
from icnn_zoo.report.payload import data_uri
from icnn_zoo.report.samples import Sample
from icnn_zoo.training.task import SegmentationTask
from icnn_zoo.zoo.cards import Card

_SMALL = 200  # pixels of an image's longer side below which it is shown with sharp pixels


def header(title: str, task: SegmentationTask, scores: Mapping[str, float]) -> str:
    """What it is and its most important numbers."""
    layers = irregular_layers(task.model)
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    positions = sum(layer.displacement.numel() for layer in layers.values())
    start = f"learnable shapes from {task.start or 'the first layer'} on" if layers else "regular convolutions"
    tiles = [
        (f"{split} mIoU", f"{100 * scores[key]:.1f} %")
        for split in ("val", "test")
        if (key := f"{split}/mIoU") in scores
    ]
    tiles += [("classes", str(len(task.class_names))), ("parameters", f"{parameters:,}")]
    if layers:
        tiles += [("irregular layers", str(len(layers))), ("taps with a position", f"{positions // 2:,}")]
    entries = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles)
    return (
        f'<header><h1>{escape(title)}</h1><p class="quiet">{escape(str(task.hparams["backbone"]))}, {escape(start)}</p>'
        f'<dl class="tiles">{entries}</dl></header>'
    )


def card_section(card: Card) -> str:
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
    return _section("Card", f"<p>{escape(card.description)}</p>{_definitions(rows, 'facts')}")


def predictions_section(task: SegmentationTask, samples: Sequence[Sample], palette: np.ndarray) -> str:
    """Images, truth where it is known, predictions, and a legend of the classes that occur."""
    figures, seen = [], set()
    for index, sample in enumerate(samples):
        image = torch.from_numpy(sample.image.copy()).permute(2, 0, 1)[None]
        with torch.no_grad():
            labels = image_scores(task, image).argmax(dim=1)[0].cpu().numpy()
        shown = [("truth", sample.mask)] if sample.mask is not None else []
        shown.append(("prediction", labels))
        height, width = sample.image.shape[:2]
        size = f'width="{width}" height="{height}"'
        name = escape(sample.name, quote=True)
        pictures = [f'<img id="image-{index}" {size} alt="{name}" src="{data_uri(sample.image, quality=85)}">']
        for what, values in shown:
            seen |= set(np.unique(values).tolist())
            picture = data_uri(colored(np.asarray(values), palette))
            pictures.append(f'<img {size} alt="{what} of {name}" src="{picture}">')
        small = " small" if max(height, width) < _SMALL else ""
        columns = "" if sample.mask is not None else " two"
        caption = "image, truth, prediction" if sample.mask is not None else "image, prediction"
        figures.append(
            f'<figure><div class="sample{small}{columns}">{"".join(pictures)}</div>'
            f"<figcaption>{name}: {caption}</figcaption></figure>"
        )
    keys = "".join(
        f'<li><i style="background:#{bytes(palette[index]).hex()}"></i>{escape(task.class_names[index])}</li>'
        for index in sorted(seen)
        if index < len(palette)  # not the label that is ignored
    )
    body = f'<div class="samples">{"".join(figures)}</div><ul class="keys">{keys}</ul>'
    return _section("Predictions", body)


def heatmaps_section(samples: Sequence[Sample], titles: Sequence[str]) -> str:
    """Places for the heatmaps, which the script fills."""
    thumbs = "".join(
        f'<button type="button" class="thumb" data-sample="{index}" aria-pressed="false">'
        f'<img alt="{escape(sample.name, quote=True)}"></button>'
        for index, sample in enumerate(samples)
    )
    fields = "".join(
        f'<figure><div class="field" tabindex="0" role="application" data-network="{index}" aria-label="Heatmap of the '
        f'{escape(title, quote=True)} network: click a pixel, or move it with the arrow keys"><canvas></canvas></div>'
        f"<figcaption>{escape(title)}</figcaption></figure>"
        for index, title in enumerate(titles)
    )
    text = (
        "<p>Which pixels of the image the output at one pixel depends on: the gradient of the score of the class "
        "that is predicted there. Click a pixel, or move it with the arrow keys.</p>"
    )
    scale = (
        '<div class="scale-row"><span>0</span><canvas class="scale" width="180" height="10"></canvas>'
        "<span>highest gradient of this pixel</span></div>"
    )
    choices = f'<div class="choices" role="group" aria-label="Image">{thumbs}</div>' if len(samples) > 1 else ""
    status = '<p class="status quiet" id="heatmap-status" aria-live="polite"></p>'
    return _section("Heatmaps", f'{text}{choices}<div class="maps">{fields}</div>{scale}{status}', "heatmaps")


def shapes_section(statistics: Sequence[ShapeStatistics], trends: Mapping[str, float | None]) -> str:
    """A place for the shapes, which the script fills, and their statistics."""
    options = "".join(
        f'<option value="{index}">{escape(entry.short_name)}</option>' for index, entry in enumerate(statistics)
    )
    columns = "".join(f'<th scope="col">{column}</th>' for column in ("layer", *COLUMNS))
    rows = "".join(
        f'<tr><th scope="row">{escape(entry.short_name)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells(entry))
        + "</tr>"
        for entry in statistics
    )
    body = (
        "<p>Every point is a tap of one shape, coloured by its place in the regular kernel. Drag to turn, or use the "
        "arrow keys.</p>"
        f'<div class="choices"><select id="layer" aria-label="Layer">{options}</select>'
        '<button type="button" data-view="flat">Along the channels</button>'
        '<button type="button" data-view="space">In space</button></div>'
        '<div class="turn"><canvas id="turn" tabindex="0" role="img" aria-label="Kernel shapes"></canvas></div>'
        '<p class="quiet" id="shapes-status" aria-live="polite"></p>'
        f'<p class="quiet">{escape(_sentence(trends))}</p>'
        '<div class="scroll"><table><caption>Lengths in pixels of each layer\'s input</caption>'
        f"<thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    return _section("Kernel shapes", body, "shapes")


def curves_section(figures: str) -> str:
    """The training curves."""
    return _section("Training", f'<div class="curves">{figures}</div>') if figures else ""


def iou_section(class_names: Sequence[str], scores: Mapping[str, float]) -> str:
    """IoU of every class, as bars."""
    for split in ("val", "test"):
        found = {name: scores[key] for name in class_names if (key := f"{split}/IoU/{name}") in scores}
        if found:
            bars = "".join(
                f'<li><span>{escape(name)}</span><span class="track"><i style="width:{100 * value:.1f}%"></i></span>'
                f"<span>{100 * value:.1f}</span></li>"
                for name, value in found.items()
            )
            return _section(f"IoU by class, {split}, in %", f'<ul class="bars">{bars}</ul>')
    return ""


def settings_section(settings: Mapping[str, Any]) -> str:
    """All arguments of the network and its training."""
    rows = [(name, str(value)) for name, value in sorted(settings.items()) if not name.startswith("_")]
    return f"<section><details><summary>Settings</summary>{_definitions(rows)}</details></section>"


def _section(title: str, body: str, identifier: str | None = None) -> str:
    name = "" if identifier is None else f' id="{identifier}"'
    return f"<section{name}><h2>{escape(title)}</h2>{body}</section>"


def _definitions(rows: Sequence[tuple[str, str]], kind: str = "settings") -> str:
    entries = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    return f'<dl class="{kind}">{entries}</dl>'


def _sentence(trends: Mapping[str, float | None]) -> str:
    shift = trends["centre_shift_over_length"]
    parts = []
    if shift is not None:
        parts.append(
            f"Centres of the clouds moved by at most {shift:.2f} of a cloud's length (the paper: centres stay)."
        )
    depth = [
        f"{name} {value:+.2f}" for name in ("length", "anisotropy", "elongation") if (value := trends[name]) is not None
    ]
    if depth:
        parts.append(
            f"Rank correlation with depth: {', '.join(depth)} (the paper: deeper layers grow longer and narrower)."
        )
    return " ".join(parts)

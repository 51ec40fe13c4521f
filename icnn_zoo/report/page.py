"""One self-contained HTML page that shows a checkpoint: no server, no network, nothing to install."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from icnn_zoo._version import __version__
from icnn_zoo.analysis.kernel_shapes import layer_shapes
from icnn_zoo.analysis.statistics import depth_trends, shape_statistics
from icnn_zoo.io.files import check_target, replacing
from icnn_zoo.nn.irregular_conv import irregular_layers
from icnn_zoo.report.curves import curve_pictures
from icnn_zoo.report.payload import heatmaps_payload, shapes_payload
from icnn_zoo.report.samples import Sample, find_palette
from icnn_zoo.report.sections import (
    card_section,
    header_section,
    iou_section,
    predictions_section,
    settings_section,
    shapes_section,
)
from icnn_zoo.training.network_sources import Source
from icnn_zoo.training.task import SegmentationTask

LONGEST_SIDE = 513  # of a shown image; a larger one is shrunk, as its heatmaps would take minutes


def write_page(
    tasks: Mapping[str, SegmentationTask],
    path: str | Path,
    samples: Sequence[Sample],
    *,
    source: Source,
    repeats: Sequence[SegmentationTask] = (),
    start: SegmentationTask | None = None,
) -> None:
    """Writes a page with all there is to see of a checkpoint.

    It has the scores and settings, the training curves if ``metrics.csv`` of the run is there, the card of a checkpoint
    of the zoo, predictions beside truth, heatmaps that follow a click, precomputed for a grid of pixels, and kernel
    shapes that can be turned, with their statistics. A regular network has no shapes.

    Args:
        tasks: Networks by title: the first is what the page is about, others' heatmaps stand beside the first one's.
        path: The file to write, .html.
        samples: Images to show it with, of at most 513 px on the longer side; larger ones are shrunk.
        source: What the first network was loaded from: its run or card is where scores and curves come from.
        repeats: Other trainings of it from the same weights, to tell signal from chance in its shapes.
        start: What they began with, where displacements were not ``epsilon`` everywhere.

    Raises:
        ValueError: No sample, another suffix, or a position that is not a finite number.
        FileNotFoundError: The folder does not exist.
    """
    path = check_target(path, (".html",))
    if not samples:
        raise ValueError("`samples` must hold at least one image; got none.")
    samples = [_shrunk(sample) for sample in samples]
    task = next(iter(tasks.values()))
    layers = layer_shapes(task.model) if irregular_layers(task.model) else []
    began = None if start is None else start.model
    others = [other.model for other in repeats]
    statistics = shape_statistics(task.model, repeats=others, start=began) if layers else []
    payload = {
        "layers": [shapes_payload(shapes) for shapes in layers],
        "heatmaps": [heatmaps_payload(tasks, sample.image) for sample in samples],
        "classes": list(task.class_names),
    }
    metrics, card = source.metrics(), source.card()
    scores = {name: series[-1][1] for name, series in metrics.items()}
    if card is not None:
        scores |= {metric.name: metric.value for metric in card.metrics}
    page = _render(
        title=source.title,
        header=header_section(task, scores),
        card=None if card is None else card_section(card),
        predictions=predictions_section(task, samples, find_palette(source, task)),
        networks=list(tasks),
        shapes=shapes_section(statistics, depth_trends(statistics)) if layers else None,
        curves=curve_pictures(metrics),
        iou=iou_section(task.class_names, scores),
        settings=settings_section(dict(task.hparams)),
        data=payload,
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _render(data: Mapping[str, Any], **content: Any) -> str:
    """The template with its content, escaped, and with the style, scripts and packed data as they are."""
    files = resources.files("icnn_zoo.report") / "assets"
    texts = {path: files.joinpath(path).read_text("utf-8") for path in ("page.css", "heatmaps.js", "shapes.js")}
    environment = Environment(
        loader=PackageLoader("icnn_zoo.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # "<" inside JSON strings could close the script element; the escape means the same in JSON.
    packed = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return environment.get_template("page.html").render(
        **content,
        version=__version__,
        style=texts["page.css"],
        script=texts["heatmaps.js"] + "\n" + texts["shapes.js"],
        data=packed,
    )


def _shrunk(sample: Sample) -> Sample:
    height, width = sample.image.shape[:2]
    factor = LONGEST_SIDE / max(height, width)
    if factor >= 1:
        return sample
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    mask = sample.mask
    if mask is not None:
        mask = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    return Sample(sample.name, cv2.resize(sample.image, size, interpolation=cv2.INTER_AREA), mask)

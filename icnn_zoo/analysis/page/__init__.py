"""One self-contained HTML page that shows a checkpoint: no server, no network, nothing to install."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from icnn_zoo._version import __version__
from icnn_zoo.analysis.files import check_target, replacing
from icnn_zoo.analysis.page import parts
from icnn_zoo.analysis.page.curves import curves, read_metrics, value_at
from icnn_zoo.analysis.page.payload import heatmaps_payload, shapes_payload
from icnn_zoo.analysis.page.samples import Sample
from icnn_zoo.analysis.shapes import layer_shapes
from icnn_zoo.analysis.statistics import depth_trends, shape_statistics
from icnn_zoo.conversion import irregular_layers
from icnn_zoo.task import SegmentationTask

LONGEST_SIDE = 513  # of a shown image; a larger one is shrunk, as its heatmaps would take minutes


def write_page(
    task: SegmentationTask,
    path: str | Path,
    samples: Sequence[Sample],
    *,
    source: str | Path,
    against: SegmentationTask | None = None,
) -> None:
    """Writes a page with all there is to see of a checkpoint.

    It has the scores and settings, the training curves if ``metrics.csv`` of the run is there, the card if
    ``card.json`` lies beside the checkpoint, predictions beside truth, heatmaps that follow a click, precomputed for a
    grid of pixels, and kernel shapes that can be turned, with their statistics. A regular network has no shapes.

    Args:
        task: The network.
        path: The file to write, .html.
        samples: Images to show it with, of at most 513 px on the longer side; larger ones are shrunk.
        source: What the network was loaded from; its run folder is where the curves come from.
        against: A second network, whose heatmaps stand beside the first one's.

    Raises:
        ValueError: No sample, another suffix, or a position that is no finite number.
        FileNotFoundError: The folder does not exist.
    """
    path, source = check_target(path, (".html",)), Path(source)
    if not samples:
        raise ValueError("`samples` must hold at least one image; got none.")
    samples = [_shrunk(sample) for sample in samples]
    tasks = {"irregular" if task.start is not None else "regular": task}
    if against is not None:
        second = "irregular" if against.start is not None else "regular"
        tasks[second if second not in tasks else f"{second}, the other"] = against
    has_shapes = bool(irregular_layers(task.model))
    statistics = shape_statistics(task.model) if has_shapes else []
    payload = {
        "layers": [shapes_payload(shapes) for shapes in layer_shapes(task.model)] if has_shapes else [],
        "heatmaps": [heatmaps_payload(tasks, sample.image) for sample in samples],
        "classes": list(task.class_names),
    }
    metrics, card = _metrics(source), _card(source)
    scores = {name: value for name, series in metrics.items() if (value := value_at(series, _step(source))) is not None}
    sections = [
        parts.header(_name(source, card), task, scores, card),
        parts.card_section(card),
        parts.predictions(task, samples),
        parts.heatmap_section(samples, list(tasks)),
        parts.shapes_section(statistics, depth_trends(statistics)) if has_shapes else "",
        parts.curve_section(curves(metrics)),
        parts.iou_section(task, scores),
        parts.settings(dict(task.hparams)),
        f"<footer>Made by icnn-zoo {escape(__version__)}.</footer>",
    ]
    with replacing(path) as temporary:
        temporary.write_text(_assemble(_name(source, card), "\n".join(sections), payload), encoding="utf-8")


def _assemble(title: str, body: str, payload: Mapping[str, Any]) -> str:
    files = resources.files(__name__)
    # "<" inside JSON strings could close the script element; the escape means the same in JSON.
    data = json.dumps(payload, separators=(",", ":")).replace("<", "\\u003c")
    page = files.joinpath("page.html").read_text(encoding="utf-8")
    inserts = {
        "@TITLE@": escape(title),
        "@STYLE@": files.joinpath("page.css").read_text(encoding="utf-8"),
        "@BODY@": body,
        "@DATA@": data,
        "@SCRIPT@": "\n".join(
            files.joinpath(name).read_text(encoding="utf-8") for name in ("heatmaps.js", "shapes.js")
        ),
    }
    before = ""
    for mark, text in inserts.items():  # in the order of the template, so that no insert is searched for marks
        head, _, page = page.partition(mark)
        before += head + text
    return before + page


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


def _name(source: Path, card: Mapping[str, Any] | None) -> str:
    if card and isinstance(card.get("name"), str):
        return str(card["name"])
    return f"{source.parent.parent.parent.name}, {source.name}" if source.suffix == ".ckpt" else source.stem


def _metrics(source: Path) -> dict[str, list[tuple[int, float]]]:
    file = source.parent.parent / "metrics.csv"
    return read_metrics(file) if source.suffix == ".ckpt" and file.is_file() else {}


def _step(source: Path) -> int | None:
    """The optimizer step at which a checkpoint was saved: later scores are not its own."""
    if source.suffix != ".ckpt":
        return None
    step: int = torch.load(source, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    return step


def _card(source: Path) -> dict[str, Any] | None:
    file = source.parent / "card.json"
    if not file.is_file():
        return None
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no JSON: {error}. Mend the card, or move it away.") from error
    if not isinstance(card, dict):
        raise ValueError(f"{str(file)!r} is no card: it must hold an object with name, description, metrics, ....")
    return card

"""The commands that look: ``icnn-zoo shapes``, ``heatmap`` and ``erf``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icnn_zoo.cli.options import (
    FIGURE_SUFFIXES,
    NETWORK,
    Command,
    add_allow,
    add_registry,
    add_white_level,
    named_where,
)
from icnn_zoo.io.files import check_target, replacing, user_path

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from icnn_zoo.training.network_sources import Source
    from icnn_zoo.training.task import SegmentationTask

_SAMPLES = 16  # images for the receptive field if none is given


def _shapes_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=f"{NETWORK}; with --animate the folder of a run")
    parser.add_argument("images", type=user_path, nargs="*", help="images for the page (default: validation data)")
    parser.add_argument("--to", type=user_path, help="picture to write: .png or .svg, or .gif with --animate")
    parser.add_argument("--three-d", action="store_true", help="draw rows, columns and channels in space")
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="only these layers, by full name or unique ending")
    parser.add_argument(
        "--repeats",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="other trainings that began with the same weights: what share of the displacement is common to all",
    )
    parser.add_argument("--animate", action="store_true", help="animate the shapes that ShapesLogger logged in a run")
    parser.add_argument("--json", action="store_true", help="print the statistics as data")
    add_white_level(parser)
    add_registry(parser)
    add_allow(parser)
    _add_html(parser)


def _shapes(options: argparse.Namespace) -> None:
    """Draws the learned kernel shapes of a network (PNG, SVG, animated GIF), or prints their statistics."""
    if options.animate:
        from icnn_zoo.analysis.shape_animation import animate_shapes

        if options.to is None:
            raise ValueError("--animate needs a file to write: --to shapes.gif.")
        frames = animate_shapes(options.source, options.to, layers=options.layers)
        print(f"Written: {options.to}, {frames} frames")
        return
    if options.to is not None:
        check_target(options.to, FIGURE_SUFFIXES)
    _check_html(options)

    from icnn_zoo.analysis import depth_trends, plot_shapes, plot_shapes_3d, shape_statistics, statistics_table
    from icnn_zoo.training.network_sources import find_source, load_start_of, load_task

    source, tasks = _load_all(options)
    task = next(iter(tasks.values()))
    others = [load_task(find_source(name, **named_where(options))) for name in options.repeats]
    start = load_start_of(source) if others else None
    # Fails early where there is no irregular layer.
    statistics = shape_statistics(
        task.model,
        layers=options.layers,
        repeats=[other.model for other in others],
        start=None if start is None else start.model,
    )
    if options.json:
        data = [entry.to_dict() for entry in statistics]
        print(json.dumps({"layers": data, "trends": depth_trends(statistics)}, indent=2))
    else:
        from icnn_zoo.io.console import print_table

        print_table(statistics_table(statistics))
    if options.to is not None:
        figure = (plot_shapes_3d if options.three_d else plot_shapes)(task.model, options.layers)
        _save(figure, options.to, quiet=options.json)
    _write_html(options, source, tasks, options.images, others, start)


def _heatmap_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=NETWORK)
    parser.add_argument("image", type=user_path, help="image file")
    parser.add_argument("--pixel", type=int, nargs=2, required=True, metavar=("ROW", "COL"), help="the output pixel")
    parser.add_argument("--class", dest="class_name", metavar="NAME", help="derive this class's score; else their sum")
    _add_against(parser)
    parser.add_argument("--to", type=user_path, help="picture to write: .png or .svg")
    add_white_level(parser)
    add_registry(parser)
    add_allow(parser)
    _add_html(parser)


def _heatmap(options: argparse.Namespace) -> None:
    """Shows which pixels of an image the output at one pixel depends on."""
    _check_outputs(options)

    from icnn_zoo.analysis.heatmaps import check_pixel, plot_heatmaps
    from icnn_zoo.analysis.heatmaps import heatmap as compute
    from icnn_zoo.io.files import require_file
    from icnn_zoo.io.rasters import read_pixels, visible

    require_file(options.image)
    source, tasks = _load_all(options)
    channels = {task.model.in_channels for task in tasks.values()}
    if len(channels) > 1:
        raise ValueError(f"both networks must take images of as many channels; got {sorted(channels)}.")
    image, pixel = read_pixels(options.image, channels.pop(), options.white_level), tuple(options.pixel)
    check_pixel(pixel, image.shape[:2])
    classes = {name: class_index(task, options.class_name) for name, task in tasks.items()}
    if options.to is not None:
        of_class = f", {options.class_name}" if options.class_name else ""
        maps = {
            f"{name}{of_class}": compute(task, as_tensor(image), [pixel], [classes[name]])[0]
            for name, task in tasks.items()
        }
        _save(plot_heatmaps(visible(image), maps, pixel), options.to)
    _write_html(options, source, tasks, [options.image])


def _erf_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=NETWORK)
    parser.add_argument(
        "images", type=user_path, nargs="*", help=f"image files; none: {_SAMPLES} of the run's validation data"
    )
    parser.add_argument("--class", dest="class_name", metavar="NAME", help="derive this class's score; else their sum")
    _add_against(parser)
    parser.add_argument("--to", type=user_path, help="picture to write: .png or .svg")
    parser.add_argument("--json", action="store_true", help="print the radii as data")
    add_white_level(parser)
    add_registry(parser)
    add_allow(parser)
    _add_html(parser)


def _erf(options: argparse.Namespace) -> None:
    """Measures the effective receptive field of a network, averaged over images."""
    if options.to is not None or options.html is not None:
        _check_outputs(options)

    from icnn_zoo.analysis.receptive_field import effective_receptive_field, plot_receptive_fields
    from icnn_zoo.report.samples import find_samples

    source, tasks = _load_all(options)
    classes = {name: class_index(task, options.class_name) for name, task in tasks.items()}
    samples = find_samples(
        source, next(iter(tasks.values())), options.images, _SAMPLES, white_level=options.white_level
    )
    images = [as_tensor(sample.image) for sample in samples]
    fields = {name: effective_receptive_field(task, images, class_index=classes[name]) for name, task in tasks.items()}
    summaries = {name: field.summary() for name, field in fields.items()}
    if options.json:
        print(json.dumps(summaries, indent=2))
    else:
        for name, summary in summaries.items():
            radii = ", ".join(f"{share} % within {summary[f'radius_{share}']:.1f} px" for share in (50, 90, 95))
            print(f"{name}: {radii} of the pixel, over {len(images)} images")
    if options.to is not None:
        _save(plot_receptive_fields(fields), options.to, quiet=options.json)
    _write_html(options, source, tasks, options.images)


def as_tensor(image: np.ndarray) -> Any:
    """Pixels [H, W, C] to a tensor [C, H, W]."""
    import torch

    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def class_index(task: SegmentationTask, name: str | None) -> int | None:
    """The index of a class by its name, None for None.

    Raises:
        ValueError: The network knows no such class; the message lists those it knows.
    """
    if name is None:
        return None
    if name not in task.class_names:
        raise ValueError(f"--class {name!r} is not a class of this network; it knows {', '.join(task.class_names)}.")
    return task.class_names.index(name)


def _add_against(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", metavar="SOURCE", help="a second network, to show beside the first")


def _add_html(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", type=user_path, metavar="FILE", help="write one page that shows it all")


def _check_outputs(options: argparse.Namespace) -> None:
    if options.to is None and options.html is None:
        raise ValueError("there is nothing to write: give --to picture.png, --to picture.svg or --html page.html.")
    if options.to is not None:
        check_target(options.to, FIGURE_SUFFIXES)
    _check_html(options)


def _check_html(options: argparse.Namespace) -> None:
    if options.html is not None:
        check_target(options.html, (".html",))


def _load_all(options: argparse.Namespace) -> tuple[Source, dict[str, SegmentationTask]]:
    """What the network was named by, and the network and the one to compare it with, by titles that tell them apart."""
    from icnn_zoo.nn.irregular_conv import irregular_layers
    from icnn_zoo.training.network_sources import find_source, load_task

    named = [options.source, *([options.against] if getattr(options, "against", None) is not None else [])]
    sources = [find_source(name, **named_where(options)) for name in named]
    tasks = [load_task(source) for source in sources]
    for source in sources:
        print(f"Weights: {source.weights()}", file=sys.stderr)  # beside the data that --json prints
    titles = ["irregular" if irregular_layers(task.model) else "regular" for task in tasks]
    if len(set(titles)) < len(titles):
        titles = [str(name) for name in named]
    if len(set(titles)) < len(titles):
        raise ValueError(f"--against names the same network: {named[0]}.")
    return sources[0], dict(zip(titles, tasks, strict=True))


def _save(figure: Any, path: Path, quiet: bool = False) -> None:
    save_figure(figure, path)
    if not quiet:  # where data are printed, nothing else is
        print(f"Written: {path}")


def _write_html(
    options: argparse.Namespace,
    source: Source,
    tasks: Mapping[str, SegmentationTask],
    images: Sequence[Path],
    repeats: Sequence[SegmentationTask] = (),
    start: SegmentationTask | None = None,
) -> None:
    if options.html is None:
        return
    from icnn_zoo.report.page import write_page
    from icnn_zoo.report.samples import find_samples

    samples = find_samples(source, next(iter(tasks.values())), images, white_level=options.white_level)
    write_page(tasks, options.html, samples, source=source, repeats=repeats, start=start)
    if not getattr(options, "json", False):
        print(f"Written: {options.html}")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG or SVG, by its suffix.

    Raises:
        ValueError: Another suffix.
        FileNotFoundError: The folder does not exist.
    """
    path = check_target(path, FIGURE_SUFFIXES)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


COMMANDS = {
    "shapes": Command(_shapes, _shapes_options),
    "heatmap": Command(_heatmap, _heatmap_options),
    "erf": Command(_erf, _erf_options),
}

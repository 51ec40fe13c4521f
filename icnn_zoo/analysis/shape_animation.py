"""Shapes over training: records of positions, and the animation made of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from icnn_zoo.analysis.kernel_shapes import LayerShapes, find_layers
from icnn_zoo.analysis.shape_figures import MOST_POINTS, draw_shapes, reach
from icnn_zoo.io.files import check_target, replacing

FOLDER = "shapes"  # of a run folder
_MOST_FRAMES = 60


def save_record(folder: Path, step: int, all_shapes: Sequence[LayerShapes]) -> Path:
    """Writes the positions of a step to ``step_<step>.npz``: at most as many shapes of a layer as a figure draws."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"step": np.array(step)}
    layers = []
    for index, shapes in enumerate(all_shapes):
        thin = shapes.thinned(max(1, MOST_POINTS // len(shapes.grid)))
        layers.append({"name": shapes.name, "kernel_size": shapes.kernel_size, "num_shapes": shapes.total})
        arrays[f"grid_{index}"] = thin.grid.astype(np.float32)
        arrays[f"positions_{index}"] = thin.positions.astype(np.float32)
        if thin.spread is not None:
            arrays[f"spread_{index}"] = thin.spread.astype(np.float32)
    path = folder / f"step_{step:07d}.npz"
    with replacing(path) as temporary:
        np.savez(temporary, layers=np.array(json.dumps(layers)), **arrays)
    return path


def read_record(path: Path) -> tuple[int, list[LayerShapes]]:
    """Reads what :func:`save_record` wrote: the step, and shapes as they were then.

    Raises:
        ValueError: The file is of another kind.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            layers = json.loads(str(file["layers"]))
            return int(file["step"]), [
                LayerShapes(
                    layer["name"],
                    tuple(layer["kernel_size"]),
                    file[f"grid_{index}"].astype(np.float64),
                    file[f"positions_{index}"].astype(np.float64),
                    layer["num_shapes"],
                    file[f"spread_{index}"].astype(np.float64) if f"spread_{index}" in file else None,
                )
                for index, layer in enumerate(layers)
            ]
    except Exception as error:  # of many kinds for a file of another kind
        raise ValueError(f"{str(path)!r} is not a record of shapes: {error}") from error


def animate_shapes(
    run: str | Path, path: str | Path, *, layers: Sequence[str] | None = None, frame_seconds: float = 0.15
) -> int:
    """Writes the shapes over a run as an animated GIF, one frame per record, with limits that do not move.

    Args:
        run: Folder of a run that was trained with :class:`icnn_zoo.training.callbacks.ShapesLogger`, or a checkpoint
            in it.
        path: The GIF to write.
        layers: Names of the layers to draw, in full or a unique ending; None for all.
        frame_seconds: How long a frame is shown; the last one ten times as long.

    Returns:
        The number of frames, 60 at most, evenly chosen.

    Raises:
        FileNotFoundError: The folder to write into does not exist, or the run has no records.
        ValueError: Another suffix than .gif, fewer than two records, records of different layers, or no such layer.
    """
    path = check_target(path, (".gif",))
    files = find_records(run)
    files = [files[index] for index in np.unique(np.linspace(0, len(files) - 1, _MOST_FRAMES).round().astype(int))]
    records = [read_record(file) for file in files]
    names = [shapes.name for shapes in records[0][1]]
    for file, (_, found) in zip(files, records, strict=True):
        if [shapes.name for shapes in found] != names:
            raise ValueError(f"{str(file)!r} holds other layers than {files[0].name}: they are of different runs.")
    wanted = find_layers(layers, names)
    records = [(step, [found[names.index(name)] for name in wanted]) for step, found in records]
    reaches = np.max([[reach(shapes) for shapes in found] for _, found in records], axis=0).tolist()
    frames = [_frame(found, f"step {step}", reaches) for step, found in records]
    # One palette for all frames, as colors would flicker with one each.
    palette = frames[-1].quantize(256, dither=Image.Dither.NONE)
    pictures = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    milliseconds = [round(1000 * frame_seconds)] * (len(frames) - 1) + [round(10_000 * frame_seconds)]
    with replacing(path) as temporary:
        pictures[0].save(
            temporary, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0, optimize=False
        )
    return len(frames)


def find_records(run: str | Path) -> list[Path]:
    """The records of a run in the order of steps; ``run`` is its folder or a checkpoint in it."""
    run = Path(run)
    folders = [run, run / FOLDER, run.parent / FOLDER, run.parent.parent / FOLDER]
    files: list[Path] = next((found for folder in folders if (found := sorted(folder.glob("step_*.npz")))), [])
    if not files:
        raise FileNotFoundError(
            f"there are no records of shapes in {str(run / FOLDER)!r}: name the folder of a run that was trained with "
            "--trainer.callbacks+=icnn_zoo.training.callbacks.ShapesLogger."
        )
    if len(files) < 2:
        raise ValueError(f"{str(files[0].parent)!r} holds one record of shapes; an animation needs two or more.")
    return files


def _frame(all_shapes: Sequence[LayerShapes], title: str, reaches: Sequence[float]) -> Image.Image:
    figure = draw_shapes(all_shapes, title, reaches)
    figure.set_dpi(80)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])

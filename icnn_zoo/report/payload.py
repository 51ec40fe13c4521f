"""What the page's script draws from: positions and heatmaps, packed small."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from icnn_zoo.analysis.colors import hex_color, tap_colors
from icnn_zoo.analysis.heatmaps import heatmap, image_scores
from icnn_zoo.analysis.kernel_shapes import LayerShapes
from icnn_zoo.analysis.shape_figures import reach
from icnn_zoo.analysis.statistics import principal_axes, tap_covariances
from icnn_zoo.training.task import SegmentationTask

MOST_POINTS = 6000  # of a layer: what a phone turns smoothly
GRID = 13  # cells along an image's longer side
TILE = 56  # pixels of a heatmap's longer side
_BATCH = 16


def shapes_payload(shapes: LayerShapes) -> dict[str, Any]:
    """One layer's positions as base64 of little-endian int16 (row, col), in units of ``scale`` pixels."""
    thin = shapes.thinned(max(1, MOST_POINTS // len(shapes.grid)))
    scale = max(float(abs(thin.positions).max()), 1e-6) / 32767
    packed = (thin.positions / scale).round().astype("<i2")
    ellipses = [
        [*mean, *principal_axes(covariance)]
        for mean, covariance in zip(shapes.positions.mean(axis=0), tap_covariances(shapes), strict=True)
        if not shapes.has_free_taps
    ]
    taps, centers, radii = shapes.spread_circles()
    spreads = [[int(tap), *center, *radius] for tap, center, radius in zip(taps, centers, radii, strict=True)]
    return {
        "name": shapes.name,
        "colors": [hex_color(color) for color in tap_colors(shapes.kernel_size, len(shapes.grid))],
        "grid": np.unique(shapes.grid, axis=0).tolist(),
        "count": len(thin.positions),
        "total": len(shapes.positions),
        "reach": round(reach(shapes), 3),
        "scale": scale,
        "positions": base64.b64encode(packed.tobytes()).decode(),
        "ellipses": [[round(float(value), 4) for value in ellipse] for ellipse in ellipses],
        "spreads": [[tap, *(round(float(value), 4) for value in circle)] for tap, *circle in spreads],
    }


def heatmaps_payload(tasks: Mapping[str, SegmentationTask], image: np.ndarray) -> dict[str, Any]:
    """Heatmaps of a grid of pixels, of the class that each network predicts there: for each network one WebP atlas.

    A tile is a heatmap, shrunk, divided by its highest 0.5 % and its square root taken, so that 8 bits show the faint
    parts too. Cell (r, c) of the grid is the tile in row r and column c of the atlas.

    Args:
        tasks: Networks by title.
        image: [H, W, C], as the networks take it.

    Returns:
        Plain data for the page's script.
    """
    height, width = image.shape[:2]
    cells = [max(1, round(GRID * side / max(height, width))) for side in (height, width)]
    tile = [max(1, round(TILE * side / max(height, width))) for side in (height, width)]
    rows, cols = (
        ((np.arange(number) + 0.5) * side / number - 0.5).round().astype(int).tolist()
        for number, side in zip(cells, (height, width), strict=True)
    )
    pixels = [(row, col) for row in rows for col in cols]
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)
    networks = []
    for title, task in tasks.items():
        with torch.no_grad():
            labels = image_scores(task, tensor[None]).argmax(dim=1)[0].cpu()
        classes: list[int | None] = [int(labels[pixel]) for pixel in pixels]
        atlas = np.zeros((cells[0] * tile[0], cells[1] * tile[1]), np.uint8)
        radii = []
        for start in range(0, len(pixels), _BATCH):
            chosen = slice(start, start + _BATCH)
            maps = heatmap(task, tensor, pixels[chosen], classes[chosen]).cpu().numpy()
            for index, values in enumerate(maps, start):
                row, col = index // cells[1] * tile[0], index % cells[1] * tile[1]
                atlas[row : row + tile[0], col : col + tile[1]] = _tile(values, tile)
                radii.append(round(_median_distance(values, pixels[index]), 1))
        networks.append({"title": title, "classes": classes, "radii": radii, "atlas": data_uri(atlas, quality=55)})
    return {"rows": rows, "cols": cols, "tile": tile, "size": [height, width], "networks": networks}


def data_uri(picture: np.ndarray, quality: int | None = None) -> str:
    """A picture as WebP in a data: address; lossless if no quality is given."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if quality is None else {"quality": quality}
    Image.fromarray(picture).save(buffer, "WEBP", method=4, **options)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _tile(values: np.ndarray, tile: list[int]) -> np.ndarray:
    small = cv2.resize(values, (tile[1], tile[0]), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), 0.7)
    top = float(np.quantile(small, 0.995)) or float(small.max()) or 1.0
    quantized: np.ndarray = (255 * np.sqrt(np.clip(small / top, 0, 1))).round().astype(np.uint8)
    return quantized


def _median_distance(values: np.ndarray, pixel: tuple[int, int]) -> float:
    """Distance from the pixel within which half of the gradient lies, in pixels; 0 for no gradient at all."""
    distance = np.hypot(*np.ogrid[-pixel[0] : len(values) - pixel[0], -pixel[1] : values.shape[1] - pixel[1]]).ravel()
    order = distance.argsort()
    cumulated = values.ravel()[order].astype(np.float64).cumsum()
    return float(distance[order][np.searchsorted(cumulated, cumulated[-1] / 2)]) if cumulated[-1] > 0 else 0.0

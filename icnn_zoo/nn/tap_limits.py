"""Where taps may go: along one axis only, within a limit, or at a price for distance; and where free ones start."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from icnn_zoo.nn.irregular_conv import IrregularConv2d, irregular_layers
from icnn_zoo.nn.tap_restriction import LEARNED, Axes, Limit, pixel_limits

Start = Literal["normal", "uniform", "grid"]


@torch.no_grad()
def place_taps(
    layer: IrregularConv2d,
    start: Start | Tensor = "normal",
    *,
    std: float = 0.5,
    generator: torch.Generator | None = None,
) -> None:
    """Puts the taps of a layer where they are to start.

    Args:
        layer: The layer, with free taps (``taps=...``) or those of a regular kernel.
        start: "normal" draws positions around the center with standard deviation ``std``, those beyond the extent
            (``kernel_size`` times dilation) at its border; "uniform" draws them anywhere in the extent; "grid" spaces
            them evenly over the extent, in rows and columns as square as their number allows; a tensor of positions in
            pixels, (row, col) from the center, that broadcasts to ``layer.positions``.
        std: Of "normal", in pixels.
        generator: What draws; None for torch's own, which ``torch.manual_seed`` seeds.

    Raises:
        ValueError: An unknown ``start``, a ``std`` that is not positive, taps that no grid within the extent holds, or
            positions of another shape, not finite, or beyond the extent.

    Example:
        >>> import torch, icnn_zoo
        >>> layer = icnn_zoo.IrregularConv2d(8, 8, (1, 9), padding="same", taps=3)
        >>> icnn_zoo.place_taps(layer, "grid")
        >>> layer.positions[0].tolist()
        [[0.0, -4.0], [0.0, 0.0], [0.0, 4.0]]
    """
    low, high = pixel_limits(layer, "extent")
    shape = layer.displacement.shape
    options: dict[str, Any] = {"dtype": torch.float64, "generator": generator}
    if isinstance(start, Tensor):
        positions = _given(start.detach().to(low), shape, low, high)
    elif start == "normal":
        if not (std > 0 and math.isfinite(std)):
            raise ValueError(f"`std` must be a positive number of pixels; got {std}.")
        positions = torch.maximum(torch.minimum(torch.randn(shape, **options).to(low) * std, high), low)
    elif start == "uniform":
        positions = low + torch.rand(shape, **options).to(low) * (high - low)
    elif start == "grid":
        positions = _even_grid(shape[-2], low, high).expand(shape)
    else:
        raise ValueError(f"`start` must be one of {', '.join(get_args(Start))}, or positions; got {start!r}.")
    _set(layer, positions - layer.regular_grid)


def _set(layer: IrregularConv2d, displacement: Tensor) -> None:
    if isinstance(layer.displacement, nn.Parameter):
        layer.displacement.copy_(displacement)
    else:
        layer.displacement = displacement  # by the parametrization's right inverse
    if layer.step_watch is not None:
        layer.step_watch.forget()


def _given(positions: Tensor, shape: torch.Size, low: Tensor, high: Tensor) -> Tensor:
    try:
        positions = positions.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"`start` must be positions that broadcast to {list(shape)}; got {list(positions.shape)}."
        ) from None
    beyond = ~((positions >= low) & (positions <= high)).all(-1)
    if beyond.any():
        place = tuple(beyond.nonzero()[0].tolist())
        raise ValueError(
            f"`start` must lie within the extent, rows and columns {low.tolist()} to {high.tolist()}; got "
            f"{positions[place].tolist()} at {list(place)}, and {int(beyond.sum()) - 1} more."
        )
    return positions


def _even_grid(taps: int, low: Tensor, high: Tensor) -> Tensor:
    height, width = (int(size) + 1 for size in (high - low))
    fits = [(rows, taps // rows) for rows in range(1, taps + 1) if taps % rows == 0]
    fits = [(rows, cols) for rows, cols in fits if rows <= height and cols <= width]
    if not fits:
        raise ValueError(f"`start`: no grid of {taps} taps fits the extent of {height} x {width} pixels.")
    rows, cols = min(fits, key=lambda fit: abs(math.log(fit[0] * width / (fit[1] * height))))
    axes = []
    for axis, count in enumerate((rows, cols)):
        first, last = float(low[axis]), float(high[axis])
        steps = torch.linspace(first, last, count, dtype=torch.float64) if count > 1 else torch.zeros(1)
        axes.append(steps.to(low))
    return torch.cartesian_prod(*axes).reshape(-1, 2)


@torch.no_grad()
def limit_taps(layer: IrregularConv2d, *, axes: Axes = "both", limit: Limit = None) -> None:
    """Says where the taps of a layer may go from now on; copies and pickles of the layer keep it.

    Args:
        layer: The layer.
        axes: "rows" learns row coordinates only (taps move up and down), "columns" column coordinates only, "both"
            both. The others are rounded to whole pixels, so that bilinear taps read one row or column, and stay there.
        limit: None for none; a number: the most that a coordinate may be away from the regular grid, in pixels (from
            the center for free taps); "extent": positions stay in the kernel's own box, ``kernel_size`` times dilation.
            The forward never reads beyond it, and :func:`icnn_zoo.bound_positions` and :func:`icnn_zoo.move_positions`
            end each step within it; a tap at the limit has a gradient and can come back.

    Raises:
        ValueError: Unknown ``axes``, or a ``limit`` that is neither positive nor "extent".

    Example:
        >>> import torch, icnn_zoo
        >>> layer = icnn_zoo.IrregularConv2d(8, 8, (1, 5), padding="same")
        >>> icnn_zoo.limit_taps(layer, axes="columns", limit=3.0)
        >>> layer(torch.randn(1, 8, 9, 9)).sum().backward()
        >>> bool((layer.displacement.grad[..., 0] == 0).all())
        True
    """
    if axes not in get_args(Axes):
        raise ValueError(f"`axes` must be one of {', '.join(get_args(Axes))}; got {axes!r}.")
    valid = limit in (None, "extent") if limit is None or isinstance(limit, str) else math.isfinite(limit) and limit > 0
    if not valid:
        raise ValueError(f'`limit` must be a positive number of pixels, "extent", or None; got {limit!r}.')
    layer.axes, layer.limit = axes, limit
    positions = layer.regular_grid + layer.displacement
    if axes != "both":
        frozen = 1 if axes == "rows" else 0
        positions[..., frozen] = positions[..., frozen].round()
    low, high = pixel_limits(layer, limit)
    positions = torch.maximum(torch.minimum(positions, high), low)
    # Taps that may stay where they are keep their displacement to the bit.
    stay = positions == layer.regular_grid + layer.displacement
    _set(layer, torch.where(stay, layer.displacement, positions - layer.regular_grid))


def distance_penalty(model: nn.Module, beyond: float = 0.0) -> Tensor:
    """A term for the loss that pulls taps back: how far they are from the regular grid, squared.

    Args:
        model: A network with irregular layers.
        beyond: Distance in pixels that costs nothing.

    Returns:
        The sum over layers, tied ones once, of the mean over their taps of ``max(0, distance - beyond) ** 2``; of free
        taps the distance is that from the center, and along the axis that is learned where only one is.
        Differentiable, also where a tap has not moved.

    Raises:
        ValueError: ``model`` has no irregular layer, or ``beyond`` is negative.

    Example:
        >>> import torch, icnn_zoo
        >>> model = torch.nn.Sequential(icnn_zoo.IrregularConv2d(3, 8, 3, epsilon=0.5))
        >>> round(icnn_zoo.distance_penalty(model).item(), 3)
        0.5
    """
    if not beyond >= 0:
        raise ValueError(f"`beyond` must not be negative; got {beyond}.")
    layers = {id(layer.displacement): layer for layer in irregular_layers(model).values()}
    if not layers:
        raise ValueError(f"`model` must have irregular layers; {type(model).__name__} has none.")
    terms = []
    for layer in layers.values():
        squares = layer.displacement[..., LEARNED[layer.axes]].square().sum(-1)
        if beyond > 0:
            over = squares > beyond**2
            # The root has no derivative at 0, where nothing is over.
            squares = torch.where(over, (torch.where(over, squares, 1.0).sqrt() - beyond).square(), 0.0)
        terms.append(squares.mean())
    return torch.stack(terms).sum()

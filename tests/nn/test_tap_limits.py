"""Where taps start, and where they may go."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import icnn_zoo
from icnn_zoo import IrregularConv2d, distance_penalty, limit_taps, place_taps
from icnn_zoo.analysis import warn_of_dead_taps


def train(layer: IrregularConv2d, hook: Any, steps: int = 3) -> None:
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(icnn_zoo.parameter_groups(model, lr=0.0, position_lr=1.0, head=None))
    hook(optimizer, model)
    image = torch.randn(2, layer.in_channels, 9, 9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(image).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("hook", [icnn_zoo.bound_positions, icnn_zoo.move_positions])
@pytest.mark.parametrize(("axes", "frozen"), [("rows", 1), ("columns", 0)])
def test_one_axis_is_learned_and_the_other_reads_whole_pixels(hook: Any, axes: Any, frozen: int) -> None:
    layer = IrregularConv2d(3, 3, 3, padding=1, epsilon=0.3)
    limit_taps(layer, axes=axes)
    before = layer.positions.detach().clone()
    train(layer, hook)
    moved = (layer.positions.detach() - before).abs().amax((0, 1))
    assert moved[frozen] == 0
    assert moved[1 - frozen] > 0.01
    assert (layer.positions[..., frozen] == layer.regular_grid[..., frozen]).all()


@pytest.mark.parametrize(("limit", "reach"), [(0.4, 1.4), ("extent", 1.0)])
def test_taps_end_within_their_limit_read_nothing_beyond_and_can_come_back(limit: Any, reach: float) -> None:
    layer = IrregularConv2d(3, 3, 3, padding=1, epsilon=-0.3)
    limit_taps(layer, limit=limit)
    train(layer, icnn_zoo.bound_positions)
    assert float((layer.regular_grid + layer.displacement.detach()).abs().max()) == pytest.approx(reach)
    with torch.no_grad():
        layer.displacement += 5
    assert float(layer.positions.detach().max()) == pytest.approx(reach)
    limit_taps(layer, limit=limit)
    layer(torch.randn(1, 3, 9, 9)).sum().backward()
    assert (layer.displacement.grad != 0).any()
    assert copy.deepcopy(layer).limit == limit


@pytest.mark.parametrize("limit", [None, 2.0, "extent"])
def test_taps_that_may_stay_keep_their_displacement_to_the_bit(limit: Any) -> None:
    layer = icnn_zoo.IrregularConv2d(2, 3, 5, epsilon=1e-3)
    limit_taps(layer, limit=limit)
    stays = layer.regular_grid.abs() < 2 if limit == "extent" else torch.ones_like(layer.regular_grid, dtype=torch.bool)
    assert (layer.displacement == 1e-3)[:, stays].all()


@pytest.mark.parametrize("start", ["normal", "uniform", "grid"])
def test_free_taps_start_within_their_extent_as_the_generator_says(start: Any) -> None:
    layers = [IrregularConv2d(4, 4, (5, 17), padding="same", groups=4, taps=34) for _ in range(2)]
    for layer in layers:
        place_taps(layer, start, std=3.0, generator=torch.Generator().manual_seed(7))
    first, second = (layer.positions.detach() for layer in layers)
    assert torch.equal(first, second)
    assert (first.abs() <= torch.tensor([2.0, 8.0]) + 1e-6).all()
    assert first[..., 1].std() > 2


def test_given_positions_are_taken_and_a_grid_of_all_is_the_regular_kernel() -> None:
    layer = IrregularConv2d(3, 6, (3, 5), padding="same", taps=15)
    place_taps(layer, "grid")
    input = torch.randn(1, 3, 8, 9)
    expected = F.conv2d(input, layer.weight.unflatten(2, (3, 5)), layer.bias, padding="same")
    torch.testing.assert_close(layer(input), expected)
    place_taps(layer, torch.tensor([0.5, -1.25]))
    assert (layer.positions == torch.tensor([0.5, -1.25])).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda layer: place_taps(layer, torch.tensor([0.0, 2.5])), r"within the extent.*got \[0.0, 2.5\] at \[0, 0\]"),
        (lambda layer: place_taps(layer, torch.full((2,), torch.nan)), "within the extent"),
        (lambda layer: place_taps(layer, torch.zeros(5, 2)), r"broadcast to \[3, 7, 2\]; got \[5, 2\]"),
        (lambda layer: place_taps(layer, "grid"), "no grid of 7 taps fits the extent of 5 x 5"),
        (lambda layer: place_taps(layer, "circle"), "`start` must be one of normal, uniform, grid, or positions"),
        (lambda layer: place_taps(layer, std=0.0), "`std` must be a positive number"),
        (lambda layer: limit_taps(layer, axes="cols"), "`axes` must be one of rows, columns, both; got 'cols'"),
        (lambda layer: limit_taps(layer, limit=-1.0), "`limit` must be a positive number"),
        (lambda layer: limit_taps(layer, limit="image"), "`limit` must be a positive number"),
        (lambda layer: distance_penalty(layer, -1.0), "`beyond` must not be negative"),
        (lambda layer: distance_penalty(nn.Linear(1, 1)), "must have irregular layers"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_came(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(IrregularConv2d(3, 3, 5, taps=7))


@pytest.mark.parametrize("beyond", [0.0, 1.0])
def test_the_penalty_is_the_mean_square_of_what_is_beyond(beyond: float) -> None:
    model = nn.Sequential(IrregularConv2d(2, 2, 3, padding=1), IrregularConv2d(2, 2, 3, padding=1))
    icnn_zoo.tie_shapes(model)
    with torch.no_grad():
        model[0].displacement.zero_()
        model[0].displacement[0, 0] = torch.tensor([3.0, 4.0])
    penalty = distance_penalty(model, beyond)
    assert float(penalty.detach()) == pytest.approx((5 - beyond) ** 2 / 18)
    penalty.backward()
    gradient = model[0].displacement.grad
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[0, 0], torch.tensor([3.0, 4.0]) * 2 * (5 - beyond) / 5 / 18)


def test_taps_that_read_nothing_are_warned_of() -> None:
    model = nn.Sequential(IrregularConv2d(3, 8, 3))
    warn_of_dead_taps(model, {"0": (9, 11)})
    with torch.no_grad():
        model[0].displacement[1, 4] = 20.0
    with pytest.warns(UserWarning, match="1 of 27 taps of '0' read nothing but zeros of its 9 x 11 input"):
        warn_of_dead_taps(model, {"0": (9, 11)})


@pytest.mark.parametrize("hook", [icnn_zoo.bound_positions, icnn_zoo.move_positions])
def test_a_frozen_axis_stays_whatever_the_loss_and_the_optimizer_do(hook: Any) -> None:
    model = nn.Sequential(*(IrregularConv2d(3, 3, 3, padding=1, epsilon=0.3) for _ in range(2)))
    limit_taps(model[0], axes="columns")
    groups = icnn_zoo.parameter_groups(model, lr=0.0, position_lr=0.1, head=None)
    for group in groups:
        group["weight_decay"] = 0.5
    optimizer = torch.optim.AdamW(groups)
    hook(optimizer, model)
    before = model[0].displacement.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.randn(2, 3, 9, 9)).square().mean() + 10 * distance_penalty(model)).backward()
        optimizer.step()
    assert torch.equal(model[0].displacement[..., 0], before[..., 0])
    assert (model[0].displacement[..., 1] != before[..., 1]).all()
    assert (model[1].displacement[..., 0] != 0.3).all()


class Doubled(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * values

    def right_inverse(self, values: torch.Tensor) -> torch.Tensor:
        return values / 2


def test_parametrized_taps_and_spreads_are_placed_limited_and_narrowed_too() -> None:
    layer = IrregularConv2d(4, 4, 9, padding="same", taps=9, interpolation="gaussian", spread=1.2)
    for name in ("displacement", "widening"):
        nn.utils.parametrize.register_parametrization(layer, name, Doubled())
    place_taps(layer, "grid")
    assert layer.positions[0].tolist() == [[float(row), float(col)] for row in (-4, 0, 4) for col in (-4, 0, 4)]
    limit_taps(layer, limit=3.0)
    assert layer.displacement.abs().max() == 3
    icnn_zoo.narrow_spreads(layer, 0.5)
    torch.testing.assert_close(layer.spread, torch.full_like(layer.spread, 0.7))


def test_a_grid_of_float64_is_as_fine_as_that() -> None:
    layer = IrregularConv2d(2, 2, 13, padding="same", taps=6, dtype=torch.float64)
    place_taps(layer, torch.full((6, 2), 0.1, dtype=torch.float64))
    place_taps(layer, "grid")
    assert {round(value, 12) for value in layer.positions.flatten().tolist()} >= {-6.0, 0.0, 6.0}
    layer = IrregularConv2d(2, 2, (1, 7), padding="same", taps=6, dtype=torch.float64)
    place_taps(layer, "grid")
    even = torch.arange(-3, 3.1, 1.2, dtype=torch.float64)
    torch.testing.assert_close(layer.positions[0, :, 1], even, rtol=0, atol=1e-15)


def test_free_taps_that_read_wide_have_no_dilation() -> None:
    with pytest.raises(ValueError, match=r"`dilation` must be 1 for free taps .* Take kernel_size=\(13, 7\)"):
        IrregularConv2d(3, 3, (7, 4), dilation=2, taps=5, interpolation="triangle")

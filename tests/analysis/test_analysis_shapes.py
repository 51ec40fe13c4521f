"""Numbers of kernel shapes, against numpy and scipy."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import spearmanr
from torch import nn

from icnn_zoo import IrregularConv2d, convert
from icnn_zoo.analysis import depth_trends, layer_shapes, shape_statistics, statistics_table
from icnn_zoo.analysis.kernel_shapes import LayerShapes
from icnn_zoo.analysis.statistics import ShapeStatistics, principal_axes


def moved(channels=7, kernel=3, scale=0.4, **options):
    layer = IrregularConv2d(channels, channels, kernel, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.displacement.normal_(std=scale)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        {"channels": 7, "kernel": (3, 5)},
        {"channels": 8, "groups": 8, "kernel": 5, "dilation": 2},
        {"channels": 4, "shapes": "kernel"},
        {"channels": 5, "kernel": (2, 4)},
        {"channels": 6, "kernel": (1, 7)},
        {"channels": 2048, "kernel": 5, "groups": 2048},
    ],
    ids=["oblong", "depthwise", "full version", "even", "row", "2048 channels"],
)
def test_means_and_covariances_are_numpys(layer):
    layer = moved(**layer)
    displacement = layer.displacement.detach().reshape(-1, layer.kernel_size[0] * layer.kernel_size[1], 2).numpy()
    statistics = shape_statistics(layer)[0]
    assert statistics.num_shapes == len(displacement)
    assert np.allclose(statistics.tap_mean, displacement.mean(axis=0))
    for tap, covariance in enumerate(statistics.tap_covariance):
        assert np.allclose(covariance, np.cov(displacement[:, tap].T))
    axes = [np.sqrt(np.linalg.eigvalsh(matrix))[::-1] for matrix in np.array(statistics.tap_covariance)]
    assert (statistics.length, statistics.width) == pytest.approx(tuple(np.mean(axes, axis=0)))
    assert statistics.anisotropy == pytest.approx(statistics.length / statistics.width)
    assert statistics.center_shift == pytest.approx(np.hypot(*displacement.mean(axis=0).T).mean())


@pytest.mark.parametrize("angle", [-60, 0, 30, 90])
def test_the_angle_is_that_of_the_clouds(angle):
    layer = moved(channels=2000, scale=0.0)
    turn = np.radians(angle)
    with torch.no_grad():  # (row, col): rows grow downwards, as the angle does
        along = torch.tensor([np.sin(turn), np.cos(turn)])
        across = torch.tensor([np.cos(turn), -np.sin(turn)])
        layer.displacement.copy_(torch.randn(2000, 9, 1) * 0.5 * along + torch.randn(2000, 9, 1) * 0.1 * across)
    statistics = shape_statistics(layer)[0]
    assert statistics.angle == pytest.approx(angle, abs=1)
    assert statistics.length == pytest.approx(0.5, rel=0.03)
    assert statistics.width == pytest.approx(0.1, rel=0.03)


def test_elongation_is_that_of_single_shapes_and_none_for_a_row():
    layer = moved(scale=0.0, kernel=3)
    assert shape_statistics(layer)[0].elongation == pytest.approx(1.0)
    with torch.no_grad():  # rows at twice their distance
        layer.displacement[..., 0] = layer.regular_grid[:, 0]
    statistics = shape_statistics(layer)[0]
    assert statistics.elongation == pytest.approx(2.0)
    assert statistics.regular_elongation == pytest.approx(1.0)
    assert shape_statistics(moved(scale=0.0, kernel=(1, 5)))[0].elongation is None


def test_outside_counts_taps_that_round_to_another_box():
    layer = moved(channels=2, scale=0.0, dilation=3)
    with torch.no_grad():
        layer.displacement[0, 0] = torch.tensor([-0.49, 0.0])  # still the corner's pixel
        layer.displacement[0, 1] = torch.tensor([-0.51, 0.0])
        layer.displacement[1, 8] = torch.tensor([0.0, 2.0])
        layer.displacement[1, 4] = torch.tensor([2.0, 2.0])  # the middle one stays inside
    assert shape_statistics(layer)[0].outside == pytest.approx(2 / 18)


def test_dead_taps_are_counted_where_the_size_is_known():
    layer = moved(channels=2, scale=0.0)
    with torch.no_grad():
        layer.displacement[0, 0] = 100.0
    assert shape_statistics(layer)[0].dead is None
    assert shape_statistics(layer, {"": (9, 11)})[0].dead == pytest.approx(1 / 18)


def test_trends_are_rank_correlations_with_depth():
    lengths, elongations = [0.1, 0.3, 0.2, 0.3, 0.9], [1.0, None, 1.1, 1.2, 1.1]
    entries = [entry(length, elongation=elong) for length, elong in zip(lengths, elongations, strict=True)]
    trends = depth_trends(entries)
    assert trends["length"] == pytest.approx(spearmanr(range(5), lengths).statistic)
    assert trends["elongation"] == pytest.approx(spearmanr(range(4), [1.0, 1.1, 1.2, 1.1]).statistic)
    assert trends["anisotropy"] is None
    assert trends["center_shift_over_length"] == pytest.approx(0.5)


def test_shapes_come_in_the_order_of_layers_and_by_unique_endings():
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 5, groups=4))), "")
    assert [shapes.name for shapes in layer_shapes(model)] == ["0", "1.0"]
    assert layer_shapes(model, ["1.0"])[0].positions.shape == (4, 25, 2)
    with pytest.raises(ValueError, match=r"'1.1' names no irregular layer; the nearest are 1.0"):
        layer_shapes(model, ["1.1"])


def entry(length=0.2, width=0.1, anisotropy=None, elongation=None, shift=0.05, dead=None, name=""):
    return ShapeStatistics(name, (3, 3), 5, [], [], shift, length, width, anisotropy, 0.0, elongation, 1.0, 0.0, dead)


def test_a_network_without_shapes_or_with_lost_positions_is_refused():
    with pytest.raises(ValueError, match=r"no irregular layer.*icnn_zoo\.convert"):
        layer_shapes(nn.Conv2d(3, 4, 3))
    layer = moved()
    with torch.no_grad():
        layer.displacement[2, 3, 0] = float("nan")
    with pytest.raises(ValueError, match=r"1 taps whose position is not a finite number.*position_lr"):
        shape_statistics(layer)


def test_layers_are_named_in_full_by_a_unique_ending_or_alone():
    model = convert(nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(2, 2, 3)), "b": nn.Sequential(nn.Conv2d(2, 2, 3))}), "")
    assert [shapes.name for shapes in layer_shapes(model, ["b.0", "a.0"])] == ["b.0", "a.0"]
    assert [shapes.name for shapes in layer_shapes(model, "b.0")] == ["b.0"]
    with pytest.raises(ValueError, match=r"'0' is the ending of several names, give one in full: a\.0, b\.0"):
        layer_shapes(model, ["0"])
    with pytest.raises(ValueError, match=r"must name at least one layer.*a\.0, b\.0"):
        layer_shapes(model, [])


def test_the_full_version_lists_shapes_kernel_by_kernel():
    layer = moved(4, (3, 1), groups=2, shapes="kernel")
    shapes = layer_shapes(layer)[0]
    assert shapes.positions.shape == (8, 3, 2)
    for kernel in range(4):
        for channel in range(2):
            assert np.array_equal(shapes.positions[2 * kernel + channel], layer.positions[kernel, channel].detach())
    assert np.array_equal(shapes.grid, [[-1, 0], [0, 0], [1, 0]])


def test_shapes_are_a_copy_that_training_does_not_change():
    layer = moved(3)
    before = layer_shapes(layer)[0].positions
    kept = before.copy()
    with torch.no_grad():
        layer.displacement.add_(1.0)
    assert np.array_equal(before, kept)


@pytest.mark.parametrize("number", [1, 2, 3, 7, 50, 51, 99])
def test_thinned_shapes_are_even_in_order_and_never_twice(number):
    whole = LayerShapes("", (1, 1), np.zeros((1, 2)), np.arange(2.0 * number).reshape(number, 1, 2))
    for most in range(1, 2 * number + 1):
        chosen = whole.thinned(most).positions[:, 0, 0] / 2
        assert len(chosen) == min(most, number)
        steps = np.diff(chosen)
        assert len(steps) == 0 or (steps.min() >= 1 and steps.max() - steps.min() <= 1)
        assert most == 1 or (chosen[0], chosen[-1]) == (0, number - 1)
        assert whole.thinned(most).thinned(1).total == number


def test_one_shape_has_no_spread_and_all_is_still_data():
    statistics = shape_statistics(moved(1, 3))[0]
    assert (statistics.num_shapes, statistics.length, statistics.width) == (1, 0.0, 0.0)
    assert statistics.anisotropy is None
    assert statistics.angle == 0.0
    json.dumps(statistics.to_dict(), allow_nan=False)


def test_round_clouds_have_the_anisotropy_that_chance_gives():
    """What the description of `anisotropy` says of round clouds, by 961 of them."""
    for shapes in (400, 1600):
        statistics = shape_statistics(moved(shapes, 31, 0.3, groups=shapes))[0]  # depthwise: dense takes 12 GB
        assert statistics.anisotropy == pytest.approx(1 + 1.25 / np.sqrt(shapes), abs=0.01)


@pytest.mark.parametrize(
    ("angle", "expected"), [(0, 0), (89, 89), (90, 90), (91, -89), (180, 0), (-90, 90), (-45, -45)]
)
def test_angles_count_from_the_columns_towards_growing_rows(angle, expected):
    turn = np.radians(angle)
    along, across = np.array([np.sin(turn), np.cos(turn)]), np.array([np.cos(turn), -np.sin(turn)])
    length, width, found = principal_axes(9 * np.outer(along, along) + 4 * np.outer(across, across))
    assert (length, width) == pytest.approx((3, 2))
    assert -90 < found <= 90 + 1e-9
    assert abs((found - expected + 90) % 180 - 90) < 1e-9


@pytest.mark.parametrize("kernel", [3, 5, (2, 4), (7, 3)])
def test_elongation_is_the_ratio_of_singular_values(kernel):
    layer = moved(11, kernel)
    ratios = []
    for shape in layer.positions.detach().numpy():
        long, short = np.linalg.svd(shape - shape.mean(axis=0), compute_uv=False)
        ratios.append(long / short)
    statistics = shape_statistics(layer)[0]
    assert statistics.elongation == pytest.approx(np.mean(ratios))
    rows, cols = layer.kernel_size
    assert statistics.regular_elongation == pytest.approx(
        np.sqrt((max(rows, cols) ** 2 - 1) / (min(rows, cols) ** 2 - 1))
    )


@pytest.mark.parametrize("kernel", [(1, 5), (5, 1), 1])
def test_a_row_of_taps_has_no_elongation_however_it_moved(kernel):
    statistics = shape_statistics(moved(6, kernel))[0]
    assert statistics.elongation is None
    assert statistics.regular_elongation is None
    assert statistics.length > 0


@pytest.mark.parametrize("kernel", [3, (2, 4), (1, 5)])
def test_nothing_is_outside_before_training_and_all_after_a_jump(kernel):
    layer = moved(3, kernel, scale=0.0, dilation=2)
    assert shape_statistics(layer)[0].outside == 0.0
    with torch.no_grad():
        layer.displacement[..., 1] = 50.0
    assert shape_statistics(layer)[0].outside == 1.0


def test_trends_agree_with_scipy_whatever_the_ties():
    rng = np.random.default_rng(0)
    for number in range(3, 12):
        values = rng.integers(0, 4, number) / 4 + 1.0
        values[0] = 0.5  # not all the same, for which scipy warns
        trends = depth_trends([entry(length=value, anisotropy=-value) for value in values])
        assert trends["length"] == pytest.approx(spearmanr(range(number), values).statistic)
        assert trends["anisotropy"] == pytest.approx(-trends["length"])


def test_trends_of_equal_of_few_and_of_still_layers():
    assert depth_trends([entry(elongation=1.0)] * 4)["elongation"] == 0.0
    two = depth_trends([entry(), entry()])
    assert two["length"] is None
    assert two["center_shift_over_length"] == pytest.approx(0.25)
    still = depth_trends([entry(length=0.0, shift=0.0)] * 3)
    assert still["center_shift_over_length"] is None
    assert depth_trends([]) == dict.fromkeys(("center_shift_over_length", "length", "anisotropy", "elongation"))


def printed(table, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_the_table_has_a_row_for_each_layer_and_fits_a_terminal():
    names = ["model.backbone.layer4_1_conv2", "model.classifier", ""]
    text = printed(statistics_table([entry(name=name, elongation=1.5) for name in names]))
    lines = [line for line in text.splitlines() if "3x3" in line]
    assert [line.split()[0] for line in lines] == ["layer4_1_conv2", "classifier", "layer"]
    assert lines[0].split()[1:] == ["3x3", "5", "0.050", "0.200", "0.100", "-", "1.50", "0.0%"]
    assert max(map(len, text.splitlines())) <= 80
    assert "dead" not in text
    known = printed(statistics_table([entry(dead=0.25), entry()]))
    assert [line.split()[-1] for line in known.splitlines() if "3x3" in line] == ["25.0%", "-"]
    assert "dead" in known


def test_sizes_of_some_layers_count_dead_taps_of_those():
    model = convert(nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)), "")
    with torch.no_grad():
        model[1].displacement[0] = 99.0
    first, second = shape_statistics(model, {"1": (7, 9)})
    assert first.dead is None
    assert second.dead == pytest.approx(0.5)


def test_half_precision_and_frozen_layers_are_described_and_left_alone():
    layer = moved(5).float().half().requires_grad_(False)
    before = layer.displacement.clone()
    statistics = shape_statistics(layer)[0]
    assert np.allclose(statistics.tap_mean, before.double().mean(dim=0))
    assert torch.equal(layer.displacement, before)
    assert not layer.displacement.requires_grad


def test_repeats_tell_signal_from_chance_layer_by_layer():
    networks = [convert(nn.Sequential(nn.Conv2d(40, 2, 3), nn.Conv2d(40, 2, 3)), "") for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for network in networks:
        with torch.no_grad():
            network[0].displacement[..., 1] += torch.linspace(-1, 1, 9)
            network[1].displacement += torch.randn(40, 9, 2, generator=generator)
    first, second = shape_statistics(networks[0], repeats=networks[1:])
    assert first.signal.share == pytest.approx(1)
    assert not second.signal.significant
    text = printed(statistics_table([first, second]))
    assert [line.split()[-1] for line in text.splitlines() if "3x3" in line] == ["100%", "none"]

"""Numbers of kernel shapes, against numpy and scipy."""

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import spearmanr
from torch import nn

from icnn_zoo import IrregularConv2d, convert
from icnn_zoo.analysis import depth_trends, layer_shapes, shape_statistics, statistics_table
from icnn_zoo.analysis.statistics import ShapeStatistics


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
        {"channels": 4, "per_kernel": True},
        {"channels": 5, "kernel": (2, 4)},
    ],
    ids=["oblong", "depthwise", "full version", "even"],
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
    assert statistics.centre_shift == pytest.approx(np.hypot(*displacement.mean(axis=0).T).mean())


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
    entries = [
        ShapeStatistics("", (3, 3), 5, [], [], 0.05, length, 0.1, None, 0.0, elongation, 1.0, 0.0, None)
        for length, elongation in zip(lengths, elongations, strict=True)
    ]
    trends = depth_trends(entries)
    assert trends["length"] == pytest.approx(spearmanr(range(5), lengths).statistic)
    assert trends["elongation"] == pytest.approx(spearmanr(range(4), [1.0, 1.1, 1.2, 1.1]).statistic)
    assert trends["anisotropy"] is None
    assert trends["centre_shift_over_length"] == pytest.approx(0.5)


def test_shapes_come_in_the_order_of_layers_and_by_unique_endings():
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 5, groups=4))), "")
    assert [shapes.name for shapes in layer_shapes(model)] == ["0", "1.0"]
    assert layer_shapes(model, ["1.0"])[0].positions.shape == (4, 25, 2)
    with pytest.raises(ValueError, match=r"no irregular layer '1.1'; the nearest are 1.0"):
        layer_shapes(model, ["1.1"])
    table = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    table.print(statistics_table(shape_statistics(model)))
    table.file.close()
    assert "5x5" in table.export_text()


def test_a_network_without_shapes_or_with_lost_positions_is_refused():
    with pytest.raises(ValueError, match=r"no irregular layer.*icnn_zoo\.convert"):
        layer_shapes(nn.Conv2d(3, 4, 3))
    layer = moved()
    with torch.no_grad():
        layer.displacement[2, 3, 0] = float("nan")
    with pytest.raises(ValueError, match=r"1 taps whose position is no finite number.*position_lr"):
        shape_statistics(layer)

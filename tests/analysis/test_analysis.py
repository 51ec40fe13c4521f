"""Displacement statistics and dead taps."""

import pytest
import torch
from torch import nn

from icnn_zoo import IrregularConv2d, convert
from icnn_zoo.analysis import InputSizes, displacement_statistics
from icnn_zoo.analysis.displacement import dead_taps


def test_statistics_are_those_of_the_euclidean_displacement():
    model = convert(nn.Sequential(nn.Conv2d(2, 3, 3)), "0", epsilon=0.0)
    with torch.no_grad():
        model[0].displacement[0, 0] = torch.tensor([3.0, 4.0])
    values = displacement_statistics(model)["0"]
    assert values["max"] == pytest.approx(5.0)
    assert values["mean"] == pytest.approx(5.0 / 18)
    assert "dead" not in values


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_dead_tap_is_one_whose_output_does_not_depend_on_the_input(stride, padding_mode):
    layer = IrregularConv2d(
        3, 2, 3, stride=stride, padding=1, bias=False, padding_mode=padding_mode, dtype=torch.float64
    )
    with torch.no_grad():
        layer.displacement.uniform_(-14, 14)
    size = (6, 9)
    dead = dead_taps(layer, size)
    assert 0 < int(dead.sum()) < dead.numel()
    for channel in range(3):
        for tap in range(9):
            single = torch.zeros_like(layer.weight)
            single[:, channel].flatten(1)[:, tap] = 1
            layer.weight.data = single
            silent = bool((layer(torch.rand(1, 3, *size, dtype=torch.float64) + 1) == 0).all())
            assert silent == bool(dead[channel, tap]), (channel, tap, layer.positions[channel, tap])


def test_input_sizes_are_those_of_the_last_forward_until_removed():
    model = convert(nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.Conv2d(3, 2, 3)), "")
    sizes = InputSizes(model)
    model(torch.zeros(1, 2, 21, 33))
    assert sizes.sizes == {"0": (21, 33), "1": (10, 16)}
    assert displacement_statistics(model, sizes.sizes)["1"]["dead"] == 0.0
    sizes.remove()
    model(torch.zeros(1, 2, 9, 9))
    assert sizes.sizes["0"] == (21, 33)

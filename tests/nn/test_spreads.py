"""Spreads: who has one, how they train, how far a step goes, and peers that they make: ACU and DAU."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import icnn_zoo


def make(**options) -> icnn_zoo.IrregularConv2d:
    torch.manual_seed(0)
    return icnn_zoo.IrregularConv2d(4, 6, 3, padding=1, **options)


@pytest.mark.parametrize(("per", "shape"), [("tap", (4, 9, 2)), ("channel", (4, 1, 2)), ("layer", (1, 1, 2))])
def test_a_spread_belongs_to_a_tap_a_channel_or_the_layer_and_is_learned_without_decay(per, shape):
    layer = make(interpolation="gaussian", spread=0.7, spread_per=per)
    assert layer.spread.shape == shape
    torch.testing.assert_close(layer.spread, torch.full(shape, 0.7))
    groups = icnn_zoo.parameter_groups(layer, lr=0.1, position_lr=0.2, spread_lr=0.3, weight_decay=0.5, head=None)
    (group,) = (group for group in groups if group["name"] == "spreads")
    assert group["params"][0] is layer.widening
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.0)
    layer(torch.randn(1, 4, 7, 8)).square().sum().backward()
    assert layer.widening.grad.abs().min() > 0


def test_spreads_stay_exact_in_half_precision_and_come_back_from_state_dict_and_pickle():
    layer = make(interpolation="triangle", spread=1.3)
    with torch.no_grad():
        layer.widening.uniform_()
    half = copy.deepcopy(layer).half()
    assert half.widening.dtype == torch.float32
    other = make(interpolation="triangle")
    other.load_state_dict(layer.state_dict())
    for same in (half, other, pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same.spread, layer.spread)
    with pytest.raises(RuntimeError, match="widening"):
        make().load_state_dict(layer.state_dict())


def test_a_widening_of_zero_is_not_stuck_and_its_sign_does_not_matter():
    layer = make(interpolation="triangle")
    with torch.no_grad():
        layer.displacement.normal_()
    layer(torch.randn(1, 4, 7, 8)).square().sum().backward()
    assert layer.widening.grad.abs().max() > 0
    with torch.no_grad():
        layer.widening.fill_(-0.4)
    torch.testing.assert_close(layer.spread, torch.full_like(layer.spread, 1.4))


@pytest.mark.parametrize(("kind", "furthest"), [("gaussian", 0.7), ("triangle", 1.0)])
def test_a_step_goes_as_far_as_the_gradient_holds(kind, furthest):
    layer = make(interpolation=kind, spread={"gaussian": 0.7, "triangle": 1.5}[kind], epsilon=0.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e6)
    icnn_zoo.bound_positions(optimizer, layer, bound_epsilon=1e-3)
    with torch.no_grad():
        layer.displacement.fill_(0.5)
    before = layer.displacement.detach().clone()
    layer.displacement.grad = torch.randn_like(layer.displacement)
    optimizer.step()
    moved = (layer.displacement - before).abs().max().item()
    assert moved == pytest.approx({"gaussian": 0.7, "triangle": 0.5}[kind] + 1e-3, abs=1e-5)


REFUSED = [
    ({"interpolation": "cubic"}, "`interpolation` must be one of bilinear, triangle, gaussian; got 'cubic'"),
    ({"spread": 1.0}, "`spread` must be None for bilinear"),
    ({"interpolation": "gaussian", "spread": 0.0}, "`spread` must be a number of at least 0.2 pixels .* got 0.0"),
    ({"interpolation": "triangle", "spread": math.nan}, "`spread` must be a number of at least 1.0 .* got nan"),
    ({"interpolation": "gaussian", "spread_per": "kernel"}, "`spread_per` must be one of tap, channel, layer"),
    ({"taps": 0}, "`taps` must be an int of at least 1; got 0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_does_not_fit_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_shape_per_layer_is_the_active_convolution_unit():
    """ACU (arXiv:1703.09076), Eq. 3: y = sum of w * x(alpha + m, beta + n), x interpolated bilinearly."""
    layer = make(shapes="layer").double()
    with torch.no_grad():
        layer.displacement.normal_()
    image = torch.randn(1, 4, 6, 7, dtype=torch.float64)
    expected = layer.bias.detach().reshape(1, -1, 1, 1).repeat(1, 1, 6, 7)
    for tap, (row, col) in enumerate(layer.positions[0].tolist()):
        for y in range(6):
            for x in range(7):
                for q_row in range(6):
                    for q_col in range(7):
                        near = max(0, 1 - abs(y + row - q_row)) * max(0, 1 - abs(x + col - q_col))
                        weight = layer.weight.detach().flatten(2)[:, :, tap]
                        expected[0, :, y, x] += near * weight @ image[0, :, q_row, q_col]
    torch.testing.assert_close(layer(image).detach(), expected)


def test_free_gaussian_taps_of_one_spread_are_displaced_aggregation_units():
    """DAU (arXiv:1902.07474), Eq. 2 and 3: sum of w * G(x - mu) / sum of G, one sigma for all units."""
    torch.manual_seed(0)
    layer = icnn_zoo.IrregularConv2d(
        2, 3, 9, padding=4, taps=4, shapes="kernel", interpolation="gaussian", spread=0.5, spread_per="layer"
    ).double()
    with torch.no_grad():
        layer.displacement.uniform_(-2, 2)
    grid = torch.arange(-4.0, 5, dtype=torch.float64)
    rows, cols = (
        torch.exp(-((grid - layer.positions.detach()[..., axis, None]) ** 2) / (2 * 0.5**2)) for axis in range(2)
    )
    units = rows[..., :, None] * cols[..., None, :]
    units = units / units.sum((-2, -1), keepdim=True)
    kernels = (layer.weight.detach()[..., None, None] * units).sum(2)
    image = torch.randn(1, 2, 11, 12, dtype=torch.float64)
    expected = F.conv2d(image, kernels, layer.bias, padding=4)
    torch.testing.assert_close(layer(image), expected, atol=2e-5, rtol=0)
    deployed = icnn_zoo.deploy(nn.Sequential(layer).eval())
    torch.testing.assert_close(deployed(image), layer(image), atol=1e-10, rtol=0)

"""Heatmaps and receptive fields, against what is worked out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from icnn_zoo import IrregularConv2d, convert
from icnn_zoo.analysis import (
    ReceptiveField,
    effective_receptive_field,
    heatmap,
    input_gradient,
    plot_heatmaps,
    plot_receptive_fields,
)
from icnn_zoo.models import SegmentationModel


def linear(*layers):
    return nn.Sequential(*layers)


def test_the_gradient_of_two_linear_layers_is_worked_out_by_hand():
    """First layer 1, 2, 3 along the columns with dilation 2, second 1, -1 along the rows: the outer product."""
    first = nn.Conv2d(3, 1, (1, 3), dilation=(1, 2), padding=(0, 2), bias=False)
    second = nn.Conv2d(1, 2, (2, 1), bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([1.0, 2.0, 3.0]).expand(1, 3, 1, 3))
        second.weight[0, 0, :, 0] = torch.tensor([1.0, -1.0])
        second.weight[1, 0, :, 0] = torch.tensor([5.0, 0.0])
    network = linear(first, second, nn.ZeroPad2d((0, 0, 0, 1)))
    gradient = input_gradient(network, torch.rand(3, 7, 11), [(2, 5)], [0])[0]
    expected = torch.zeros(7, 11)
    for row, sign in ((2, 1.0), (3, -1.0)):
        for col, weight in ((3, 1.0), (5, 2.0), (7, 3.0)):
            expected[row, col] = sign * weight
    assert torch.equal(gradient, expected.expand(3, 7, 11))
    assert torch.equal(heatmap(network, torch.rand(3, 7, 11), [(2, 5)], [0])[0], 3 * expected.abs())
    summed = input_gradient(network, torch.rand(3, 7, 11), [(2, 5)])[0, 0]
    assert summed[2, 7] == 3.0 * (1 + 5)


def test_an_irregular_tap_gives_its_four_pixels_their_bilinear_shares():
    layer = IrregularConv2d(3, 1, 1, bias=False, epsilon=0.0)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.displacement[:] = torch.tensor([1.25, -2.5])  # a row and a quarter down, two and a half columns left
    gradient = input_gradient(layer, torch.rand(3, 9, 11), [(4, 6)])[0, 1]
    expected = torch.zeros(9, 11)
    expected[5, 3], expected[5, 4], expected[6, 3], expected[6, 4] = 0.75, 0.75, 0.25, 0.25
    assert torch.allclose(gradient, expected)


def test_scores_of_a_lower_resolution_are_interpolated_as_the_network_does():
    """Logits lie on every 8th pixel; half-way between two, each of them counts half."""
    model = SegmentationModel("test_resnet", 3, output_stride=8, head_dilation=1).eval()
    image = torch.rand(3, 33, 41) * 255
    halves = input_gradient(model, image, [(16, 20)], [1])[0]
    leaf = image[None].clone().requires_grad_()
    logits = model(leaf)
    assert logits.shape[-2:] == (5, 6)
    (expected,) = torch.autograd.grad(logits[0, 1, 2, 2:4].sum() / 2, leaf)
    assert torch.allclose(halves, expected[0], atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_it_is_exactly_zero_outside_of_the_receptive_field(stride):
    layers = [nn.Conv2d(3, 4, 3, padding=1, stride=stride), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=2, dilation=2)]
    network = linear(*layers, nn.Upsample(size=(33, 29), mode="nearest"))
    values = heatmap(network, torch.rand(3, 33, 29), [(16, 12)])[0]
    reached = 1 + 2 * stride + (stride - 1)
    inside = np.zeros((33, 29), bool)
    inside[16 - reached : 17 + reached, 12 - reached : 13 + reached] = True
    assert (values[torch.from_numpy(~inside)] == 0).all()
    assert (values > 0).any()
    irregular = convert(linear(nn.Conv2d(3, 2, 3, padding=1)), "0", epsilon=0.0)
    with torch.no_grad():
        irregular[0].displacement.uniform_(-2, 2)
    values = heatmap(irregular, torch.rand(3, 33, 29), [(16, 12)])[0]
    far = torch.ones(33, 29, dtype=torch.bool)
    far[16 - 3 : 17 + 3, 12 - 3 : 13 + 3] = False
    assert (values[far] == 0).all()


def test_many_pixels_at_once_are_each_by_itself():
    model = convert(SegmentationModel("test_resnet", 4, output_stride=8, head_dilation=3), "layer4", epsilon=0.3)
    image, pixels, classes = torch.rand(3, 65, 49) * 255, [(0, 0), (30, 40), (64, 48)], [0, None, 3]
    together = input_gradient(model, image, pixels, classes)
    for index, pixel in enumerate(pixels):
        alone = input_gradient(model, image, [pixel], [classes[index]])[0]
        assert torch.allclose(together[index], alone, rtol=1e-4, atol=1e-7)


def test_the_network_is_left_as_it_was():
    model = SegmentationModel("test_resnet", 3, output_stride=8, head_dilation=3).train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heatmap(model, torch.rand(3, 33, 33), [(3, 4)])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_pixels_and_classes_that_are_not_there_are_refused():
    network = nn.Conv2d(3, 2, 1)
    with pytest.raises(ValueError, match=r"7 rows and 9 columns; got \(7, -1\).*nearest inside is \(6, 0\)"):
        heatmap(network, torch.rand(3, 7, 9), [(7, -1)])
    with pytest.raises(ValueError, match="from 0 to 1; got 2"):
        heatmap(network, torch.rand(3, 7, 9), [(3, 3)], [2])


def test_overlays_share_a_scale_and_mark_the_pixel():
    image = np.zeros((20, 30, 3), np.uint8)
    narrow, wide = np.zeros((20, 30)), np.ones((20, 30))
    narrow[4:6, 7:9] = 1
    figure = plot_heatmaps(image, {"regular": narrow, "irregular": torch.from_numpy(wide)}, (5, 8), smoothing=0)
    panels = figure.axes[:3]
    assert [axes.get_title() for axes in panels] == ["image", "regular", "irregular"]
    for axes in panels:
        assert {(*line.get_xdata(), *line.get_ydata()) for line in axes.lines} == {(8, 5)}
    strengths = [axes.images[1].get_array() for axes in panels[1:]]
    assert strengths[0].max() == 1
    assert strengths[1].max() < 0.1  # the same sum over 600 pixels, on the same scale
    with pytest.raises(ValueError, match="nearest inside"):
        plot_heatmaps(image, {"regular": narrow}, (20, 0))


def test_the_effective_field_of_a_box_is_the_box():
    layer = nn.Conv2d(3, 1, 5, padding=2, bias=False)
    nn.init.ones_(layer.weight)
    field = effective_receptive_field(layer, [torch.rand(3, 21, 31), torch.rand(3, 15, 9)])
    assert field.num_images == 2
    assert field.shares.sum() == pytest.approx(1)
    row, col = (side // 2 for side in field.shares.shape)
    assert np.allclose(field.shares[row - 2 : row + 3, col - 2 : col + 3], 1 / 25)
    assert field.radius(1.0) == pytest.approx(np.hypot(2, 2))
    assert field.share_within(1.0) == pytest.approx(5 / 25)
    assert field.share_within(0.0) == pytest.approx(1 / 25)
    assert field.summary()["rms"] == pytest.approx(2.0)  # the variance of -2..2 is 2, in both directions


def test_images_count_the_same_whatever_the_strength_of_their_gradients():
    class Scaled(nn.Module):
        def forward(self, images):
            shift = 3 if images.mean() > 0.5 else 0
            return (1000 if shift else 1) * F.pad(images, (0, 3))[..., shift : shift + images.shape[-1]]

    field = effective_receptive_field(Scaled(), [torch.zeros(3, 11, 11), torch.ones(3, 11, 11)])
    middle = field.shares.shape[0] // 2
    assert field.shares[middle, middle] == pytest.approx(0.5)
    assert field.shares[middle, middle + 3] == pytest.approx(0.5)


def test_fields_without_images_or_gradient_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        effective_receptive_field(nn.Conv2d(3, 1, 1), [])
    silent = nn.Conv2d(3, 1, 1)
    nn.init.zeros_(silent.weight)
    with pytest.raises(ValueError, match="does not depend on the image"):
        effective_receptive_field(silent, [torch.rand(3, 5, 5)])
    with pytest.raises(ValueError, match="at least one receptive field"):
        plot_receptive_fields({})
    with pytest.raises(ValueError, match="`share` must be above 0"):
        ReceptiveField(np.ones((1, 1)), 1).radius(0.0)


def test_fields_are_drawn_beside_each_other_with_their_circles():
    shares = np.zeros((21, 21))
    shares[10, 10] = 1
    narrow, wide = ReceptiveField(shares, 3), ReceptiveField(np.full((21, 21), 1 / 441), 3)
    figure = plot_receptive_fields({"regular": narrow, "irregular": wide})
    assert [axes.get_title() for axes in figure.axes[:2]] == ["regular, 3 images", "irregular, 3 images"]
    radius = max(figure.axes[1].lines[0].get_xdata())
    assert radius == pytest.approx(wide.radius(0.5))
    assert [line.get_label() for line in figure.axes[2].lines] == ["regular", "irregular"]


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1)])
def test_strips_need_no_more_memory_than_other_images(size):
    """A square around a strip, or a figure of its shape, would take gigabytes for an image of 3,000 pixels."""
    layer = nn.Conv2d(3, 1, 3, padding=1, bias=False)
    nn.init.ones_(layer.weight)
    pixel = (size[0] // 2, size[1] // 2)
    values = heatmap(layer, torch.zeros(3, *size), [pixel])[0]
    figures = [plot_heatmaps(np.zeros((*size, 3), np.uint8), {"a": values}, pixel)]
    field = effective_receptive_field(layer, [torch.zeros(3, *size), torch.zeros(3, 5, 5)])
    assert field.shares.sum() == pytest.approx(1)
    assert field.shares.size <= 5 * 3001
    figures.append(plot_receptive_fields({"a": field}))
    for figure in figures:
        assert np.prod(150 * figure.get_size_inches()) < 20e6

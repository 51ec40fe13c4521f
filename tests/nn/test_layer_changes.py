"""What may happen to a layer after it was made: edits, moves, half precision, loading, parametrizations."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from icnn_zoo import IrregularConv2d, convert, irregular_conv2d


class Within2px(nn.Module):
    def forward(self, x):
        return 2 * torch.tanh(x / 2)

    def right_inverse(self, y):
        return 2 * torch.atanh(y / 2)


def image() -> torch.Tensor:
    return torch.randn(1, 4, 9, 11)


@pytest.mark.parametrize("dilation", [2, (2, 3)])
def test_the_grid_follows_an_edited_dilation_at_once_and_stays_where_it_is(dilation):
    layer = IrregularConv2d(4, 4, 3, padding=1, epsilon=0.3)
    layer.dilation = dilation
    pair = (2, 2) if dilation == 2 else dilation
    assert layer.dilation == pair
    assert layer.positions[0, 0].tolist() == pytest.approx([0.3 - pair[0], 0.3 - pair[1]])
    before = layer(image_ := image())
    for same in (layer.cpu(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(image_), before)


def test_stride_padding_and_dilation_edited_later_are_those_of_conv2d():
    layer, x = IrregularConv2d(4, 4, 3, epsilon=0.0), image()
    layer.stride, layer.padding, layer.dilation = 2, (2, 3), (1, 2)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, 2, (2, 3), (1, 2)))
    with pytest.raises(ValueError, match="`stride`"):
        layer.stride = 0


def test_surgery_by_attributes_moves_the_grid_and_keeps_the_displacement():
    """As networks are dilated after the fact, by code that looks for `dilation` and not for nn.Conv2d."""
    conv = nn.Conv2d(4, 4, 3, stride=2, padding=1)
    layer = IrregularConv2d.from_conv2d(conv, epsilon=0.0)
    for module in (conv, layer):
        module.stride, module.dilation, module.padding = (1, 1), (2, 2), (2, 2)
    torch.testing.assert_close(layer(x := image()), conv(x))


def test_an_int_dilation_set_on_a_convolution_is_taken_over():
    conv, x = nn.Conv2d(4, 4, 3), image()
    conv.dilation = conv.stride = 2
    expected = conv(x)
    torch.testing.assert_close(convert(nn.Sequential(conv), "", epsilon=0.0)(x), expected)


def test_a_layer_made_on_meta_is_whole_after_an_assigned_state_dict():
    state = IrregularConv2d(4, 4, 3, dilation=2).state_dict()
    with torch.device("meta"):
        layer = IrregularConv2d(4, 4, 3, dilation=2)
    layer.load_state_dict(state, assign=True)
    assert layer.regular_grid.device == layer.positions.device == torch.device("cpu")
    expected = irregular_conv2d(x := image(), layer.weight, layer.positions, layer.bias, dilation=2)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.to("cpu")(x), expected)


def test_a_layer_whose_parameters_are_put_on_a_device_one_by_one_computes_there():
    """As accelerate's hooks do around each forward; they leave buffers that are not saved where they were."""
    layer = IrregularConv2d(4, 4, 3)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.to("meta")
    for name, value in state.items():
        layer._parameters[name] = nn.Parameter(value)
    assert layer(image()).device == torch.device("cpu")


def test_a_half_displacement_assigned_from_a_state_dict_is_float32_again():
    layer = IrregularConv2d(4, 4, 3)
    state = {name: value.bfloat16() for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert (layer.weight.dtype, layer.displacement.dtype) == (torch.bfloat16, torch.float32)


def test_a_displacement_rounded_by_others_is_refused_and_not_used():
    layer = IrregularConv2d(4, 4, 3)
    layer.displacement.data = layer.displacement.data.bfloat16()
    with pytest.raises(TypeError, match="whole_displacements"):
        layer(image())


@pytest.mark.parametrize("how", ["half", "bfloat16"])
def test_a_parametrized_displacement_is_not_rounded(how):
    layer = IrregularConv2d(4, 4, 3, epsilon=0.3)
    parametrize.register_parametrization(layer, "displacement", Within2px())
    before = layer.positions.clone()
    getattr(layer, how)()
    assert layer.weight.dtype == getattr(torch, how)
    assert torch.equal(layer.positions, before)
    assert layer.double().positions.dtype == torch.float64


def test_gradients_of_a_displacement_are_not_rounded_either():
    layer = IrregularConv2d(4, 4, 3)
    layer(image()).square().sum().backward()
    gradient = layer.displacement.grad.clone()
    layer.half()
    assert torch.equal(layer.displacement.grad, gradient)
    assert layer.weight.grad.dtype == torch.float16


def test_numpys_integers_are_ints_in_every_size():
    three, one = np.int64(3), np.int32(1)
    conv, x = nn.Conv2d(4, 4, three, stride=np.int64(2), padding=(one, one), dilation=one, groups=np.int64(2)), image()
    expected = conv(x)
    torch.testing.assert_close(convert(nn.Sequential(conv), "", epsilon=0.0)(x), expected)
    sizes = (np.int64(4), np.int64(4), three, np.int64(2), (one, one), one, np.int64(2))
    layer = IrregularConv2d(*sizes, epsilon=np.float32(0))
    layer.load_state_dict(conv.state_dict(), strict=False)
    torch.testing.assert_close(layer(x), expected)
    sizes = (layer.in_channels, layer.out_channels, *layer.kernel_size, *layer.stride, *layer.dilation, layer.groups)
    assert {type(size) for size in sizes} == {int}
    positions = layer.positions
    arguments = (np.int64(2), np.array([1, 1]), one, np.int64(2))
    torch.testing.assert_close(irregular_conv2d(x, layer.weight, positions, layer.bias, *arguments), expected)
    with pytest.raises(TypeError, match="`kernel_size`"):
        IrregularConv2d(4, 4, 3.0)

"""Every convolution class that is known computes the same after converting; unknown ones are refused by name."""

import pytest
import timm.layers
import torch
from timm.layers import Conv2dSame, MixedConv2d, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers.conv2d_same import Conv2dSameExport
from torch import nn

import icnn_zoo
from icnn_zoo import ConvRules, IrregularConv2d, convert, irregular_layers, plan, register_conv_rules
from icnn_zoo.nn.conv_rules import find_rules

TIMM = (Conv2dSame, Conv2dSameExport, StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
GEOMETRIES = (
    {"kernel_size": 3},
    {"kernel_size": 5, "stride": 2},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": (1, 5), "stride": (2, 1)},
    {"kernel_size": 3, "stride": 4, "groups": 4},
    {"kernel_size": 3, "dilation": 2, "groups": 2},
)


def woken(kind: type[nn.Conv2d], *channels: int, **options) -> nn.Conv2d:
    conv = kind(*channels, **options).double()
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.uniform_(0.5, 1.5)
    return conv


@pytest.mark.parametrize("size", [(12, 20), (13, 21), (7, 10)])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kind", TIMM)
def test_timm_classes_keep_their_function_and_gradients(kind, geometry, size):
    conv = woken(kind, 4, 8, **geometry)
    image = torch.randn(2, 4, *size, dtype=torch.double)
    expected = conv(image)
    wanted = torch.autograd.grad(expected.square().sum(), list(conv.parameters()))
    layer = IrregularConv2d.from_conv2d(conv, epsilon=0.0)
    torch.testing.assert_close(layer(image), expected)
    found = torch.autograd.grad(layer(image).square().sum(), list(conv.parameters()))
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        layer.displacement += 0.4
    assert (layer(image) - expected).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", (1, 2)])
def test_every_padding_and_padding_mode_of_conv2d_is_kept(padding, mode):
    conv = woken(nn.Conv2d, 3, 4, kernel_size=(4, 3), dilation=(1, 2), padding=padding, padding_mode=mode)
    image = torch.randn(1, 3, 11, 14, dtype=torch.double)
    torch.testing.assert_close(IrregularConv2d.from_conv2d(conv, epsilon=0.0)(image), conv(image))


@pytest.mark.parametrize("kind", TIMM)
def test_a_layer_holds_the_same_parameters_and_its_state_loads_into_the_regular_one(kind):
    conv = woken(kind, 3, 4, kernel_size=3)
    layer = IrregularConv2d.from_conv2d(conv)
    parameters = dict(layer.named_parameters())
    assert all(parameters[name] is parameter for name, parameter in conv.named_parameters())
    state = {name: value for name, value in layer.state_dict().items() if name != "displacement"}
    assert state.keys() == conv.state_dict().keys()
    conv.load_state_dict(state)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", TIMM)
def test_deploying_keeps_the_padding_and_the_standardised_weight(kind, stride):
    layer = IrregularConv2d.from_conv2d(woken(kind, 3, 4, kernel_size=3, stride=stride), epsilon=0.3)
    deployed = icnn_zoo.deploy(layer)
    for size in ((9, 12), (10, 13)):
        image = torch.randn(1, 3, *size, dtype=torch.double)
        torch.testing.assert_close(deployed(image), layer(image))


def test_mixed_convolutions_keep_the_order_of_their_children():
    mixed = MixedConv2d(9, 9, [3, 5, 7], depthwise=True).double()
    image = torch.randn(1, 9, 11, 12, dtype=torch.double)
    expected, keys = mixed(image), list(mixed.keys())
    convert(mixed, "", epsilon=0.0)
    assert list(mixed.keys()) == keys
    assert len(irregular_layers(mixed)) == 3
    torch.testing.assert_close(mixed(image), expected)


def test_other_kinds_of_convolutions_are_left_alone_with_a_reason():
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3), nn.ConvTranspose2d(3, 3, 2), nn.Conv3d(1, 1, 3), nn.Conv1d(1, 1, 3),
        timm.layers.CondConv2d(3, 3, 3), nn.Linear(2, 2),
    )  # fmt: skip
    reasons = {layer.name: layer.reason for layer in plan(model, "").skipped}
    assert reasons.keys() == {"1", "2", "3", "4"}
    assert "transposed" in reasons["1"]
    assert "three-dimensional" in reasons["2"]
    assert "one-dimensional" in reasons["3"]
    assert "for every image" in reasons["4"]
    convert(model, "")
    assert list(irregular_layers(model)) == ["0"]


class Doubled(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) * 2


class Renamed(Conv2dSame):
    """Computes what its parent computes."""


def test_an_unknown_forward_is_refused_by_name_and_can_be_left_out():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), Doubled(3, 3, 3))
    result = plan(model, "")
    assert [layer.name for layer in result.refused] == ["1"]
    assert "refused" in str(result)
    with pytest.raises(ValueError, match=r"'1'.*Doubled has a forward of its own.*register_conv_rules.*`filter`"):
        convert(model, "")
    assert not irregular_layers(model)
    convert(model, "", filter=lambda module, name: not isinstance(module, Doubled))
    assert list(irregular_layers(model)) == ["0"]


def test_a_subclass_goes_by_its_parents_rules_unless_it_computes_anew():
    assert find_rules(Renamed(3, 3, 3)) == find_rules(Conv2dSame(3, 3, 3))
    assert find_rules(type("Child", (Doubled,), {})(3, 3, 3)) is None
    assert find_rules(nn.Linear(2, 2)) is None


def doubled_weight(layer):
    return 2 * layer.weight


def test_a_class_of_ones_own_is_registered_by_one_function():
    class Twice(nn.Conv2d):
        def forward(self, input):
            return super().forward(input) * 2

    @register_conv_rules(Twice)
    def twice(conv):
        return ConvRules(weight=doubled_weight)

    model = nn.Sequential(Twice(3, 4, 3, bias=False))
    image = torch.randn(1, 3, 8, 9)
    expected = model(image)
    convert(model, "", epsilon=0.0)
    torch.testing.assert_close(model(image), expected)
    torch.testing.assert_close(icnn_zoo.deploy(model)(image), expected)
    assert "weight_rule=doubled_weight" in repr(model)


def test_registering_checks_its_argument():
    with pytest.raises(TypeError, match=r"`kind` must be a subclass of torch\.nn\.Module"):
        register_conv_rules("Conv2d")
    for kind in (nn.Conv2d, StdConv2d):
        with pytest.raises(ValueError, match="are built in"):
            register_conv_rules(kind)


def test_a_padding_rule_of_ones_own_can_not_be_deployed():
    layer = IrregularConv2d(3, 4, 3)
    layer.padding_rule = lambda layer, input: (0, 2, 0, 2)
    with pytest.raises(ValueError, match="no standard form"):
        icnn_zoo.deploy(layer)

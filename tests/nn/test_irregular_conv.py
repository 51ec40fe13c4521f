"""`IrregularConv2d`: what it shares with nn.Conv2d, the displacement's dtype, and what conversion keeps."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import Tensor, nn

import icnn_zoo
from icnn_zoo import IrregularConv2d
from icnn_zoo.ops.sharing import SHAPES, Shapes

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "no bias": {"kernel_size": 3, "bias": False},
    "stride, padding": {"kernel_size": 3, "stride": 2, "padding": 1},
    "unequal": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (2, 3)},
    "same": {"kernel_size": (3, 5), "padding": "same", "dilation": 2},
    "same, even": {"kernel_size": (4, 2), "padding": "same", "dilation": (2, 1)},
    "valid": {"kernel_size": (1, 5), "padding": "valid"},
    "groups": {"kernel_size": 3, "groups": 2},
    "depthwise, multiplier 2": {"kernel_size": 3, "groups": 4, "out_channels": 8},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": (1, 3), "padding_mode": "replicate", "stride": 2},
    "circular": {"kernel_size": (5, 3), "padding": "same", "padding_mode": "circular"},
    "reflect, same, even": {"kernel_size": 2, "padding": "same", "padding_mode": "reflect"},
    "1x1": {"kernel_size": 1},
}
# F.conv2d copies its input here; the irregular layer pads by itself.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def make(kind: type[Any] = IrregularConv2d, **settings: Any) -> Any:
    torch.manual_seed(0)
    return kind(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **settings})


def spread(layer: IrregularConv2d, amount: float = 1.5) -> IrregularConv2d:
    """Move the taps."""
    with torch.no_grad():
        layer.displacement.normal_(std=amount, generator=torch.Generator().manual_seed(1))
    return layer


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, 8, 9, dtype=dtype, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_attributes_are_those_of_conv2d(settings: dict[str, Any]) -> None:
    layer, conv = make(**settings), make(nn.Conv2d, **settings)
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode transposed"
    for name in [*names.split(), "output_padding"]:
        assert getattr(layer, name) == getattr(conv, name), name
    assert layer.weight.shape == conv.weight.shape
    assert (layer.bias is None) == (conv.bias is None)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_initial_weights_are_drawn_as_in_conv2d(settings: dict[str, Any]) -> None:
    layer, conv = make(**settings), make(nn.Conv2d, **settings)
    assert torch.equal(layer.weight, conv.weight)
    assert layer.bias is None or torch.equal(layer.bias, conv.bias)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_equals_conv2d_at_epsilon_0_and_not_when_taps_move(settings: dict[str, Any], shapes: Shapes) -> None:
    conv = make(nn.Conv2d, **settings)
    layer = IrregularConv2d.from_conv2d(conv, epsilon=0.0, shapes=shapes)
    torch.testing.assert_close(layer(image()), conv(image()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(image()[0]), conv(image()[0]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(spread(layer)(image()), conv(image()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_any_padding_equals_explicit_padding_and_the_reference(settings: dict[str, Any]) -> None:
    layer = spread(make(**settings, dtype=torch.float64))
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    reach = [dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "same":
        (top, bottom), (left, right) = ((r // 2, r - r // 2) for r in reach)
    else:
        top, left = (0, 0) if layer.padding == "valid" else layer.padding
        bottom, right = top, left
    padded = F.pad(image(torch.float64), (left, right, top, bottom), mode=mode)
    expected = icnn_zoo.irregular_conv2d(
        padded,
        layer.weight,
        layer.positions,
        layer.bias,
        layer.stride,
        0,
        layer.dilation,
        layer.groups,
        backend="reference",
    )
    torch.testing.assert_close(layer(image(torch.float64)), expected)


@pytest.mark.parametrize("size", [(8, 9), (7, 5)])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 5, "stride": 2, "groups": 4, "out_channels": 4},
        {"kernel_size": (2, 3), "dilation": (1, 2)},
        {"kernel_size": 4, "stride": 3, "dilation": 2},
    ],
)
def test_equals_timms_conv2d_same_at_epsilon_0(settings: dict[str, Any], shapes: Shapes, size: tuple[int, int]) -> None:
    conv, input = make(Conv2dSame, **settings), image()[:, :, : size[0], : size[1]]
    layer = IrregularConv2d.from_conv2d(conv, epsilon=0.0, shapes=shapes)
    torch.testing.assert_close(layer(input), conv(input), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(spread(layer)(input), conv(input), rtol=1e-2, atol=1e-2)


def test_is_not_a_conv2d() -> None:
    assert not isinstance(make(), nn.Conv2d)


def test_positions_are_the_regular_grid_plus_the_displacement() -> None:
    layer = make(kernel_size=(2, 3), dilation=(2, 3))
    grid = [[0, -3], [0, 0], [0, 3], [2, -3], [2, 0], [2, 3]]  # row, col; an even kernel's center is tap 0
    assert layer.regular_grid.tolist() == grid
    assert torch.equal(layer.displacement, torch.full((4, 6, 2), 1e-3))
    assert torch.equal(layer.positions, layer.regular_grid + layer.displacement)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, (4, 9, 2)),
        ({"groups": 2}, (4, 9, 2)),
        ({"groups": 4, "out_channels": 8, "kernel_size": (1, 5)}, (4, 5, 2)),
        ({"shapes": "layer", "groups": 2}, (1, 9, 2)),
        ({"shapes": "group", "groups": 2}, (2, 9, 2)),
        ({"shapes": "kernel"}, (6, 4, 9, 2)),
        ({"shapes": "kernel", "groups": 2}, (6, 2, 9, 2)),
    ],
)
def test_shape_of_the_displacement(settings: dict[str, Any], shape: tuple[int, ...]) -> None:
    layer = make(**settings)
    assert layer.displacement.shape == layer.positions.shape == shape


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, -0.25])
def test_epsilon_is_the_initial_displacement(epsilon: float) -> None:
    assert (make(epsilon=epsilon).displacement == epsilon).all()
    assert (IrregularConv2d.from_conv2d(make(nn.Conv2d), epsilon=epsilon).displacement == epsilon).all()


@pytest.mark.parametrize("shapes", SHAPES)
def test_every_parameter_gets_a_gradient(shapes: Shapes) -> None:
    layer = make(shapes=shapes)
    layer(image()).square().sum().backward()
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias", "displacement"}
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.ne(0).all(), name


@pytest.mark.parametrize("change", ["half", "bfloat16"])
def test_displacement_stays_float32_in_a_layer_of_half_precision(change: str) -> None:
    layer = spread(make())
    displacement, parameter = layer.displacement.detach().clone(), layer.displacement
    layer.displacement.grad = displacement.clone()
    for result in (getattr(layer, change)(), layer.to(getattr(torch, change.replace("half", "float16")))):
        assert result is layer
        assert layer.weight.dtype == layer.bias.dtype == getattr(torch, change.replace("half", "float16"))
        assert layer.displacement is parameter
        assert layer.displacement.dtype == layer.regular_grid.dtype == layer.positions.dtype == torch.float32
        assert torch.equal(layer.displacement, displacement)  # not rounded on the way either
        assert layer.displacement.grad is not None
        assert torch.equal(layer.displacement.grad, displacement)
    assert layer(image(layer.weight.dtype)).dtype == layer.weight.dtype


def test_displacement_follows_to_float64_and_back() -> None:
    layer = spread(make())
    displacement = layer.displacement.detach().clone()
    layer.double()
    assert layer.displacement.dtype == layer.positions.dtype == torch.float64
    assert torch.equal(layer.displacement, displacement.double())
    assert layer(image(torch.float64)).dtype == torch.float64
    layer.float()
    assert layer.displacement.dtype == layer.positions.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_a_new_layer(dtype: torch.dtype) -> None:
    layer = make(dtype=dtype)
    assert layer.weight.dtype == dtype
    assert layer.displacement.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_layer_on_the_meta_device_can_be_made_and_filled() -> None:
    layer = make(device="meta")
    assert layer.weight.is_meta
    assert layer.displacement.is_meta
    assert layer.regular_grid.is_meta
    with torch.device("meta"):
        assert make().weight.is_meta


def test_a_layer_from_the_meta_device_works_once_it_is_filled() -> None:
    source, layer = spread(make(dilation=2)), make(dilation=2, device="meta").to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer(image()), source(image()))


def test_a_large_grid_survives_half_precision_exactly() -> None:
    layer = make(dilation=257)  # bfloat16 counts in steps of 2 there
    grid = layer.regular_grid.clone()
    assert torch.equal(layer.bfloat16().regular_grid, grid)


def test_a_half_layer_inside_a_network_keeps_float32_positions_through_autocast() -> None:
    network = nn.Sequential(make(), nn.ReLU(), make(in_channels=6))
    with torch.autocast("cpu", torch.bfloat16):
        output = network(image())
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert network[0].displacement.grad.dtype == torch.float32
    network.bfloat16()
    assert network[0].displacement.dtype == network[2].positions.dtype == torch.float32


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_independent(clone: Any) -> None:
    layer = spread(make(padding="same", padding_mode="circular", shapes="kernel"))
    copied = clone(layer)
    assert torch.equal(copied(image()), layer(image()))
    with torch.no_grad():
        copied.displacement.add_(1.0)
    assert not torch.equal(copied(image()), layer(image()))
    assert repr(copied) == repr(layer)


def test_state_dict_holds_weight_bias_and_displacement_and_round_trips() -> None:
    layer = spread(make())
    state = layer.state_dict()
    assert list(state) == ["weight", "bias", "displacement"]
    other = make(dilation=2)  # a change of dilation moves the grid and not the displacement
    other.load_state_dict(state)
    assert torch.equal(other.displacement, layer.displacement)
    assert torch.equal(other.positions, 2 * layer.regular_grid + layer.displacement)


def test_state_dict_of_a_conv2d_loads_when_not_strict() -> None:
    conv, layer = nn.Conv2d(4, 6, 3), make(epsilon=0.0)
    with pytest.raises(RuntimeError, match="displacement"):
        layer.load_state_dict(conv.state_dict())
    outcome = layer.load_state_dict(conv.state_dict(), strict=False)
    assert outcome.missing_keys == ["displacement"]
    assert not outcome.unexpected_keys
    torch.testing.assert_close(layer(image()), conv(image()), rtol=1e-4, atol=1e-5)


def test_from_conv2d_keeps_the_very_same_parameters() -> None:
    conv = make(nn.Conv2d)
    layer = IrregularConv2d.from_conv2d(conv)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    assert IrregularConv2d.from_conv2d(make(nn.Conv2d, bias=False)).bias is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_from_conv2d_keeps_mode_requires_grad_dtype_and_device(
    training: bool, requires_grad: bool, dtype: torch.dtype, device: str
) -> None:
    conv = make(nn.Conv2d, dtype=dtype, device=device).train(training).requires_grad_(requires_grad)
    layer = IrregularConv2d.from_conv2d(conv)
    assert layer.training == training
    assert all(parameter.requires_grad == requires_grad for parameter in layer.parameters())
    assert layer.weight.dtype == dtype
    assert layer.displacement.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert layer.displacement.device.type == layer.positions.device.type == device


def test_from_conv2d_does_not_draw_random_numbers() -> None:
    conv = make(nn.Conv2d)
    before = torch.get_rng_state()
    IrregularConv2d.from_conv2d(conv)
    assert torch.equal(torch.get_rng_state(), before)


def test_from_conv2d_refuses_a_subclass_with_a_forward_of_its_own() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, input):
            return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)

    for wrong in (make(Standardised), nn.Linear(2, 2), make(nn.ConvTranspose2d)):
        with pytest.raises(TypeError, match=type(wrong).__name__):
            IrregularConv2d.from_conv2d(wrong)


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"kernel_size": 0}, "kernel_size"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size"),
        ({"stride": 0}, "stride"),
        ({"dilation": -1}, "dilation"),
        ({"groups": 3}, "groups"),
        ({"groups": 0}, "groups"),
        ({"padding": "full"}, "padding"),
        ({"padding": "same", "stride": 2}, "padding"),
        ({"padding_mode": "mirror"}, "padding_mode"),
        ({"epsilon": float("nan")}, "`epsilon`"),
    ],
)
def test_a_wrong_setting_is_a_value_error_that_names_it(settings: dict[str, Any], argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        make(**settings)


@pytest.mark.parametrize(("per_kernel", "shapes"), [(False, "channel"), (True, "kernel")])
def test_a_pickle_of_version_0_1_is_read(per_kernel: bool, shapes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = spread(make(shapes=shapes))
    old = {name: value for name, value in vars(layer).items() if name != "shapes"} | {"per_kernel": per_kernel}
    monkeypatch.setattr(IrregularConv2d, "__getstate__", lambda self: old, raising=False)
    read = pickle.loads(pickle.dumps(layer))
    assert (read.shapes, hasattr(read, "per_kernel")) == (shapes, False)
    assert torch.equal(read(image()), layer(image()))


def test_repr_says_what_differs_from_the_default() -> None:
    assert repr(make()) == "IrregularConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1))"
    text = repr(make(padding="same", dilation=2, groups=2, bias=False, padding_mode="reflect", shapes="kernel"))
    for part in (
        "padding=same",
        "dilation=(2, 2)",
        "groups=2",
        "bias=False",
        "padding_mode=reflect",
        "shapes=kernel",
    ):
        assert part in text


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_input_channels_gives_its_bias():
    layer = IrregularConv2d(0, 6, 3, padding=1)
    output = layer(torch.zeros(1, 0, 9, 8))
    assert output.equal(layer.bias[:, None, None].expand(1, 6, 9, 8))

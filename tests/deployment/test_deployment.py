"""The contract of icnn_zoo.deploy: the same outputs from standard convolutions, for every input size."""

import copy
import math

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn

from icnn_zoo import IrregularConv2d, convert, deploy, irregular_conv2d, irregular_layers
from icnn_zoo.deployment import standard_forms
from icnn_zoo.deployment.rewriting import rewrite
from icnn_zoo.models import SegmentationModel
from icnn_zoo.ops.geometry import resolve_padding

SIZES = ((9, 14), (16, 5))
LAYERS = {
    "plain": {},
    "stride": {"stride": (2, 3)},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"out_channels": 8, "groups": 4, "padding": 2, "stride": 2},
    "even kernel": {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 3)},
    "dilation": {"dilation": (2, 4), "padding": (2, 4), "bias": False},
    "generous padding": {"padding": (7, 5)},
    "valid": {"padding": "valid", "dilation": 2},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"padding": "same", "padding_mode": "replicate", "stride": 1},
    "circular": {"padding": 3, "padding_mode": "circular", "stride": 2},
}


def make_layer(dtype=torch.double, **arguments) -> IrregularConv2d:
    defaults = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1}
    return IrregularConv2d(**(defaults | arguments), dtype=dtype)


def move(layer: IrregularConv2d, how: str) -> IrregularConv2d:
    with torch.no_grad():
        displacement = layer.displacement.uniform_(-0.75, 0.75)
        if how == "spread":
            displacement.normal_(std=3)
        elif how == "one tap":
            displacement.zero_()[..., 0, :] = -5
        elif how == "everything far":
            displacement.add_(torch.tensor([-77.0, 210.0]))
        elif how == "outliers":
            flat = displacement.view(-1)
            flat[torch.randperm(len(flat))[:6]] += torch.tensor([9, -9, 31, -400, 70000, 3e9])
    return layer


def assert_same(layer: IrregularConv2d, module: nn.Module, sizes=SIZES) -> None:
    for size in sizes:
        image = torch.randn(2, layer.in_channels, *size, dtype=torch.double)
        with torch.no_grad():
            expected, actual = layer(image), module(image)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * max(1, float(expected.abs().max())))


def largest_difference(model: nn.Module, deployed: nn.Module, *size: int) -> float:
    image = torch.randn(*size)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(image.double())
        return float((deployed(image) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("how", ["near", "spread", "outliers", "one tap", "everything far"])
@pytest.mark.parametrize("shapes", ["channel", "kernel"])
@pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS)
def test_every_form_equals_the_layer(arguments, shapes, how, monkeypatch):
    layer = move(make_layer(shapes=shapes, **arguments), how)
    plans = standard_forms.plans
    tried = set()
    for number in range(3):
        monkeypatch.setattr(
            standard_forms, "plans", lambda layout, chosen=number: plans(layout)[chosen:][:1] or plans(layout)
        )
        tried.add(rewrite(layer).layers[0].form)
        assert_same(layer, deploy(layer))
    assert tried == {"dense", "stacked"} | (set() if shapes == "kernel" or "out_channels" in arguments else {"taps"})


def test_the_reference_says_the_same():
    layer = move(make_layer(stride=2, dilation=2), "outliers")
    image = torch.randn(1, 4, 9, 11, dtype=torch.double)
    arguments = (layer.weight, layer.positions, layer.bias, layer.stride, layer.padding, layer.dilation)
    expected = irregular_conv2d(image, *arguments, backend="reference")
    torch.testing.assert_close(deploy(layer)(image), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 2, 1), ((5, 2), (2, 3), 1), (3, 1, 2), (1, (3, 2), 1)])
@pytest.mark.parametrize("how", ["near", "outliers"])
def test_dynamic_same_padding_follows_the_input_size(kernel, stride, dilation, how):
    conv = Conv2dSame(4, 4, kernel, stride=stride, dilation=dilation, groups=2).double()
    layer = move(IrregularConv2d.from_conv2d(conv), how) if kernel != 1 else IrregularConv2d.from_conv2d(conv)
    deployed = deploy(layer)
    for rows in range(1, 8):
        assert_same(layer, deployed, [(rows, 13 - rows)])


def test_maps_smaller_than_the_reach_of_every_tap():
    layer = move(make_layer(padding=12, dilation=12), "near")
    assert_same(layer, deploy(layer), [(1, 1), (3, 40), (13, 2)])


def test_images_without_a_batch():
    layer = move(make_layer(), "outliers")
    image = torch.randn(4, 9, 8, dtype=torch.double)
    torch.testing.assert_close(deploy(layer)(image), layer(image))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_keep_their_dtype(dtype):
    layer = move(make_layer(torch.float32), "near").to(dtype)
    deployed = deploy(layer)
    image = torch.randn(1, 4, 9, 9)
    assert {parameter.dtype for parameter in deployed.parameters()} == {dtype}
    torch.testing.assert_close(deployed(image.to(dtype)).float(), layer.float()(image), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("name", "start"), [("test_resnet", "layer2"), ("test_efficientnet", ""), ("test_convnext", "")]
)
def test_a_woken_network_is_the_same_to_1e_5(name, start, waken):
    model = waken(SegmentationModel(name, 4)).eval()
    for layer in irregular_layers(convert(model, start)).values():
        move(layer, "outliers")
    deployed = deploy(model)
    assert not irregular_layers(deployed)
    for size in ((2, 3, 65, 97), (1, 3, 40, 33)):
        assert largest_difference(model, deployed, *size) < 1e-5


def test_nothing_of_the_package_is_left():
    model = convert(timm.create_model("test_resnet", num_classes=3), "", epsilon=0.3)
    for layer in irregular_layers(model).values():
        move(layer, "outliers")
    before = {type(module) for module in timm.create_model("test_resnet").modules()}
    for name, module in deploy(model).named_modules():
        known = type(module).__module__.startswith(("torch.nn", "torch.fx.graph_module"))
        assert known or type(module) in before, (name, type(module))
        if isinstance(module, torch.fx.GraphModule):
            assert all("icnn_zoo" not in str(node.target) for node in module.graph.nodes)


def test_a_network_deployed_can_be_saved_and_loaded_without_the_package(tmp_path):
    import subprocess
    import sys

    model = nn.Sequential(move(make_layer(torch.float32), "outliers"), nn.ReLU())
    image = torch.randn(1, 4, 9, 9)
    deployed = deploy(model)
    torch.save((deployed, image, deployed(image)), tmp_path / "deployed.pt")
    code = (
        "import sys, torch; model, image, output = torch.load(sys.argv[1], weights_only=False); "
        # Close, not equal: the other process may sum with another number of threads.
        "torch.testing.assert_close(model(image), output); assert 'icnn_zoo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "deployed.pt"], check=True, cwd=tmp_path)


def test_a_copy_in_eval_mode_and_the_original_untouched():
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "").train()
    before = copy.deepcopy(model.state_dict())
    deployed = deploy(model)
    assert model.training
    assert isinstance(model[0], IrregularConv2d)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in deployed.modules())
    assert not any(parameter.requires_grad for parameter in deployed.parameters())


def test_a_layer_registered_twice_is_rewritten_once():
    shared = make_layer(torch.float32)
    deployed = deploy(nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})}))
    assert deployed["a"] is deployed["b"]["c"]


def test_regular_positions_give_the_regular_convolution():
    conv = nn.Conv2d(4, 6, 3, padding=1)
    deployed = deploy(IrregularConv2d.from_conv2d(conv, epsilon=0.0))
    assert type(deployed) is nn.Conv2d
    assert torch.equal(deployed.weight, conv.weight)
    assert deployed.padding == conv.padding


def test_an_outlier_does_not_widen_the_box_of_all():
    for arguments in ({}, {"groups": 256}):
        layer = move(make_layer(torch.double, in_channels=256, out_channels=256, **arguments), "near")
        (before,) = rewrite(layer).layers
        with torch.no_grad():
            layer.displacement[3, 4] += 25
        (after,) = rewrite(layer).layers
        assert after.outliers == 1
        assert after.box == before.box
        assert after.cost < 4 * before.cost  # the box of all would be 30x30
        assert_same(layer, deploy(layer), [(9, 33)])


def test_the_form_with_the_least_cost_is_taken():
    def form(how="near", **arguments):
        return rewrite(move(make_layer(torch.float32, **arguments), how)).layers[0].form

    many = {"in_channels": 256, "out_channels": 256}
    assert form(**many, dilation=4, padding=4) == "taps"
    assert form(in_channels=512, out_channels=21, dilation=12, padding=12) == "stacked"
    assert form(in_channels=256, out_channels=256, groups=256) == "dense"
    assert form(in_channels=16, out_channels=16, shapes="kernel") == "dense"


class Branching(nn.Module):
    """Norms that must not be folded (reader of many, called twice, weight read elsewhere), and one that can be."""

    def __init__(self) -> None:
        super().__init__()
        self.read_twice, self.read_once, self.layer = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norm, self.called_twice, self.other, self.good = (nn.BatchNorm2d(4) for _ in range(4))
        self.folded = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, scale=None):
        x = self.read_twice(x)
        x = self.norm(x) + x
        x = self.called_twice(self.called_twice(self.read_once(x)))
        x = self.other(self.layer(x)) * self.other.weight.mean()
        x = self.good(self.folded(x))
        return x if scale is None else x * scale


def test_a_norm_is_folded_where_it_alone_reads_the_layer_and_nowhere_else(waken):
    model = convert(waken(Branching()).eval(), "", epsilon=0.3)
    result = rewrite(model)
    assert {layer.name: layer.folded for layer in result.layers if layer.folded} == {"folded": "good"}
    assert type(result.model.good) is nn.Identity
    assert type(result.model.norm) is nn.BatchNorm2d
    assert largest_difference(model, result.model, 1, 4, 9, 8) < 1e-6


def test_a_norm_with_an_activation_is_folded_and_the_activation_stays(waken):
    model = convert(waken(timm.create_model("test_efficientnet", num_classes=3)).eval(), "", epsilon=0.3)
    result = rewrite(model)
    assert all(layer.folded for layer in result.layers)
    assert largest_difference(model, result.model, 1, 3, 70, 51) < 1e-5


def test_a_network_that_cannot_be_traced_keeps_its_norms(waken):
    class Untraceable(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    model = convert(waken(Untraceable(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))).eval(), "", epsilon=0.3)
    result = rewrite(model)
    assert result.layers[0].folded is None
    assert largest_difference(model, result.model, 1, 4, 9, 8) < 1e-6


def test_the_report_is_a_table():
    model = convert(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)), "", epsilon=0.3)
    lines = str(rewrite(model)).splitlines()
    assert lines[0].split() == ["layer", "form", "box", "outliers", "cost", "folded"]
    assert lines[1].split()[:4] == ["0", "dense", "4x4", "0"]


def test_a_regular_network_is_refused():
    with pytest.raises(ValueError, match=r"must have irregular layers; ResNet has none"):
        deploy(timm.create_model("test_resnet"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_positions_that_are_no_numbers_are_refused_by_the_layers_name(value):
    model = nn.Sequential(nn.ReLU(), make_layer())
    with torch.no_grad():
        model[1].displacement[1, 2, 0] = value
    with pytest.raises(ValueError, match=r"layer '1' has 1 that are not, of 72"):
        deploy(model)


def test_hooks_are_refused():
    model = nn.Sequential(make_layer())
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"'0' carries forward_hooks"):
        deploy(model)


def test_padding_is_what_the_layer_resolves():
    layer = make_layer(padding="same", kernel_size=(2, 5), dilation=(3, 1))
    assert standard_forms._static_padding(layer) == resolve_padding("same", (2, 5), (1, 1), (3, 1))

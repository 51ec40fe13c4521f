"""The contract of icnn_zoo.convert."""

import copy
import json

import pytest
import timm
import torch
from torch import nn

import icnn_zoo
from icnn_zoo import IrregularConv2d, convert, irregular_layers, plan


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)),
        nn.Conv2d(8, 4, (1, 5), padding="same"),
    )


def test_start_itself_and_everything_after_is_converted_in_registration_order():
    model = small_net()
    assert convert(model, "2") is model
    assert list(irregular_layers(model)) == ["2.1", "3"]
    assert type(model[0]) is nn.Conv2d
    assert type(model[2][0]) is nn.Conv2d


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "convnext_atto", "test_byobnet"])
def test_output_is_unchanged_at_epsilon_zero_and_changes_when_taps_move(name, waken):
    model = waken(timm.create_model(name, num_classes=5)).double().eval()
    image = torch.randn(2, 3, 97, 131, dtype=torch.double)
    before = model(image)
    convert(model, start="", epsilon=0.0)
    torch.testing.assert_close(model(image), before, rtol=1e-9, atol=1e-9)
    for layer in irregular_layers(model).values():
        control = layer.displacement.detach().clone()
        with torch.no_grad():
            layer.displacement += 0.4
        assert (model(image) - before).abs().max() > 1e-6 * before.abs().max()
        with torch.no_grad():
            layer.displacement.copy_(control)


def test_epsilon_is_the_initial_displacement():
    model = convert(small_net(), "0", epsilon=0.25)
    assert all((layer.displacement == 0.25).all() for layer in irregular_layers(model).values())


def test_axes_and_limit_are_those_of_every_layer_and_wrong_ones_change_nothing():
    model = convert(small_net(), "0", epsilon=0.25, axes="columns", limit=0.125)
    for layer in irregular_layers(model).values():
        assert (layer.axes, layer.limit) == ("columns", 0.125)
        assert ((layer.positions - layer.regular_grid) == torch.tensor([0.0, 0.125])).all()
    model = small_net()
    for options in ({"axes": "cols"}, {"limit": 0.0}, {"taps": 34}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be"):
            convert(model, "0", **options)
    assert not irregular_layers(model)


def test_parameters_are_the_same_objects():
    model = small_net()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    convert(model, "0")
    after = {name: id(p) for name, p in model.named_parameters() if "displacement" not in name}
    assert after == before


def test_a_second_call_changes_nothing():
    model = convert(small_net(), "0")
    before = {name: id(module) for name, module in model.named_modules()}
    assert convert(model, "0") is model
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_training_dtype_and_requires_grad_are_kept():
    model = small_net().double()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    convert(model, "0")
    assert not model[3].training
    assert model[0].training
    assert model[0].displacement.dtype == torch.float64
    assert not model[0].displacement.requires_grad
    assert not model[0].weight.requires_grad
    assert model[3].displacement.requires_grad


def test_position_of_children_is_kept():
    model = small_net()
    names = [name for name, _ in model.named_modules()]
    convert(model, "0")
    assert [name for name, _ in model.named_modules()] == names


def test_a_module_registered_twice_is_converted_once_under_both_names():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict({"a": shared, "inner": nn.ModuleDict({"b": shared}), "c": nn.Conv2d(4, 4, 3)})
    result = plan(model, "a")
    assert result.converted[0].aliases == ("a", "inner.b")
    convert(model, "a")
    assert isinstance(model["a"], IrregularConv2d)
    assert model["a"] is model["inner"]["b"]
    assert len(irregular_layers(model)) == 2


def test_a_root_convolution_is_returned_converted():
    conv = nn.Conv2d(3, 4, 3)
    layer = convert(conv, "")
    assert isinstance(layer, IrregularConv2d)
    assert layer.weight is conv.weight


def test_zero_conversions_is_an_error_that_names_the_last_candidate():
    model = timm.create_model("resnet18")
    with pytest.raises(ValueError, match=r"no convolution to convert.*layer4\.1\.conv2"):
        convert(model, "fc")


def test_filter_narrows_the_choice():
    model = small_net()
    convert(model, "0", filter=lambda module, name: module.groups == 1)
    assert list(irregular_layers(model)) == ["0", "3"]


def test_plan_changes_nothing_and_counts_what_convert_adds():
    model = small_net()
    untouched = copy.deepcopy(model)
    result = plan(model, "0")
    assert str(model) == str(untouched)
    before = sum(p.numel() for p in model.parameters())
    convert(model, "0")
    assert sum(p.numel() for p in model.parameters()) - before == result.added_parameters
    assert "3 converted" in str(result)


def test_a_plan_is_data_and_a_table():
    result = plan(timm.create_model("resnet18"), "layer4")
    data = json.loads(json.dumps(result.to_dict()))
    assert [layer["name"] for layer in data["converted"]] == [layer.name for layer in result.converted]
    assert data["added_parameters"] == result.added_parameters
    assert data["skipped"][0] == {
        "name": "layer4.0.downsample.0",
        "kind": "Conv2d",
        "reason": "1x1 kernels stay as they are",
    }
    lines = str(result).splitlines()
    assert lines[0] == "layer4.0.conv1         Conv2d 3x3  +4,608"
    assert lines[-2] == "layer4.0.downsample.0  Conv2d      skipped: 1x1 kernels stay as they are"
    assert lines[-1].startswith("From 'layer4' on: 4 converted, 1 skipped, 0 refused; +32,256 parameters (0.28% of")


def test_a_network_on_the_meta_device_is_planned_but_not_converted():
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    assert len(plan(model, "layer4").converted) == 4
    with pytest.raises(ValueError, match=r"'layer4\.0\.conv1' is on the meta device"):
        convert(model, "layer4")


def test_plan_counts_the_full_version():
    model = small_net()
    result = plan(model, "0", shapes="kernel")
    before = sum(p.numel() for p in model.parameters())
    convert(model, "0", shapes="kernel")
    assert sum(p.numel() for p in model.parameters()) - before == result.added_parameters


def test_regular_state_dict_loads_after_converting_with_strict_false():
    regular = timm.create_model("resnet18")
    model = convert(timm.create_model("resnet18"), "layer3")
    with pytest.raises(RuntimeError, match="displacement"):
        model.load_state_dict(regular.state_dict())
    missing, unexpected = model.load_state_dict(regular.state_dict(), strict=False)
    assert not unexpected
    assert all(name.endswith("displacement") for name in missing)


def test_copies_and_pickles_compute_the_same(tmp_path):
    model = convert(small_net(), "0", epsilon=0.3).eval()
    image = torch.randn(1, 3, 9, 11)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert torch.equal(other(image), model(image))


def test_importing_starts_no_cuda_and_imports_no_training_code():
    import subprocess
    import sys

    code = (
        "import sys, icnn_zoo, torch; assert not torch.cuda.is_initialized(); "
        "bad = {'triton', 'lightning', 'albumentations', 'wandb'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist():
    assert all(hasattr(icnn_zoo, name) for name in icnn_zoo.__all__)

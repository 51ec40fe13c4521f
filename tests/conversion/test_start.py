"""What ``start`` means: names, wrappers that rename, aliases, and the two orders."""

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import nn

from icnn_zoo import IrregularConv2d, convert, irregular_layers, plan
from icnn_zoo.conversion.start import resolve_start

IMAGE = torch.zeros(1, 3, 64, 96)


def test_an_exact_name_wins_over_an_ending():
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Conv2d(3, 3, 3)}), "b": nn.Conv2d(3, 3, 3)})
    assert resolve_start(model, "b") == "b"


def test_a_unique_ending_names_the_start():
    model = nn.ModuleDict({"backbone": timm.create_model("resnet18")})
    assert resolve_start(model, "layer4.1") == "backbone.layer4.1"


def test_an_ambiguous_ending_is_refused_with_the_candidates():
    with pytest.raises(ValueError, match=r"several names.*layer1\.0\.conv1"):
        resolve_start(timm.create_model("resnet18"), "0.conv1")


def test_of_several_endings_the_one_in_a_wrapper_is_meant():
    inner = nn.ModuleDict({"stem": nn.Conv2d(3, 3, 3), "side": nn.ModuleDict({"stem": nn.Conv2d(3, 3, 3)})})
    assert resolve_start(nn.ModuleDict({"model": inner}), "stem") == "model.stem"


@pytest.mark.parametrize(
    ("name", "options", "start", "found"),
    [
        ("resnet18", {}, "layer3.1", "layer3.1"),
        ("tf_efficientnet_lite0", {"output_stride": 16}, "blocks.3.0", "blocks.3.0"),
        ("convnext_atto", {"output_stride": 8}, "stages.2.blocks.1", "stages_2.blocks.1"),
        ("test_vit", {}, "patch_embed", "model.patch_embed"),
        ("pit_ti_224", {}, "patch_embed", "body.patch_embed"),
        ("resnet18", {"feature_cls": "fx"}, "layer3.1", "graph_module.layer3.1"),
        ("resnet18", {"feature_cls": "hook"}, "layer3.1", "body.layer3.1"),
        ("resnet18", {"feature_cls": "getter"}, "layer3.1", "model.layer3.1"),
    ],
)
def test_names_of_the_network_are_found_in_a_feature_extractor(name, options, start, found):
    model = timm.create_model(name, features_only=True, **options)
    assert resolve_start(model, start) == found


@pytest.mark.parametrize(
    ("make", "start", "found"),
    [
        (lambda: smp.Unet("resnet18", encoder_weights=None), "layer4", "encoder.layer4"),
        (lambda: smp.Unet("tu-convnext_atto", encoder_weights=None), "stages.3", "encoder.model.stages_3"),
        (lambda: smp.DeepLabV3Plus("resnet18", encoder_weights=None), "layer4", "encoder.layer4"),
        (lambda: torchvision.models.resnet18(), "layer4", "layer4"),
        (
            lambda: torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None),
            "layer4",
            "backbone.layer4",
        ),
        (
            lambda: torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None),
            "classifier",
            "classifier",
        ),
    ],
)
def test_networks_of_other_packages_convert_and_keep_their_function(make, start, found, waken):
    model = waken(make()).eval()
    assert resolve_start(model, start) == found
    image = torch.randn(1, 3, 96, 64)

    def output():
        with torch.no_grad():
            result = model(image)
        return result["out"] if isinstance(result, dict) else result

    expected = output()
    convert(model, start, epsilon=0.0)
    assert irregular_layers(model)
    torch.testing.assert_close(output(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_start_that_out_indices_cut_off_is_an_error_that_says_so():
    model = timm.create_model("resnet18", features_only=True, out_indices=(1, 2))
    with pytest.raises(ValueError, match=r"names no module.*`out_indices` .later ones are cut off"):
        convert(model, "layer4")


def test_an_unknown_start_lists_the_nearest_names():
    with pytest.raises(ValueError, match=r"names no module of ResNet; the nearest are layer4, [^.]*\.\d[^`]*$"):
        convert(timm.create_model("resnet18"), "layer44")


def test_an_alias_as_start_decides_by_where_the_alias_stands():
    model = timm.create_model("coat_tiny")
    names = [layer.name for layer in plan(model, "serial_blocks1.0").converted]
    assert "cpe1.proj" in names  # registered before, and again as serial_blocks1.0.cpe.proj
    assert "patch_embed1.proj" not in names
    convert(model, "serial_blocks1.0")
    assert isinstance(model.cpe1.proj, IrregularConv2d)
    assert model.serial_blocks1[0].cpe.proj is model.cpe1.proj
    assert model.serial_blocks1[1].cpe.proj is model.cpe1.proj


@pytest.mark.parametrize(("name", "start"), [("twins_svt_small", "blocks.1"), ("fasternet_t0", "stages.1")])
def test_execution_order_differs_where_modules_are_registered_by_kind(name, start):
    model = timm.create_model(name).train()
    by_registration = [layer.name for layer in plan(model, start).converted]
    result = plan(model, start, order="execution", example_input=torch.randn(2, 3, 64, 96))
    by_execution = [layer.name for layer in result.converted]
    assert result.order == "execution"
    assert by_execution != by_registration
    assert model.training


def test_execution_order_is_that_of_the_first_calls():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.middle, self.first = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.never = nn.Conv2d(3, 3, 3)

        def forward(self, image):
            return self.last(self.first(self.middle(self.first(image))))

    model = Backwards()
    result = plan(model, "middle", order="execution", example_input=IMAGE)
    assert [layer.name for layer in result.converted] == ["middle", "last"]
    assert [(layer.name, layer.reason) for layer in result.skipped] == [("never", "`example_input` does not reach it")]
    convert(model, "middle", order="execution", example_input=(IMAGE,))
    assert list(irregular_layers(model)) == ["last", "middle"]
    with pytest.raises(ValueError, match=r"'never' is not called"):
        plan(Backwards(), "never", order="execution", example_input={"image": IMAGE})


def test_a_forward_for_the_order_changes_no_statistics_and_no_modes():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3).eval())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan(model, "1", order="execution", example_input=torch.randn(2, 3, 9, 9))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, True, False]
    assert not any(module._forward_pre_hooks for module in model.modules())

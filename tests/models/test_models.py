"""The segmentation network."""

import pytest
import timm
import torch

from icnn_zoo import convert, irregular_layers
from icnn_zoo.models.segmentation import SegmentationModel, shrink_labels


@pytest.mark.parametrize("backbone", ["resnet18", "tf_efficientnet_lite0", "convnext_atto"])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_logits_have_the_output_stride(backbone, output_stride):
    model = SegmentationModel(backbone, 7, output_stride=output_stride).eval()
    logits = model(torch.randn(1, 3, 96, 160))
    assert logits.shape == (1, 7, 96 // output_stride, 160 // output_stride)


def test_sizes_of_8k_plus_1_give_k_plus_1_logits():
    assert SegmentationModel("resnet18", 3).eval()(torch.randn(1, 3, 81, 97)).shape[-2:] == (11, 13)


def test_the_head_is_one_dilated_convolution_drawn_as_in_deeplab():
    head = SegmentationModel("resnet18", 21).classifier
    assert (head.kernel_size, head.dilation, head.padding) == ((3, 3), (12, 12), (12, 12))
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (head.bias == 0).all()


def test_start_classifier_converts_the_head_alone():
    assert list(irregular_layers(convert(SegmentationModel("resnet18", 3), "classifier"))) == ["classifier"]


def test_start_in_the_backbone_reaches_the_head():
    layers = list(irregular_layers(convert(SegmentationModel("resnet101", 3), "layer4.2")))
    assert layers == ["backbone.layer4.2.conv2", "classifier"]


def test_preprocessing_takes_mean_and_std_from_timm_unless_given():
    image = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    cfg = timm.get_pretrained_cfg("resnet18")
    expected = (1 - torch.tensor(cfg.mean)) / torch.tensor(cfg.std)
    torch.testing.assert_close(SegmentationModel("resnet18", 3).preprocess(image)[0, :, 0, 0], expected)
    half = SegmentationModel("resnet18", 3, mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.testing.assert_close(half.preprocess(image)[0, :, 0, 0], torch.full((3,), 2.0))


def test_aligned_upsampling_keeps_the_logits_on_every_8th_pixel():
    model = SegmentationModel("resnet18", 3)
    logits = torch.randn(1, 3, 6, 9)
    torch.testing.assert_close(model.upsample(logits, (41, 65))[..., ::8, ::8], logits)


def test_labels_shrink_to_every_8th_pixel_and_other_sizes_name_the_nearest():
    labels = torch.arange(17 * 25).reshape(1, 17, 25)
    assert torch.equal(shrink_labels(labels, 8), labels[:, ::8, ::8])
    with pytest.raises(ValueError, match=r"153 or 161 for 160"):
        shrink_labels(torch.zeros(1, 160, 161), 8)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet101"])
def test_caffes_rule_dilates_the_first_block_like_the_rest_of_its_stage(backbone):
    timms = SegmentationModel(backbone, 3).eval()
    caffes = SegmentationModel(backbone, 3, dilation_rule="caffe").eval()
    for stage, dilation in (("layer1", 1), ("layer2", 1), ("layer3", 2), ("layer4", 4)):
        layers = [layer for layer in caffes.backbone[stage].modules() if getattr(layer, "kernel_size", 0) == (3, 3)]
        assert len(layers) >= 2
        assert {layer.dilation for layer in layers} == {(dilation, dilation)}, stage
    first = dict(timms.backbone.named_modules())
    conv = "conv1" if backbone == "resnet18" else "conv2"
    assert [first[f"{stage}.0.{conv}"].dilation[0] for stage in ("layer3", "layer4")] == [1, 2]
    caffes.load_state_dict(timms.state_dict())  # the rule changes no parameter
    image = torch.randn(1, 3, 65, 81)
    assert caffes(image).shape == timms(image).shape == (1, 3, 9, 11)


@pytest.mark.parametrize("backbone", ["regnetx_002", "tf_efficientnet_lite0", "res2net50_26w_4s"])
def test_caffes_rule_holds_for_other_families_and_keeps_the_centre(backbone):
    timms = SegmentationModel(backbone, 3, output_stride=16).eval()
    caffes = SegmentationModel(backbone, 3, output_stride=16, dilation_rule="caffe").eval()
    pairs = zip(timms.backbone.named_modules(), caffes.backbone.named_modules(), strict=True)
    changed = [(before, after) for (_, before), (_, after) in pairs if before.extra_repr() != after.extra_repr()]
    assert changed
    for before, after in changed:
        assert (before.dilation, after.dilation) == ((1, 1), (2, 2))
        image = torch.randn(1, after.in_channels, 9, 9)
        with torch.no_grad():
            for layer in (before, after):  # the center tap alone: the layer must leave the image where it is
                layer.weight.zero_()
                layer.weight[:, :, after.kernel_size[0] // 2, after.kernel_size[1] // 2] = 1
            torch.testing.assert_close(before(image), after(image))


def test_caffes_rule_leaves_stages_that_keep_their_stride_alone():
    backbone = SegmentationModel("resnet18", 3, output_stride=16, dilation_rule="caffe").backbone
    kept, lost = backbone.layer3[0].conv1, backbone.layer4[0].conv1
    assert (kept.stride, kept.dilation, kept.padding) == ((2, 2), (1, 1), (1, 1))
    assert (lost.stride, lost.dilation, lost.padding) == ((1, 1), (2, 2), (2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnetaa50", "dilation_rule": "caffe"}, "dilation_rule='timm'"),
        ({"backbone": "convnext_atto", "dilation_rule": "caffe"}, "dilation_rule='timm'"),
        ({"dilation_rule": "cafe"}, "`dilation_rule`"),
        ({"backbone": "resnet100"}, r"not a timm model; the nearest are .*resnet10"),
        ({"backbone": "vgg11"}, "cannot be dilated"),
        ({"backbone": "vit_tiny_patch16_224"}, "cannot be dilated"),
        ({"output_stride": 3}, "`output_stride`"),
        ({"output_stride": 4}, "cannot be dilated"),
        ({"head": "asp"}, "`head` must be one of largefov, aspp"),
        ({"num_classes": 1}, "`num_classes`"),
        ({"mean": (0.5,)}, "`mean`"),
    ],
)
def test_wrong_choices_name_the_right_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        SegmentationModel(**{"backbone": "resnet18", "num_classes": 3, **arguments})


def test_backbone_args_change_the_width_and_keep_caffes_rule():
    arguments = {"channels": [8, 8, 16, 16], "stem_width": 8}
    model = SegmentationModel("resnet10t", 3, backbone_args=arguments, dilation_rule="caffe")
    assert model.classifier.in_channels == 16
    assert model(torch.randn(1, 3, 33, 41)).shape == (1, 3, 5, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": True}, "other options decide"),
        ({"checkpoint_path": "weights"}, "other options decide"),
        ({"act_layer": "relu"}, "numbers up to 4096"),
        ({"channels": [10**9]}, "numbers up to 4096"),
        ({"wideness": 2}, "resnet10t does not take"),
        ([32, 64], "names and numbers; got a list"),
    ],
)
def test_backbone_args_are_sizes_that_the_network_takes(arguments, message):
    with pytest.raises(ValueError, match=message):
        SegmentationModel("resnet10t", 3, backbone_args=arguments)

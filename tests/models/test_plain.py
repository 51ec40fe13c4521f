"""The small network in the package, as timm and the zoo see it."""

import pytest
import timm
import torch
from torch import nn

import icnn_zoo
from icnn_zoo.models import SegmentationModel


def test_it_is_a_backbone_by_name():
    model = SegmentationModel("plain5", 4, output_stride=2, head_dilation=1)
    assert timm.is_model("plain5")
    assert model(torch.rand(2, 3, 65, 48)).shape == (2, 4, 33, 24)
    kernels = [layer.kernel_size for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert kernels == [(3, 3)] * 6  # five and the head


def test_what_is_converted_from_its_first_layer_on():
    model = SegmentationModel("plain5", 4, output_stride=2, head_dilation=1)
    icnn_zoo.convert(model, "layer1")
    names = ["backbone.layer1.0", "backbone.layer2.0", "backbone.layer3.0", "classifier"]
    assert list(icnn_zoo.irregular_layers(model)) == names


def test_another_output_stride_and_pretrained_weights_are_refused():
    with pytest.raises(ValueError, match="`backbone`='plain5' cannot be dilated to output stride 8"):
        SegmentationModel("plain5", 4)
    with pytest.raises(ValueError, match="no weights of plain5"):
        timm.create_model("plain5", pretrained=True)

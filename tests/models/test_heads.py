"""Heads: logits at the output stride, a dilation where the head has one, 3x3 convolutions that can be converted."""

import pytest
import torch

from icnn_zoo import convert, irregular_layers
from icnn_zoo.models.segmentation import SegmentationModel


def three_by_three(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer for layer in model.classifier.modules() if getattr(layer, "kernel_size", 0) == (3, 3)]


@pytest.mark.parametrize(("head", "dilations"), [("largefov", [2]), ("aspp", [2, 4, 6, 1]), ("fcn", [1])])
def test_a_head_on_the_last_stage_gives_logits_at_the_output_stride(head, dilations):
    options = {} if head == "fcn" else {"head_dilation": 2}
    model = SegmentationModel("test_resnet", 3, head=head, **options).eval()
    assert model(torch.randn(1, 3, 33, 41)).shape == (1, 3, 5, 6)
    assert [layer.dilation[0] for layer in three_by_three(model)] == dilations
    convert(model, "classifier")
    assert len(irregular_layers(model)) == len(dilations)
    assert model(torch.randn(1, 3, 33, 41)).isfinite().all()


def test_a_pyramid_serves_a_backbone_that_cannot_be_dilated():
    model = SegmentationModel("densenet121", 3, output_stride=4, head="fpn").eval()
    logits = model(torch.randn(1, 3, 65, 97))
    assert logits.shape[:2] == (1, 3)
    assert model.upsample(logits, (65, 97)).shape[-2:] == (65, 97)
    convert(model, "classifier")
    assert irregular_layers(model)

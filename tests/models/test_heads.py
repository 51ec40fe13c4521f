"""A head is a name and a builder: nothing else knows what is inside."""

import torch
from torch import nn

from icnn_zoo import convert, irregular_layers, parameter_groups
from icnn_zoo.models import SegmentationModel
from icnn_zoo.models.heads import HEADS


def two_layers(channels: int, num_classes: int, dilation: int) -> nn.Module:
    mixed = nn.Conv2d(channels, 8, 3, padding=dilation, dilation=dilation)
    return nn.Sequential(mixed, nn.ReLU(), nn.Conv2d(8, num_classes, 1))


def test_a_new_head_is_built_converted_trained_and_named_by_its_name_alone(monkeypatch):
    monkeypatch.setitem(HEADS, "two_layers", two_layers)
    model = SegmentationModel("test_resnet", 3, head="two_layers", head_dilation=2)
    assert model(torch.randn(2, 3, 65, 81)).shape == (2, 3, 9, 11)
    assert list(irregular_layers(convert(model, "classifier"))) == ["classifier.0"]
    groups = {group["name"]: group for group in parameter_groups(model, lr=1.0, position_lr=1.0)}
    assert len(groups["head"]["params"]) == len(groups["head_bias"]["params"]) == 2


def test_the_default_dilation_keeps_the_field_of_view():
    strides = {16: 6, 8: 12}
    found = {stride: SegmentationModel("test_resnet", 3, output_stride=stride).head_dilation for stride in strides}
    assert found == strides


def test_mean_and_std_survive_meta_assigned_weights_and_empty_memory():
    whole = SegmentationModel("test_resnet", 3).eval()
    images = torch.randint(0, 256, (1, 3, 33, 33), dtype=torch.uint8)
    with torch.device("meta"):
        assigned, emptied = (SegmentationModel("test_resnet", 3).eval() for _ in range(2))
    assigned.load_state_dict(whole.state_dict(), assign=True)
    emptied.to_empty(device="cpu").load_state_dict(whole.state_dict())
    for model in (assigned, emptied):
        assert torch.equal(model.preprocess(images), whole.preprocess(images))
        assert torch.equal(model(model.preprocess(images)), whole(whole.preprocess(images)))

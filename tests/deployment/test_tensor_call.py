"""Networks with any inputs and outputs as functions from tensors to named tensors."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import onnxruntime
import pytest
import torch
import torchvision
from torch import nn

from icnn_zoo import convert, irregular_layers
from icnn_zoo.deployment.onnx_export import export_onnx
from icnn_zoo.deployment.tensor_call import TensorCall, named_outputs

ONE, TWO = torch.ones(1), torch.ones(2)


@dataclass
class Levels:
    low: torch.Tensor
    high: torch.Tensor | None = None


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (ONE, ["output"]),
        ((ONE, [TWO, ONE]), ["output_0", "output_1.0", "output_1.1"]),
        (OrderedDict(out=ONE, aux=None), ["out"]),
        ({"out": ONE, "levels": [ONE, TWO]}, ["out", "levels.0", "levels.1"]),
        (Levels(ONE), ["low"]),
        (namedtuple("Pair", "a b")(ONE, {"c": TWO}), ["output_0", "output_1.c"]),
    ],
)
def test_outputs_are_named_by_what_holds_them(output, names):
    assert list(named_outputs(output)) == names


@pytest.mark.parametrize(
    ("output", "message"), [({"a": [1]}, r"got int at 'a\.0'"), (None, "got NoneType"), ("text", r"got str\.")]
)
def test_what_is_not_a_tensor_is_refused_by_its_place(output, message):
    with pytest.raises(ValueError, match=message):
        named_outputs(output)


def test_inputs_are_named_by_the_forward_and_what_is_not_a_tensor_stays():
    class Takes(nn.Module):
        def forward(self, image, others, *rest, scale=1, mask=None):
            return {"sum": image + others[0] + others[1] + sum(rest) + mask * scale}

    example = (ONE, [ONE, ONE], ONE)
    call = TensorCall(Takes(), example[:2])
    assert list(call.inputs) == ["image", "others_1", "others_2"]
    keywords = TensorCall(Takes(), {"image": ONE, "others": [ONE, ONE], "scale": 3, "mask": TWO})
    assert list(keywords.inputs) == ["image", "others_1", "others_2", "mask"]
    assert keywords(ONE, ONE, ONE, TWO)[0].tolist() == [6, 6]
    with pytest.raises(ValueError, match="must have a tensor"):
        TensorCall(Takes(), {"scale": 3})


class Guided(nn.Module):
    """Two inputs of different kinds, a flag, and a nested output."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images, guide, weight, *, twice=False):
        features = self.conv(images)
        return {"levels": [features, features.mean((2, 3)) * weight], "guided": features * guide * (2 if twice else 1)}


def test_several_inputs_and_nested_outputs_are_exported_and_compared(tmp_path):
    model = convert(Guided(), "", epsilon=0.3)
    example = {"images": torch.rand(2, 3, 9, 12), "guide": torch.rand(2, 1, 9, 12), "weight": torch.rand(2, 4)}
    report = export_onnx(model, tmp_path / "m.onnx", example_input=example | {"twice": True}, rounds=1)
    assert report.shapes == ((2, 3, 9, 12), (4, 3, 9, 12))
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_inputs()] == ["images", "guide", "weight"]
    assert [item.name for item in session.get_outputs()] == ["levels.0", "levels.1", "guided"]
    larger = {"images": torch.rand(3, 3, 17, 8), "guide": torch.rand(3, 1, 17, 8), "weight": torch.rand(3, 4)}
    found = session.run(None, {name: value.numpy() for name, value in larger.items()})
    with torch.no_grad():
        expected = named_outputs(model(**larger, twice=True))
    for truth, output in zip(expected.values(), found, strict=True):
        torch.testing.assert_close(torch.from_numpy(output), truth, atol=1e-5, rtol=1e-5)


def test_a_network_with_a_dict_as_output_is_exported(tmp_path, waken):
    net = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3, aux_loss=True
    )
    model = convert(waken(net).eval(), "classifier", epsilon=0.3)
    assert irregular_layers(model)
    report = export_onnx(model, tmp_path / "m.onnx", (3, 65, 65), rounds=1)
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_outputs()] == ["out", "aux"]
    assert len(report.shapes) == 3


@pytest.mark.parametrize("arguments", [{}, {"input_size": (3, 9, 9), "example_input": torch.rand(1, 3, 9, 9)}])
def test_either_a_size_or_an_example_is_given(arguments, tmp_path):
    with pytest.raises(ValueError, match="one of both"):
        export_onnx(convert(nn.Sequential(nn.Conv2d(3, 3, 3)), ""), tmp_path / "m.onnx", **arguments)

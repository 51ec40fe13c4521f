"""DeepLab-LargeFOV's VGG16: strides traded for dilation, DeepLab's names, weights by way of Keras."""

import numpy as np
import pytest
import timm
import torch

from icnn_zoo import convert, irregular_layers
from icnn_zoo.data.preparation.vgg16 import rename
from icnn_zoo.models.segmentation import SegmentationModel

BLOCKS = {1: 2, 2: 2, 3: 3, 4: 3, 5: 3}


@pytest.fixture(scope="module")
def keras():
    """Arrays as Keras stores them, small numbers of each path its own."""
    rng = np.random.default_rng(0)
    network = timm.create_model("vgg16_largefov").state_dict()
    found = {}
    for block, number in BLOCKS.items():
        for layer in range(number):
            path = f"block{block}/layers/conv2d{f'_{layer}' if layer else ''}/vars"
            outputs, inputs = network[f"conv{block}_{layer + 1}.weight"].shape[:2]
            found[f"{path}/0"] = rng.standard_normal((3, 3, inputs, outputs), np.float32)
            found[f"{path}/1"] = rng.standard_normal(outputs, np.float32)
    return found


@pytest.mark.parametrize("output_stride", [8, 16])
def test_sizes_of_8k_plus_1_keep_a_logit_on_every_stride(output_stride):
    model = SegmentationModel("vgg16_largefov", 3, output_stride=output_stride)
    assert model(torch.zeros(1, 3, 33, 49)).shape == (1, 3, 32 // output_stride + 1, 48 // output_stride + 1)
    dilated = [name for name, layer in model.backbone.named_modules() if getattr(layer, "dilation", 0) == (2, 2)]
    assert dilated == (["conv5_1", "conv5_2", "conv5_3"] if output_stride == 8 else [])


def test_start_by_deeplabs_names_and_caffes_normalization():
    model = convert(SegmentationModel("vgg16_largefov", 3), "conv5_1")
    names = [name.rpartition(".")[2] for name in irregular_layers(model)]
    assert names == ["conv5_1", "conv5_2", "conv5_3", "classifier"]
    bgr_mean = torch.tensor([104.00699, 116.66877, 122.67892])
    seen = model.preprocess(torch.full((1, 3, 1, 1), 200.0)).flatten()
    assert torch.allclose(seen.flip(0), 200 - bgr_mean, atol=1e-3)


def test_keras_kernels_see_the_same_image_in_rgb(keras):
    tensors = rename(keras)
    timm.create_model("vgg16_largefov").load_state_dict(tensors)
    kernel = keras["block1/layers/conv2d/vars/0"]
    for channel in range(3):
        assert np.array_equal(tensors["conv1_1.weight"][5, channel].numpy(), kernel[:, :, 2 - channel, 5])
    assert np.array_equal(tensors["conv4_2.weight"][7, 9].numpy(), keras["block4/layers/conv2d_1/vars/0"][:, :, 9, 7])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block3/layers/conv2d_2/vars/1": None}, "lack block3/layers/conv2d_2/vars/1, which conv3_3.bias"),
        (
            {"block2/layers/conv2d/vars/1": np.zeros(5, np.float32)},
            r"\[5\] does not fit conv2_1.bias, which needs \[128\]",
        ),
    ],
)
def test_the_first_array_that_does_not_fit_is_named(keras, change, message):
    arrays = {path: value for path, value in {**keras, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        rename(arrays)


def test_missing_weights_name_the_command_that_makes_them():
    with pytest.raises(ValueError, match="icnn-zoo prepare vgg16"):
        timm.create_model("vgg16_largefov", pretrained=True)

"""Losses by class path, weighted sums, weights of classes, and pixels without a class."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from icnn_zoo.data import ShapesDataModule
from icnn_zoo.training.losses import PixelLoss, balanced_weights

SMP = "segmentation_models_pytorch.losses."
DICE = {"class_path": f"{SMP}DiceLoss", "init_args": {"mode": "multiclass"}}
LOVASZ = {"class_path": f"{SMP}LovaszLoss", "init_args": {"mode": "multiclass"}}
ENTROPY = {"class_path": "torch.nn.CrossEntropyLoss"}


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 7, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 7, 9), generator=generator)
    labels[:, :3] = 255
    return logits, labels


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 0.0, 3.0]])
def test_the_cross_entropy_is_torchs_weighted_mean(pixels, weights):
    logits, labels = pixels
    expected = F.cross_entropy(
        logits, labels, None if weights is None else torch.tensor(weights).double(), ignore_index=255
    )
    torch.testing.assert_close(PixelLoss(None, 4, 255, weights)(logits.float(), labels).double(), expected)


@pytest.mark.parametrize(
    "spec",
    [
        DICE,
        {"class_path": f"{SMP}FocalLoss", "init_args": {"mode": "multiclass"}},
        LOVASZ,
        ENTROPY,
    ],
    ids=lambda spec: spec["class_path"].rpartition(".")[2],
)
def test_a_loss_of_another_package_does_not_see_pixels_without_a_class(pixels, spec):
    logits, labels = pixels[0].float(), pixels[1]
    loss = PixelLoss(spec, 4, 255)
    changed = torch.where((labels == 255)[:, None], logits + 5, logits)
    torch.testing.assert_close(loss(changed, labels), loss(logits, labels))
    assert loss(logits, torch.full_like(labels, 255)).item() == 0


def test_several_losses_are_added_with_their_weights(pixels):
    logits, labels = pixels
    both = PixelLoss([{"class_path": "torch.nn.CrossEntropyLoss"}, {**DICE, "weight": 0.25}], 4, 255)
    dice = PixelLoss(DICE, 4, 255)(logits, labels)
    torch.testing.assert_close(both(logits, labels), F.cross_entropy(logits, labels, ignore_index=255) + 0.25 * dice)


def test_weights_of_classes_reach_a_loss_that_takes_them(pixels):
    logits, labels = (values.float() if values.is_floating_point() else values for values in pixels)
    found = PixelLoss({"class_path": "torch.nn.CrossEntropyLoss"}, 4, 255, [1, 2, 3, 4])(logits, labels)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, torch.tensor([1.0, 2, 3, 4]), ignore_index=255))


def test_classes_are_weighed_by_the_median_of_their_pixels():
    data = ShapesDataModule(image_size=33, num_classes=4, num_train=5, num_workers=0)
    masks = np.concatenate([data.make_dataset("train")[index]["mask"].ravel() for index in range(5)])
    assert data.count_pixels().tolist() == [(masks == index).sum() for index in range(4)]
    assert balanced_weights(np.array([8, 2, 4])) == [0.5, 2, 1]


class Seeing(nn.Module):
    """A loss that learns from all pixels."""

    def forward(self, logits, labels):
        return logits.square().mean()


class Learning(nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize(
    ("spec", "weights", "message"),
    [
        ({"class_path": f"{__name__}.Seeing"}, None, r"`loss`.*learns from pixels labeled 255.*DiceLoss"),
        ({"class_path": "torch.nn.MSELoss"}, None, r"`loss`: MSELoss cannot be used"),
        ({"class_path": f"{SMP}DiceLoss"}, None, r"`loss`.*cannot be built.*mode"),
        (
            {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"reduction": "none"}},
            None,
            "set reduction to mean",
        ),
        ([DICE, {"class_path": "torch.nn.Nothing"}], None, r"`loss\[1\]`: torch.nn has no class Nothing"),
        ([{**DICE, "weight": "half"}], None, r"`loss\[0\].weight` must be a number; got 'half'"),
        ({"class_path": f"{__name__}.Learning"}, None, "has parameters"),
        (None, [1, 2, 3], r"`class_weights` must be auto or 4 numbers.*got 3: \[1, 2, 3\]"),
        (None, "automatic", r"`class_weights` must be auto, a list.*got 'automatic'"),
        (
            {"class_path": f"{SMP}LovaszLoss", "init_args": {"mode": "multiclass"}},
            [1, 2, 3, 4],
            "LovaszLoss takes none",
        ),
    ],
)
def test_a_loss_that_cannot_be_used_says_why(spec, weights, message):
    with pytest.raises(ValueError, match=message):
        PixelLoss(spec, 4, 255, weights)

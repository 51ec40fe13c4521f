"""Evaluation: windows, mirror images, scales and scores against literal descriptions."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.classification import MulticlassConfusionMatrix

from icnn_zoo.models import SegmentationModel
from icnn_zoo.models.evaluation import check_evaluation, multi_scale, sliding_logits, whole_logits, window_starts
from icnn_zoo.training.scores import iou_and_accuracy
from icnn_zoo.training.task import SegmentationTask

pytestmark = pytest.mark.filterwarnings("ignore")


def network_for(model):
    return lambda images: model.upsample(model(images), images.shape[-2:])


def blur(images):
    """A network that sees sideways: its output at a place depends on what lies around, differently left and right."""
    kernel = torch.tensor([[0.1, 0.5, 0.0], [0.2, 1.0, 0.0], [0.0, 0.3, -0.4]], dtype=images.dtype)
    return F.conv2d(images, kernel.expand(3, 1, 3, 3), padding=1, groups=3)


@pytest.mark.parametrize(("extent", "window"), [(713, 713), (714, 713), (1024, 713), (2048, 713), (100, 7), (9, 8)])
def test_windows_lie_as_the_formula_says(extent, window):
    stride = math.ceil(window * 2 / 3)
    number = math.ceil((extent - window) / stride) + 1
    expected = []
    for index in range(number):
        end = min(index * stride + window, extent)
        expected.append(end - window)
    assert window_starts(extent, window) == expected
    assert expected[0] == 0
    assert expected[-1] + window == extent
    assert all(later - former <= stride for former, later in itertools.pairwise(expected))


def test_cityscapes_has_eight_windows():
    assert window_starts(1024, 713) == [0, 311]
    assert window_starts(2048, 713) == [0, 476, 952, 1335]


@pytest.mark.parametrize("flip", [False, True])
def test_a_window_that_covers_the_image_is_whole_image_inference(waken, flip):
    network = network_for(waken(SegmentationModel("test_resnet", 4)).eval())
    image = torch.randn(2, 3, 65, 65)
    with torch.no_grad():
        torch.testing.assert_close(
            sliding_logits(network, image, window=65, flip=flip), whole_logits(network, image, flip=flip)
        )


def test_overlapping_windows_are_averaged_by_their_number():
    window, image = 12, torch.randn(1, 3, 29, 22, dtype=torch.float64)
    total, number = torch.zeros(1, 3, 29, 22, dtype=torch.float64), torch.zeros(29, 22)
    for row in (0, 8, 16, 17):
        for col in (0, 8, 10):
            total[..., row : row + window, col : col + window] += blur(
                image[..., row : row + window, col : col + window]
            )
            number[row : row + window, col : col + window] += 1
    assert number.min() >= 1
    for window_batch in (1, 5, 100):
        found = sliding_logits(blur, image, window=window, window_batch=window_batch)
        torch.testing.assert_close(found, total / number)


def test_windows_and_argmax_hold_the_logits_of_the_image_once():
    class Storages(TorchDispatchMode):
        """Notes the storages of results that are as large as the image's logits."""

        def __init__(self):
            super().__init__()
            self.found = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() >= 4 * 19 * 64 * 128:
                self.found[result.untyped_storage().data_ptr()] = result  # kept, so that no address comes twice
            return result

    with Storages() as storages, torch.no_grad():
        logits = sliding_logits(lambda part: part[:, :1].repeat(1, 19, 1, 1), torch.randn(1, 3, 64, 128), window=33)
        logits.argmax(dim=1)
    assert len(storages.found) == 1


def test_images_smaller_than_the_window_are_padded_with_the_mean_at_right_and_bottom():
    image = torch.randn(1, 3, 9, 20)
    seen = []

    def network(images):
        seen.append(images)
        return blur(images)

    logits = sliding_logits(network, image, window=16)
    assert logits.shape == image.shape
    assert [tuple(images.shape[-2:]) for images in seen] == [(16, 16)] * 2
    assert all((images[..., 9:, :] == 0).all() for images in seen)
    assert torch.equal(seen[0][..., :9, :], image[..., :16])


def test_flip_is_the_mean_of_the_image_and_of_its_mirror_image_mirrored_back():
    image = torch.randn(1, 3, 8, 11)
    mirrored = blur(image.flip(-1)).flip(-1)
    assert not torch.allclose(mirrored, blur(image))
    torch.testing.assert_close(whole_logits(blur, image, flip=True), (blur(image) + mirrored) / 2)
    both = whole_logits(blur, image, flip=True)
    torch.testing.assert_close(whole_logits(blur, image.flip(-1), flip=True).flip(-1), both)


def test_scales_average_probabilities_at_the_image_size():
    image = torch.randn(1, 3, 17, 33)
    assert torch.equal(multi_scale(blur, image, (1.0,)), blur(image))
    sizes = []

    def network(images):
        sizes.append(tuple(images.shape[-2:]))
        return blur(images)

    found = multi_scale(network, image, (0.5, 1.0, 1.5))
    assert sizes == [(9, 17), (17, 33), (25, 49)]
    expected = torch.zeros_like(image)
    for size in sizes:
        scaled = F.interpolate(image, size, mode="bilinear", align_corners=True)
        back = F.interpolate(blur(scaled), (17, 33), mode="bilinear", align_corners=True)
        expected += back.softmax(dim=1) / 3
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(1), torch.ones(1, 17, 33))


@pytest.mark.parametrize("evaluation", ["whole", "sliding"])
def test_padding_never_scores_and_is_cut_off_predictions(evaluation):
    task = SegmentationTask("test_resnet", 4, evaluation=evaluation, window=33).eval()
    image = torch.randint(0, 256, (2, 3, 49, 57), dtype=torch.uint8)
    mask = torch.randint(0, 4, (2, 49, 57))
    mask[0, 40:], mask[0, :, 30:], mask[1] = 255, 255, 255
    batch = {"image": image, "mask": mask, "name": ["a", "b"], "size": torch.tensor([[40, 30], [49, 57]])}
    with torch.no_grad():
        task.validation_step(batch, 0)
        predicted = task.predict_step(batch, 0)
        plain = task.predict_step({"image": image}, 0)
    assert int(task.confusion.compute().sum()) == 40 * 30
    assert predicted["name"] == ["a", "b"]
    assert [tuple(labels.shape) for labels in predicted["labels"]] == [(40, 30), (49, 57)]
    assert torch.equal(predicted["labels"][0], plain[0, :40, :30])
    assert plain.dtype == predicted["labels"][0].dtype == torch.uint8


def test_the_tasks_options_reach_the_evaluation(waken):
    torch.manual_seed(1)
    image = torch.randint(0, 256, (1, 3, 49, 57), dtype=torch.uint8)
    task = SegmentationTask("test_resnet", 4, evaluation="sliding", window=33, flip=True, scales=[0.5, 1.0]).eval()
    waken(task)
    network = network_for(task.model)
    with torch.no_grad():
        expected = multi_scale(
            lambda images: sliding_logits(network, images, window=33, flip=True),
            task.model.preprocess(image),
            (0.5, 1.0),
        )
        assert torch.equal(task.predict_step({"image": image}, 0).long(), expected.argmax(dim=1))


def test_miou_equals_a_plain_numpy_implementation_with_ignored_pixels_and_absent_classes():
    rng = np.random.default_rng(0)
    number = 7
    for trial in range(20):
        present = rng.choice(number, size=rng.integers(1, number), replace=False)
        confusion = MulticlassConfusionMatrix(number, ignore_index=255)
        maps = []
        for _ in range(3):
            shape = tuple(rng.integers(5, 30, size=2))
            truth = rng.choice(np.append(present, 255), size=shape)
            predicted = np.where(rng.random(shape) < 0.6, np.where(truth == 255, 0, truth), rng.choice(present, shape))
            maps.append((truth, predicted))
            confusion.update(torch.from_numpy(predicted)[None], torch.from_numpy(truth)[None])
        truth = np.concatenate([pair[0].ravel() for pair in maps])
        predicted = np.concatenate([pair[1].ravel() for pair in maps])
        predicted, truth = predicted[truth != 255], truth[truth != 255]
        iou = []
        for index in range(number):
            union = np.sum((truth == index) | (predicted == index))
            iou.append(np.sum((truth == index) & (predicted == index)) / union if union else np.nan)
        found, accuracy = iou_and_accuracy(confusion.compute())
        np.testing.assert_allclose(found.numpy(), iou, rtol=1e-6, err_msg=str(trial))
        assert float(found.nanmean()) == pytest.approx(np.nanmean(iou), rel=1e-6)
        assert float(accuracy) == pytest.approx(np.mean(truth == predicted), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("slide", 713, (1.0,), 1), "`evaluation`"),
        (("sliding", 0, (1.0,), 1), "`window`"),
        (("sliding", 713, (), 1), "`scales`"),
        (("sliding", 713, (1.0, 0.0), 1), "`scales`"),
        (("sliding", 713, (1.0,), 0), "`window_batch`"),
    ],
)
def test_wrong_options_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_evaluation(*arguments)

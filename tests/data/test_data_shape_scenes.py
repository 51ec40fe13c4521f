"""Scenes of shapes: deterministic, any size and number of classes, masks that fit the picture."""

import numpy as np
import pytest

from icnn_zoo.data import ShapesDataModule
from icnn_zoo.data.shape_scenes import FORMS, SHAPE_NAMES


def shapes(**kwargs) -> ShapesDataModule:
    return ShapesDataModule(**{"image_size": 48, "num_workers": 0, "num_train": 20, "num_val": 6, **kwargs})


def test_scenes_are_a_function_of_seed_split_and_index():
    first, again = shapes().make_dataset("train")[3], shapes().make_dataset("train")[3]
    assert np.array_equal(first["image"], again["image"])
    assert np.array_equal(first["mask"], again["mask"])
    others = [
        shapes().make_dataset("train")[4],
        shapes().make_dataset("val")[3],
        shapes().make_dataset("test")[3],
        shapes(seed=1).make_dataset("train")[3],
    ]
    assert all(not np.array_equal(first["image"], other["image"]) for other in others)


@pytest.mark.parametrize(("size", "expected"), [(33, (33, 33)), ((40, 72), (40, 72))])
def test_scenes_have_the_wanted_size(size, expected):
    sample = shapes(image_size=size).make_dataset("train")[0]
    assert sample["image"].shape == (*expected, 3)
    assert sample["mask"].shape == expected


def test_without_noise_and_texture_the_mask_is_where_the_picture_changes():
    data = shapes(noise=0, background_contrast=0, objects=(1, 1), image_size=96)
    dataset = data.make_dataset("train")
    for index in range(10):
        image, mask = dataset[index]["image"].astype(int), dataset[index]["mask"]
        background = np.median(image[mask == 0], axis=0)
        changed = np.abs(image - background).max(axis=-1) > 0
        # Pixels that an object covers by less than a half are background by label and mixed by color.
        assert changed[mask > 0].all()
        assert (changed != (mask > 0)).mean() < 0.1


def test_every_class_occurs():
    dataset = shapes(num_train=200).make_dataset("train")
    seen = set().union(*(np.unique(dataset[index]["mask"]) for index in range(100)))
    assert seen == set(range(6))


def test_255_classes_are_possible_and_differ():
    data = shapes(num_classes=255)
    assert len(set(data.classes)) == 255
    assert data.num_classes == 255
    assert data.classes[:4] == ("background", "disk", "triangle", "cross")
    assert len(SHAPE_NAMES) == 16 * len(FORMS)
    assert data.make_dataset("train")[0]["mask"].max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 256}, "`num_classes` must be 2 to 255"),
        ({"num_classes": 1}, "`num_classes` must be 2 to 255"),
        ({"num_val": 0}, "`num_val` must be at least 1"),
        ({"objects": (3, 1)}, "`objects` must be the least and the greatest"),
        ({"object_size": (0.0, 0.5)}, "`object_size` must be two positive shares"),
        ({"noise": -1.0}, "`noise` must not be negative"),
        ({"image_size": -4}, "`image_size` must be a positive number"),
        ({"background_contrast": 2.0}, "`background_contrast` must be 0 to 1"),
    ],
)
def test_impossible_scenes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        shapes(**arguments)


def test_scenes_of_evaluation_are_the_same_for_all_seeds_and_their_own():
    first, second = (shapes(seed=seed).make_dataset("val")[3] for seed in (0, 1))
    assert np.array_equal(first["image"], second["image"])
    assert not np.array_equal(first["image"], shapes(eval_seed=1).make_dataset("val")[3]["image"])
    with pytest.raises(ValueError, match="`eval_seed` must not be negative; got -1"):
        shapes(eval_seed=-1)

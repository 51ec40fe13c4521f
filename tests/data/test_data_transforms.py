"""The training augmentation does what the protocol says, and the same for the same seed."""

import albumentations as A
import numpy as np
import pytest
import torch

from icnn_zoo.data import TrainTransform
from icnn_zoo.models.segmentation import shrink_labels

FILL = (124, 116, 104)


def picture(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose every pixel tells its place, and a mask that can be checked against it."""
    rows, cols = np.mgrid[0:height, 0:width]
    mask = ((rows // 8 + cols // 8) % 4).astype(np.uint8)
    return np.stack([mask * 60, mask * 60, mask * 60], axis=-1).astype(np.uint8), mask


def test_smaller_images_are_padded_at_the_right_and_the_bottom():
    transform = TrainTransform((40, 50), scales=(0.5,), mirror=False)
    image, mask = transform(*picture(60, 70), seed=3)
    assert image.shape == (40, 50, 3)
    assert mask.shape == (40, 50)
    assert (mask[:30, :35] != 255).all()
    assert (mask[30:] == 255).all()
    assert (mask[:, 35:] == 255).all()
    assert (image[mask == 255] == FILL).all()


def test_scaled_size_is_the_integer_part():
    _, mask = TrainTransform(100, scales=(0.75,), mirror=False)(*picture(33, 47), seed=0)
    assert (mask != 255).any(axis=1).sum() == int(33 * 0.75)
    assert (mask != 255).any(axis=0).sum() == int(47 * 0.75)


def test_masks_stay_aligned_and_get_no_new_values():
    transform = TrainTransform(32)
    for seed in range(20):
        image, mask = transform(*picture(64, 64), seed=seed)
        assert set(np.unique(mask)) <= {0, 1, 2, 3, 255}
        seen = mask != 255
        # Only pixels at the borders of squares are interpolated differently.
        assert np.isclose(image[..., 0][seen], mask[seen] * 60.0, atol=8).mean() > 0.6


def test_a_seed_decides_everything():
    transform, other = TrainTransform(48), TrainTransform(48)
    sample = picture(80, 96)
    first = [transform(*sample, seed=seed)[0] for seed in range(8)]
    again = [other(*sample, seed=seed)[0] for seed in reversed(range(8))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(first[0], image) for image in first[1:])


def test_mirror_can_be_switched_off():
    image, mask = picture(40, 40)
    image[:, :20] = 0
    plain = TrainTransform(40, scales=(1.0,), mirror=False)
    mirrored = TrainTransform(40, scales=(1.0,))
    assert all(np.array_equal(plain(image, mask, seed)[0], image) for seed in range(8))
    share = np.mean([np.array_equal(mirrored(image, mask, seed)[0], image) for seed in range(200)])
    assert 0.35 < share < 0.65


def test_uniform_scales_lie_between_the_ends():
    transform = TrainTransform(200, scales=(0.5, 1.5), scale_mode="uniform", mirror=False)
    heights = {int((transform(*picture(100, 100), seed)[1] != 255).any(axis=1).sum()) for seed in range(60)}
    assert 50 <= min(heights) < 60
    assert 140 < max(heights) <= 150
    assert len(heights) > 20


def resized(values: np.ndarray, height: int, width: int, nearest: bool) -> np.ndarray:
    """Pixels as squares, centers at halves: bilinear between the four nearest centers, or the square one is in."""
    result = np.zeros((height, width, *values.shape[2:]))
    for row in range(height):
        for col in range(width):
            places = []
            for place, size, old in ((row, height, values.shape[0]), (col, width, values.shape[1])):
                if nearest:
                    places.append([(int(place * old / size), 1.0)])
                    continue
                center = min(max((place + 0.5) * old / size - 0.5, 0), old - 1)
                low = int(center)
                places.append([(low, low + 1 - center), (min(low + 1, old - 1), center - low)])
            for i, weight_i in places[0]:
                for j, weight_j in places[1]:
                    result[row, col] += weight_i * weight_j * values[i, j]
    return result


@pytest.mark.parametrize("size", [(25, 33), (33, 17), (41, 41)])
@pytest.mark.parametrize("scale", [0.5, 0.75, 1.0, 1.25, 1.5])
def test_scale_pad_crop_and_mirror_are_a_literal_description(size, scale):
    """Sizes of 8k + 1, a crop of 33: every result is one of the possible crops, and its mask shrinks to 5 x 5."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    mask = rng.integers(0, 5, size).astype(np.uint8)
    height, width = int(size[0] * scale), int(size[1] * scale)
    whole_image = np.full((max(height, 33), max(width, 33), 3), FILL, np.float64)
    whole_mask = np.full(whole_image.shape[:2], 255)
    whole_image[:height, :width] = resized(image, height, width, nearest=False)
    whole_mask[:height, :width] = resized(mask, height, width, nearest=True)
    places = [(i, j) for i in range(whole_mask.shape[0] - 32) for j in range(whole_mask.shape[1] - 32)]
    transform = TrainTransform(33, scales=(scale,))
    seen = set()
    for seed in range(12):
        found_image, found_mask = transform(image, mask, seed)
        matches = [
            (place, step)
            for place in places
            for step in (1, -1)
            if np.array_equal(whole_mask[place[0] : place[0] + 33, place[1] : place[1] + 33][:, ::step], found_mask)
        ]
        assert len(matches) == 1
        (row, col), step = matches[0]
        expected = whole_image[row : row + 33, col : col + 33][:, ::step]
        assert np.abs(found_image - expected).max() <= 1  # of 255: rounding
        small = shrink_labels(torch.from_numpy(found_mask.astype(np.int64))[None], 8)[0].numpy()
        assert np.array_equal(small, [[found_mask[8 * i, 8 * j] for j in range(5)] for i in range(5)])
        seen.add(matches[0])
    assert len(seen) >= min(2 * len(places), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": 0}, "`crop_size` must be a positive number"),
        ({"crop_size": (3, 4, 5)}, "`crop_size` must be a positive number"),
        ({"crop_size": 8, "scales": ()}, "`scales` must be one or more positive"),
        ({"crop_size": 8, "scales": (1.0, -1.0)}, "`scales` must be one or more positive"),
        ({"crop_size": 8, "scale_mode": "uniform"}, "the range's two ends"),
        ({"crop_size": 8, "scale_mode": "log"}, "`scale_mode` must be choice or uniform; got 'log'"),
        ({"crop_size": 8, "fill": (1, 256)}, "`fill` must be one number for each channel, 0 to 255"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainTransform(**arguments)


@pytest.mark.parametrize(("scales", "mode"), [((1.0,), "choice"), ((1.0, 2.0), "uniform")])
def test_what_is_drawn_for_one_sample_is_independent(scales, mode):
    """Crop, mirror and scale once came from one number: crops of the upper half were the mirrored ones."""
    transform = TrainTransform(20, scales=scales, scale_mode=mode)
    rows, cols = np.mgrid[0:60, 0:60].astype(np.uint8)
    drawn = []
    for seed in range(300):
        image, _ = transform(np.stack([rows, cols, cols], axis=-1), rows, seed=seed)
        steps = np.diff(image[10, :, 1].astype(float))
        drawn.append((image[0, 0, 0], steps.mean() > 0, abs(steps.mean()), image[:, :, 1].min()))
    values = np.array(drawn, dtype=float)
    values = values[:, values.std(axis=0) > 1e-6]
    between = np.corrcoef(values.T)[np.triu_indices(values.shape[1], 1)]
    # The last is where a crop lies, which a larger scale gives more room for: no more than that.
    assert np.abs(between).max() < (0.2 if mode == "choice" else 0.35)


def test_own_augmentations_see_float_images_as_they_see_bytes(tmp_path):
    file = tmp_path / "own.yaml"
    A.save(A.Compose([A.RandomBrightnessContrast(brightness_limit=(0.1, 0.1), contrast_limit=0, p=1)]), file, "yaml")
    transform = TrainTransform(20, scales=(1.0,), mirror=False, augmentations=file)
    pixels = np.random.default_rng(0).integers(0, 200, (30, 30, 3), dtype=np.uint8)
    mask = np.zeros((30, 30), np.uint8)
    of_bytes, of_floats = (transform(image, mask, seed=1)[0] for image in (pixels, pixels.astype(np.float32)))
    assert of_floats.dtype == np.float32
    assert np.abs(of_floats - of_bytes).max() <= 1

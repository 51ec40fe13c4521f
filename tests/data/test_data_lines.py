"""Pages of lines: deterministic, the same pages for every seed in evaluation, classes told by key glyphs alone."""

import time
from itertools import pairwise

import numpy as np
import pytest

from icnn_zoo.data import LinesDataModule
from icnn_zoo.data import lines as module


def lines(**kwargs) -> LinesDataModule:
    return LinesDataModule(**{"num_workers": 0, "num_train": 40, "num_val": 6, "num_test": 6, **kwargs})


def page(split: str, index: int, **kwargs) -> tuple[np.ndarray, np.ndarray]:
    sample = lines(**kwargs).make_dataset(split)[index]
    return sample["image"], sample["mask"]


def bands(mask: np.ndarray) -> list[tuple[int, int, int, int]]:
    """The lines of an upright page: top, bottom, left and class."""
    found = []
    for row in range(len(mask)):
        inside = np.flatnonzero(mask[row] != 255)
        if len(inside) and not (row and (mask[row - 1] != 255).any()):
            bottom = row
            while bottom < len(mask) and (mask[bottom] != 255).any():
                bottom += 1
            found.append((row, bottom, int(inside[0]), int(mask[row, inside[0]])))
    return found


def glyphs(image: np.ndarray, top: int, left: int) -> list[int]:
    """Which glyph of the font stands at each place of a line without noise; -1 for none."""
    ink = image[top : top + 5, left:, 0] > 127
    read = []
    for col in range(0, ink.shape[1] - 5, 6):
        same = [index for index, pattern in enumerate(module._FONT) if np.array_equal(pattern, ink[:, col : col + 5])]
        read.append(same[0] if same else -1)
    return read


def test_a_training_page_is_a_function_of_seed_and_index():
    first = page("train", 3)
    assert all(np.array_equal(a, b) for a, b in zip(first, page("train", 3), strict=True))
    for other in (page("train", 4), page("val", 3), page("test", 3), page("train", 3, seed=1)):
        assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("split", ["val", "test", "predict"])
def test_evaluation_pages_do_not_depend_on_the_seed(split):
    assert np.array_equal(page(split, 2)[0], page(split, 2, seed=7)[0])


def test_workers_give_the_same_batches():
    def batches(workers: int) -> list[np.ndarray]:
        data = lines(num_workers=workers, batch_size=8)
        data.setup("fit")
        return [batch["image"].numpy() for batch in data.train_dataloader()]

    assert all(np.array_equal(a, b) for a, b in zip(batches(0), batches(2), strict=True))


def test_the_key_glyphs_alone_tell_a_lines_class():
    seen: dict[int, set[int]] = {}
    for index in range(30):
        image, mask = page("train", index, noise=0, num_classes=3)
        for top, _, left, label in bands(mask):
            read = glyphs(image, top, left)
            assert -1 not in read
            keys = {glyph for glyph in read if glyph < 26}
            assert keys == {label}  # every line has its own, and no other's
            seen.setdefault(label, set()).update(glyph for glyph in read if glyph >= 26)
    assert seen[0] == seen[1] == seen[2] == set(range(26, 40))  # the others occur in all


def test_keys_lie_as_far_apart_as_asked():
    gaps = set()
    for index in range(40):
        image, mask = page("train", index, noise=0, key_gap=(2, 4), image_size=97)
        for top, _, left, label in bands(mask):
            gaps.update(np.diff([place for place, glyph in enumerate(glyphs(image, top, left)) if glyph == label]))
    assert gaps == {2, 3, 4}


def test_neighboring_lines_differ_and_have_the_spacing_asked_for():
    blanks = set()
    for index in range(30):
        found = bands(page("train", index, line_spacing=(1, 4))[1])
        assert all(above[3] != below[3] for above, below in pairwise(found))
        blanks.update(below[0] - above[1] for above, below in pairwise(found))
    assert blanks == {1, 2, 3, 4}


def test_every_class_occurs_equally_often():
    counts = np.zeros(4)
    dataset = lines(num_train=200).make_dataset("train")
    for index in range(200):
        for *_, label in bands(dataset[index]["mask"]):
            counts[label] += 1
    assert (abs(counts / counts.sum() - 0.25) < 0.03).all()


def test_pages_are_turned_by_the_angle_asked_for():
    for degrees in (20, 90):
        _, mask = page("train", 0, rotation=(degrees, degrees), image_size=129)
        changes = mask[:, 1:] != mask[:, :-1], mask[1:] != mask[:-1]
        # An edge at an angle crosses columns and rows as its tangent says; counterclockwise, as pictures are seen.
        across, down = changes[0].sum(), changes[1].sum()
        assert np.degrees(np.arctan2(across, down)) == pytest.approx(degrees, abs=4)
    # Counterclockwise: 20 columns to the right a line stands 20 * tan(20 degrees) = 7 rows higher.
    mask = page("train", 0, rotation=(20, 20), image_size=129)[1]
    assert (mask[7:, :-20] == mask[:-7, 20:]).mean() > 0.8


def test_large_glyphs_are_the_same_ones_enlarged():
    image, mask = page("train", 1, noise=0, glyph_size=10, image_size=(80, 120), line_spacing=(4, 4))
    top, bottom, left, _ = bands(mask)[0]
    assert bottom - top == 10
    small = image[top:bottom:2, left : left + 10 : 2, 0] > 127
    assert any(np.array_equal(pattern, small) for pattern in module._FONT)


def test_ink_and_noise_are_as_documented():
    clean = page("train", 0, noise=0)[0]
    assert set(np.unique(clean)) == {64, 191}
    noisy = page("train", 0, noise=0.15)[0].astype(int)
    assert (noisy - clean).std() == pytest.approx(0.15 * 127.5, rel=0.05)


def test_a_page_takes_less_time_than_a_training_step():
    dataset = lines().make_dataset("train")
    begin = time.process_time()
    for index in range(40):
        dataset[index]
    assert (time.process_time() - begin) / 40 < 0.01  # 0.5 ms on an idle core


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "`num_classes` must be 2 to 26"),
        ({"num_classes": 27}, "`num_classes` must be 2 to 26"),
        ({"num_val": 0}, "`num_val` must be at least 1"),
        ({"rotation": (10, -10)}, "`rotation` must be two numbers, -180 to 180, the smaller first"),
        ({"rotation": (0, 200)}, "`rotation` must be"),
        ({"line_spacing": (0, 3)}, "`line_spacing` must be two numbers, at least 1"),
        ({"key_gap": (3,)}, "`key_gap` must be two numbers"),
        ({"noise": -0.1}, "`noise` must not be negative"),
        ({"glyph_size": 4}, "`glyph_size` must be at least 5"),
        ({"glyph_size": 60}, "`glyph_size` must .*shorter side is 65; got 60"),
        ({"image_size": 0}, "`image_size` must be a positive number"),
    ],
)
def test_impossible_pages_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lines(**arguments)

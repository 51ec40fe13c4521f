"""Intervals over documents: paired by seed, and as wide as groups differ."""

import numpy as np
from documents_bootstrap import gain, miou, pixel_accuracy


def matrix(hits):
    """Two classes, of 100 pixels each, ``hits`` of which are right."""
    return np.array([[hits, 100 - hits], [100 - hits, hits]])


def test_miou_leaves_out_classes_that_neither_occur_nor_are_predicted():
    three = np.zeros((3, 3), int)
    three[:2, :2] = matrix(80)
    assert miou(three) == miou(matrix(80))
    assert np.isclose(miou(matrix(80)), 100 * 80 / 120)
    assert pixel_accuracy(matrix(80)) == 80


def test_a_gain_that_all_groups_share_has_no_width_and_one_of_a_single_group_has():
    rng = np.random.default_rng(0)
    regular = {seed: {str(group): matrix(50) for group in range(20)} for seed in ("0", "1", "2")}
    better = {seed: {str(group): matrix(60) for group in range(20)} for seed in ("1", "2")}
    result = gain(better, regular, rng)
    assert result["seeds"] == ["1", "2"]
    assert result["interval"] == [result["gain"]] * 2
    assert np.isclose(result["gain"], 100 * (60 / 140 - 50 / 150), atol=1e-3)
    one = {seed: {**found, "7": matrix(60)} for seed, found in regular.items()}
    low, high = gain(one, regular, rng)["interval"]
    assert low == 0 < high

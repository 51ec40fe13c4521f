"""How much of the displacement several trainings share."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from icnn_zoo import IrregularConv2d, convert, irregular_layers
from icnn_zoo.analysis import signal_share, signal_shares


def trainings(share: float, number: int, seed: int, size=(60, 9, 2)) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(size) * share**0.5
    return [common + rng.standard_normal(size) * (1 - share) ** 0.5 for _ in range(number)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("number", [2, 4])
def test_the_estimate_has_no_bias_and_its_interval_covers_the_truth(share, number):
    results = [signal_share(trainings(share, number, seed), resamples=200) for seed in range(40)]
    estimates = np.array([result.share for result in results])
    assert abs(estimates.mean() - share) < 4 * estimates.std() / len(results) ** 0.5 + 0.005
    # the 95 % interval, in 40 trials: 32 and fewer hits have a chance of 1 in 2000
    assert sum(result.low - 1e-9 <= share <= result.high + 1e-9 for result in results) > 32


def test_the_share_is_the_mean_product_of_pairs_over_the_mean_square():
    first, second, third = (np.random.default_rng(i).standard_normal((5, 9, 2)) + 1 for i in range(3))
    pairs = ((first * second).sum() + (first * third).sum() + (second * third).sum()) / 3
    squares = ((first**2).sum() + (second**2).sum() + (third**2).sum()) / 3
    assert signal_share([first, second, third], resamples=10).share == pytest.approx(pairs / squares)


def test_walks_stay_below_chance_as_often_as_the_level_says():
    above = [signal_share(trainings(0.0, 3, seed), level=0.9, resamples=200).significant for seed in range(200)]
    assert 8 <= sum(above) <= 34  # 20 expected
    assert signal_share(trainings(0.3, 3, 0)).significant


def test_a_layer_of_one_shape_is_resampled_tap_by_tap():
    result = signal_share(trainings(0.5, 3, 0, size=(1, 25, 2)))
    assert result.low < result.share < result.high


def test_the_result_is_a_pure_function_and_takes_tensors():
    arrays = trainings(0.5, 2, 0)
    tensors = [torch.from_numpy(array).requires_grad_() for array in arrays]
    assert signal_share(arrays) == signal_share(tensors)


def test_shares_of_networks_leave_the_common_start_out():
    networks = [convert(nn.Sequential(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 4, 3)), "0", epsilon=0.1) for _ in range(2)]
    for seed, network in enumerate(networks):
        for layer, displacement in zip(irregular_layers(network).values(), (3, 40), strict=True):
            walk = np.random.default_rng(seed).standard_normal((displacement, 9, 2)) * 0.01
            layer.displacement.data += torch.from_numpy(walk).float()
    shares = signal_shares(networks)
    assert list(shares) == ["0", "1"]
    assert abs(shares["1"].share) < 0.2  # 0.99 with the start of 0.1


@pytest.mark.parametrize(
    ("displacements", "message"),
    [
        ([np.ones((3, 9, 2))], "at least two"),
        ([np.ones((3, 9, 2)), np.ones((4, 9, 2))], "one size"),
        ([np.ones((3, 9, 3))] * 2, "one size"),
        ([np.zeros((3, 9, 2))] * 2, "not all zero"),
        ([np.full((3, 9, 2), np.nan)] * 2, "finite"),
    ],
)
def test_what_is_wrong_is_named(displacements, message):
    with pytest.raises(ValueError, match=message):
        signal_share(displacements)


def test_a_training_is_not_compared_with_itself():
    network = convert(nn.Sequential(nn.Conv2d(3, 4, 3)), "0", epsilon=0.1)
    with pytest.raises(ValueError, match=r"0 and 1 have equal shapes.*data\.init_args\.seed"):
        signal_shares([network, network])


def test_networks_with_other_layers_are_refused():
    first = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), "0")
    second = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), "1")
    with pytest.raises(ValueError, match="one network"):
        signal_shares([first, second])
    with pytest.raises(ValueError, match="one network"):
        signal_shares([])


def walked(network, seed: int, axes: slice = slice(0, 2)):
    """A copy whose taps walked at random along what is learned."""
    copied = copy.deepcopy(network)
    for layer in irregular_layers(copied).values():
        walk = torch.from_numpy(np.random.default_rng(seed).standard_normal(layer.displacement.shape) * 0.05)
        layer.displacement.data[..., axes] += walk.float()[..., axes]
    return copied


def test_a_common_start_is_no_signal():
    start = convert(nn.Sequential(nn.Conv2d(40, 4, 3)), "0")
    start[0].displacement.data.normal_(generator=torch.Generator().manual_seed(3))
    networks = [walked(start, seed) for seed in (0, 1)]
    assert signal_shares(networks)["0"].share > 0.9  # of the start
    assert abs(signal_shares(networks, start=start)["0"].share) < 0.2
    with pytest.raises(ValueError, match="`start` must be a network with the irregular layers"):
        signal_shares(networks, start=nn.Sequential(nn.Conv2d(40, 4, 3)))


def test_frozen_coordinates_are_no_signal():
    start = convert(nn.Sequential(nn.Conv2d(40, 4, 3)), "0", epsilon=0.2, axes="columns")
    networks = [walked(start, seed, slice(1, 2)) for seed in (0, 1)]
    assert abs(signal_shares(networks)["0"].share) < 0.2


def test_free_taps_need_a_start():
    networks = [nn.Sequential(IrregularConv2d(3, 3, 9, taps=5)) for _ in range(2)]
    with pytest.raises(ValueError, match="`start` is needed: the taps of '0' are free"):
        signal_shares(networks)

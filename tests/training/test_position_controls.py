"""Controls for learned positions: a walk of the same size, and shapes drawn at random."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import icnn_zoo
from icnn_zoo.training.callbacks.position_controls import RandomShapes, RandomWalk


def network() -> nn.Module:
    return icnn_zoo.convert(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), "0")


def test_a_walk_has_the_size_of_the_gradient_and_nothing_of_its_direction():
    model = network()
    (1e-3 * model(torch.randn(2, 8, 9, 9)).square().mean()).backward()
    before = {name: layer.displacement.grad.clone() for name, layer in icnn_zoo.irregular_layers(model).items()}
    weights = model[0].weight.grad.clone()
    RandomWalk().on_before_optimizer_step(None, model, None)
    for name, layer in icnn_zoo.irregular_layers(model).items():
        walk = layer.displacement.grad
        assert walk.square().mean().sqrt() == pytest.approx(before[name].square().mean().sqrt().item(), rel=0.3)
        assert abs(torch.corrcoef(torch.stack([walk.flatten(), before[name].flatten()]))[0, 1]) < 0.3
    assert torch.equal(model[0].weight.grad, weights)  # weights still learn
    assert before["0"].square().mean() != before["1"].square().mean()  # layer by layer


def test_a_walk_is_repeated_with_the_generator_and_skips_positions_without_a_gradient():
    grads = []
    for _ in range(2):
        torch.manual_seed(3)
        model = network()
        RandomWalk().on_before_optimizer_step(None, model, None)
        model(torch.randn(2, 8, 9, 9)).mean().backward()
        RandomWalk().on_before_optimizer_step(None, model, None)
        grads.append(model[0].displacement.grad)
    assert torch.equal(*grads)


def test_random_shapes_are_drawn_once_with_the_spread_asked_for():
    model = network()
    RandomShapes(spread=0.7).on_fit_start(SimpleNamespace(ckpt_path=None), model)
    for layer in icnn_zoo.irregular_layers(model).values():
        assert layer.displacement.std().item() == pytest.approx(0.7, rel=0.25)
    drawn = model[0].displacement.clone()
    RandomShapes().on_fit_start(SimpleNamespace(ckpt_path="last.ckpt"), model)  # resumed: as the checkpoint has them
    assert torch.equal(model[0].displacement, drawn)


def test_what_is_frozen_does_not_walk_and_is_not_drawn():
    model = icnn_zoo.convert(nn.Sequential(nn.Conv2d(8, 8, 3)), "0", axes="columns")
    model(torch.randn(2, 8, 9, 9)).square().mean().backward()
    RandomWalk().on_before_optimizer_step(None, model, None)
    RandomShapes().on_fit_start(SimpleNamespace(ckpt_path=None), model)
    for values in (model[0].displacement.grad, model[0].displacement.detach()):
        assert not values[..., 0].any()
        assert values[..., 1].all()


def test_a_spread_must_be_positive():
    with pytest.raises(ValueError, match="`spread` must be a positive number of pixels; got 0"):
        RandomShapes(0)

"""The rule by which positions move, with any optimizer and in any loop."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from icnn_zoo import convert, irregular_layers, move_positions, parameter_groups

RATE = 0.05
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    return convert(model, "0", epsilon=0.3)


def optimizer_of(model: nn.Module, name: str = "adamw") -> torch.optim.Optimizer:
    return OPTIMIZERS[name](parameter_groups(model, lr=1e-2, position_lr=RATE, head=None))


def displacements(model: nn.Module) -> torch.Tensor:
    return torch.cat([layer.displacement.detach().flatten() for layer in irregular_layers(model).values()])


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    return model(torch.randn(2, 3, 12, 9, generator=torch.Generator().manual_seed(step))).square().mean()


def train(model, optimizer, steps, factor=1.0):
    for step in steps:
        optimizer.zero_grad()
        (loss_of(model, step) * factor).backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_positions_follow_the_formula_with_any_optimizer(name):
    model = network()
    optimizer = optimizer_of(model, name)
    move_positions(optimizer, model, momentum=0.8, memory=0.9, threshold=1.5, bound_epsilon=1e-3)
    layers = irregular_layers(model).values()
    mean, square = [0.0, 0.0], [0.0, 0.0]
    for step in range(1, 6):
        before = [layer.displacement.detach().numpy().astype(np.float64) for layer in layers]
        train(model, optimizer, [step])
        for i, layer in enumerate(layers):
            gradient = layer.displacement.grad.numpy().astype(np.float64)
            mean[i] = 0.8 * mean[i] + 0.2 * gradient
            square[i] = 0.9 * square[i] + 0.1 * gradient**2
            variance = square[i] / (1 - 0.9**step)
            direction = mean[i] / (1 - 0.8**step)
            weights = 0.2 * 0.8 ** np.arange(step) / (1 - 0.8**step)  # of the gradients in their mean
            noise = (variance * (weights**2).sum()).sum(axis=-1, keepdims=True)
            trust = np.maximum(0, 1 - 1.5 * noise / (direction**2).sum(axis=-1, keepdims=True))
            move = RATE * trust * direction / (np.sqrt(variance) + np.sqrt(variance.mean()))
            expected = np.clip(before[i] - move, np.floor(before[i]) - 1e-3, np.ceil(before[i]) + 1e-3)
            np.testing.assert_allclose(layer.displacement.detach().numpy(), expected, atol=2e-6)


def test_the_scale_of_the_loss_does_not_matter():
    results = []
    for factor in (1.0, 1024.0):
        model = network()
        optimizer = torch.optim.SGD([layer.displacement for layer in irregular_layers(model).values()], lr=RATE)
        move_positions(optimizer, model)
        train(model, optimizer, [0] * 6, factor)
        results.append(displacements(model))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)
    assert (results[0] - 0.3).abs().max() > 0.05


def test_a_step_far_beyond_the_cell_is_bounded():
    model = network()
    optimizer = optimizer_of(model)
    move_positions(optimizer, model, bound_epsilon=1e-3)
    optimizer.param_groups[-1]["lr"] = 100.0
    for _ in range(4):
        last = displacements(model)
        train(model, optimizer, [0])
        moved = displacements(model)
        assert (moved >= last.floor() - 1.01e-3).all()
        assert (moved <= last.ceil() + 1.01e-3).all()
    assert moved.min() < -1e-4
    assert moved.max() > 1


def test_taps_move_where_gradients_agree_and_stay_where_they_are_noise():
    model = network()
    (layer, _) = irregular_layers(model).values()
    optimizer = torch.optim.SGD([layer.displacement, irregular_layers(model)["2"].displacement], lr=0.01)
    move_positions(optimizer, model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        layer.displacement.grad = torch.randn(layer.displacement.shape, generator=generator)
        layer.displacement.grad[0] = -1.0  # of the usual size, always the same way
        optimizer.step()
    moved = (layer.displacement.detach() - 0.3).abs()
    assert moved[0].min() > 0.1  # 30 steps of 0.005, but for the first
    assert moved[1:].mean() < 0.01


def test_the_schedule_of_the_group_is_followed():
    model = network()
    optimizer = optimizer_of(model)
    move_positions(optimizer, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(2))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(name):
    whole = network()
    optimizer = optimizer_of(whole, name)
    move_positions(optimizer, whole)
    train(whole, optimizer, range(3))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    train(whole, optimizer, range(3, 6))
    resumed = network()
    again = optimizer_of(resumed, name)
    move_positions(again, resumed)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(resumed, again, range(3, 6))
    assert torch.equal(displacements(whole), displacements(resumed))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaler_changes_nothing_and_what_it_skips_moves_nothing(name):
    plain, scaled = network(), network()
    optimizers = [optimizer_of(model, name) for model in (plain, scaled)]
    for optimizer, model in zip(optimizers, (plain, scaled), strict=True):
        move_positions(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, overflow in enumerate([False, True, False]):
        before = displacements(scaled)
        optimizers[1].zero_grad()
        scaler.scale(loss_of(scaled, step) * (float("inf") if overflow else 1.0)).backward()
        scaler.step(optimizers[1])
        scaler.update()
        if overflow:
            assert torch.equal(displacements(scaled), before)
        else:
            train(plain, optimizers[0], [step])
    torch.testing.assert_close(displacements(scaled), displacements(plain))


def test_gradients_that_are_made_in_a_closure_are_those_of_the_step():
    plain, closed = network(), network()
    first, second = optimizer_of(plain), optimizer_of(closed)
    move_positions(first, plain)
    move_positions(second, closed)
    for step in range(3):
        train(plain, first, [step])

        def closure(step=step):
            second.zero_grad()
            loss = loss_of(closed, step)
            loss.backward()
            return loss

        second.step(closure)
    assert torch.equal(displacements(plain), displacements(closed))


def test_accumulated_gradients_move_positions_once():
    plain, accumulated = network(), network()
    first, second = optimizer_of(plain), optimizer_of(accumulated)
    move_positions(first, plain)
    move_positions(second, accumulated)
    ((loss_of(plain, 0) + loss_of(plain, 1)) / 2).backward()
    first.step()
    for step in range(2):
        (loss_of(accumulated, step) / 2).backward()
    second.step()
    torch.testing.assert_close(displacements(plain), displacements(accumulated))


def test_a_layer_without_a_gradient_stays_and_a_removed_rule_is_gone():
    model = network()
    optimizer = optimizer_of(model)
    with move_positions(optimizer, model):
        before = displacements(model)
        optimizer.step()
        assert torch.equal(displacements(model), before)
    assert not optimizer.state
    train(model, optimizer, [0])
    steps = (displacements(model) - before).abs()
    torch.testing.assert_close(steps, torch.full_like(steps, RATE), atol=1e-3, rtol=0)  # Adam's first step


@pytest.mark.parametrize("name", ["momentum", "memory"])
@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_momentum_and_memory_out_of_range_are_refused(name, value):
    model = network()
    with pytest.raises(ValueError, match=f"`{name}` must be at least 0 and below 1"):
        move_positions(optimizer_of(model), model, **{name: value})

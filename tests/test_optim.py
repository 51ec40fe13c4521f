"""Parameter groups, the poly policy and the bound of Eq. 7."""

import copy

import pytest
import torch
from torch import nn

from icnn_zoo import bound_positions, convert, freeze_norm, irregular_layers, parameter_groups, poly_policy
from icnn_zoo.models import SegmentationModel


def network() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1))
    return convert(model, "0", epsilon=0.0)


def positions(model: nn.Module) -> torch.Tensor:
    return torch.cat([layer.positions.detach().flatten() for layer in irregular_layers(model).values()])


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(torch.randn(2, 3, 12, 9)).square().mean()


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=500.0, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=2.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_stays_within_the_last_cell_and_positions_do_move(name):
    model = network()
    weights = [p for n, p in model.named_parameters() if "displacement" not in n]
    before_weights = [p.detach().clone() for p in weights]
    optimizer = OPTIMIZERS[name]([p for n, p in model.named_parameters() if "displacement" in n])
    bound_positions(optimizer, model, bound_epsilon=1e-3)
    free = 0
    for _ in range(8):
        last = positions(model)
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        now = positions(model)
        assert (now >= last.floor() - 1e-3 - 1e-6).all()
        assert (now <= last.ceil() + 1e-3 + 1e-6).all()
        free += int((now != last).sum())
    assert free > 0
    assert (positions(model).frac() != 0).any()
    assert all(torch.equal(a, b) for a, b in zip(weights, before_weights, strict=True))


def test_without_the_bound_the_same_step_leaves_the_cell():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    last = positions(model)
    loss_of(model).backward()
    optimizer.step()
    assert (positions(model) > last.ceil() + 1e-3).any() or (positions(model) < last.floor() - 1e-3).any()


def test_a_step_inside_the_cell_is_not_touched():
    model = network()
    for layer in irregular_layers(model).values():
        nn.init.constant_(layer.displacement, 0.5)
    other = copy.deepcopy(model)
    for net in (model, other):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        if net is model:
            bound_positions(optimizer, net)
        loss_of(net).backward()
        optimizer.step()
    assert torch.equal(positions(model), positions(other))


def test_accumulated_gradients_are_bounded_once_at_the_step():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    bound_positions(optimizer, model)
    last = positions(model)
    for _ in range(3):
        loss_of(model).backward()
        assert torch.equal(positions(model), last)
    optimizer.step()
    assert (positions(model) <= last.ceil() + 1e-3 + 1e-6).all()


def test_a_step_that_the_scaler_skips_moves_nothing():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    bound_positions(optimizer, model)
    scaler = torch.amp.GradScaler("cpu")
    last = positions(model)
    scaler.scale(loss_of(model) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(positions(model), last)
    optimizer.zero_grad()
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)
    assert (positions(model) <= last.ceil() + 1e-3 + 1e-6).all()


def test_a_removed_bound_is_gone():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with bound_positions(optimizer, model):
        pass
    last = positions(model)
    loss_of(model).backward()
    optimizer.step()
    assert (positions(model) - last).abs().max() > 1.1


def test_bound_refuses_a_zero_epsilon_and_an_optimizer_made_before_converting():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="bound_epsilon"):
        bound_positions(optimizer, model, bound_epsilon=0.0)
    with pytest.raises(ValueError, match="Convert the network first"):
        bound_positions(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), model)


def test_groups_hold_every_parameter_once_with_the_papers_rates():
    model = convert(SegmentationModel("resnet18", 5), "layer4")
    groups = {g["name"]: g for g in parameter_groups(model, lr=1e-3, position_lr=50.0, weight_decay=5e-4)}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "backbone": (1e-3, 5e-4),
        "backbone_no_decay": (1e-3, 0.0),
        "head": (1e-2, 5e-4),
        "head_bias": (2e-2, 0.0),
        "positions": (50.0, 0.0),
    }
    members = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in groups["positions"]["params"]} == {
        id(layer.displacement) for layer in irregular_layers(model).values()
    }


def test_frozen_norms_are_in_no_group_and_keep_their_statistics():
    model = SegmentationModel("resnet18", 5, freeze_norm=True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    model(torch.randn(2, 3, 65, 65))
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    names = {g["name"] for g in parameter_groups(model, lr=1.0, position_lr=1.0)}
    assert names == {"backbone", "head", "head_bias"}


def test_freeze_norm_works_on_any_network():
    model = freeze_norm(network())
    assert not model[1].training
    assert not model[1].weight.requires_grad


def test_unknown_head_and_negative_rates_are_refused():
    with pytest.raises(ValueError, match=r"`head`='decoder'"):
        parameter_groups(network(), lr=1.0, position_lr=1.0, head="decoder")
    with pytest.raises(ValueError, match="`position_lr`"):
        parameter_groups(network(), lr=1.0, position_lr=-1.0, head=None)


def test_poly_policy_follows_its_formula_per_step():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 50.0)])
    scheduler = poly_policy(optimizer, max_steps=10)
    for step in range(10):
        for group, base in zip(optimizer.param_groups, (1.0, 50.0), strict=True):
            assert group["lr"] == pytest.approx(base * (1 - step / 10) ** 0.9)
        optimizer.step()
        scheduler.step()
    with pytest.raises(ValueError, match="max_steps"):
        poly_policy(optimizer, 0)

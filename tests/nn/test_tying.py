"""Several layers that share one displacement."""

import copy
import pickle

import pytest
import torch
from torch import nn

import icnn_zoo
from icnn_zoo import IrregularConv2d
from icnn_zoo.nn.tying import tie_by_name


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(IrregularConv2d(3, 3, 3, padding=1, epsilon=0.3) for _ in range(3)))
    icnn_zoo.tie_shapes(model)
    return model


def tied_names(model: nn.Module) -> list[list[str]]:
    groups = {}
    for name, layer in icnn_zoo.irregular_layers(model).items():
        groups.setdefault(id(layer.displacement), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def run(model: nn.Module) -> torch.Tensor:
    return model(torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(1)))


def test_the_gradient_of_a_tied_shape_is_the_sum_over_its_layers() -> None:
    model = network()
    run(model).square().sum().backward()
    loose = copy.deepcopy(model)
    for layer in loose:
        layer.displacement = nn.Parameter(layer.displacement.detach().clone())
    run(loose).square().sum().backward()
    torch.testing.assert_close(model[0].displacement.grad, sum(layer.displacement.grad for layer in loose))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_loaded_states_stay_tied(clone) -> None:
    model = network()
    copied = clone(model)
    with torch.no_grad():
        model[0].displacement.normal_()
    copied.load_state_dict(model.state_dict())
    assert tied_names(copied) == [["0", "1", "2"]]
    assert torch.equal(run(copied), run(model))
    torch.testing.assert_close(run(icnn_zoo.deploy(copied)), run(model), rtol=1e-4, atol=1e-5)
    assert tied_names(copied.double().half()) == [["0", "1", "2"]]


@pytest.mark.parametrize("hook", [icnn_zoo.bound_positions, icnn_zoo.move_positions])
def test_a_step_moves_and_bounds_a_tied_shape_once(hook) -> None:
    model = network()
    groups = icnn_zoo.parameter_groups(model, lr=0.1, position_lr=0.2, head=None)
    assert [len(group["params"]) for group in groups if group["name"] == "positions"] == [1]
    optimizer = torch.optim.SGD(groups)
    hook(optimizer, model)
    for step in (1, 2):
        optimizer.zero_grad()
        run(model).square().sum().backward()
        before = model[0].positions.detach().clone()
        optimizer.step()
        assert (model[2].positions >= before.floor() - 1.001e-3).all()
        assert (model[2].positions <= before.ceil() + 1.001e-3).all()
        if hook is icnn_zoo.move_positions:
            assert optimizer.state[model[0].displacement]["position_steps"] == step


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (IrregularConv2d(4, 3, 3), ValueError, r"one shape, dtype and device to share; got \[3, 9, 2\] .*\[4, 9, 2\]"),
        (nn.Conv2d(3, 3, 3), TypeError, "irregular layers; got a Conv2d"),
        (None, ValueError, "two or more"),
    ],
)
def test_what_cannot_be_tied_is_refused(other, error, message) -> None:
    layers = [IrregularConv2d(3, 3, 3), *([] if other is None else [other])]
    with pytest.raises(error, match=message):
        icnn_zoo.tie_shapes(layers)


def test_layers_are_tied_by_name_and_unknown_names_refused() -> None:
    model = nn.Sequential(*(IrregularConv2d(3, 3, 3) for _ in range(3)))
    tie_by_name(model, [["0", "2"]])
    assert tied_names(model) == [["0", "2"]]
    with pytest.raises(ValueError, match="`tied`='5' names no irregular layer"):
        tie_by_name(model, [["0", "5"]])


@pytest.mark.parametrize(
    ("first", "second", "limits", "message"),
    [
        ({}, {"interpolation": "gaussian"}, ({}, {}), "agree in interpolation"),
        ({}, {}, ({}, {"axes": "rows"}), "agree in axes"),
        ({}, {}, ({}, {"limit": 0.5}), "agree in limit"),
        ({}, {"dilation": 2}, ({"limit": "extent"}, {"limit": "extent"}), "one kernel size and dilation"),
        ({}, {"taps": 9}, ({}, {}), "agree in has_free_taps"),
    ],
)
def test_layers_that_bound_their_taps_otherwise_are_not_tied(first, second, limits, message) -> None:
    layers = [IrregularConv2d(3, 3, 3, **options) for options in (first, second)]
    for layer, limit in zip(layers, limits, strict=True):
        icnn_zoo.limit_taps(layer, **limit)
    with pytest.raises(ValueError, match=message):
        icnn_zoo.tie_shapes(layers)
    assert layers[0].displacement is not layers[1].displacement


@pytest.mark.parametrize("wide", [0, 1])
def test_gaussians_that_share_a_shape_move_as_far_as_the_narrowest_reads(wide) -> None:
    layers = [
        IrregularConv2d(3, 3, 3, padding=1, interpolation="gaussian", spread=(3.0 if i == wide else 0.4))
        for i in (0, 1)
    ]
    model = nn.Sequential(*layers)
    icnn_zoo.tie_shapes(model)
    optimizer = torch.optim.SGD([model[0].displacement], lr=1e9)
    icnn_zoo.bound_positions(optimizer, model)
    before = model[0].displacement.detach().clone()
    run(model).square().sum().backward()
    optimizer.step()
    assert (model[0].displacement - before).abs().max() <= 0.4 + 2e-3

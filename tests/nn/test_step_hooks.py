"""Where the hooks of Eq. 7 have to reach: groups added later, wrappers, copies, several optimizers."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from timm.optim.lookahead import Lookahead
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from icnn_zoo import (
    IrregularConv2d,
    bound_positions,
    check_gradients,
    convert,
    irregular_layers,
    move_positions,
    parameter_groups,
)

ONE_CELL = 1 + 1e-3 + 1e-5


def network() -> nn.Sequential:
    return convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), "", epsilon=0.5)


def backward(model: nn.Module) -> None:
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model(image).square().sum().backward()


def positions(model: nn.Module) -> torch.Tensor:
    return torch.cat([layer.positions.detach().flatten() for layer in irregular_layers(model).values()])


def step(model: nn.Module, optimizer) -> float:
    before = positions(model)
    model.zero_grad()
    backward(model)
    optimizer.step()
    return float((positions(model) - before).abs().max())


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization as its authors' code has it: a base optimizer, and a step in two halves."""

    def __init__(self, params, base, rho):
        super().__init__(params, {"rho": rho})
        self.base_optimizer = base(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    def _parameters(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self):
        for p in self._parameters():
            self.state[p]["old"] = p.clone()
            p.add_(self.param_groups[0]["rho"] * p.grad.sign())

    @torch.no_grad()
    def second_step(self):
        for p in self._parameters():
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class ScheduleFree(torch.optim.SGD):
    """What optimizers of this kind have: `eval` puts an average in place of what takes the gradients."""

    def eval(self):
        pass


def adamw(params):
    return torch.optim.AdamW(params, lr=5.0)


def test_a_group_added_later_is_bounded():
    model = network()
    BaseFinetuning.freeze(model[0])
    optimizer = adamw(BaseFinetuning.filter_params(model))
    bound_positions(optimizer, model)
    BaseFinetuning.unfreeze_and_add_param_group(model[0], optimizer, lr=5.0)
    assert 0.5 < step(model, optimizer) < ONE_CELL


def test_a_layer_converted_later_is_bounded_as_soon_as_the_optimizer_holds_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    optimizer = adamw(convert(model, "1").parameters())
    bound_positions(optimizer, model)
    convert(model, "0")
    optimizer.add_param_group({"params": [model[0].displacement]})
    assert step(model, optimizer) < ONE_CELL


@pytest.mark.parametrize("rule", [bound_positions, move_positions])
def test_a_wrapper_that_skips_torchs_set_up_is_bounded_without_zero_grad(rule):
    model = network()
    optimizer = Lookahead(adamw(model.parameters()), k=2)
    rule(optimizer, model)
    moved = [step(model, optimizer) for _ in range(6)]
    assert max(moved) < ONE_CELL
    assert min(moved[-3:]) > 0  # the rule waits until gradients agree


def test_a_wrapper_whose_halves_are_called_apart_is_bounded():
    model = network()
    optimizer = SAM(model.parameters(), adamw, rho=0.05)
    bound_positions(optimizer, model)
    before = positions(model)
    backward(model)
    optimizer.first_step()
    backward(model)
    optimizer.second_step()
    assert 0.5 < (positions(model) - before).abs().max() < ONE_CELL


def test_a_wrapper_with_a_closure_is_bounded_once():
    model = network()
    optimizer = SAM(model.parameters(), adamw, rho=0.05)
    bound_positions(optimizer, model)
    before = positions(model)
    backward(model)
    optimizer.step(lambda: backward(model))
    assert 0.5 < (positions(model) - before).abs().max() < ONE_CELL


@pytest.mark.parametrize("rule", [bound_positions, move_positions])
def test_schedule_free_optimizers_are_refused_for_displacements_only(rule):
    model = network()
    with pytest.raises(ValueError, match="ScheduleFree is schedule-free"):
        rule(ScheduleFree(model.parameters(), lr=1.0), model)
    displacements = [layer.displacement for layer in irregular_layers(model).values()]
    optimizers = [ScheduleFree([model[0].weight], lr=1.0), torch.optim.SGD(displacements, lr=5.0)]
    rule(optimizers, model)
    assert step(model, optimizers[1]) < ONE_CELL


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copied_optimizer_that_steps_without_the_bound_is_told(way):
    model = network()
    optimizer = adamw(model.parameters())
    bound_positions(optimizer, model)
    step(model, optimizer)
    model, optimizer = way((model, optimizer))
    step(model, optimizer)
    with pytest.warns(UserWarning, match="a step went by without the hooks"):
        backward(model)
    bound_positions(optimizer, model)
    assert step(model, optimizer) < ONE_CELL


def test_no_step_is_reported_where_positions_are_loaded_averaged_or_moved_by_sam():
    model = network()
    optimizer = SAM(model.parameters(), adamw, rho=0.05)
    bound_positions(optimizer, model)
    for _ in range(3):
        backward(model)
        optimizer.step(lambda: backward(model))
    state = copy.deepcopy(model.state_dict())
    state["0.displacement"] += 7
    model.load_state_dict(state)
    backward(model)
    with bound_positions(adamw(model.parameters()), model):
        pass
    with torch.no_grad():
        model[0].displacement += 7
    backward(model)  # no bound, no watch


def test_several_optimizers_are_given_in_a_list():
    model = network()
    optimizers = [adamw(part.parameters()) for part in model]
    with pytest.raises(ValueError, match="Of several optimizers, give all in a list"):
        bound_positions(optimizers[0], model)
    bound_positions(optimizers, model)
    for optimizer in optimizers:
        assert 0.5 < step(model, optimizer) < ONE_CELL


def test_what_is_not_a_torch_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, whose steps can be hooked.*got object"):
        bound_positions(object(), network())


class Within2px(nn.Module):
    def forward(self, x):
        return 2 * torch.tanh(x / 2)


class Invertible(Within2px):
    def right_inverse(self, y):
        return 2 * torch.atanh(y / 2)


def test_a_parametrized_displacement_is_a_position_and_bounded_through_its_inverse():
    model = network()
    parametrize.register_parametrization(model[0], "displacement", Invertible())
    groups = {group["name"]: group for group in parameter_groups(model, lr=0.1, position_lr=9.0, head=None)}
    original = model[0].parametrizations.displacement.original
    assert any(parameter is original for parameter in groups["positions"]["params"])
    assert not any(parameter is original for parameter in groups["backbone"]["params"])
    optimizer = torch.optim.AdamW(groups.values())
    with pytest.raises(ValueError, match="'0' is parametrized"):
        move_positions(optimizer, model)
    bound_positions(optimizer, model)
    assert 0.4 < step(model, optimizer) < ONE_CELL


def test_a_parametrization_without_an_inverse_is_refused():
    model = network()
    parametrize.register_parametrization(model[0], "displacement", Within2px(), unsafe=True)
    with pytest.raises(ValueError, match="'0' has no right_inverse"):
        bound_positions(adamw(model.parameters()), model)


def test_muon_leaves_displacements_to_its_fallback_or_is_refused():
    Muon = pytest.importorskip("timm.optim.muon", reason="needs a newer timm").Muon
    model = network()
    with pytest.raises(ValueError, match=r"Muon would orthogonalize the displacement of '0'.*use_muon=False"):
        bound_positions(Muon(model.parameters(), lr=0.02), model)
    move_positions(Muon(model.parameters(), lr=0.02), model).remove()  # which steps them by a rule of its own
    optimizer = Muon(parameter_groups(model, lr=0.02, position_lr=0.1, head=None))
    bound_positions(optimizer, model)
    step(model, optimizer)
    assert {"exp_avg", "exp_avg_sq"} <= optimizer.state[model[0].displacement].keys()  # of AdamW


def test_a_displacement_without_a_gradient_is_told_by_its_layers_name():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.used(x)

    model = convert(Half(), "")
    backward(model)
    with pytest.raises(ValueError, match="displacement of 'unused' received no gradient"):
        check_gradients(model)
    model.unused.displacement.requires_grad_(False)
    check_gradients(model)
    with pytest.raises(ValueError, match="must have irregular layers"):
        check_gradients(nn.Conv2d(3, 3, 3))


class Operators(TorchDispatchMode):
    """Names of the operators that ran, without views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not operator.is_view:
            self.names.append(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


def operators_of_a_step(rule, layers: int) -> list[str]:
    model = convert(nn.Sequential(*[nn.Conv2d(2, 2, 3) for _ in range(layers)]), "")
    displacements = [layer.displacement for layer in irregular_layers(model).values()]
    optimizer = torch.optim.SGD(displacements, lr=1.0, foreach=True)
    rule(optimizer, model)
    for displacement in displacements:
        displacement.grad = torch.randn_like(displacement)
    with Operators() as mode:
        optimizer.step()
    return mode.names


def test_a_bounded_step_takes_no_more_operators_for_more_layers():
    few, many = (operators_of_a_step(bound_positions, layers) for layers in (2, 6))
    assert many == few
    assert len(few) <= 20


@pytest.mark.parametrize("rule", [bound_positions, move_positions])
def test_a_step_reads_no_number_that_a_gpu_would_be_waited_for(rule):
    assert "_local_scalar_dense" not in operators_of_a_step(rule, 2)


def test_an_error_in_a_step_does_not_switch_the_bound_of_others_off() -> None:
    model = nn.Sequential(*(IrregularConv2d(3, 3, 3, padding=1, epsilon=0.3) for _ in range(2)))
    first, second = (torch.optim.SGD([layer.displacement], lr=1e6) for layer in model)
    bound_positions([first, second], model)

    def fails() -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        first.step(fails)
    before = model[1].positions.detach().clone()
    model(torch.randn(2, 3, 9, 9)).square().mean().backward()
    second.step()
    assert (model[1].positions - before).abs().max() < 1.01


def test_a_copy_may_have_other_positions_without_a_warning(recwarn) -> None:
    model = nn.Sequential(IrregularConv2d(3, 3, 3, padding=1, epsilon=0.3))
    bound_positions(torch.optim.SGD(model.parameters(), lr=0.1), model)
    copied = copy.deepcopy(model).train()
    with torch.no_grad():
        copied[0].displacement.add_(5)
    copied(torch.randn(1, 3, 9, 9))
    assert not [warning for warning in recwarn if "left their cells" in str(warning.message)]


def test_a_step_walks_through_the_network_only_after_a_change(monkeypatch) -> None:
    """With one optimizer for positions and one for the rest; a layer that takes another's place is one."""
    model = network()
    moved = [layer.displacement for layer in irregular_layers(model).values()]
    rest = [each for each in model.parameters() if all(each is not it for it in moved)]
    optimizers = [torch.optim.SGD(rest, lr=0.1), torch.optim.SGD(moved, lr=0.1)]
    bound_positions(optimizers, model)
    walks = []
    named_modules = nn.Module.named_modules
    monkeypatch.setattr(nn.Module, "named_modules", lambda self, *how: walks.append(self) or named_modules(self, *how))

    def steps() -> int:
        walks.clear()
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.step()
        return sum(walked is model for walked in walks)

    backward(model)
    assert steps() == len(optimizers)
    assert steps() == 0
    other = IrregularConv2d(4, 4, 3)
    other.limit = 0.25
    other.displacement = model[1].displacement
    model[1] = other
    assert steps() == len(optimizers)
    assert other.displacement.detach().abs().max() <= 0.25 + 1e-6  # by the new layer's limit

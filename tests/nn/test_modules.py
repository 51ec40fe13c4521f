"""Modules found by name, run in eval mode for a while, and replaced."""

import pytest
import torch
from torch import nn

from icnn_zoo import parameter_groups
from icnn_zoo.nn.modules import evaluating, find_name, replace_modules, some_of

NAMES = ["", "backbone", "backbone.layer1", "backbone.layer1.conv", "head", "aux.head"]


@pytest.mark.parametrize(
    ("names", "wanted", "found"),
    [
        (NAMES, "head", "head"),
        (NAMES, "layer1.conv", "backbone.layer1.conv"),
        (["", "module", "module.fc"], "fc", "module.fc"),
        (["module._orig_mod.fc", "module._orig_mod.aux.fc"], "fc", "module._orig_mod.fc"),
    ],
)
def test_a_name_is_exact_or_the_only_ending_or_directly_in_wrappers(names, wanted, found):
    assert find_name(wanted, names, argument="start", what="module") == found


def test_no_name_and_several_are_errors_of_the_callers_argument():
    with pytest.raises(ValueError, match=r"`layers`='layer2' names no layer; the nearest are .*layer1"):
        find_name("layer2", NAMES, argument="layers", what="layer")
    with pytest.raises(ValueError, match=r"`layers`='fc' is the ending of several names, .*: a\.fc, b\.fc\."):
        find_name("fc", ["a.fc", "b.fc"], argument="layers", what="layer")


class Wrapper(nn.Module):
    """As DistributedDataParallel names what it wraps."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper, torch.compile, lambda m: Wrapper(torch.compile(m))])
def test_the_head_of_a_wrapped_network_has_its_own_rates(wrap):
    model = wrap(nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "fc": nn.Linear(4, 2)}))
    groups = {group["name"]: group for group in parameter_groups(model, lr=1.0, position_lr=1.0, head="fc")}
    assert [tuple(parameter.shape) for parameter in groups["head"]["params"]] == [(2, 4)]
    assert [tuple(parameter.shape) for parameter in groups["head_bias"]["params"]] == [(2,)]


def test_evaluating_puts_every_mode_back_also_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyError
    except KeyError:
        pass
    assert [module.training for module in model.modules()] == [True, True, False]


def test_a_module_is_replaced_under_all_its_names_and_in_its_place():
    shared = nn.ReLU()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.Identity(), shared, nn.Tanh())})
    model.kept = [shared]
    new = nn.GELU()
    assert replace_modules(model, {shared: new}) is model
    assert model["a"] is model["b"][1] is model.kept[0] is new
    assert list(model) == ["a", "b"]
    assert replace_modules(shared, {shared: new}) is new


def test_messages_name_three_and_say_that_there_are_more():
    assert some_of(["a", "b", "c"]) == "'a', 'b', 'c'"
    assert some_of(["a", "b", "c", "d"]) == "'a', 'b', 'c' and others"

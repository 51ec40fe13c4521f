"""Layers that networks hold outside of their registered modules are converted and deployed there too."""

import functools
import types
import weakref
from collections import OrderedDict, deque, namedtuple

import pytest
import torch
from torch import nn

from icnn_zoo import IrregularConv2d, check_gradients, convert, deploy, irregular_layers

Pair = namedtuple("Pair", "conv act")


class Caller:
    """A helper that is not a module."""

    def __init__(self, conv):
        self.conv = conv


class Held(nn.Module):
    """One convolution and a norm; `keep` says how the forward gets at the former."""

    def __init__(self, keep):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.call = None
        keep(self, self.conv)

    def forward(self, x):
        return self.norm(self.call(self, x))


def by(read, **attributes):
    """A way to hold a convolution: attributes made of it, and how they are read."""

    def keep(block, conv):
        for name, make in attributes.items():
            object.__setattr__(block, name, make(conv))
        object.__setattr__(block, "call", read)

    return keep


def bound_by_hand(conv):
    return types.MethodType(lambda self, x: self(x), conv)


def in_a_closure(block, conv):
    object.__setattr__(block, "call", lambda _, x: conv(x))


def as_a_default(block, conv):
    object.__setattr__(block, "call", lambda _, x, layer=conv: layer(x))


def in_a_hidden_module(block, conv):
    object.__setattr__(block, "hidden", nn.Sequential(conv))
    object.__setattr__(block, "call", lambda block, x: block.hidden(x))


# Ways that a deep copy follows too, and so `deploy`; functions are shared by copies.
COPIED = {
    "list": by(lambda block, x: block.items[1](x), items=lambda conv: [None, conv]),
    "tuple in a list": by(lambda block, x: block.items[0][1](x), items=lambda conv: [(0, conv)]),
    "named tuple": by(lambda block, x: block.items.conv(x), items=lambda conv: Pair(conv, None)),
    "dict": by(lambda block, x: block.items["a"](x), items=lambda conv: {"a": conv}),
    "ordered dict": by(lambda block, x: block.items["a"](x), items=lambda conv: OrderedDict(a=conv, b=0)),
    "key": by(lambda block, x: next(iter(block.items))(x), items=lambda conv: {conv: 1, "b": 2}),
    "set": by(lambda block, x: next(iter(block.items))(x), items=lambda conv: {conv}),
    "deque": by(lambda block, x: block.items[0](x), items=lambda conv: deque([conv])),
    "attribute": by(lambda block, x: block.alias(x), alias=lambda conv: conv),
    "bound method": by(lambda block, x: block.method(x), method=lambda conv: conv.forward),
    "call": by(lambda block, x: block.method(x), method=lambda conv: conv.__call__),
    "partial": by(lambda block, x: block.partial(x), partial=functools.partial),
    "argument of a partial": by(
        lambda block, x: block.partial(x), partial=lambda conv: functools.partial(Held.apply_to, conv)
    ),
    "plain object": by(lambda block, x: block.helper.conv(x), helper=Caller),
    "hidden module": in_a_hidden_module,
}
SHARED = {
    "closure": in_a_closure,
    "default argument": as_a_default,
    "bound by hand": by(lambda block, x: block.method(x), method=bound_by_hand),
    "weak reference": by(lambda block, x: block.reference()(x), reference=weakref.ref),
}
Held.apply_to = staticmethod(lambda layer, x: layer(x))


@pytest.mark.parametrize("keep", (COPIED | SHARED).values(), ids=COPIED | SHARED)
def test_the_layer_that_is_called_is_the_converted_one(keep):
    model, x = Held(keep).eval(), torch.randn(1, 3, 9, 9)
    before = model(x)
    convert(model, "", epsilon=0.0)
    torch.testing.assert_close(model(x), before)
    model(x).sum().backward()
    check_gradients(model)
    with torch.no_grad():
        model.conv.displacement += 0.4
    assert not torch.allclose(model(x), before)


@pytest.mark.parametrize("keep", COPIED.values(), ids=COPIED)
def test_deploy_follows_and_a_folded_norm_is_not_applied_twice(keep, waken):
    model, x = convert(waken(Held(keep)).eval(), "", epsilon=0.3), torch.randn(1, 3, 9, 9)
    expected = model(x)
    torch.testing.assert_close(deploy(model)(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(x), expected)
    assert irregular_layers(model)


@pytest.mark.parametrize("name", ["closure", "default argument"])
def test_deploy_refuses_a_layer_that_a_function_holds(name):
    model = convert(Held(SHARED[name]), "")
    with pytest.raises(ValueError, match=r"Held\.call \((closure|default argument)\).*holds an irregular layer"):
        deploy(model)


def test_a_held_method_that_the_new_layer_lacks_is_refused_and_nothing_changes():
    keep = by(lambda block, x: block.method(x, block.conv.weight, None), method=lambda conv: conv._conv_forward)
    model = Held(keep)
    with pytest.raises(ValueError, match=r"Held\.method holds the method '_conv_forward'"):
        convert(model, "")
    assert type(model.conv) is nn.Conv2d


def test_layers_kept_apart_on_purpose_stay_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    teacher = nn.Conv2d(3, 4, 3)
    object.__setattr__(model, "teacher", [teacher])
    convert(model, "")
    assert model.teacher == [teacher]


def test_what_holds_itself_ends():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    loop = [model[0]]
    loop.append(loop)
    model.loop = loop
    convert(model, "")
    assert isinstance(model.loop[1][0], IrregularConv2d)

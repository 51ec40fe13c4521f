"""Norms are folded where a block proves it, never where others use a part of it, and `fuse` does nothing afterwards."""

import copy
import pickle

import pytest
import torch
from torch import nn

from icnn_zoo import IrregularConv2d, convert, deploy, irregular_layers
from icnn_zoo.deployment.rewriting import rewrite


class Block(nn.Module):
    """Like YOLO's: a convolution, a norm, and a `fuse` that reads both."""

    def __init__(self, conv=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))

    def fuse(self):
        return self.conv.weight * self.bn.weight[:, None, None, None]


class Untraceable(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if x.shape[-1] > 3 else x
        return x

    def fuse(self):
        for block in self.blocks:
            block.fuse()
        return self


def image() -> torch.Tensor:
    return torch.randn(1, 4, 9, 11)


def test_blocks_of_a_network_that_cannot_be_traced_are_folded_one_by_one(waken):
    model = convert(waken(Untraceable(Block(), Block())).eval(), "", epsilon=0.3)
    result = rewrite(model, image())
    assert [layer.folded for layer in result.layers] == ["blocks.0.bn", "blocks.1.bn"]
    assert result.difference < 1e-5


@pytest.mark.parametrize("shapes", ["layer", "channel", "kernel"])
def test_a_norm_is_folded_into_a_layer_of_free_taps(shapes, waken):
    layer = IrregularConv2d(4, 4, 5, padding=2, taps=6, groups=2, shapes=shapes, bias=False)
    model = waken(Untraceable(Block(layer))).eval()
    result = rewrite(model, image())
    assert [layer.folded for layer in result.layers] == ["blocks.0.bn"]
    assert result.difference < 1e-5


@pytest.mark.parametrize("way", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_fuse_of_the_deployed_copy_changes_nothing_and_returns_the_network(way, waken):
    model = convert(waken(Untraceable(Block(), Block())).eval(), "", epsilon=0.3)
    with pytest.raises(RuntimeError, match=r"icnn_zoo\.deploy folds"):
        model.fuse()
    deployed = way(deploy(model))
    assert deployed.fuse() is deployed
    assert deployed.blocks[0].fuse() is deployed.blocks[0]
    torch.testing.assert_close(deployed(x := image()), model(x), atol=1e-5, rtol=1e-5)


def test_a_convolution_shared_by_blocks_keeps_their_norms(waken):
    """As in detection heads, which share convolutions between levels and have a norm for each."""
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = convert(waken(Untraceable(Block(conv), Block(conv))).eval(), "", epsilon=0.3)
    result = rewrite(model, image())
    assert [layer.folded for layer in result.layers] == [None]


def test_a_convolution_that_the_network_also_calls_by_a_list_keeps_its_norm(waken):
    class Twice(Untraceable):
        def forward(self, x):
            return super().forward(x) + self.more[0](x)

    model = Twice(Block())
    model.more = [model.blocks[0].conv]
    result = rewrite(convert(waken(model).eval(), "", epsilon=0.3), image())
    assert [layer.folded for layer in result.layers] == [None]


def test_parts_of_a_plain_container_are_not_folded_where_others_step_through_it(waken):
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x):
            seen = []
            for layer in self.features if x.sum() != 0 else ():
                seen.append(x := layer(x))
            return seen

    result = rewrite(convert(waken(Steps()).eval(), "", epsilon=0.3), image())
    assert [layer.folded for layer in result.layers] == [None]


def test_what_a_block_cannot_show_is_seen_on_the_example(waken):
    class Around(Untraceable):
        def forward(self, x):
            return super().forward(x) + self.blocks[0].conv(x)

    model = convert(waken(Around(Block())).eval(), "", epsilon=0.3)
    with pytest.raises(RuntimeError, match=r"'output' by .* of its maximum.*may call one of its parts alone"):
        deploy(model, image())
    assert irregular_layers(model)


@pytest.mark.parametrize("example", [image(), (image(),), {"x": image()}], ids=["tensor", "tuple", "mapping"])
def test_the_example_may_be_a_tensor_arguments_or_keywords_and_leaves_the_network_as_it_was(example, waken):
    model = convert(waken(Untraceable(Block())).train(), "", epsilon=0.3)
    state = copy.deepcopy(model.state_dict())
    assert rewrite(model, example).difference < 1e-5
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

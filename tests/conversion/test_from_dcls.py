"""Networks of DCLS become ours and give the same: against the installed package (extra benchmark)."""

import logging

import pytest
import torch
from torch import nn

import icnn_zoo

modules = pytest.importorskip("DCLS.construct.modules")

NAMES = ("in_channels", "out_channels", "kernel_count", "dilated_kernel_size", "padding", "groups", "stride")
CASES = {
    "depthwise": (6, 6, 5, 7, 3, 6, 1),
    "grouped, oblong": (4, 6, 4, (5, 7), (2, 3), 2, 1),
    "even, stride 2": (3, 4, 3, (4, 6), 0, 1, 2),
    "circular": (2, 2, 3, 5, 2, 1, 1),
}


def sizes_of(case: str) -> dict[str, object]:
    sizes = dict(zip(NAMES, CASES[case], strict=True))
    return {**sizes, "padding_mode": "circular"} if case == "circular" else sizes


def make(version: str, spread: float = 0.25, **sizes) -> nn.Module:
    logging.disable(logging.WARNING)  # which kernel it uses
    module = modules.Dcls2d(version=version, **sizes)
    logging.disable(logging.NOTSET)
    torch.manual_seed(0)
    with torch.no_grad():
        module.P.normal_(std=spread)
        module.clamp_parameters()
        if module.SIG is not None:
            module.SIG.normal_(std=0.4)
    return module


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("version", ["v1", "max", "gauss"])
@pytest.mark.parametrize("case", CASES)
def test_a_converted_network_gives_the_same_and_so_do_its_gradients(case, version):
    network = nn.Sequential(nn.Identity(), make(version, **sizes_of(case)))
    theirs = network[1]
    images = torch.randn(2, theirs.in_channels, 9, 10)
    expected = network(images)
    (grad,) = torch.autograd.grad(expected.square().sum(), theirs.P)
    assert icnn_zoo.from_dcls(network) is network
    layer = network[1]
    assert isinstance(layer, icnn_zoo.IrregularConv2d)
    assert layer.weight is theirs.weight
    output = network(images)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    (ours,) = torch.autograd.grad(output.square().sum(), layer.displacement)
    ours, inside = ours.flip(-1).permute(3, 0, 1, 2), grad.abs() > 1e-3  # outside of DCLS's box its taps have none
    torch.testing.assert_close(ours[inside], grad[inside], atol=1e-3, rtol=1e-3)
    deployed = icnn_zoo.deploy(network.eval())
    torch.testing.assert_close(deployed(images), expected, atol=1e-5, rtol=1e-5)


def test_what_is_not_known_is_refused_by_name():
    with pytest.raises(ValueError, match=r"must have a Dcls2d .* Conv2d has none"):
        icnn_zoo.from_dcls(nn.Conv2d(2, 3, 3))
    sizes = sizes_of("depthwise")
    with pytest.raises(ValueError, match="'0' has version 'v0'; known are v1, max, gauss"):
        icnn_zoo.from_dcls(nn.Sequential(make("v0", **sizes)))
    logging.disable(logging.WARNING)
    line = modules.Dcls1d(2, 2, 3, dilated_kernel_size=5)
    logging.disable(logging.NOTSET)
    with pytest.raises(ValueError, match="is a Dcls1d; known is Dcls2d"):
        icnn_zoo.from_dcls(line)
    outside = make("v1", **sizes)
    with torch.no_grad():
        outside.P[0, 0, 0, 0] = 5.0
    with pytest.raises(ValueError, match="lie outside of DCLS's box of 7 x 7"):
        icnn_zoo.from_dcls(outside)


def test_positions_and_spreads_that_layers_share_stay_shared():
    network = nn.Sequential(*(make("gauss", **sizes_of("depthwise")) for _ in range(2)))
    network[1].P, network[1].SIG = network[0].P, network[0].SIG
    number = len(list(network.parameters()))
    icnn_zoo.from_dcls(network)
    assert network[0].displacement is network[1].displacement
    assert network[0].widening is network[1].widening
    assert len(list(network.parameters())) == number


def test_layers_that_share_positions_in_other_boxes_and_hooks_are_refused():
    network = nn.Sequential(
        *(make("gauss", **{**sizes_of("depthwise"), "dilated_kernel_size": size}) for size in (7, 8))
    )
    network[1].P = network[0].P
    with pytest.raises(ValueError, match="'1' shares positions or spreads with a layer that reads them otherwise"):
        icnn_zoo.from_dcls(network)
    hooked = make("gauss", **sizes_of("depthwise"))
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has forward_hooks, which its new layer would lose"):
        icnn_zoo.from_dcls(hooked)

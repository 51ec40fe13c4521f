"""Peers of irregular layers, trained in the same place."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import icnn_zoo
from icnn_zoo.experiments import peers
from icnn_zoo.experiments.peers import DeformableConv2d, PeerTask, replace_layers
from icnn_zoo.models import SegmentationModel

OPTIONS = {"num_classes": 3, "backbone": "test_resnet", "output_stride": 8, "head_dilation": 3, "pretrained": False}


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (4, 1), (4, 2), (2, 1)])
def test_a_deformable_layer_begins_as_the_regular_one(groups, stride):
    conv = nn.Conv2d(4, 8, 3, stride=stride, padding=2, dilation=2, groups=groups).double()
    input = torch.randn(2, 4, 11, 14, dtype=torch.float64)
    expected = conv(input)
    layer = DeformableConv2d(conv).double()
    assert torch.allclose(layer(input), expected)
    with torch.no_grad():  # one row down and a column to the right, everywhere
        layer.offsets.bias.fill_(1.0)
    moved = F.conv2d(F.pad(input, (2, 3, 2, 3))[..., 1:, 1:], conv.weight, conv.bias, stride, 0, 2, groups)
    assert torch.allclose(layer(input)[..., :-1, :-1], moved[..., : expected.shape[-2] - 1, : expected.shape[-1] - 1])


def test_peers_stand_where_irregular_layers_would():
    model = SegmentationModel("test_resnet", 3, output_stride=8, head_dilation=3)
    wanted = [layer.name for layer in icnn_zoo.plan(model, "layer3").converted]
    assert replace_layers(model, "layer3", "deformable") == wanted
    assert [name for name, module in model.named_modules() if isinstance(module, DeformableConv2d)] == wanted


def test_twice_the_dilation_keeps_sizes_and_the_head():
    model = SegmentationModel("test_resnet", 3, output_stride=8, head_dilation=3).eval()
    image = torch.rand(1, 3, 65, 97)
    size, before = model(image).shape, {name: module.dilation for name, module in convolutions(model)}
    names = replace_layers(model, "layer3", "dilation")
    assert model(image).shape == size
    assert model.classifier.dilation == (3, 3)
    for name, module in convolutions(model):
        factor = 2 if name in names else 1
        assert module.dilation == tuple(factor * step for step in before[name])


def plain() -> SegmentationModel:
    return SegmentationModel("plain5", 3, output_stride=2, head_dilation=1)


@pytest.mark.parametrize("dilation", [1, 3, 4])
def test_any_dilation_keeps_sizes(dilation):
    model = plain().eval()
    image = torch.rand(1, 3, 33, 40)
    before = model(image)
    names = replace_layers(model, "layer1", "dilation", dilation)
    assert names == ["backbone.layer1.0", "backbone.layer2.0", "backbone.layer3.0"]
    assert all(model.get_submodule(name).dilation == (dilation, dilation) for name in names)
    assert model(image).shape == before.shape
    assert torch.equal(model(image), before) == (dilation == 1)


def test_a_row_of_taps_reads_along_the_row_alone():
    model = plain()
    names = replace_layers(model, "layer1", "row")
    assert len(names) == 4
    layer = model.get_submodule(names[0])
    assert layer.weight.numel() == 32 * 32 * 9  # as many as before
    pulse = torch.zeros(1, 32, 15, 15)
    pulse[..., 7, 7] = 1
    reached = (layer(pulse) != 0).any(dim=1)[0].nonzero()
    assert set(reached[:, 0].tolist()) == {7}
    assert set(reached[:, 1].tolist()) == set(range(3, 12))


def test_a_filled_head_begins_as_the_regular_one_and_draws_nothing():
    model = SegmentationModel("test_resnet", 3, output_stride=8, head_dilation=3).eval()
    image = torch.rand(1, 3, 33, 40)
    before, state = model(image), torch.get_rng_state()
    assert replace_layers(model, "classifier", "filled") == ["classifier"]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.classifier.weight.shape[2:] == (7, 7)
    assert model.classifier.dilation == (1, 1)
    torch.testing.assert_close(model(image), before)


@pytest.mark.parametrize("peer", ["row", "dilation", "deformable", "filled"])
def test_peers_can_be_built_without_memory(peer):
    """As checkpoints are loaded; DCLS's own layers take memory."""
    with torch.device("meta"):
        model = plain()
        replace_layers(model, "layer1", peer)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("peer", ["row", "dcls"])
def test_peers_for_plain_layers_refuse_dilated_ones(peer):
    with pytest.raises(ValueError, match="stride and dilation 1"):
        replace_layers(SegmentationModel("test_resnet", 3, output_stride=8, head_dilation=3), "classifier", peer)


def test_a_dilation_below_1_is_refused():
    with pytest.raises(ValueError, match="`dilation` must be at least 1; got 0"):
        replace_layers(plain(), "layer1", "dilation", 0)


def test_dcls_positions_have_their_own_rate_no_decay_and_stay_within_the_kernel():
    pytest.importorskip("DCLS", reason="extra benchmark")
    options = {**OPTIONS, "backbone": "plain5", "output_stride": 2, "head_dilation": 1, "optimizer": "adamw"}
    task = PeerTask(peer="dcls", peer_start="layer1", start=None, lr=0.01, **options)
    task.trainer = SimpleNamespace(estimated_stepping_batches=10)
    configured = task.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    own = next(group for group in optimizer.param_groups if group["name"] == "geometry")
    assert (own["lr"], own["weight_decay"], len(own["params"])) == (pytest.approx(0.05), 0.0, 8)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in task.model.parameters())  # each once
    layer = task.model.get_submodule("backbone.layer1.0").conv
    with torch.no_grad():
        layer.P[0, 0, 0, 0] = 20.0
    before = layer.P.clone()
    task.model(torch.rand(2, 3, 33, 33)).logsumexp(1).mean().backward()
    optimizer.step()
    scheduler.step()
    assert layer.P.abs().max() <= 6
    assert (before != layer.P).float().mean() > 0.9
    assert own["lr"] == pytest.approx(0.05 * 0.9**0.9)


@pytest.mark.parametrize("peer", ["deformable", "dilation"])
def test_a_peer_learns_through_the_same_optimizer(peer):
    task = PeerTask(peer=peer, peer_start="layer4", start=None, **OPTIONS)
    optimizer = torch.optim.SGD(icnn_zoo.parameter_groups(task.model, lr=0.1, position_lr=0.1, head="classifier"))
    task.model(torch.rand(2, 3, 65, 65)).logsumexp(1).mean().backward()
    before = {name: value.clone() for name, value in task.model.named_parameters()}
    optimizer.step()
    changed = {name for name, value in task.model.named_parameters() if not torch.equal(value, before[name])}
    assert any("layer4" in name for name in changed)
    assert any("offsets" in name for name in changed) == (peer == "deformable")


def test_a_start_of_irregular_layers_beside_a_peer_is_refused():
    with pytest.raises(ValueError, match="`start` must be null"):
        PeerTask(peer="dilation", peer_start="layer4", start="layer4", **OPTIONS)


def test_the_command_line_trains_a_peer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).parents[1]
    options = ["--trainer.max_steps", "1", "--trainer.val_check_interval", "1", "--data.init_args.num_val", "2"]
    options += ["--data.init_args.num_workers", "0", "--data.init_args.batch_size", "2", "--pictures.num_samples", "0"]
    options += ["--trainer.limit_val_batches", "1", "--trainer.enable_progress_bar", "false", "--model.start", "null"]
    options += ["--model.peer", "deformable", "--model.peer_start", "layer4", "--trainer.accelerator", "cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        command = peers.PeerCLI.run(["fit", "-c", f"{root}/shapes.yaml", *options])
    assert any(isinstance(module, DeformableConv2d) for module in command.model.modules())
    assert (tmp_path / "runs" / "shapes" / "version_0" / "checkpoints" / "last.ckpt").is_file()


def convolutions(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]

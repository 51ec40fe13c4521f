"""Converting keeps what a module carries, refuses what it can't keep, and later rewrites do not drop shapes."""

import copy
import pickle
import time
import warnings

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.utils.model import reparameterize_model
from torch import fx, nn
from torch.nn.utils import parametrizations, prune

import icnn_zoo
from icnn_zoo import IrregularConv2d, convert, irregular_layers, plan
from icnn_zoo.conversion.rewrite_guards import PatchSizeGuard, RewriteGuard


def net(*first: nn.Module) -> nn.Sequential:
    return nn.Sequential(*first, nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, (3, 5)))


def refused(model: nn.Module, match: str, **options) -> None:
    """Converting raises, and nothing has changed."""
    before = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    with pytest.raises(ValueError, match=match):
        convert(model, "", **options)
    assert {name: id(module) for name, module in model.named_modules(remove_duplicate=False)} == before


def test_hooks_run_in_the_new_layer_and_their_handles_remove_them():
    model, seen = net(), []
    handles = [
        model[0].register_forward_hook(lambda module, args, output: seen.append(("after", type(module)))),
        model[0].register_forward_pre_hook(lambda module, args: seen.append(("before", type(module)))),
        model[0].register_full_backward_hook(lambda module, *gradients: seen.append(("backward", type(module)))),
    ]
    convert(model, "")
    model(torch.randn(1, 3, 9, 9, requires_grad=True)).sum().backward()
    assert seen == [(name, IrregularConv2d) for name in ("before", "after", "backward")]
    for handle in handles:
        handle.remove()
    model(torch.randn(1, 3, 9, 9))
    assert len(seen) == 3


def test_attributes_parameters_and_buffers_of_the_convolution_come_along():
    model = net()
    model[0].stage = 3
    model[0].register_buffer("mask", torch.ones(2))
    model[0].register_buffer("scratch", torch.ones(2), persistent=False)
    original = model[0]
    convert(model, "")
    assert model[0].stage == 3
    assert "0.mask" in model.state_dict()
    assert "0.scratch" not in model.state_dict()
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(model[0], name) == getattr(original, name)
    assert not hasattr(original, "displacement")
    assert "displacement" not in original.state_dict()


def test_parametrized_and_pruned_and_normed_convolutions_are_refused():
    refused(net(parametrizations.weight_norm(nn.Conv2d(3, 3, 3))), r"'0'.*its weight is parametrized.*before param")
    refused(net(prune.l1_unstructured(nn.Conv2d(3, 3, 3), "weight", 0.5)), r"'0'.*pruned.*prune\.remove")
    with pytest.warns(FutureWarning):
        normed = nn.utils.weight_norm(nn.Conv2d(3, 3, 3))
    refused(net(normed), r"'0'.*no parameter")


def test_lazy_quantized_and_scripted_convolutions_are_refused():
    refused(net(nn.LazyConv2d(3, 3)), "LazyConv2d does not know its input channels")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized and scripted modules are deprecated
        quantized, scripted, root = (
            torch.ao.nn.quantized.Conv2d(3, 3, 3),
            torch.jit.script(net()[0]),
            torch.jit.script(net()),
        )
    refused(net(quantized), "Conv2d is quantized")
    refused(nn.Sequential(scripted, nn.Conv2d(3, 3, 3)), "it is scripted")
    refused(root, "`model` is scripted")


def test_a_replaced_forward_and_a_compiled_module_are_refused():
    patched, compiled, whole = net(), net(), net()
    patched[0].forward = lambda input: input
    refused(patched, r"'0'.*forward was replaced")
    compiled[2].compile()
    refused(compiled, r"'2' is compiled")
    refused(torch.compile(whole), "OptimizedModule.*convert first, then compile")


def test_a_distributed_wrapper_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        refused(nn.parallel.DistributedDataParallel(net()), "DistributedDataParallel.*convert first, then wrap")
    finally:
        torch.distributed.destroy_process_group()


def test_a_convolution_inlined_by_a_tracer_is_refused():
    inlined = timm.create_model("nf_ecaresnet26", features_only=True, feature_cls="fx")
    refused(inlined, r"'graph_module\.stem\.conv'.*a tracer inlined it")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"epsilon": float("nan")}, "`epsilon` must be a finite number"),
        ({"epsilon": "small"}, "`epsilon` must be a finite number"),
        ({"order": "forward"}, "`order` must be one of registration, execution"),
        ({"order": "execution"}, "needs an `example_input`"),
        ({"example_input": torch.zeros(1, 3, 9, 9)}, "`example_input` is for order='execution'"),
    ],
)
def test_impossible_options_are_refused_before_anything_changes(options, error):
    refused(net(), error, **options)


def test_a_filter_or_start_of_another_type_is_refused():
    with pytest.raises(TypeError, match="`filter` must be a function"):
        convert(net(), "", filter=["0"])
    with pytest.raises(TypeError, match="`start` must be the dotted name"):
        convert(net(), 0)
    with pytest.raises(ValueError, match="`shapes` must be one of layer, group, channel, kernel; got 'tap'"):
        convert(net(), "", shapes="tap")
    with pytest.raises(ValueError, match="`spread_per` must be one of tap, channel, layer; got 'kernel'"):
        plan(nn.Conv2d(3, 3, 3), "", spread_per="kernel")


def test_an_optimizer_made_before_converting_is_detected():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, "2")
    with pytest.raises(ValueError, match="Convert the network first, then make the optimizer"):
        icnn_zoo.bound_positions(optimizer, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, "0")
    with pytest.raises(ValueError, match=r"lacks.*'0'"):
        icnn_zoo.bound_positions(optimizer, model)


REPARAMETERIZED = ("repvgg_a0", "mobileone_s0", "fastvit_t8", "ghostnetv3_050", "repghostnet_050", "lcnetv2_small")
FUSED = ("repvit_m0_9", "levit_128s", "tiny_vit_5m_224", "efficientvit_m0", "efficientvim_m1", "shvit_s1", "iformer_t")


@pytest.mark.parametrize("name", [*REPARAMETERIZED, *FUSED])
def test_reparameterising_a_converted_network_raises_and_says_what_to_do(name):
    model = timm.create_model(name)
    convert(model, "")
    layers = len(irregular_layers(model))
    for inplace in (False, True):
        with pytest.raises(RuntimeError, match=r"drop their learned shapes.*Reparameterize before converting"):
            reparameterize_model(model, inplace=inplace)
    assert len(irregular_layers(model)) == layers


@pytest.mark.parametrize("name", ["repvgg_a0", "repvit_m0_9"])
def test_a_reparameterised_network_converts_to_the_same_function(name, waken):
    model = reparameterize_model(waken(timm.create_model(name, num_classes=3)).eval()).double()
    image = torch.randn(1, 3, 64, 96, dtype=torch.double)
    expected = model(image)
    torch.testing.assert_close(convert(model, "", epsilon=0.0)(image), expected, rtol=1e-9, atol=1e-9)


def test_a_guard_stands_only_where_a_layer_was_converted():
    model = convert(timm.create_model("repvgg_a0"), "stages.3")
    model.stages[0][0].reparameterize()
    with pytest.raises(RuntimeError, match=r"RepVggBlock\.reparameterize.*'stages\.3\.0"):
        model.stages[3][0].reparameterize()


def test_guards_are_copied_and_pickled_with_the_network_and_taken_off_by_deploy():
    model = convert(timm.create_model("test_vit"), "")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        guard = vars(other.patch_embed)["set_input_size"]
        assert isinstance(guard, PatchSizeGuard)
        assert guard.module is other.patch_embed
    deployed = icnn_zoo.deploy(convert(timm.create_model("repvgg_a0"), "stages.3"))
    guards = (RewriteGuard, PatchSizeGuard)
    assert not any(isinstance(value, guards) for module in deployed.modules() for value in vars(module).values())


def test_a_new_patch_size_is_refused_and_a_new_image_size_is_not():
    model = convert(timm.create_model("test_vit"), "")
    with pytest.raises(RuntimeError, match=r"set_input_size\(patch_size=8\).*'patch_embed\.proj'"):
        model.patch_embed.set_input_size(patch_size=8)
    with pytest.raises(RuntimeError, match="drop its learned shapes"):
        model.set_input_size(img_size=(96, 64), patch_size=(8, 8))
    model.set_input_size(img_size=(96, 64), patch_size=16)
    model.patch_embed.set_input_size(patch_size=(16, 16))
    assert model.eval()(torch.randn(1, 3, 96, 64)).shape == (1, 1000)
    assert "patch_embed.proj" in irregular_layers(model)


def test_conv_and_norm_fuse_to_the_same_function():
    conv, norm = nn.Conv2d(3, 4, 3, bias=False).double(), nn.BatchNorm2d(4).double()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 1.5)
    layer = IrregularConv2d.from_conv2d(conv, epsilon=0.3).eval()
    image = torch.randn(1, 3, 9, 12, dtype=torch.double)
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(layer, norm.eval())
    torch.testing.assert_close(fused(image), norm(layer(image)))


def test_tracers_keep_the_layer_as_a_leaf():
    model = convert(net(), "").eval()
    traced = fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    assert not [node for node in traced.graph.nodes if node.op == "get_attr"]
    image = torch.randn(1, 3, 9, 12)
    assert torch.equal(traced(image), model(image))


def test_a_converted_network_becomes_a_feature_extractor_of_torch_fx():
    model = convert(timm.create_model("nf_ecaresnet26"), "")
    features = timm.models.FeatureGraphNet(model, out_indices=(-1,))
    assert len(irregular_layers(features)) == len(irregular_layers(model))
    image = torch.randn(1, 3, 64, 96)
    before = features.eval()(image)[0]
    with torch.no_grad():
        irregular_layers(features)["graph_module.stem.conv"].displacement += 0.4
    assert not torch.equal(features(image)[0], before)


def test_timm_optimizers_take_the_displacement_and_decay_pulls_it_to_the_regular_grid():
    model = convert(timm.create_model("resnet18"), "layer4", epsilon=0.25)
    decayed = [group for group in param_groups_weight_decay(model, 0.1) if group["weight_decay"]]
    assert any(parameter is model.layer4[0].conv1.displacement for parameter in decayed[0]["params"])
    assert sum(len(group["params"]) for group in param_groups_layer_decay(model)) == len(list(model.parameters()))
    optimizer = create_optimizer_v2(model, "momentum", lr=0.1, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.layer4[0].conv1.displacement, torch.full((256, 9, 2), 0.25 * 0.99))


def test_converting_resnet101_takes_little_time():
    model = timm.create_model("resnet101")
    begin = time.process_time()
    convert(model, "")
    assert len(irregular_layers(model)) == 34
    assert time.process_time() - begin < 2  # ten times what it may take, for busy machines


@pytest.mark.parametrize(("method", "argument"), [("make_dilated", 8), ("set_in_channels", 4)])
def test_surgery_that_looks_for_regular_convolutions_raises_and_says_what_to_do(method, argument):
    model = convert(smp.Unet("resnet18", encoder_weights=None), "layer3")
    with pytest.raises(RuntimeError, match=rf"ResNetEncoder\.{method} looks for nn\.Conv2d .*before icnn_zoo\.convert"):
        getattr(model.encoder, method)(argument)
    regular = smp.Unet("resnet18", encoder_weights=None)
    getattr(regular.encoder, method)(argument)
    assert irregular_layers(convert(regular, "layer3"))


def test_fusing_a_batch_norm_by_torchs_own_function_keeps_the_shapes(waken):
    layer = IrregularConv2d(3, 4, 3, epsilon=0.3)
    model = waken(nn.Sequential(layer, nn.BatchNorm2d(4)).eval())
    image = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(torch.nn.utils.fuse_conv_bn_eval(model[0], model[1])(image), model(image))

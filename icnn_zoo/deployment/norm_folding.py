"""A BatchNorm folded into the irregular layer before it, where a trace proves that nothing else reads the layer."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from icnn_zoo.nn.irregular_conv import IrregularConv2d
from icnn_zoo.nn.modules import attached_hooks
from icnn_zoo.nn.references import unregistered_uses

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class _Tracer(fx.Tracer):
    """Follows a network down to irregular layers and norms; what holds none of them may compute anything."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kinds: tuple[type[nn.Module], ...] = (IrregularConv2d, *_norm_types())
        return isinstance(m, kinds) or not any(isinstance(part, kinds) for part in m.modules())


def foldable_norms(model: nn.Module) -> dict[str, str]:
    """Maps irregular layers to the norms that alone read their output, both called once, where that can be proved.

    A network that cannot be traced is looked at block by block. What a block does to its parts is then proved; that
    nothing else uses them is taken for granted where they have one name, are held nowhere else, and the block is not a
    plain container, whose parts others step through.
    """
    try:
        return _traced_pairs(model)
    except Exception:  # whatever the network's own code raises when its input is not a tensor
        pass
    modules = dict(model.named_modules(remove_duplicate=False))
    names = Counter(modules.values())
    elsewhere = set(unregistered_uses(model))
    return {
        layer: norm
        for layer, norm in _pairs_of_blocks(model, "").items()
        if all(names[part] == 1 and part not in elsewhere for part in (modules[layer], modules[norm]))
    }


def _pairs_of_blocks(model: nn.Module, prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, block in model.named_children():
        if isinstance(block, IrregularConv2d) or not any(isinstance(part, IrregularConv2d) for part in block.modules()):
            continue
        inside = f"{prefix}{name}."
        try:
            pairs = None if type(block) in _CONTAINERS else _traced_pairs(block)
        except Exception:
            pairs = None
        if pairs is None:
            found |= _pairs_of_blocks(block, inside)
        else:
            found |= {inside + layer: inside + norm for layer, norm in pairs.items()}
    return found


def _traced_pairs(model: nn.Module) -> dict[str, str]:
    # An argument with a default stays at it: a proxy would be traced as if it were given.
    arguments = inspect.signature(model.forward).parameters
    defaults = {name: item.default for name, item in arguments.items() if item.default is not item.empty}
    graph = _Tracer().trace(model, defaults)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # Parameters that the network's own code uses have to stay what they are.
    used = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    modules = dict(model.named_modules())
    found = {}
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], IrregularConv2d) or len(node.users) != 1:
            continue
        (reader,) = node.users
        alone = reader.op == "call_module" and reader.args == (node,) and not reader.kwargs
        if not alone or calls[node.target] != 1 or calls[reader.target] != 1 or {node.target, reader.target} & used:
            continue
        norm = modules[reader.target]
        if type(norm) in _norm_types() and norm.running_var is not None and not attached_hooks(norm):
            found[node.target] = reader.target
    return found


def _norm_types() -> tuple[type[nn.Module], ...]:
    timm_norms = sys.modules.get("timm.layers.norm_act")  # whoever has such a layer has imported timm; we need not
    timm_types: list[type[nn.Module]] = [] if timm_norms is None else [timm_norms.BatchNormAct2d]
    return (nn.BatchNorm2d, nn.SyncBatchNorm, *timm_types)


def fold(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution (float64, CPU) that computes what it and the norm after it do in eval mode."""
    mean, variance = norm.running_mean.cpu().double(), norm.running_var.cpu().double()
    scale, shift = (None if each is None else each.cpu().double() for each in (norm.weight, norm.bias))
    folded = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)
    return folded[0].detach(), folded[1].detach()


def without_norm(norm: nn.Module) -> nn.Module:
    """What stays of a norm that was folded: nothing, or the activation of timm's norms that have one."""
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return nn.Identity()
    return nn.Sequential(norm.get_submodule("drop"), norm.get_submodule("act"))

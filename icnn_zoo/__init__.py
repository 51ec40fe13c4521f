"""Convolutions with learnable shapes: the operator, the layer, the converter for any network, and the zoo.

Training, data and pictures live in ``icnn_zoo.training``, ``icnn_zoo.data`` and ``icnn_zoo.analysis``, which are
imported by name: this module needs neither Lightning nor albumentations. The zoo, which needs timm, is imported on
first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from icnn_zoo._version import __version__
from icnn_zoo.conversion.converter import convert
from icnn_zoo.conversion.dcls import from_dcls
from icnn_zoo.conversion.planning import ConversionPlan, plan
from icnn_zoo.deployment.rewriting import deploy
from icnn_zoo.nn.conv_rules import ConvRules, register_conv_rules
from icnn_zoo.nn.irregular_conv import IrregularConv2d, irregular_layers
from icnn_zoo.nn.norms import freeze_norm
from icnn_zoo.nn.sharding import whole_displacements
from icnn_zoo.nn.spreads import narrow_spreads
from icnn_zoo.nn.tap_limits import distance_penalty, limit_taps, place_taps
from icnn_zoo.nn.tying import tie_shapes
from icnn_zoo.ops import irregular_conv2d
from icnn_zoo.optim import bound_positions, check_gradients, move_positions, parameter_groups, poly_policy

if TYPE_CHECKING:
    from icnn_zoo.zoo.networks import create_model, load_checkpoint
    from icnn_zoo.zoo.registry import list_checkpoints

_LAZY = {
    "create_model": "icnn_zoo.zoo.networks",
    "list_checkpoints": "icnn_zoo.zoo.registry",
    "load_checkpoint": "icnn_zoo.zoo.networks",
}

__all__ = [
    "ConvRules",
    "ConversionPlan",
    "IrregularConv2d",
    "__version__",
    "bound_positions",
    "check_gradients",
    "convert",
    "create_model",
    "deploy",
    "distance_penalty",
    "freeze_norm",
    "from_dcls",
    "irregular_conv2d",
    "irregular_layers",
    "limit_taps",
    "list_checkpoints",
    "load_checkpoint",
    "move_positions",
    "narrow_spreads",
    "parameter_groups",
    "place_taps",
    "plan",
    "poly_policy",
    "register_conv_rules",
    "tie_shapes",
    "whole_displacements",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)

"""Convolutions with learnable shapes: the operator, the layer, and the converter for any network.

Training, data and pictures live in ``icnn_zoo.task``, ``icnn_zoo.data`` and ``icnn_zoo.analysis``, which are imported
by name: this module needs neither Lightning nor albumentations.
"""

from icnn_zoo._version import __version__
from icnn_zoo.conv_rules import ConvRules, register_conv_rules
from icnn_zoo.conversion import ConversionPlan, convert, irregular_layers, plan
from icnn_zoo.deployment import deploy
from icnn_zoo.layers import IrregularConv2d
from icnn_zoo.ops import irregular_conv2d
from icnn_zoo.optim import bound_positions, freeze_norm, parameter_groups, poly_policy

__all__ = [
    "ConvRules",
    "ConversionPlan",
    "IrregularConv2d",
    "__version__",
    "bound_positions",
    "convert",
    "deploy",
    "freeze_norm",
    "irregular_conv2d",
    "irregular_layers",
    "parameter_groups",
    "plan",
    "poly_policy",
    "register_conv_rules",
]

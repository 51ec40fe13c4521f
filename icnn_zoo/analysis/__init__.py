"""Looking at learned shapes: their numbers, their pictures, and what a network's output depends on."""

from icnn_zoo.analysis.displacement import InputSizes, displacement_statistics, warn_of_dead_taps
from icnn_zoo.analysis.heatmaps import heatmap, input_gradient, plot_heatmaps
from icnn_zoo.analysis.kernel_shapes import LayerShapes, layer_shapes
from icnn_zoo.analysis.receptive_field import ReceptiveField, effective_receptive_field, plot_receptive_fields
from icnn_zoo.analysis.shape_figures import plot_shapes, plot_shapes_3d
from icnn_zoo.analysis.signal import SignalShare, signal_share, signal_shares
from icnn_zoo.analysis.statistics import ShapeStatistics, depth_trends, shape_statistics, statistics_table

__all__ = [
    "InputSizes",
    "LayerShapes",
    "ReceptiveField",
    "ShapeStatistics",
    "SignalShare",
    "depth_trends",
    "displacement_statistics",
    "effective_receptive_field",
    "heatmap",
    "input_gradient",
    "layer_shapes",
    "plot_heatmaps",
    "plot_receptive_fields",
    "plot_shapes",
    "plot_shapes_3d",
    "shape_statistics",
    "signal_share",
    "signal_shares",
    "statistics_table",
    "warn_of_dead_taps",
]

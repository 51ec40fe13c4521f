"""Looking at learned shapes."""

from icnn_zoo.analysis.displacement import InputSizes, displacement_statistics

__all__ = ["InputSizes", "displacement_statistics"]

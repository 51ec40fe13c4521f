"""Segmentation networks with a timm backbone."""

from icnn_zoo.models.plain import PlainNetwork
from icnn_zoo.models.segmentation import PixelsToLogits, SegmentationModel, shrink_labels

__all__ = ["PixelsToLogits", "PlainNetwork", "SegmentationModel", "shrink_labels"]

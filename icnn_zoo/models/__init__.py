"""Segmentation networks with a timm backbone."""

from icnn_zoo.models.plain import PlainNetwork
from icnn_zoo.models.segmentation import PixelsToLogits, SegmentationModel, shrink_labels
from icnn_zoo.models.vgg import LargeFOVBackbone

__all__ = ["LargeFOVBackbone", "PixelsToLogits", "PlainNetwork", "SegmentationModel", "shrink_labels"]

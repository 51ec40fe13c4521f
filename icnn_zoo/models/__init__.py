"""Segmentation networks with a timm backbone."""

from icnn_zoo.models.segmentation import SegmentationModel

__all__ = ["SegmentationModel"]

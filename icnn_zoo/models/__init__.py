"""Segmentation networks with a timm backbone."""

from icnn_zoo.models.segmentation import PixelsToLogits, SegmentationModel, shrink_labels

__all__ = ["PixelsToLogits", "SegmentationModel", "shrink_labels"]

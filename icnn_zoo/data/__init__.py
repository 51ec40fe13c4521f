"""Datasets for segmentation: one data module per family over one base that shards, augments and resumes."""

from icnn_zoo.data.base import SegmentationDataModule
from icnn_zoo.data.drawn_voc import DrawnVOCDataModule
from icnn_zoo.data.shapes import ShapesDataModule
from icnn_zoo.data.transforms import TrainTransform
from icnn_zoo.data.voc_classes import VOC_CLASSES, color_map

__all__ = [
    "VOC_CLASSES",
    "DrawnVOCDataModule",
    "SegmentationDataModule",
    "ShapesDataModule",
    "TrainTransform",
    "color_map",
]

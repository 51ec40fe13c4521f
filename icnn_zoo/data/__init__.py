"""Datasets for segmentation: one data module per family over one base that shards, augments and resumes."""

from icnn_zoo.data.cityscapes import CityscapesDataModule
from icnn_zoo.data.datamodule import SegmentationDataModule
from icnn_zoo.data.documents import DocumentsDataModule
from icnn_zoo.data.drawn_voc import DrawnVOCDataModule
from icnn_zoo.data.folder import FolderDataModule
from icnn_zoo.data.lines import LinesDataModule
from icnn_zoo.data.pascal_context import PascalContextDataModule
from icnn_zoo.data.shape_scenes import ShapesDataModule
from icnn_zoo.data.transforms import TrainTransform
from icnn_zoo.data.voc2012 import VOC2012DataModule
from icnn_zoo.data.voc_classes import VOC_CLASSES
from icnn_zoo.io.label_pictures import color_map

__all__ = [
    "VOC_CLASSES",
    "CityscapesDataModule",
    "DocumentsDataModule",
    "DrawnVOCDataModule",
    "FolderDataModule",
    "LinesDataModule",
    "PascalContextDataModule",
    "SegmentationDataModule",
    "ShapesDataModule",
    "TrainTransform",
    "VOC2012DataModule",
    "color_map",
]

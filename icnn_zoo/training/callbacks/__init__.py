"""Callbacks of a training run."""

from icnn_zoo.training.callbacks.monitors import DisplacementMonitor, ScoreTable
from icnn_zoo.training.callbacks.pictures import PredictionWriter, SamplePictures
from icnn_zoo.training.callbacks.resuming import GeneratorStates, LastCheckpoint
from icnn_zoo.training.callbacks.shapes_logger import ShapesLogger

__all__ = [
    "DisplacementMonitor",
    "GeneratorStates",
    "LastCheckpoint",
    "PredictionWriter",
    "SamplePictures",
    "ScoreTable",
    "ShapesLogger",
]

"""Callbacks of a training run."""

from icnn_zoo.training.callbacks.averaging import NetworkAverage
from icnn_zoo.training.callbacks.monitors import DisplacementMonitor, ScoreTable
from icnn_zoo.training.callbacks.pictures import PredictionWriter, SamplePictures
from icnn_zoo.training.callbacks.progress import StepProgress
from icnn_zoo.training.callbacks.resuming import GeneratorStates, LastCheckpoint, ValidateAtEnd
from icnn_zoo.training.callbacks.shapes_logger import ShapesLogger
from icnn_zoo.training.callbacks.spread_schedule import NarrowSpreads

__all__ = [
    "DisplacementMonitor",
    "GeneratorStates",
    "LastCheckpoint",
    "NarrowSpreads",
    "NetworkAverage",
    "PredictionWriter",
    "SamplePictures",
    "ScoreTable",
    "ShapesLogger",
    "StepProgress",
    "ValidateAtEnd",
]

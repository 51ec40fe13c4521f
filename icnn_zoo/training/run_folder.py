"""Where a run keeps its files: the one place that knows their names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger

from icnn_zoo.training.loggers import NoLogs


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, ``runs/<name>/version_<n>``, and the names of what lies in it.

    Attributes:
        path: The folder.
    """

    path: Path

    @classmethod
    def of(cls, trainer: pl.Trainer) -> RunFolder:
        """The folder of a trainer's run: that of its first logger, where ModelCheckpoint puts its files too."""
        logger = trainer.logger
        if logger is None:
            return cls(Path(trainer.default_root_dir))
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        return cls(Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version)

    @classmethod
    def claim(cls, trainer: pl.Trainer) -> RunFolder | None:
        """Makes the folder whose number the logger has chosen, or the next one where another run was quicker.

        Returns:
            The folder; None where a person has chosen it, or the logger makes it itself.
        """
        logger = trainer.logger
        if not isinstance(logger, NoLogs) and not (isinstance(logger, CSVLogger) and logger._version is None):
            return None
        numbered: Any = logger
        while True:
            folder = cls.of(trainer)
            folder.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.path.mkdir()
            except FileExistsError:
                numbered._version += 1
            else:
                return folder

    @classmethod
    def around(cls, checkpoint: str | Path) -> RunFolder:
        """The folder of the run that a checkpoint (.ckpt) belongs to."""
        return cls(Path(checkpoint).parent.parent)

    @property
    def config(self) -> Path:
        """The whole configuration, defaults too."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """What CSVLogger wrote."""
        return self.path / "metrics.csv"

    @property
    def best(self) -> Path:
        """The checkpoint with the best score."""
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def last(self) -> Path:
        """The newest checkpoint, to resume from."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def pictures(self) -> Path:
        """Folder of sample predictions."""
        return self.path / "pictures"

    @property
    def predictions(self) -> Path:
        """Folder of predicted label maps."""
        return self.path / "predictions"


def find_ckpt(source: str | Path) -> Path:
    """The checkpoint that a source means: itself, or best.ckpt, else last.ckpt of a run folder.

    Raises:
        FileNotFoundError: There is none.
    """
    source = Path(source)
    if source.is_file():
        return source
    run = RunFolder(source)
    for file in (run.best, run.last):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"`source`: {str(source)!r} is neither a checkpoint (.ckpt) nor a run folder (runs/<name>/version_<n>) with "
        "checkpoints/best.ckpt or last.ckpt."
    )

"""A calm screen: what Lightning says that no user of this package can act upon is left out, by exact patterns."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Loggers and what of theirs is left out.
_MESSAGES = {
    "lightning.pytorch.utilities.rank_zero": (
        r".*Tip: .*(litlogger|litmodels)",  # advertisements
        r"TPU available:|HPU available:",  # devices that were not asked for
        r"Restoring states from the checkpoint",  # the command line has said which
        r"`Trainer\.fit` stopped: `max_",  # the bar is full
    ),
    "lightning.pytorch.trainer.connectors.checkpoint_connector": (r"`weights_only` was not set",),
}
_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's use of PyTorch
    r".*The number of training batches .* is smaller than the logging interval",  # steps are counted over epochs
    r".*LightningCLI's args parameter is intended",  # which both programs use
    r".*Checkpoint directory .* exists and is not empty",  # a run has its own folder
    r".*The dirpath has changed from",  # likewise, whose best checkpoint is the best since it went on
)


@contextmanager
def calm() -> Iterator[None]:
    """Leaves out the messages listed in this file while a command runs."""
    filters = {name: _Without(patterns) for name, patterns in _MESSAGES.items()}
    for name, without in filters.items():
        logging.getLogger(name).addFilter(without)
    try:
        with warnings.catch_warnings():
            for pattern in _WARNINGS:
                warnings.filterwarnings("ignore", pattern)
            yield
    finally:
        for name, without in filters.items():
            logging.getLogger(name).removeFilter(without)


class _Without(logging.Filter):
    """Lets messages pass that begin with none of some patterns."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        super().__init__()
        self._pattern = re.compile("|".join(patterns))

    def filter(self, record: logging.LogRecord) -> bool:
        return self._pattern.match(record.getMessage()) is None

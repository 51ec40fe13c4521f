"""Weights & Biases without prompts, and pictures for any logger."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.loggers import WandbLogger as _WandbLogger
from PIL import Image


class WandbLogger(_WandbLogger):
    """Lightning's WandbLogger that is online if a key is there, offline otherwise, and never asks for one.

    A key comes from the variable ``WANDB_API_KEY`` or from ``wandb login`` (the .netrc file); ``WANDB_MODE`` wins over
    both. Offline runs are kept in ``save_dir``; ``wandb sync`` uploads them later.

    Args:
        offline: True or False to insist, None to look for a key.
        save_dir: Folder of the runs.
        name: Name of the run, None for a random one.
        project: Project of the run.
        **kwargs: Further arguments of Lightning's WandbLogger.
    """

    def __init__(
        self,
        offline: bool | None = None,
        save_dir: str = "runs",
        name: str | None = None,
        project: str = "icnn-zoo",
        **kwargs: Any,
    ) -> None:
        mode = os.environ.get("WANDB_MODE")
        if offline is None:
            offline = mode == "offline" if mode else not has_key()
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        super().__init__(name=name, save_dir=save_dir, offline=offline, project=project, **kwargs)


class NoLogs(Logger):
    """Keeps no logs, and gives the run a folder all the same: ``SAVE_DIR/unlogged/version_<n>``.

    In the place of ``logger: false``, with which Lightning would put checkpoints into the current folder, and refuse
    callbacks that log.

    Args:
        save_dir: Folder of the runs.
    """

    def __init__(self, save_dir: str | Path = "runs") -> None:
        super().__init__()
        self._save_dir = str(save_dir)
        taken = [path.name.partition("_")[2] for path in (Path(save_dir) / self.name).glob("version_*")]
        self._version = max((int(number) for number in taken if number.isdecimal()), default=-1) + 1

    @property
    def name(self) -> str:
        return "unlogged"

    @property
    def version(self) -> int:
        return self._version

    @property
    def save_dir(self) -> str:
        return self._save_dir

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Forgets them."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Forgets them."""


def has_key() -> bool:
    """Whether wandb would find a key without asking: in the environment or the .netrc file.

    wandb's own look-up cannot be used: where there is no key it prompts or raises.
    """
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    candidates = [os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]
    for path in candidates:
        if path and Path(path).is_file():
            try:
                return netrc.netrc(path).authenticators(host) is not None
            except netrc.NetrcParseError as error:
                raise ValueError(
                    f"cannot look for a wandb key: {error}; correct the file or set WANDB_MODE=offline."
                ) from error
    return False


def log_picture(logger: Logger, key: str, picture: Path, step: int) -> None:
    """Gives a picture to a logger that takes pictures: Weights & Biases and TensorBoard; others are left as they are.

    Args:
        logger: Any of Lightning's.
        key: Name in the log.
        picture: File of the picture.
        step: Optimizer step.
    """
    if isinstance(logger, _WandbLogger):
        logger.log_image(key, [str(picture)], step=step)
    elif isinstance(logger, TensorBoardLogger):
        with Image.open(picture) as image:
            logger.experiment.add_image(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")

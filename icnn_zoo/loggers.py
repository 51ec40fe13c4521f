"""Weights & Biases without prompts."""

from __future__ import annotations

import os
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger as _WandbLogger


class WandbLogger(_WandbLogger):
    """Lightning's WandbLogger that is online if a key is there, offline otherwise, and never asks for one.

    A key comes from ``wandb login`` (the .netrc file) or the variable ``WANDB_API_KEY``; ``WANDB_MODE`` wins over both.
    Offline runs are kept in the run folder; ``wandb sync`` uploads them later.

    Args:
        offline: True or False to insist, None to look for a key.
        **kwargs: As Lightning's: name, project, save_dir, ...
    """

    def __init__(self, offline: bool | None = None, **kwargs: Any) -> None:
        if offline is None:
            mode = os.environ.get("WANDB_MODE")
            offline = mode == "offline" if mode else wandb.api.api_key is None
        super().__init__(offline=offline, **kwargs)

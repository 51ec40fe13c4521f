"""``icnn-zoo prepare``: datasets and pretrained weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from icnn_zoo.cli.options import Command
from icnn_zoo.io.files import user_path


def _prepare_options(parser: argparse.ArgumentParser) -> None:
    from icnn_zoo.data.preparation.catalog import DATASETS, OPTIONS

    parser.add_argument("name", choices=sorted(DATASETS), help="what to prepare")
    parser.add_argument("--root", type=user_path, default=Path("data"), help="folder to store it in (default: data)")
    for name, option in OPTIONS.items():
        kind: dict[str, Any] = {"action": "store_true"} if option.kind is None else {"type": option.kind}
        parser.add_argument(f"--{name.replace('_', '-')}", help=option.help, **kind)


def _prepare(options: argparse.Namespace) -> None:
    """Fetches a dataset or pretrained weights and stores them ready for training."""
    from icnn_zoo.data.preparation.catalog import OPTIONS, prepare

    print(prepare(options.name, options.root, **{name: getattr(options, name) for name in OPTIONS}))


COMMANDS = {"prepare": Command(_prepare, _prepare_options)}

"""What the commands share: how one is declared, and options that several have."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from icnn_zoo.io.files import user_path

FIGURE_SUFFIXES = (".png", ".svg")
NETWORK = "checkpoint of a run (.ckpt, or its folder), of the zoo (its name), or a config (.yaml)"


class Command(NamedTuple):
    """A command of ``icnn-zoo``.

    Attributes:
        run: Does it. The first line of its docstring is the command's help.
        add_options: Declares its options; it may set the parser's ``description`` and ``epilog``.
        overrides: Whether words after ``--`` are passed on, as ``options.overrides``.
    """

    run: Callable[[argparse.Namespace], None]
    add_options: Callable[[argparse.ArgumentParser], None]
    overrides: bool = False


def add_registry(parser: argparse.ArgumentParser) -> None:
    """Where checkpoints are looked for."""
    parser.add_argument(
        "--registry",
        action="append",
        help="folder or URL to search, once or several times in order; 'default' is the one of this package "
        "(default: ICNN_ZOO_REGISTRY, else default)",
    )
    parser.add_argument(
        "--cache", type=user_path, help="folder for downloads (default: ICNN_ZOO_CACHE, else the platform's)"
    )


def add_allow(parser: argparse.ArgumentParser) -> None:
    """Which networks of other packages may be imported because a card or a checkpoint names them."""
    parser.add_argument(
        "--allow",
        action="append",
        metavar="CLASS",
        help="dotted name of a class or package that a checkpoint may name as its network, once or several times "
        "(default: ICNN_ZOO_ALLOW, else none)",
    )


def named_where(options: argparse.Namespace) -> dict[str, Any]:
    """Where the network that a command names is looked for, and what it may import."""
    return {name: getattr(options, name) for name in ("registry", "cache", "allow")}


def add_white_level(parser: argparse.ArgumentParser) -> None:
    """How images of 16 bits are read."""
    parser.add_argument(
        "--white-level", type=int, metavar="N", help="the value that is white in images of 16 bits, such as 65535"
    )


def check_output(path: Path, force: bool, suffixes: Sequence[str]) -> None:
    """Checks a file to be written, which must not replace another one unless ``force``.

    Raises:
        ValueError: Another suffix, a folder of that name, or an existing file.
        FileNotFoundError: The folder does not exist.
    """
    from icnn_zoo.io.files import check_target

    check_target(path, suffixes)
    if path.exists() and not force:
        raise ValueError(f"{str(path)!r} exists; choose another name, or --force.")

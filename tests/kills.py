"""Kills at every place where a program touches a folder's files, so that what it leaves behind can be looked at."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod")


def kill_everywhere(action: Callable[[], Any], folder: Path, limit: int = 100) -> Iterator[int]:
    """Runs ``action`` in forked processes, killed before the first change below ``folder``, the second, and so on.

    A file that is opened for writing is emptied first where it would be: the kill falls between truncating and writing.
    A rename comes after whatever was copied. Yields the number of the change after every kill, until the action gets
    through; a fault of the action itself is one of the test.
    """
    for number in range(1, limit):
        process = multiprocessing.get_context("fork").Process(target=_run, args=(action, folder, number))
        process.start()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0
            return
        yield number
    raise AssertionError(f"more than {limit} changes")


def _run(action: Callable[[], Any], folder: Path, number: int) -> None:
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (opens or event in _CHANGES) or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        path = Path(os.fsdecode(arguments[0]))
        if folder not in path.parents or path.suffix == ".lock" or path.name == ".lock":
            return
        count += 1
        if count == number:
            if opens and arguments[2] & os.O_TRUNC and path.exists():
                os.truncate(path, 0)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    action()

"""Kernels that were compiled here, in the user's cache.

What is loaded runs, so the folder and the file must belong to the user (or root) and be writable by nobody else, and a
file ends with the SHA-256 of what precedes it: one that is damaged, truncated or not the user's is compiled anew.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

_DIGEST_LENGTH = 64
_STALE_SECONDS = 3600


def private_folder(name: str) -> Path:
    """The folder of compiled kernels of one kind, which nobody else can write to.

    Raises:
        OSError: It cannot be made, or others own it or may write to it.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "icnn_zoo" / name
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from None  # there is no home folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(folder.stat()):
        raise PermissionError(f"{str(folder)!r} belongs to another user or others may write to it")
    return folder


def read_intact(path: Path) -> bytes | None:
    """What a file held when it was sealed; None unless it is there, the user's own, and whole."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            private, content = _is_private(os.fstat(file.fileno())), file.read()
    except OSError:
        return None
    kernel, digest = content[:-_DIGEST_LENGTH], content[-_DIGEST_LENGTH:]
    return kernel if private and hashlib.sha256(kernel).hexdigest().encode() == digest else None


def seal(path: Path) -> None:
    """Appends a file's digest and keeps others from it."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("ab") as file:
        file.write(digest.encode())
    path.chmod(0o700)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Removes what compilations left that were killed."""
    for leftover in folder.glob(pattern):
        if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
            leftover.unlink(missing_ok=True)


def _is_private(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022

"""Files: checked before they are read or made, and written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def check_target(path: str | Path, suffixes: Sequence[str]) -> Path:
    """Checks a file that is to be written, before the work of hours that makes it.

    Args:
        path: The file.
        suffixes: Endings that are known.

    Returns:
        The path.

    Raises:
        ValueError: Another suffix, a folder of that name, or one that cannot be written.
        FileNotFoundError: The folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        example = (path.stem or "picture") + suffixes[0]
        raise ValueError(f"the file to write must end in {' or '.join(suffixes)}; got {str(path)!r}. Try {example!r}.")
    if path.is_dir():
        raise ValueError(f"the file to write, {str(path)!r}, is a folder; choose another name.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} to write {path.name!r} into; make it first.")
    check_writable("the file to write", path.parent)
    return path


def check_writable(argument: str, folder: Path) -> None:
    """Checks that files can be written into a folder, which may have to be made.

    Raises:
        ValueError: They cannot, or it is a file; the message begins with ``argument``.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"{argument} must be in a folder; {str(existing)!r} is a file.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{argument} must be in a folder that can be written; {str(existing)!r} cannot.")


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path as a person gives it, ``~`` being their home: shells do not expand it in YAML, nor after ``--root=``.

    Raises:
        ValueError: It begins with the home of a user that there is not.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def require_file(path: str | Path) -> Path:
    """Checks that there is a file to read.

    Returns:
        The path.

    Raises:
        FileNotFoundError: There is none: nothing, a folder, or a link to nothing.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        raise FileNotFoundError(f"{str(path)!r} is a folder; name a file.")
    if path.is_symlink():
        raise FileNotFoundError(f"{str(path)!r} is a link to {os.readlink(path)!r}, which is not there.")
    raise FileNotFoundError(f"there is no file {str(path)!r}.")


def read_text(path: str | Path) -> str:
    """Reads a text file of UTF-8, with or without a byte order mark.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not UTF-8.
    """
    path = require_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not text in UTF-8: {error}. Store it as UTF-8.") from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary file beside ``path`` that takes its place at the end, whole and synced, or not at all.

    The temporary file is hidden, has the suffix of ``path`` (libraries choose a format by it) and the mode that
    ``open()`` would give; it is removed after an error. A kill leaves it behind and ``path`` as it was.
    """
    path = Path(path)
    stem = path.stem.encode(errors="surrogateescape")[:100].decode(errors="ignore")  # names are limited in bytes
    temporary = path.with_name(f".{stem}-{secrets.token_hex(4)}{path.suffix}")
    # As open() makes a file, by the user's mask; to ask for the mask would change it for all threads for a moment.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        sync(temporary)  # before the move: else a power cut can leave an empty file under the name
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, content: bytes | str) -> Path:
    """Writes a file that is there whole or not at all, making its folder.

    Args:
        path: The file.
        content: Bytes, or text that is stored as UTF-8.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def sync(path: Path) -> None:
    """Waits until a file's content, or the entries of a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders, and needs no sync of them
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Where the files of a dataset are: lists, manifests, folders that a dataset may lie in, files that are missing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from icnn_zoo.io.files import read_text


def read_list(path: Path, advice: str = "") -> list[tuple[str, str | None]]:
    """The entries of a list of images: an id a line, or DeepLab's two columns of an image's and a label file's path.

    Args:
        path: The list.
        advice: What to do if there is none, for the error.

    Returns:
        Ids (names without folder and ending), each once and in order, with the label file's path or None.

    Raises:
        FileNotFoundError: There is no such list.
        ValueError: It is empty, or a line is neither form.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no list {str(path)!r}. {advice}".rstrip())
    entries: dict[str, str | None] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        columns = line.split()
        if not columns:
            continue
        if len(columns) > 2 or (len(columns) == 2 and "/" not in columns[1]):
            raise ValueError(
                f"{str(path)!r}, line {number}: expected an id, or paths of an image and a label file; got {line!r}."
            )
        image = Path(columns[0])
        name = image.stem if image.suffix in (".jpg", ".png") else image.name
        entries[name] = columns[1] if len(columns) > 1 else None
    if not entries:
        raise ValueError(f"the list {str(path)!r} is empty.")
    return list(entries.items())


def read_manifest(folder: Path, format: int, command: str) -> dict[str, Any]:
    """The ``manifest.json`` of a prepared dataset.

    Args:
        folder: Where it was prepared.
        format: The format that is read.
        command: What prepares it, for the errors.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or of another format.
    """
    file = folder / "manifest.json"
    if not file.is_file():
        raise FileNotFoundError(f"there is no prepared dataset in {str(folder)!r}. Make it with: {command}")
    again = f"Remove {str(folder)!r} and run: {command}"
    try:
        manifest: dict[str, Any] = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(file)!r} is damaged ({error}). {again}") from error
    if manifest.get("format") != format:
        raise ValueError(
            f"{str(folder)!r} has format {manifest.get('format')}, this version of icnn_zoo reads {format}. {again}"
        )
    return manifest


def files_below(folder: Path, endings: Sequence[str]) -> list[Path]:
    """Files below a folder by their endings, in lower case; also in linked folders, but nothing hidden.

    Hidden are names that begin with a dot: notebooks' ``.ipynb_checkpoints``, the ``._a.png`` of a Mac.

    Returns:
        Paths below ``folder``, sorted; none where there is no such folder. Links to nothing are among them.
    """
    return sorted(path for path in _walk(folder, ()) if path.suffix.lower() in endings) if folder.is_dir() else []


def _walk(folder: Path, parents: tuple[str, ...]) -> Iterator[Path]:
    here = os.path.realpath(folder)
    if here in parents:  # a link to a folder that it lies in
        return
    for name in os.listdir(folder):
        path = folder / name
        if name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, (*parents, here))
        else:
            yield path


def search_folder(root: Path, candidates: Iterable[str], holding: str) -> Path | None:
    """The first of ``candidates`` below ``root`` that holds a file or folder named ``holding``; None if none does."""
    return next((root / name for name in candidates if (root / name / holding).exists()), None)


def find_folder(root: Path, candidates: Sequence[str], holding: str, advice: str) -> Path:
    """As :func:`search_folder`, but not finding any is an error.

    Args:
        root: Folder that the user gave.
        candidates: Folders below it, in the order of looking.
        holding: What the folder must contain.
        advice: What to do, for the error.

    Raises:
        FileNotFoundError: None of them; the message lists the paths that were looked for.
    """
    found = search_folder(root, candidates, holding)
    if found is None:
        paths = ", ".join(repr(str(root / name / holding)) for name in candidates)
        raise FileNotFoundError(f"no dataset in `root` = {str(root)!r}: looked for {paths}. {advice}")
    return found


def files_in(folder: Path, suffix: str) -> dict[str, Path]:
    """The files of a folder that end in ``suffix``, by their names without it, sorted; nothing hidden.

    Empty without the folder.
    """
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return {
        name.removesuffix(suffix): folder / name for name in names if name.endswith(suffix) and not name.startswith(".")
    }


def missing_files(paths: Iterable[Path]) -> list[Path]:
    """Those of the paths that are not files, or links to nothing. Reads every folder once: network drives are slow."""
    present: dict[Path, set[str]] = {}
    missing = []
    for path in paths:
        folder = path.parent
        if folder not in present:
            entries = list(os.scandir(folder)) if folder.is_dir() else []
            present[folder] = {entry.name for entry in entries if entry.is_file()}
        if path.name not in present[folder]:
            missing.append(path)
    return missing

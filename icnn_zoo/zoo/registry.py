"""The zoo: registries anywhere, the checkpoints they list, and networks rebuilt from them."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from icnn_zoo.io.downloads import DownloadError, cache_folder, fetch, fetch_small, mismatch, store
from icnn_zoo.io.transports import is_local, local_path
from icnn_zoo.zoo.cards import Card, Name, Record, Sha256, Size, Text, parse

INDEX = "index.json"
WEIGHTS = "model.safetensors"
CARD = "card.json"
README = "README.md"
PACKAGED = Path(__file__).parents[1] / "checkpoints"
DEFAULT = "default"
_INDEX_LIMIT = 10_000_000

Registries = str | Path | Sequence[str | Path] | None


class File(Record):
    """What a file must be."""

    sha256: Sha256
    size: Size


class Entry(Record):
    """A checkpoint in an index; its files are in the folder of its name."""

    name: Name
    summary: Text
    card: File
    weights: File


class Index(Record):
    """The file index.json of a registry."""

    format: Literal[1]
    checkpoints: tuple[Entry, ...]

    @model_validator(mode="after")
    def _unique(self) -> Index:
        names = [entry.name for entry in self.checkpoints]
        if len(set(names)) < len(names):
            raise ValueError("`checkpoints` must have different names")
        return self


@dataclass(frozen=True)
class Registry:
    """A place with ``index.json`` and one folder for each checkpoint.

    Attributes:
        url: A folder, or any URL that fsspec can read: https, s3, hf, ...
        cache: Where copies of remote files are kept; files of a folder are read where they are.
        progress: Shows a bar while downloading, on a terminal.
    """

    url: str
    cache: Path
    progress: bool = True

    def read_index(self) -> Index:
        """The list of its checkpoints; the last known one, with a warning, where the registry cannot be reached.

        Raises:
            FileNotFoundError: It has no index.
            DownloadError: It cannot be reached and never was.
            ValueError: The index is broken, or of a newer version.
        """
        url = self.join(INDEX)
        if is_local(self.url):
            file = Path(local_path(url))
            if not file.is_file():
                raise FileNotFoundError(f"the registry {self.url!r} has no {INDEX}; a registry is a folder with one.")
            return parse(Index, file.read_bytes(), url)
        copy = self.cache / "indices" / f"{hashlib.sha256(url.encode()).hexdigest()}.json"
        try:
            data = fetch_small(url, _INDEX_LIMIT)
        except (DownloadError, FileNotFoundError) as error:
            if not copy.is_file():
                raise type(error)(f"the registry {self.url!r} cannot be read: {error}") from error
            warnings.warn(
                f"the registry {self.url!r} cannot be read, its last known index is used: {error}", stacklevel=2
            )
            return parse(Index, copy.read_bytes(), str(copy))
        index = parse(Index, data, url)
        if not copy.is_file() or copy.read_bytes() != data:
            store(copy, data, self.cache)
        return index

    def read_card(self, entry: Entry) -> Card:
        """The card of a checkpoint.

        Raises:
            FileNotFoundError: It is not there.
            DownloadError: It cannot be had.
            ValueError: It is not the one of the index, or broken, or of a newer version.
        """
        url = self.join(entry.name, CARD)
        card = parse(Card, self._read(url, entry.card), url)
        for what, said, found in (
            ("name", entry.name, card.name),
            ("weights' sha256", entry.weights.sha256, card.weights.sha256),
            ("weights' size", entry.weights.size, card.weights.size),
        ):
            if said != found:
                raise ValueError(f"{url} does not belong to its entry in the index: {what} is {found}, not {said}.")
        return card

    def read(self, entry: Entry) -> tuple[Card, bytes]:
        """The card of a checkpoint and the verified bytes of its safetensors file.

        Raises:
            FileNotFoundError: A file is not there.
            DownloadError: It cannot be had.
            ValueError: It is not the one of the index (a copy of it was removed), or as :meth:`read_card`.
        """
        return self.read_card(entry), self._read(self.join(entry.name, WEIGHTS), entry.weights)

    def join(self, *parts: str) -> str:
        """The URL of something in the registry."""
        return "/".join([self.url.rstrip("/"), *parts])

    def _read(self, url: str, file: File) -> bytes:
        if not is_local(self.url):
            return fetch(url, sha256=file.sha256, size=file.size, cache=self.cache, progress=self.progress)
        path = Path(local_path(url))
        if not path.is_file():
            raise FileNotFoundError(f"the registry {self.url!r} lists {url!r}, which is not there.")
        data = path.read_bytes()
        wrong = mismatch(data, file.sha256, file.size)
        if wrong is not None:
            raise ValueError(f"{url} is not the file that the index promises: {wrong}.")
        return data


def open_registries(
    registry: Registries = None, cache: str | Path | None = None, progress: bool = True
) -> list[Registry]:
    """The registries to search, in order.

    Args:
        registry: Folders or URLs, "default" for the one that comes with the package. None takes those of
            ``ICNN_ZOO_REGISTRY``, separated by commas, and without it the default.
        cache: Folder for copies; None for ``ICNN_ZOO_CACHE``, and without it the platform's.
        progress: Shows a bar while downloading, on a terminal.

    Raises:
        ValueError: There is none to search.
    """
    if registry is None:
        urls = [url.strip() for url in os.environ.get("ICNN_ZOO_REGISTRY", DEFAULT).split(",")]
    else:
        urls = [str(url) for url in ([registry] if isinstance(registry, (str, Path)) else registry)]
    if not urls or not all(urls):
        raise ValueError(f"`registry` (or ICNN_ZOO_REGISTRY) must name folders or URLs; got {urls}.")
    folder = cache_folder(cache)
    return [Registry(str(PACKAGED) if url == DEFAULT else url, folder, progress) for url in urls]


def list_checkpoints(pattern: str = "*", *, registry: Registries = None, cache: str | Path | None = None) -> list[str]:
    """The names of the published checkpoints.

    Args:
        pattern: Shell pattern that names must match, such as ``"*drawn*"``.
        registry: Folders or URLs to search; None for ``ICNN_ZOO_REGISTRY``, and without it those of this package.
        cache: Folder for copies; None for ``ICNN_ZOO_CACHE``, and without it the platform's.

    Returns:
        Names, sorted, each once.

    Raises:
        FileNotFoundError: A registry has no index.
        DownloadError: A registry cannot be reached and never was.
        ValueError: An index is broken, or of a newer version.

    Example:
        >>> import icnn_zoo
        >>> icnn_zoo.list_checkpoints("no_such_network.*")
        []
    """
    names = {entry.name for place in open_registries(registry, cache) for entry in place.read_index().checkpoints}
    return sorted(fnmatch.filter(names, pattern))


def find_checkpoint(
    name: str, *, registry: Registries = None, cache: str | Path | None = None, progress: bool = True
) -> tuple[Registry, Entry]:
    """The first registry that has a checkpoint, and its entry there.

    A registry that cannot be read is an error even if a later one has the name: which network a name means must not
    depend on the weather.

    Raises:
        ValueError: None has it; the message lists the nearest names.
    """
    places = open_registries(registry, cache, progress)
    names: list[str] = []
    for place in places:
        for entry in place.read_index().checkpoints:
            if entry.name == name:
                return place, entry
            names.append(entry.name)
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    near += [other for other in names if other.startswith(f"{name}.") and other not in near]
    hint = f"the nearest are {', '.join(near)}" if near else f"there are {', '.join(sorted(names)) or 'none at all'}"
    raise ValueError(f"`name`={name!r} is no checkpoint of {', '.join(place.url for place in places)}; {hint}.")

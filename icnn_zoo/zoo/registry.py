"""The zoo: registries anywhere, and the checkpoints they list."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from icnn_zoo.io.addresses import is_address, is_plain_http, join, shown, split_last
from icnn_zoo.io.downloads import Promise, cache_folder, fetch, fetch_small, open_plain, read_small, store
from icnn_zoo.io.transports import PATIENCE, DownloadError, Patience, is_local, local_path
from icnn_zoo.zoo.cards import Card, parse
from icnn_zoo.zoo.indices import CARD, INDEX, PIN, WEIGHTS, Entry, File, Index

PACKAGED = Path(__file__).parents[1] / "checkpoints"
DEFAULT = "default"
_INDEX_LIMIT = 10_000_000


@dataclass(frozen=True)
class Registry:
    """A place with ``index.json`` and one folder for each checkpoint.

    Attributes:
        url: A folder, or any URL that fsspec can read: https, s3, hf, ...
        cache: Where copies of remote files are kept; files of a folder are read where they are.
        progress: Shows a bar while downloading, on a terminal.
        patience: How long a remote registry is waited for.
    """

    url: str
    cache: Path
    progress: bool = True
    patience: Patience = PATIENCE

    def __str__(self) -> str:
        return shown(self.url)

    def read_index(self) -> Index:
        """The list of its checkpoints.

        The last known one, with a warning, where the registry cannot be reached, or gives an older list than before, or
        none of what it listed: whoever holds the registry back should not decide what is new.

        Raises:
            FileNotFoundError: It has no index.
            DownloadError: It cannot be reached and never was.
            ValueError: The index is broken, or of a newer format.
        """
        url = join(self.url, INDEX)
        if is_local(self.url):
            file = Path(local_path(url))
            if not file.is_file():
                raise FileNotFoundError(f"the registry {str(self)!r} has no {INDEX}; a registry is a folder with one.")
            return parse(Index, read_small(file, _INDEX_LIMIT), url)
        if is_plain_http(url):
            warnings.warn(
                f"the registry {str(self)!r} is read without encryption: whoever is on the way can change what a name "
                "means. Use https, or pin names (NAME@sha256:...).",
                stacklevel=2,
            )
        copy = self.cache / "indices" / f"{hashlib.sha256(url.encode()).hexdigest()}.json"
        known = _read_copy(copy)
        try:
            data = fetch_small(url, _INDEX_LIMIT, patience=self.patience)
        except (DownloadError, FileNotFoundError) as error:
            if known is None:
                raise type(error)(f"the registry {str(self)!r} cannot be read: {error}") from error
            return self._keep(known, f"cannot be read, its last known index is used: {error}")
        index = parse(Index, data, shown(url))
        if known is not None and (index.version < known.version or (known.checkpoints and not index.checkpoints)):
            what = f"version {index.version} of {index.date}, {len(index.checkpoints)} checkpoints"
            return self._keep(
                known,
                f"gives an older or emptied index ({what}), its last known one is used (version {known.version} of "
                f"{known.date}, {len(known.checkpoints)} checkpoints). If that is meant, remove {str(copy)!r}.",
            )
        if index != known:
            store(copy, data, self.cache)
        return index

    def read_card(self, entry: Entry) -> Card:
        """The card of a checkpoint.

        Raises:
            FileNotFoundError: It is not there.
            DownloadError: It cannot be had.
            ValueError: It is not the one of the index, or broken, or of a newer format.
        """
        url = join(self.url, entry.name, CARD)
        name = shown(url)
        card = parse(Card, self._read(url, entry.card), name)
        for what, said, found in (
            ("name", entry.name, card.name),
            ("weights' sha256", entry.weights.sha256, card.weights.sha256),
            ("weights' size", entry.weights.size, card.weights.size),
        ):
            if said != found:
                raise ValueError(f"{name} does not belong to its entry in the index: {what} is {found}, not {said}.")
        return card

    def read_weights(self, entry: Entry) -> bytes:
        """The verified bytes of a checkpoint's safetensors file.

        Raises:
            FileNotFoundError: It is not there.
            DownloadError: It cannot be had.
            ValueError: It is not the one of the index; a copy of it was removed.
        """
        return self._read(join(self.url, entry.name, WEIGHTS), entry.weights)

    def _keep(self, known: Index, why: str) -> Index:
        warnings.warn(f"the registry {str(self)!r} {why}", stacklevel=3)
        return known

    def _read(self, url: str, file: File) -> bytes:
        promise = Promise(file.sha256, file.size)
        if not is_local(self.url):
            return fetch(url, promise, self.cache, progress=self.progress, patience=self.patience)
        path = Path(local_path(url))
        if not path.is_file():
            raise FileNotFoundError(f"the registry {str(self)!r} lists {url!r}, which is not there.")
        if path.stat().st_size > file.size:  # perhaps much larger: not read
            raise ValueError(
                f"{url} is not the file that the index promises: expected {file.size} bytes with sha256 {file.sha256}; "
                f"got {path.stat().st_size} bytes."
            )
        data = path.read_bytes()
        wrong = promise.mismatch(data)
        if wrong is not None:
            raise ValueError(f"{url} is not the file that the index promises: {wrong}.")
        return data


Registries = str | Path | Registry | Sequence[str | Path | Registry] | None


def open_registries(
    registry: Registries = None, cache: str | Path | None = None, progress: bool = True
) -> list[Registry]:
    """The registries to search, in order.

    Args:
        registry: Folders, URLs or opened registries, "default" for the one that comes with the package. None takes
            those of ``ICNN_ZOO_REGISTRY``, separated by commas, and without it the default.
        cache: Folder for copies; None for ``ICNN_ZOO_CACHE``, and without it the platform's.
        progress: Shows a bar while downloading, on a terminal.

    Raises:
        ValueError: There is none to search.
    """
    if registry is None:
        urls: list[str | Path | Registry] = [
            url.strip() for url in os.environ.get("ICNN_ZOO_REGISTRY", DEFAULT).split(",")
        ]
    else:
        urls = [registry] if isinstance(registry, (str, Path, Registry)) else list(registry)
    if not urls or not all(map(str, urls)):
        raise ValueError(f"`registry` (or ICNN_ZOO_REGISTRY) must name folders or URLs; got {shown(urls)}.")
    folder = cache_folder(cache)
    return [
        url if isinstance(url, Registry) else Registry(str(PACKAGED if url == DEFAULT else url), folder, progress)
        for url in urls
    ]


def list_checkpoints(pattern: str = "*", *, registry: Registries = None, cache: str | Path | None = None) -> list[str]:
    """The names of the published checkpoints.

    Args:
        pattern: Shell pattern that names must match, such as ``"*drawn*"``. Yanked ones are not among them.
        registry: Folders or URLs to search; None for ``ICNN_ZOO_REGISTRY``, and without it those of this package.
        cache: Folder for copies; None for ``ICNN_ZOO_CACHE``, and without it the platform's.

    Returns:
        Names, sorted, each once.

    Raises:
        FileNotFoundError: A registry has no index.
        DownloadError: A registry cannot be reached and never was.
        ValueError: An index is broken, or of a newer format.

    Example:
        >>> import icnn_zoo
        >>> icnn_zoo.list_checkpoints("no_such_network.*")
        []
    """
    first: dict[str, Entry] = {}  # what a name means: the registries are searched in order
    for place in open_registries(registry, cache):
        for entry in place.read_index().checkpoints:
            first.setdefault(entry.name, entry)
    names = [name for name, entry in first.items() if entry.mark is None or entry.mark.kind != "yanked"]
    return sorted(fnmatch.filter(names, pattern))


def _read_copy(file: Path) -> Index | None:
    """An index as it was last; None where there is none that can be read."""
    try:
        with open_plain(file, os.O_RDONLY) as stream:
            return parse(Index, stream.read(_INDEX_LIMIT), str(file))
    except (OSError, ValueError):
        return None


def find_checkpoint(
    name: str,
    *,
    sha256: str | None = None,
    registry: Registries = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> tuple[Registry, Entry]:
    """The checkpoint of :func:`find_entry`, to be used: one that is superseded, or yanked and pinned, with a warning.

    Raises:
        ValueError: It is yanked and not pinned, or as :func:`find_entry`.
    """
    place, entry = find_entry(name, sha256=sha256, registry=registry, cache=cache, progress=progress)
    if entry.mark is not None:
        if entry.mark.kind == "yanked" and sha256 is None and PIN not in name:
            raise ValueError(f"{entry.name} of {place} is {entry.mark}. Its pin still loads it: {entry.pin}")
        warnings.warn(f"{entry.name} of {place} is {entry.mark}", stacklevel=3)
    return place, entry


def find_entry(
    name: str,
    *,
    sha256: str | None = None,
    registry: Registries = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> tuple[Registry, Entry]:
    """The first registry that has a checkpoint, and its entry there.

    A name's meaning must not depend on which registries are reachable: one that cannot be read is an error even if a
    later one has the name.

    Args:
        name: ``arch.tag``, or its address, ``hf://user/repo/arch.tag``, in a registry that is searched alone; with
            ``@sha256:...`` after it only with that hash.
        sha256: The same hash: of the checkpoint's card.json, which pins everything, or of its weights. None takes
            whatever the name means.
        registry: As in :func:`icnn_zoo.load_checkpoint`.
        cache: Likewise.
        progress: Likewise.

    Raises:
        ValueError: None has it (the message lists the nearest names), the address has no name, it has another hash, or
            the hash is not one.
    """
    if is_address(name):
        if registry is not None:
            raise ValueError(f"`name`={shown(name)!r} is an address, which has its registry in it; give no `registry`.")
        address, (registry, name) = name, split_last(name)
        if re.fullmatch(r"hf://((datasets|spaces)/)?[^/]+", registry):
            raise ValueError(
                f"`name`={shown(address)!r} is a repository; name a checkpoint in it: {shown(address)}/arch.tag. "
                f"`icnn-zoo list --registry {shown(address)}` lists them."
            )
    name, mark, pinned = name.partition("@")
    if mark and not pinned.startswith("sha256:"):
        raise ValueError(f"a name is pinned as {name}{PIN}<64 hexadecimal digits>; got {name}@{pinned}.")
    pins = {pin.lower() for pin in (sha256, pinned.removeprefix("sha256:") if mark else None) if pin is not None}
    for pin in pins:
        if not re.fullmatch("[0-9a-f]{64}", pin):
            raise ValueError(f"`sha256` must be 64 hexadecimal digits; got {pin!r}.")
    places = open_registries(registry, cache, progress)
    names: list[str] = []
    for place in places:
        for entry in place.read_index().checkpoints:
            if entry.name == name:
                _check_pins(place, entry, pins)
                return place, entry
            names.append(entry.name)
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    near += [other for other in names if other.startswith(f"{name}.") and other not in near]
    hint = f"the nearest are {', '.join(near)}" if near else f"there are {', '.join(sorted(names)) or 'none at all'}"
    raise ValueError(f"`name`={name!r} is not a checkpoint of {', '.join(map(str, places))}; {hint}.")


def _check_pins(place: Registry, entry: Entry, pins: set[str]) -> None:
    for pin in pins - {entry.card.sha256, entry.weights.sha256}:
        raise ValueError(
            f"`sha256`: {entry.name} of {place} is not the one with {pin}: its card has {entry.card.sha256}, its "
            f"weights {entry.weights.sha256}."
        )

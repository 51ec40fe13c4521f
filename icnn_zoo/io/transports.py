"""Opening a URL as a stream that can begin in the middle: HTTP, and whatever else fsspec knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import fsspec
import requests

_TIMEOUT = (10.0, 30.0)  # seconds to connect, and between two pieces
_CHUNK = 1 << 14  # bytes; what is lost of a piece when the connection breaks
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


class DownloadError(RuntimeError):
    """A file cannot be had: the source refuses, or cannot be reached."""


class TransientError(DownloadError):
    """The same, where trying again may help."""


@dataclass
class Source:
    """An open file.

    Attributes:
        start: The byte that ``chunks`` begin with.
        version: What tells this version of the file from others; None where the server has nothing.
        chunks: Its bytes from there on.
    """

    start: int
    version: str | None
    chunks: Iterator[bytes]


def is_local(url: str) -> bool:
    """Whether a URL is a path of this machine."""
    return fsspec.utils.get_protocol(url) in ("file", "local")


def local_path(url: str) -> str:
    """The path that a local URL stands for."""
    return str(fsspec.url_to_fs(url)[1])


@contextmanager
def open_url(url: str, start: int = 0, version: str | None = None) -> Iterator[Source]:
    """Opens a file for reading.

    HTTP goes through requests, since fsspec's HTTP shows neither status nor ETag, by which alone one can tell that a
    file is still the same. Everything else (s3, gs, hf, ...) goes through fsspec.

    Args:
        url: Where it is.
        start: The byte to begin with, if the file is still of this ``version``; else it is opened from the beginning.
        version: The version that the bytes before ``start`` are of.

    Yields:
        The open file.

    Raises:
        FileNotFoundError: There is none.
        DownloadError: It is refused.
        TransientError: It cannot be reached now; also while reading.
        ImportError: fsspec needs a further package for this protocol; the message names it.
    """
    opener = _open_http if fsspec.utils.get_protocol(url) in ("http", "https") else _open_fsspec
    with opener(url, start, version) as source:
        yield source


@contextmanager
def _open_http(url: str, start: int, version: str | None) -> Iterator[Source]:
    headers = {"Accept-Encoding": "identity"}  # compressed bytes have other sizes
    if start and version is not None:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
            if answer.status_code in (404, 410):
                raise FileNotFoundError(f"{url} does not exist (HTTP {answer.status_code}).")
            if answer.status_code == 416:  # the file is shorter now
                raise TransientError(f"{url} has no byte {start} (HTTP 416).")
            if answer.status_code not in (200, 206):
                kind = TransientError if answer.status_code in _TRANSIENT else DownloadError
                raise kind(f"{url} is refused: HTTP {answer.status_code} {answer.reason}.")
            begins = 0
            if answer.status_code == 206:
                if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                    raise DownloadError(f"{url} answers another range than bytes {start} and on.")
                begins = start
            yield Source(begins, _http_version(answer), answer.iter_content(_CHUNK))
    except requests.RequestException as error:
        if isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema)):
            raise DownloadError(f"{url} is no valid address: {error}") from error
        raise TransientError(f"{url} cannot be reached: {error}") from error


def _http_version(answer: requests.Response) -> str | None:
    # Weak tags stand for files that mean the same, not for files with the same bytes.
    tag = answer.headers.get("ETag", "")
    return tag if tag.startswith('"') else None


@contextmanager
def _open_fsspec(url: str, start: int, version: str | None) -> Iterator[Source]:
    # Errors of whoever uses the stream pass through the yield: only those of opening and reading are translated.
    with _translated(url):
        system, path = fsspec.url_to_fs(url)
        current = str(system.ukey(path))
        file = system.open(path, "rb")
        begins = start if current == version else 0
        file.seek(begins)
    with file:
        yield Source(begins, current, _chunks(url, file))


def _chunks(url: str, file: IO[bytes]) -> Iterator[bytes]:
    while True:
        with _translated(url):
            chunk = file.read(_CHUNK)
        if not chunk:
            return
        yield chunk


@contextmanager
def _translated(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url} does not exist.") from error
    except PermissionError as error:
        raise DownloadError(f"{url} is refused: {error}") from error
    except OSError as error:
        raise TransientError(f"{url} cannot be reached: {error}") from error
    except ImportError:
        raise  # fsspec names the package to install
    except Exception as error:  # of the many kinds that clients of clouds have
        raise DownloadError(f"{url} cannot be opened: {error}") from error

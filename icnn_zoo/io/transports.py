"""Opening a URL as a stream that can begin in the middle: HTTP, and whatever else fsspec knows."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import fsspec
import requests
import requests.adapters

from icnn_zoo.io.addresses import is_http, shown, token_for

_CHUNK = 1 << 14  # bytes; what is lost of a piece when the connection breaks
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


class DownloadError(RuntimeError):
    """A file cannot be had: the source refuses, or cannot be reached."""


class TransientError(DownloadError):
    """The same, where trying again may help."""


class RangeError(TransientError):
    """The file has no such byte: it is shorter than it was."""


@dataclass(frozen=True)
class Patience:
    """How long a source is waited for.

    Attributes:
        attempts: In a row without a new byte.
        first_wait: Seconds between the first two attempts; the wait doubles.
        longest_wait: Seconds that it grows to.
        connect: Seconds to connect.
        read: Seconds between two pieces.
        total: Seconds for all of it, and
        slowest: one second more for as many bytes as this.
    """

    attempts: int = 5
    first_wait: float = 0.5
    longest_wait: float = 8.0
    connect: float = 10.0
    read: float = 30.0
    total: float = 180.0
    slowest: float = 4096.0


PATIENCE = Patience()


class Deadline:
    """When a source must have given everything; every byte that comes moves it."""

    def __init__(self, patience: Patience = PATIENCE) -> None:
        self.patience = patience
        self._end = time.monotonic() + patience.total

    def extend(self, size: int) -> None:
        """Counts bytes that came."""
        self._end += size / self.patience.slowest

    def left(self) -> float:
        """Seconds that are left; 0 if none are."""
        return max(0.0, self._end - time.monotonic())


@dataclass
class Source:
    """An open file.

    Attributes:
        start: The byte that ``chunks`` begin with.
        version: Identifier of this file version (such as an ETag); None if unknown.
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
    return str(fsspec.core.url_to_fs(url)[1])


@contextmanager
def open_url(url: str, deadline: Deadline, start: int = 0, version: str | None = None) -> Iterator[Source]:
    """Opens a file for reading.

    HTTP goes through requests, since fsspec's HTTP shows neither status nor ETag, by which alone one can tell that a
    file is still the same. Everything else (s3, gs, hf, ...) goes through fsspec.

    Args:
        url: Where it is.
        deadline: Until when; reading moves it.
        start: The byte to begin with, if the file is still of this ``version``; else it is opened from the beginning.
        version: The version that the bytes before ``start`` are of.

    Yields:
        The open file.

    Raises:
        FileNotFoundError: There is none.
        DownloadError: It is refused, or too slow.
        TransientError: It cannot be reached now; also while reading.
        ImportError: fsspec needs a further package for this protocol; the message names it.
    """
    with _in_time(url, deadline, start, version) as source:
        yield source


@contextmanager
def _in_time(url: str, deadline: Deadline, start: int, version: str | None) -> Iterator[Source]:
    """Reads in a thread that can be left behind: a server may keep any single call waiting by a byte now and then."""
    pieces: queue.Queue[Any] = queue.Queue(maxsize=16)
    left, sockets = threading.Event(), list[socket.socket]()

    def put(piece: Any) -> None:
        while not left.is_set():
            with contextlib.suppress(queue.Full):
                return pieces.put(piece, timeout=0.1)

    def read() -> None:
        try:
            opened = (
                _open_http(url, start, version, deadline.patience, sockets.append)
                if is_http(url)
                else _open_fsspec(url, start, version)
            )
            with opened as source:
                put(source)
                for chunk in source.chunks:
                    put(chunk)
                    if left.is_set():
                        return
            put(None)
        except BaseException as error:  # raised where the file is used
            put(error)

    def take() -> Any:
        try:
            piece = pieces.get(timeout=deadline.left())
        except queue.Empty:
            raise DownloadError(
                f"{shown(url)} is too slow: it was given up after {deadline.patience.total:.0f} s and "
                f"one more for every {deadline.patience.slowest:.0f} bytes."
            ) from None
        if isinstance(piece, BaseException):
            raise piece
        return piece

    def chunks() -> Iterator[bytes]:
        while (chunk := take()) is not None:
            deadline.extend(len(chunk))
            yield chunk

    threading.Thread(target=read, daemon=True, name="icnn_zoo download").start()
    try:
        source = take()
        yield Source(source.start, source.version, chunks())
    finally:
        left.set()
        for connection in sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread


@contextmanager
def _open_http(
    url: str, start: int, version: str | None, patience: Patience, watch: Callable[[socket.socket], None]
) -> Iterator[Source]:
    headers = {"Accept-Encoding": "identity"}  # compressed bytes have other sizes
    if start and version is not None:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    token, name = token_for(url), shown(url)
    try:
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, _WatchedAdapter(watch))
            with session.get(
                url,
                headers=headers,
                stream=True,
                timeout=(patience.connect, patience.read),
                auth=None if token is None else _Bearer(token),
            ) as answer:
                _check_answer(answer, name, start)
                begins = start if answer.status_code == 206 else 0
                yield Source(begins, _http_version(answer), answer.iter_content(_CHUNK))
    except requests.RequestException as error:
        # Without the cause, which holds the address with its secrets.
        if isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema)):
            raise DownloadError(f"{name} is not a valid address: {shown(error)}") from None
        raise TransientError(f"{name} cannot be reached: {shown(error)}") from None


def _check_answer(answer: requests.Response, name: str, start: int) -> None:
    status = answer.status_code
    if name.lower().startswith("https://") and not answer.url.lower().startswith("https://"):
        raise DownloadError(f"{name} leads to an address without encryption, {shown(answer.url)}.")
    if status in (404, 410):
        raise FileNotFoundError(f"{name} does not exist (HTTP {status}).")
    if status == 416:
        raise RangeError(f"{name} has no byte {start} (HTTP 416).")
    if status not in (200, 206):
        kind = TransientError if status in _TRANSIENT else DownloadError
        hint = ""
        if status in (401, 403):
            hint = " Tokens come from ICNN_ZOO_TOKENS (host=token), logins from ~/.netrc."
        raise kind(f"{name} is refused: HTTP {status} {shown(answer.reason)}.{hint}")
    if status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        raise DownloadError(f"{name} answers another range than bytes {start} and on.")


def _http_version(answer: requests.Response) -> str | None:
    # Weak tags stand for files that mean the same, not for files with the same bytes.
    tag = answer.headers.get("ETag", "")
    return tag if tag.startswith('"') else None


class _Bearer(requests.auth.AuthBase):
    """A token in the request's header; requests drops it where a redirection leads to another host."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class _WatchedAdapter(requests.adapters.HTTPAdapter):
    """Tells of every connection, so that it can be hung up from outside: nothing else ends an endless answer."""

    def __init__(self, watch: Callable[[socket.socket], None]) -> None:
        super().__init__()
        self._watch = watch

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        """The pool of connections to a host."""
        pool, watch = super().get_connection_with_tls_context(*args, **kwargs), self._watch
        kind: Any = type(pool).ConnectionCls

        class Watched(kind):
            def connect(self) -> None:
                super().connect()
                watch(self.sock)

        pool.ConnectionCls = Watched
        return pool


@contextmanager
def _open_fsspec(url: str, start: int, version: str | None) -> Iterator[Source]:
    # Errors of whoever uses the stream pass through the yield: only those of opening and reading are translated.
    with _translated(url):
        system, path = fsspec.core.url_to_fs(url)
        system.invalidate_cache()  # of listings, which another process may have made wrong
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
    name = shown(url)
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} does not exist.") from None
    except PermissionError as error:
        raise DownloadError(f"{name} is refused: {shown(error)}") from None
    except OSError as error:
        raise TransientError(f"{name} cannot be reached: {shown(error)}") from None
    except ImportError:
        raise  # fsspec names the package to install
    except Exception as error:  # of the many kinds that clients of clouds have
        raise DownloadError(f"{name} cannot be opened: {shown(error)}") from None

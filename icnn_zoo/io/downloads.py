"""Files from anywhere, resumed, retried and verified, to a place of their own or into a cache that processes share."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import platformdirs
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential, wait_random

from icnn_zoo.io.addresses import shown
from icnn_zoo.io.files import sync, write_whole
from icnn_zoo.io.transports import PATIENCE, Deadline, DownloadError, Patience, RangeError, TransientError, open_url

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Promise:
    """What the content of a file must be.

    Attributes:
        digest: In hexadecimal.
        size: In bytes; None where nobody says.
        algorithm: Of the digest, as hashlib names it.
    """

    digest: str
    size: int | None = None
    algorithm: str = "sha256"

    def mismatch(self, data: bytes) -> str | None:
        """What is wrong with a content, in words with both digests; None if nothing is."""
        return self._compare(len(data), hashlib.new(self.algorithm, data).hexdigest())

    def mismatch_of(self, file: Path) -> str | None:
        """The same of a file; one that is far too large is not read.

        Raises:
            OSError: It is not a plain file, or cannot be read.
        """
        with open_plain(file, os.O_RDONLY) as stream:
            size = os.fstat(stream.fileno()).st_size
            if self.size is not None and size > self.size + 1:
                return f"expected {self.size} bytes; got {size}"
            return self._compare(size, hashlib.file_digest(stream, self.algorithm).hexdigest())

    def _compare(self, size: int, digest: str) -> str | None:
        if digest == self.digest and self.size in (None, size):
            return None
        wanted = "" if self.size is None else f"{self.size} bytes with "
        more = "at least " if self.size is not None and size > self.size else ""
        return f"expected {wanted}{self.algorithm} {self.digest}; got {more}{size} bytes with {self.algorithm} {digest}"


def cache_folder(cache: str | Path | None = None) -> Path:
    """The folder that keeps downloads: ``cache``, else ``ICNN_ZOO_CACHE``, else the platform's (~/.cache/icnn_zoo)."""
    chosen = cache or os.environ.get("ICNN_ZOO_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("icnn_zoo", appauthor=False)


def fetch(url: str, promise: Promise, cache: Path, *, progress: bool = True, patience: Patience = PATIENCE) -> bytes:
    """A file's content, from the cache or from ``url`` into the cache.

    Args:
        url: Where it is, for any file system of fsspec.
        promise: What it must be, by SHA-256. Content is stored under its hash.
        cache: Folder of the cache; it is made.
        progress: Shows a bar with size and rate, on a terminal.
        patience: How long the source is waited for.

    Returns:
        The very bytes that were verified.

    Raises:
        FileNotFoundError: There is no such file.
        DownloadError: It cannot be had: refused, too slow, or unreachable after all attempts.
        ValueError: What came is not the file; it was removed. The message has both hashes.
        RuntimeError: The cache cannot be written, or has no space left; what it held stays.
    """
    target = cache / "files" / promise.digest
    with explained(cache):
        _check_folder(target.parent)
        # A good file needs no lock, which a cache that cannot be written would not give.
        data, damage = _read_good(target, promise)
        if data is not None:
            return data
        try:
            download(url, target, promise, progress=progress, patience=patience)
        except (DownloadError, FileNotFoundError) as error:
            if damage is None:
                raise
            raise DownloadError(f"{error} The cached copy was damaged and is removed: {damage}.") from error
        data, damage = _read_good(target, promise)
        if data is None:
            raise ValueError(f"{str(target)!r} was changed while it was read: {damage or 'it is gone'}.")
        return data


def download(url: str, target: Path, promise: Promise, *, progress: bool = True, patience: Patience = PATIENCE) -> None:
    """Downloads a file to a place of its own, where it is there whole and verified or not at all.

    One process downloads, others wait for it. A download that was killed or cut off is resumed where the server can
    tell that its file is still the same; attempts are repeated until five in a row bring nothing.

    Args:
        url: Where it is, for any file system of fsspec.
        target: The file; its folder is made. One that is as promised is kept, another one is replaced.
        promise: What it must be.
        progress: Shows a bar with size and rate, on a terminal.
        patience: How long the source is waited for.

    Raises:
        FileNotFoundError: There is no such file.
        DownloadError: It cannot be had: refused, too slow, or unreachable after all attempts.
        ValueError: What came is not the file; it was removed. The message has both hashes.
        OSError: The folder cannot be written, or has no space left.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f"{target.name}.lock")
    with FileLock(lock):
        if _size(target) is not None:
            if promise.mismatch_of(target) is None:  # another process was faster
                return
            target.unlink()
        _Download(url, target, promise, progress, Deadline(patience)).run()
    with contextlib.suppress(OSError):  # others may wait for it, and find the file
        lock.unlink()


def fetch_small(url: str, limit: int, *, patience: Patience = PATIENCE) -> bytes:
    """The content of a small file that nothing vouches for, such as an index.

    Args:
        url: Where it is, for any file system of fsspec.
        limit: Bytes that it may have.
        patience: How long the source is waited for.

    Raises:
        FileNotFoundError: There is no such file.
        DownloadError: It cannot be had: refused, too slow, or unreachable after all attempts.
        ValueError: It is larger.
    """
    deadline = Deadline(patience)

    def read() -> bytes:
        data = b""
        with open_url(url, deadline) as source:
            for chunk in source.chunks:
                data += chunk
                if len(data) > limit:
                    raise ValueError(f"{shown(url)} is larger than the {limit} bytes that such a file may have.")
        return data

    return _repeat(read, lambda: 0, deadline)


def read_small(file: Path, limit: int) -> bytes:
    """The content of a small file of this machine.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is larger than ``limit`` bytes; it is not read then.
    """
    size = file.stat().st_size
    if size > limit:
        raise ValueError(f"{str(file)!r} has {size} bytes, more than the {limit} that such a file may have.")
    return file.read_bytes()


class _Download:
    """A download under way: the part of the file that is there, and a note on what it is a part of."""

    def __init__(self, url: str, target: Path, promise: Promise, progress: bool, deadline: Deadline) -> None:
        self.url, self.target, self.promise, self.progress, self.deadline = url, target, promise, progress, deadline
        self.partial, self.note = (target.with_name(target.name + suffix) for suffix in (".partial", ".json"))
        # Not the address itself, which may hold a password.
        self.address = hashlib.sha256(url.encode()).hexdigest()
        self.resumed = False

    def run(self) -> None:
        size = self.promise.size
        free = shutil.disk_usage(self.target.parent).free
        if size is not None and free < size - self.present():
            raise OSError(errno.ENOSPC, f"{shown(self.url)} needs {size} bytes, {free} are free")
        for _ in range(2):
            self.resumed = False
            try:
                if size is None or self.present() < size:
                    _repeat(self.attempt, self.present, self.deadline)
                else:
                    self.resumed = True  # killed after the last byte
            except OSError as error:
                if error.errno in _NO_SPACE:
                    self.discard()
                raise
            wrong = self.promise.mismatch_of(self.partial)
            if wrong is None:
                sync(self.partial)  # before the move: else a power cut can leave an empty file under the name
                os.replace(self.partial, self.target)
                sync(self.target.parent)
                self.note.unlink(missing_ok=True)
                return
            self.discard()
            # What was joined from two attempts may be two versions of a file: once more from the beginning.
            if not self.resumed:
                break
        raise ValueError(f"{shown(self.url)} is not the file that was promised, and is removed: {wrong}.")

    def present(self) -> int:
        return _size(self.partial) or 0

    def discard(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def attempt(self) -> None:
        """Downloads what the partial file lacks."""
        version = self.version()
        start = self.present() if version is not None else 0
        try:
            with open_url(self.url, self.deadline, start, version) as source:
                self.append(source.start, source.version, source.chunks)
        except RangeError:
            self.discard()  # the next attempt begins anew
            raise

    def version(self) -> str | None:
        """The version that the partial file is of, by the note; None where there is none that can be read."""
        if _size(self.note) is None:
            return None
        try:
            known = json.loads(self.note.read_bytes())
        except ValueError:
            return None
        if not isinstance(known, dict) or known.get("address") != self.address:
            return None
        version = known.get("version")
        return version if isinstance(version, str) else None

    def append(self, start: int, version: str | None, chunks: Iterator[bytes]) -> None:
        self.resumed |= start > 0
        size = self.promise.size
        with open_plain(self.partial, os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if start else os.O_TRUNC)) as file:
            # After the file was emptied: a note must never be newer than the bytes that it tells of.
            write_whole(self.note, json.dumps({"address": self.address, "version": version}))
            with _bar(self.target.name, self.url, size, start, self.progress) as advance:
                written = start
                for chunk in chunks:
                    if size is not None:
                        chunk = chunk[: size + 1 - written]  # one byte more than promised tells enough
                    file.write(chunk)
                    file.flush()
                    written += len(chunk)
                    advance(len(chunk))
                    if size is not None and written > size:
                        break


@contextlib.contextmanager
def _bar(name: str, url: str, size: int | None, start: int, progress: bool) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar:
        place = "/".join(url.partition("?")[0].rsplit("/", 2)[-2:])
        task = bar.add_task(shown(place), total=size, completed=start)
        yield lambda count: bar.advance(task, count)


def _repeat(action: Callable[[], Result], progress: Callable[[], int], deadline: Deadline) -> Result:
    """Calls ``action`` until it does not fail, or failed five times in a row without more ``progress`` than ever.

    Not than the time before: a server that begins anew and cuts off elsewhere each time would be asked for ever.
    """
    idle, most, failures = 0, progress(), list[str]()
    patience = deadline.patience

    def stop(state: RetryCallState) -> bool:
        nonlocal idle, most
        if state.outcome is not None:
            failures.append(str(state.outcome.exception()))
        idle = idle + 1 if progress() <= most else 1
        most = max(most, progress())
        return idle >= patience.attempts or not deadline.left()

    wait = wait_exponential(multiplier=patience.first_wait, max=patience.longest_wait)
    retrying = Retrying(
        retry=retry_if_exception_type(TransientError),
        wait=wait + wait_random(0, patience.first_wait),
        stop=stop,
        reraise=True,
    )
    try:
        return retrying(action)
    except TransientError as error:
        raise DownloadError(f"{failures[-1]} Tried {len(failures)} times.") from error


def _size(file: Path) -> int | None:
    """The size of a plain file, None if there is none.

    Raises:
        OSError: It is something else. Links are not followed: in a cache that users share, another user may have put
            one there.
    """
    try:
        found = file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, f"{str(file)!r} is not a plain file; remove it")
    return found.st_size


def open_plain(file: Path, flags: int) -> io.BufferedIOBase:
    """Opens a file, but no symbolic link, with the mode that the user's mask gives.

    Raises:
        OSError: As ``os.open``.
    """
    handle = os.open(file, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), 0o666)
    if flags & (os.O_WRONLY | os.O_RDWR):
        return os.fdopen(handle, "wb")
    return os.fdopen(handle, "rb")


def _check_folder(folder: Path) -> None:
    if folder.is_symlink():
        raise OSError(errno.EINVAL, f"{str(folder)!r} is a symbolic link, which is not followed; remove it")


def _read_good(file: Path, promise: Promise) -> tuple[bytes | None, str | None]:
    """The content of a file if it is what it should be, else what is wrong with it; two None if there is no file."""
    size = _size(file)
    if size is None:
        return None, None
    if size != promise.size:
        return None, f"expected {promise.size} bytes; got {size} bytes"
    with open_plain(file, os.O_RDONLY) as stream:
        data = stream.read()
    damage = promise.mismatch(data)
    return (data, None) if damage is None else (None, damage)


def store(file: Path, data: bytes, cache: Path) -> None:
    """Writes a file of the cache, whole or not at all.

    Raises:
        RuntimeError: The cache cannot be written, or has no space left; what it held stays.
    """
    with explained(cache):
        _check_folder(file.parent)
        write_whole(file, data)


@contextlib.contextmanager
def explained(cache: Path) -> Iterator[None]:
    """Says what to do where the cache is the trouble."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise RuntimeError(
                f"no space left in the cache {str(cache)!r} ({error.strerror}): make room, or name another folder "
                "with ICNN_ZOO_CACHE. What it held is unchanged."
            ) from error
        if error.errno is None:  # of a source, not of this machine
            raise
        raise RuntimeError(
            f"the cache {str(cache)!r} cannot be written ({error.strerror}): name another folder with ICNN_ZOO_CACHE."
        ) from error

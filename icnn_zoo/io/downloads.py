"""Files from anywhere into a cache that processes share: resumed, retried, and verified before anyone reads them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import platformdirs
from filelock import FileLock
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential, wait_random
from tqdm import tqdm

from icnn_zoo.io.transports import DownloadError, TransientError, open_url

_ATTEMPTS = 5  # in a row without a new byte
_BACKOFF = (0.5, 8.0)  # seconds: the first wait and the longest
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Result = TypeVar("Result")


def cache_folder(cache: str | Path | None = None) -> Path:
    """The folder that keeps downloads: ``cache``, else ``ICNN_ZOO_CACHE``, else the platform's (~/.cache/icnn_zoo)."""
    chosen = cache or os.environ.get("ICNN_ZOO_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("icnn_zoo", appauthor=False)


def mismatch(data: bytes, sha256: str, size: int) -> str | None:
    """What is wrong with a file's content, in words with both hashes; None if nothing is."""
    found = hashlib.sha256(data).hexdigest()
    if len(data) == size and found == sha256:
        return None
    more = "at least " if len(data) > size else ""
    return f"expected {size} bytes with sha256 {sha256}; got {more}{len(data)} bytes with sha256 {found}"


def fetch(url: str, *, sha256: str, size: int, cache: Path, progress: bool = True) -> bytes:
    """A file's content, from the cache or from ``url`` into the cache.

    One process downloads, others wait for it. A download that was killed or cut off is resumed where the server can
    tell that its file is still the same; attempts are repeated until five in a row bring nothing.

    Args:
        url: Where it is, for any file system of fsspec.
        sha256: Of its bytes, in hexadecimal.
        size: In bytes.
        cache: Folder of the cache; it is made. Content is stored under its hash.
        progress: Shows a bar with size and rate, on a terminal.

    Returns:
        The very bytes that were verified.

    Raises:
        FileNotFoundError: There is no such file.
        DownloadError: It cannot be had: refused, or unreachable after all attempts.
        ValueError: What came is not the file; it was removed. The message has both hashes.
        RuntimeError: The cache cannot be written, or has no space left; what it held stays.
    """
    target = cache / "files" / sha256
    with _explained(cache):
        # A good file needs no lock, which a cache that cannot be written would not give.
        data = _read_good(target, sha256, size)[0]
        if data is not None:
            return data
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            data, damage = _read_good(target, sha256, size)
            if data is not None:  # another process was faster
                return data
            if damage is not None:
                target.unlink()
            try:
                return _download(url, sha256, size, target, progress)
            except (DownloadError, FileNotFoundError) as error:
                if damage is None:
                    raise
                raise DownloadError(f"{error} The cached copy was damaged and is removed: {damage}.") from error


def fetch_small(url: str, limit: int) -> bytes:
    """The content of a small file that nothing vouches for, such as an index.

    Args:
        url: Where it is, for any file system of fsspec.
        limit: Bytes that it may have.

    Raises:
        FileNotFoundError: There is no such file.
        DownloadError: It cannot be had: refused, or unreachable after all attempts.
        ValueError: It is larger.
    """

    def read() -> bytes:
        data = b""
        with open_url(url) as source:
            for chunk in source.chunks:
                data += chunk
                if len(data) > limit:
                    raise ValueError(f"{url} is larger than the {limit} bytes that such a file may have.")
        return data

    return _repeat(read, lambda: 0)


def store(file: Path, data: bytes, cache: Path) -> None:
    """Writes a file of the cache, whole or not at all.

    Raises:
        RuntimeError: The cache cannot be written, or has no space left; what it held stays.
    """
    with _explained(cache):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            os.replace(temporary, file)
        finally:
            Path(temporary).unlink(missing_ok=True)


def _read_good(file: Path, sha256: str, size: int) -> tuple[bytes | None, str | None]:
    """The content of a file if it is what it should be, else what is wrong with it; two None if there is no file."""
    if not file.is_file():
        return None, None
    data = file.read_bytes()
    damage = mismatch(data, sha256, size)
    return (data, None) if damage is None else (None, damage)


def _download(url: str, sha256: str, size: int, target: Path, progress: bool) -> bytes:
    partial, note = target.with_suffix(".partial"), target.with_suffix(".json")

    def present() -> int:
        return partial.stat().st_size if partial.is_file() else 0

    def discard() -> None:
        partial.unlink(missing_ok=True)
        note.unlink(missing_ok=True)

    free = shutil.disk_usage(target.parent).free
    if free < size - present():
        raise OSError(errno.ENOSPC, f"{url} needs {size} bytes, {free} are free")
    for _ in range(2):
        resumed = False

        def attempt() -> None:
            nonlocal resumed
            resumed |= _append(url, size, partial, note, progress)

        try:
            if present() < size:
                _repeat(attempt, present)
            else:
                resumed = True  # killed after the last byte
        except OSError as error:
            if error.errno in _NO_SPACE:
                discard()
            raise
        data = partial.read_bytes()
        wrong = mismatch(data, sha256, size)
        if wrong is None:
            os.replace(partial, target)
            note.unlink(missing_ok=True)
            return data
        discard()
        # What was joined from two attempts may be two versions of a file: once more from the beginning.
        if not resumed:
            break
    raise ValueError(f"{url} is not the file that its registry promises, and is removed: {wrong}.")


def _append(url: str, size: int, partial: Path, note: Path, progress: bool) -> bool:
    """Downloads what a partial file lacks; whether it went on with a file that was there."""
    known = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    start = partial.stat().st_size if partial.is_file() and known.get("url") == url else 0
    with open_url(url, start, known.get("version")) as source, partial.open("ab" if source.start else "wb") as file:
        note.write_text(json.dumps({"url": url, "version": source.version}), encoding="utf-8")
        name = "/".join(url.rsplit("/", 2)[-2:])
        # None shows the bar on a terminal only.
        hidden = None if progress else True
        with tqdm(desc=name, total=size, initial=source.start, unit="B", unit_scale=True, disable=hidden) as bar:
            written = source.start
            for chunk in source.chunks:
                chunk = chunk[: size + 1 - written]  # one byte more than promised tells enough
                file.write(chunk)
                file.flush()
                written += len(chunk)
                bar.update(len(chunk))
                if written > size:
                    break
        return source.start > 0


def _repeat(action: Callable[[], Result], progress: Callable[[], int]) -> Result:
    """Calls ``action`` until it does not fail, or failed five times in a row while ``progress`` stayed the same."""
    idle, last, failures = 0, progress(), list[str]()

    def stop(state: RetryCallState) -> bool:
        nonlocal idle, last
        if state.outcome is not None:
            failures.append(str(state.outcome.exception()))
        idle = idle + 1 if progress() == last else 1
        last = progress()
        return idle >= _ATTEMPTS

    first, longest = _BACKOFF
    retrying = Retrying(
        retry=retry_if_exception_type(TransientError),
        wait=wait_exponential(multiplier=first, max=longest) + wait_random(0, first),
        stop=stop,
        reraise=True,
    )
    try:
        return retrying(action)
    except TransientError as error:
        raise DownloadError(f"{failures[-1]} Tried {len(failures)} times.") from error


@contextmanager
def _explained(cache: Path) -> Iterator[None]:
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

"""Where a registry can be written: a folder, a repository of Hugging Face, and any store that fsspec writes to."""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import fsspec
from filelock import FileLock

from icnn_zoo.io.addresses import is_address, is_http, shown
from icnn_zoo.io.files import check_writable, write_whole
from icnn_zoo.io.transports import is_local, local_path

_REPOSITORY = re.compile(r"hf://(?:(dataset|space)s/)?([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*))?")
_HINTS = {
    "hf": "Its token, which must be one that writes, comes from HF_TOKEN.",
    "s3": "Its keys come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, as for any program.",
}


class Target(Protocol):
    """A registry to write into.

    Attributes:
        url: Its address or folder.
    """

    url: str

    def check(self) -> None:
        """Finds out whether it can be written, before the work of hours that makes what is to be written.

        Raises:
            ValueError: It cannot be by its kind.
            RuntimeError: It is refused.
        """

    def lock(self) -> AbstractContextManager[Any]:
        """Keeps other processes from changing it, where that is possible."""

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""

    def write(self, files: Mapping[str, Path], message: str) -> None:
        """Copies files to the places of their names, in their order, the last one only when the others are there.

        What is there already is not sent again, so that it can be called once more after a failure.

        Args:
            files: Local files by their names in the registry.
            message: What is done, for places that keep a history.
        """


def open_target(to: str | Path) -> Target:
    """A place to publish to, by its address or folder.

    Raises:
        ValueError: A web server, which takes no files, or a file in the place of the folder.
        RuntimeError: A kind of address that fsspec does not know or has no package for.
    """
    url = str(to)
    if is_http(url):
        raise ValueError(
            f"`to` must be a folder, hf://user/repo, s3://bucket/folder or another place that fsspec writes to; "
            f"{shown(url)} is a web server, which takes no files. Publish into a folder, and copy that to its host."
        )
    if url.startswith("hf://") and not url.startswith("hf://buckets/"):
        return HubTarget(url)
    return StoreTarget(url) if is_address(url) and not is_local(url) else FolderTarget(url)


class FolderTarget:
    """A folder of this machine."""

    def __init__(self, url: str) -> None:
        # An address that went through a Path has lost a slash.
        if re.match(r"\w{2,}:/", url) and not url.startswith("file:"):
            raise ValueError(
                f"`to` must be a folder or an address; got {url!r}, an address that lost a slash as a Path."
            )
        self.url = url
        self.folder = Path(local_path(url))

    def check(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"`to` must be a folder; {self.url!r} is a file.")
        check_writable("`to`", self.folder)

    def lock(self) -> AbstractContextManager[Any]:
        return FileLock(self.folder / ".lock")  # freed when its process ends, however it ends

    def read(self, name: str) -> bytes | None:
        file = self.folder / name
        return file.read_bytes() if file.is_file() else None

    def write(self, files: Mapping[str, Path], message: str) -> None:
        for name, file in files.items():
            write_whole(self.folder / name, file.read_bytes())


class StoreTarget:
    """A store that fsspec writes to: s3, gs, az, sftp, memory, ..."""

    def __init__(self, url: str) -> None:
        self.url = url
        with _explained(url):
            self._system, self._root = fsspec.core.url_to_fs(url)

    def check(self) -> None:
        with TemporaryDirectory() as folder, _explained(self.url):
            probe = Path(folder) / f".writable-{secrets.token_hex(4)}"
            probe.touch()
            self._system.put_file(str(probe), self._path(probe.name))
            self._system.rm_file(self._path(probe.name))

    def lock(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def read(self, name: str) -> bytes | None:
        with _explained(self.url):
            self._system.invalidate_cache()
            try:
                content: bytes = self._system.cat_file(self._path(name))
            except FileNotFoundError:
                return None
            return content

    def write(self, files: Mapping[str, Path], message: str) -> None:
        *others, last = files.items()
        with _explained(self.url):
            self._system.invalidate_cache()
            for name, file in others:
                if not self._holds(name, file):
                    self._system.put_file(str(file), self._path(name))
                    if not self._holds(name, file):
                        raise OSError(f"{name} is not there as it was sent")
            self._commit(*last)

    def _commit(self, name: str, file: Path) -> None:
        # Where a store does not put whole objects, as over sftp, a transaction moves a whole file.
        with self._system.transaction, self._system.open(self._path(name), "wb") as stream:
            stream.write(file.read_bytes())

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _holds(self, name: str, file: Path) -> bool:
        try:
            if self._system.info(self._path(name))["size"] != file.stat().st_size:
                return False
            with self._system.open(self._path(name), "rb") as theirs, file.open("rb") as own:
                digests = [hashlib.file_digest(stream, "sha256").digest() for stream in (theirs, own)]
        except FileNotFoundError:
            return False
        return digests[0] == digests[1]


class HubTarget:
    """A repository of Hugging Face: everything is one commit, refused if there was another one since it was read."""

    def __init__(self, url: str) -> None:
        from huggingface_hub import HfApi

        found = _REPOSITORY.fullmatch(url)
        if found is None:
            raise ValueError(f"`to` must be hf://user/repo, or hf://datasets/user/repo; got {url!r}.")
        kind, repository, self._revision, folder = found.groups()
        self.url = url
        self._prefix = f"{folder.strip('/')}/" if folder else ""
        self._where: dict[str, Any] = {"repo_id": repository, "repo_type": kind or "model"}
        self._api = HfApi()
        self._parent: str | None = None

    def check(self) -> None:
        from huggingface_hub import CommitOperationAdd

        with _explained(self.url):
            if self._find_parent() is None:
                self._api.whoami()  # write() makes the repository
            else:  # the hub says how it would take a file, to those who may write
                probe = [CommitOperationAdd(f"{self._prefix}README.md", b"?")]
                self._api.preupload_lfs_files(**self._where, additions=probe, revision=self._revision)

    def lock(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def read(self, name: str) -> bytes | None:
        from huggingface_hub import HfFileSystem

        with _explained(self.url):
            parent = self._parent or self._find_parent()
            if parent is None:
                return None
            kind = "" if self._where["repo_type"] == "model" else f"{self._where['repo_type']}s/"
            try:
                content: bytes = HfFileSystem().cat_file(
                    f"{kind}{self._where['repo_id']}@{parent}/{self._prefix}{name}"
                )
            except FileNotFoundError:
                return None
            return content

    def write(self, files: Mapping[str, Path], message: str) -> None:
        from huggingface_hub import CommitOperationAdd

        with _explained(self.url):
            if self._parent is None:
                self._api.create_repo(**self._where, exist_ok=True)
            self._api.create_commit(
                **self._where,
                operations=[CommitOperationAdd(self._prefix + name, str(file)) for name, file in files.items()],
                commit_message=message,
                revision=self._revision,
                parent_commit=self._parent,
            )

    def _find_parent(self) -> str | None:
        from huggingface_hub.errors import RepositoryNotFoundError

        with contextlib.suppress(RepositoryNotFoundError):
            self._parent = self._api.repo_info(**self._where, revision=self._revision).sha
        return self._parent


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Says which place cannot be written, whatever its client raises."""
    try:
        yield
    except Exception as error:
        reason = next(iter(shown(error).splitlines()), "").rstrip(".")
        hint = _HINTS.get(url.partition("://")[0], "")
        raise RuntimeError(
            f"`to`: {shown(url)} cannot be written: {type(error).__name__}: {reason}. {hint}".strip()
        ) from error

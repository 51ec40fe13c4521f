"""Where PDFs come from, who wrote them, and which split their authors belong to."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.progress import track
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from icnn_zoo.data.folders import files_below
from icnn_zoo.io.pdf import open_pdf

# Debian packages of free documentation by thousands of authors: theses, articles, slides, manuals.
DEBIAN_PACKAGES = (
    "texlive-publishers-doc",
    "texlive-science-doc",
    "texlive-humanities-doc",
    "texlive-latex-recommended-doc",
    "texlive-latex-extra-doc",
    "texlive-pictures-doc",
)
PAGES_PER_DOCUMENT = 12  # at most: many authors teach more than many pages of one
TEST_PAGES, VAL_PAGES = 1600, 500  # to choose from, of which some are then dropped
_LARGEST_SHARE = 0.25  # of a test set: a larger group of authors is trained on
_FIRST_PAGES = 2  # whose addresses tell authors

_ADDRESS = re.compile(r"[\w.+-]{2,}@[\w-]+(?:\.[\w-]+)+")
_NOBODY = re.compile(r"^(latex|tex|the author|author|user|root|admin\w*|unknown|your name|name|.{0,4})$|example", re.I)

DocumentSplit = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Source:
    """A PDF and where it comes from.

    Attributes:
        path: The file.
        package: Whose it is: a package's name, or the folder that holds it.
        key: Its path below the folder of all PDFs.
    """

    path: Path
    package: str
    key: str


@dataclass(frozen=True)
class Document:
    """A readable PDF.

    Attributes:
        source: The file and its package.
        name: Unique and the same on every machine: package, file name, and the beginning of its hash.
        pages: The chosen pages, from 0.
        authors: Names and addresses.
        group: Of all documents that share a package or an author, directly or through others.
    """

    source: Source
    name: str
    pages: tuple[int, ...]
    authors: frozenset[str]
    group: int = 0


def folder_sources(folder: Path) -> list[Source]:
    """The PDFs below a folder; each folder directly in it is a package, as is each file directly in it.

    Raises:
        FileNotFoundError: There is no such folder, or no PDF in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"`pdfs`: there is no folder {str(folder)!r}.")
    found = [path for path in files_below(folder, (".pdf",)) if path.is_file()]
    if not found:
        raise FileNotFoundError(f"`pdfs`: there are no PDFs in {str(folder)!r} or below it.")
    below = {path: path.relative_to(folder) for path in found}
    return [Source(path, Path(inner.parts[0]).stem, inner.as_posix()) for path, inner in below.items()]


def debian_sources(folder: Path, packages: Sequence[str] = DEBIAN_PACKAGES) -> list[Source]:
    """Fetches Debian packages with ``apt-get download``, without being installed, and finds the PDFs in them.

    Args:
        folder: Gets a folder of PDFs for each package, and ``licenses``. Packages that are there are not fetched again.
        packages: Names.

    Raises:
        FileNotFoundError: There is no apt-get or dpkg-deb.
        RuntimeError: A package cannot be fetched or unpacked.
    """
    sources = []
    for package in packages:
        if not (folder / package).is_dir():
            _fetch_package(package, folder)
        for path in sorted((folder / package).rglob("*.pdf")):
            inner = path.relative_to(folder / package)  # such as latex/biblatex/doc.pdf
            owner = inner.parts[1] if len(inner.parts) > 2 else inner.parts[0]
            sources.append(Source(path, owner, f"{package}/{inner.as_posix()}"))
    return sources


def _fetch_package(package: str, folder: Path) -> None:
    tools = {name: shutil.which(name) for name in ("apt-get", "dpkg-deb")}
    missing = [name for name, path in tools.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"{' and '.join(missing)} of Debian or Ubuntu are needed to fetch {package}, and are not on the PATH. Give "
            "a folder of your own PDFs instead: icnn-zoo prepare documents --pdfs FOLDER"
        )
    partial = folder / f"{package}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        print(f"Fetching {package}", flush=True)
        _run(
            [str(tools["apt-get"]), "download", package],
            partial,
            "Without a network, or on another system, give a "
            "folder of your own PDFs: --pdfs FOLDER. If the package is not found, run `apt-get update` first.",
        )
        (archive,) = partial.glob("*.deb")
        _run([str(tools["dpkg-deb"]), "-x", archive.name, "content"], partial, "Is the disk full?")
        content = partial / "content" / "usr" / "share" / "doc"
        (folder / "licenses").mkdir(exist_ok=True)
        version = archive.name.split("_")[1]
        shutil.copyfile(content / package / "copyright", folder / "licenses" / f"{package}_{version}.copyright")
        kept = partial / "pdfs"
        for path in sorted(content.rglob("*.pdf")):
            if path.is_file() and not path.is_symlink():
                parts = path.relative_to(content).parts
                target = kept.joinpath(*(parts[1:] if parts[0] in ("texlive-doc", package) else parts))
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
        kept.mkdir(exist_ok=True)
        os.replace(kept, folder / package)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run(command: Sequence[str], folder: Path, advice: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr or done.stdout).strip()[-400:]
        raise RuntimeError(f"`{' '.join(command)}` failed: {words}. {advice}")


def read_documents(sources: Iterable[Source]) -> tuple[list[Document], dict[str, str]]:
    """Opens every PDF once, chooses pages, finds authors and groups.

    Args:
        sources: The files. Of equal files the first is taken.

    Returns:
        The readable documents, and why others are not: reasons by key.
    """
    documents: list[Document] = []
    skipped: dict[str, str] = {}
    seen: dict[str, Source] = {}
    for source in track(list(sources), "Reading PDFs"):
        digest = hashlib.sha256(source.path.read_bytes()).hexdigest()
        if digest in seen:
            skipped[source.key] = f"the same as {seen[digest].key}"
            continue
        seen[digest] = source
        try:
            documents.append(_read_document(source, digest))
        except ValueError as error:
            skipped[source.key] = str(error).removeprefix(f"{str(source.path)!r} ")
    return _grouped(documents), skipped


def _read_document(source: Source, digest: str) -> Document:
    pdf = open_pdf(source.path)
    try:
        rng = np.random.default_rng(int(digest[:12], 16))
        pages = rng.permutation(len(pdf))[:PAGES_PER_DOCUMENT]
        authors = {_plain(name) for name in re.split(r"\s+and\s+|[;,&]", pdf.get_metadata_dict().get("Author", ""))}
        for number in range(min(_FIRST_PAGES, len(pdf))):
            text = pdf[number].get_textpage().get_text_range()
            authors |= {address.lower() for address in _ADDRESS.findall(text)}
    except Exception as error:  # what a broken page leads pdfium to
        raise ValueError(f"is broken: {error}") from error
    finally:
        pdf.close()
    stem = re.sub(r"[^\w-]+", "-", f"{source.package}-{source.path.stem}")[:80]
    return Document(
        source,
        f"{stem}-{digest[:8]}",
        tuple(sorted(int(number) for number in pages)),
        frozenset(name for name in authors if not _NOBODY.search(name)),
    )


def _plain(name: str) -> str:
    return re.sub(r"[^\w]+", " ", re.sub(r"<[^>]*>", "", name)).strip().lower()


def _grouped(documents: Sequence[Document]) -> list[Document]:
    """The documents with their groups: those that share a package or an author are of one."""
    keys: dict[str, int] = {}
    rows, cols = [], []
    for row, document in enumerate(documents):
        for key in (f"package {document.source.package}", *sorted(document.authors)):
            rows.append(row)
            cols.append(len(documents) + keys.setdefault(key, len(keys)))
    total = len(documents) + len(keys)
    links = coo_array((np.ones(len(rows), np.int8), (rows, cols)), shape=(total, total))
    _, labels = connected_components(links, directed=False)
    return [
        Document(entry.source, entry.name, entry.pages, entry.authors, int(label))
        for entry, label in zip(documents, labels[: len(documents)].tolist(), strict=True)
    ]


def split_documents(
    documents: Sequence[Document], *, test_pages: int = TEST_PAGES, val_pages: int = VAL_PAGES
) -> dict[DocumentSplit, list[Document]]:
    """Splits documents by group, in an order that only their names decide.

    Groups go to the test set until it has ``test_pages`` or a tenth of all pages, then to validation until it has
    ``val_pages`` or a twentieth. Groups larger than a quarter of the test set, as of the authors of a whole system,
    are for training.

    Args:
        documents: Of :func:`read_documents`.
        test_pages: Pages of the test set.
        val_pages: Pages of the validation set.

    Raises:
        ValueError: There are fewer than three groups, so that a split would be empty.
    """
    groups: dict[int, list[Document]] = {}
    for document in sorted(documents, key=lambda entry: _order(entry.name)):
        groups.setdefault(document.group, []).append(document)
    if len(groups) < 3:
        raise ValueError(
            f"the PDFs are of {len(groups)} packages and authors, and a split needs 3 at least: one to train on, one "
            "to validate, one to test. Folders in the folder of PDFs are packages."
        )
    number = Counter({group: sum(len(entry.pages) for entry in members) for group, members in groups.items()})
    total = number.total()
    wanted: dict[DocumentSplit, float] = {"test": min(test_pages, total / 10), "val": min(val_pages, total / 20)}
    order = sorted(groups, key=lambda group: _order(min(entry.source.package for entry in groups[group])))
    small = [group for group in order if number[group] <= max(_LARGEST_SHARE * wanted["test"], 1)]
    order = small + sorted(set(order) - set(small), key=lambda group: (number[group], group))
    splits: dict[DocumentSplit, list[Document]] = {"test": [], "val": [], "train": []}
    for split, least in wanted.items():
        while not splits[split] or sum(len(entry.pages) for entry in splits[split]) < least:
            if len(order) <= (2 if split == "test" else 1):
                break
            splits[split] += groups[order.pop(0)]
    splits["train"] = [entry for group in order for entry in groups[group]]
    return {split: sorted(entries, key=lambda entry: _order(entry.name)) for split, entries in splits.items()}


def _order(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()

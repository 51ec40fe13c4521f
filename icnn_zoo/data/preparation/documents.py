"""Makes the pages of documents: PDFs found or fetched, split by author, rendered and labeled; resumable."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import signal
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import filelock
import numpy as np
from PIL import Image
from rich.progress import track

from icnn_zoo.data.documents import DOCUMENT_CLASSES, FOLDER, FORMAT, PALETTE, check_folder
from icnn_zoo.data.preparation.document_pages import LONGEST_SIDE, LabeledPage, label_document
from icnn_zoo.data.preparation.document_sources import (
    Document,
    Source,
    debian_sources,
    folder_sources,
    read_documents,
    split_documents,
)
from icnn_zoo.io.files import write_whole
from icnn_zoo.io.label_pictures import palette_picture

PAGES = 24000
_PAGES_A_WORKER = 250  # at least: starting one takes about as long as labeling so many
_PLAN, _PROGRESS = "plan.json", "progress.jsonl"
_COLUMNS = ("split", "name", "document", "package", "group", "page", "height", "width")


def prepare_documents(root: Path, *, pdfs: Path | None = None, pages: int = PAGES, workers: int = 1) -> str:
    """Renders and labels pages of PDFs.

    The folder ``documents`` below ``root`` is a dataset once it has its ``manifest.json``, which is written last; an
    interrupted call goes on after the last document that was done. Called again with more ``pages`` it adds to those
    that are there. Test and validation pages come first and do not depend on ``pages``. From the same PDFs come the
    same files.

    Args:
        root: Folder that gets the folder ``documents`` (120 kB a page).
        pdfs: Folder of PDFs; None fetches Debian's packages of TeX documentation (1.3 GB), of which PDFs and licenses
            are kept.
        pages: Pages to prepare in all, if there are so many. Documents are done whole.
        workers: Processes that label documents at most, which decides nothing but the time; there is one more for every
            250 pages. 1 labels in this process. More are started anew (``spawn``), so a script that asks for them needs
            ``if __name__ == "__main__":``.

    Returns:
        A report: where the pages are, how many of each split, and what was skipped why.

    Raises:
        FileNotFoundError: A folder without PDFs, or no apt-get.
        ImportError: The extra ``documents`` is not installed.
        RuntimeError: The packages cannot be fetched, another process is at work in the folder, or a worker was killed.
        ValueError: The folder was begun from other PDFs or by another version, ``pages`` are fewer than those of test
            and validation, no PDF can be used, they are of too few packages to split, or there are no ``workers``.
    """
    if workers < 1:
        raise ValueError(f"`workers` must be at least 1; got {workers}.")
    import pypdfium2  # noqa: F401  fails before anything is fetched

    folder = root / FOLDER
    sources = None if pdfs is None else folder_sources(pdfs)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            if sources is None:
                sources = debian_sources(folder / "sources")
            return _prepare(folder, sources, pages, workers)
    except filelock.Timeout:
        raise RuntimeError(f"another process prepares documents in {str(folder)!r} at this moment.") from None


def _prepare(folder: Path, sources: Sequence[Source], pages: int, workers: int) -> str:
    splits, unread = _plan(folder, sources)
    fixed = sum(len(entry.pages) for split in ("test", "val") for entry in splits[split])
    if pages <= fixed:
        raise ValueError(f"`pages` must be more than the {fixed} that testing and validation get; got {pages}.")
    done = _read_progress(folder)
    todo = [(name, document) for name in ("test", "val", "train") for document in splits[name]]
    left = sum(len(document.pages) for _, document in todo if document.name not in done)
    labeled = _label(folder, todo, done, pages, min(workers, 1 + min(left, pages) // _PAGES_A_WORKER))
    with (folder / _PROGRESS).open("a", encoding="utf-8") as log, closing(labeled):
        for entry in track(labeled, "Labeling pages", total=len(todo)):
            if entry["document"] not in done:
                done[entry["document"]] = entry
                log.write(json.dumps(entry) + "\n")
                log.flush()
    entries = {
        split: [(entry, done[entry.name]) for entry in members if entry.name in done]
        for split, members in splits.items()
    }
    return _finish(folder, entries, unread)


def _plan(folder: Path, sources: Sequence[Source]) -> tuple[dict[str, list[Document]], dict[str, str]]:
    """Documents by split, and why other PDFs are not read: made once and kept."""
    file = folder / _PLAN
    sizes = {source.key: source.path.stat().st_size for source in sources}
    by_key = {source.key: source for source in sources}
    if file.is_file():
        plan = json.loads(file.read_text(encoding="utf-8"))
        if plan["format"] != FORMAT or plan["pdfs"] != sizes:
            raise ValueError(
                f"{str(folder)!r} was begun by another version or from other PDFs. Remove it, or choose another --root."
            )
    else:
        documents, skipped = read_documents(sources)
        if not documents:
            raise ValueError(f"none of {len(sources)} PDFs can be used:\n" + _counted(skipped.values()))
        plan = {
            "format": FORMAT,
            "pdfs": sizes,
            "skipped": skipped,
            "splits": {
                split: [
                    {
                        "pdf": entry.source.key,
                        "name": entry.name,
                        "pages": entry.pages,
                        "authors": sorted(entry.authors),
                        "group": entry.group,
                    }
                    for entry in members
                ]
                for split, members in split_documents(documents).items()
            },
        }
        write_whole(file, json.dumps(plan, indent=1) + "\n")
    splits = {
        split: [
            Document(by_key[row["pdf"]], row["name"], tuple(row["pages"]), frozenset(row["authors"]), row["group"])
            for row in rows
        ]
        for split, rows in plan["splits"].items()
    }
    return splits, plan["skipped"]


def _read_progress(folder: Path) -> dict[str, dict[str, Any]]:
    """What was done, by document. A line that a kill left unfinished is cut off."""
    file = folder / _PROGRESS
    done: dict[str, dict[str, Any]] = {}
    if file.is_file():
        whole = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        write_whole(file, "".join(whole))
        for line in whole:
            entry = json.loads(line)
            done[entry["document"]] = entry
    return done


def _label(
    folder: Path,
    todo: Sequence[tuple[str, Document]],
    done: Mapping[str, dict[str, Any]],
    pages: int,
    workers: int,
) -> Generator[dict[str, Any], None, None]:
    """Yields the line of progress of every document in order, until there are ``pages``.

    At work at once are only those that are needed however many pages of the others are skipped: so that no file is
    written that does not belong to the dataset.
    """
    total = end = 0
    with _mapper(workers) as apply:
        while end < len(todo) and (todo[end][0] != "train" or total < pages):
            begin, most = end, total
            while end < len(todo) and (todo[end][0] != "train" or most < pages):
                most += len(todo[end][1].pages)
                end += 1
            new = [pair for pair in todo[begin:end] if pair[1].name not in done]
            labeled = iter(apply(partial(_write_pages, folder), *zip(*new, strict=True))) if new else iter(())
            for _, document in todo[begin:end]:
                entry = done[document.name] if document.name in done else next(labeled)
                total += len(entry["pages"])
                yield entry


@contextmanager
def _mapper(workers: int) -> Iterator[Any]:
    """``map``, in processes of their own if there are several; what was not begun is dropped at an error."""
    if workers == 1:
        yield map
        return
    # Not forked: this process has threads of PyTorch and OpenCV.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield pool.map
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that labels documents was killed, as for want of memory. What was done is kept; go on with "
            f"fewer `workers` than {workers}."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    cv2.setNumThreads(1)


def _write_pages(folder: Path, split: str, document: Document) -> dict[str, Any]:
    """Labels a document, stores its pages, and returns its line of progress."""
    try:
        result = label_document(document)
    except ValueError as error:
        return {"document": document.name, "pages": [], "skipped": {"all": str(error)}}
    images, labels = folder / "images" / split, folder / "labels" / split
    for place in (images, labels):
        place.mkdir(parents=True, exist_ok=True)
    for page in result.pages:  # until the line of progress stands, a file that a kill cut off is written anew
        file = f"{page_name(document.name, page.number)}.png"
        _picture(page).save(images / file, compress_level=1)
        palette_picture(page.labels, PALETTE).save(labels / file, compress_level=1)
    return {
        "document": document.name,
        "pages": [(page.number, *page.labels.shape) for page in result.pages],
        "skipped": {str(number): reason for number, reason in result.skipped.items()},
    }


def page_name(document: str, number: int) -> str:
    """Name of a page's files without ending, from the number of the page, from 0."""
    return f"{document}-p{number + 1:04d}"


def _picture(page: LabeledPage) -> Image.Image:
    """The page's picture, gray if it has no color, which takes a third."""
    red, green, blue = cv2.split(page.image)
    is_gray = np.array_equal(red, green) and np.array_equal(green, blue)
    return Image.fromarray(red if is_gray else page.image)


def _finish(
    folder: Path,
    entries: Mapping[str, Sequence[tuple[Document, Mapping[str, Any]]]],
    unread: Mapping[str, str],
) -> str:
    """Writes the lists and at last the manifest, and returns the report."""
    rows, skipped = [], [(key, "", reason) for key, reason in unread.items()]
    for split, members in entries.items():
        for document, result in members:
            for number, height, width in result["pages"]:
                name = page_name(document.name, number)
                package = document.source.package
                rows.append((split, name, document.name, package, document.group, number + 1, height, width))
            for number, reason in result["skipped"].items():
                page = number if number == "all" else str(int(number) + 1)
                skipped.append((document.source.key, page, reason))
    numbers = Counter(row[0] for row in rows)
    empty = [split for split in ("train", "val", "test") if not numbers[split]]
    if empty:
        raise ValueError(f"no pages are left for {' and '.join(empty)}:\n{_counted(reason for *_, reason in skipped)}")
    write_whole(folder / "pages.tsv", _table(_COLUMNS, rows))
    write_whole(folder / "skipped.tsv", _table(("pdf", "page", "reason"), skipped))
    packages = sorted(path.stem for path in (folder / "sources" / "licenses").glob("*.copyright"))
    manifest = {
        "format": FORMAT,
        "classes": DOCUMENT_CLASSES,
        "longest_side": LONGEST_SIDE,
        "pages": dict(numbers),
        "documents": {split: len({row[2] for row in rows if row[0] == split}) for split in numbers},
        "groups": {split: len({row[4] for row in rows if row[0] == split}) for split in numbers},
        "debian_packages": packages,
        "skipped": len(skipped),
    }
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    check_folder(folder)
    made = ", ".join(f"{numbers[split]} {split}" for split in ("train", "val", "test"))
    report = [f"{folder}: {made} pages of {len({row[2] for row in rows})} documents"]
    if skipped:
        report.append(f"Skipped, by name in {folder / 'skipped.tsv'}:\n{_counted(reason for *_, reason in skipped)}")
    return "\n".join(report)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerows([columns, *rows])
    return text.getvalue()


def _counted(reasons: Any) -> str:
    """How often each reason came, details left out."""
    kinds = Counter(reason.partition(":")[0].partition(" as ")[0] for reason in reasons)
    return "\n".join(f"  {number} x {reason}" for reason, number in kinds.most_common())

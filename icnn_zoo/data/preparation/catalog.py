"""What ``icnn-zoo prepare`` can fetch: names and the functions that store a thing under a root folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from icnn_zoo.io.files import user_path

_WORKERS = 8  # unless asked for: each holds about a GB


class Preparation(NamedTuple):
    """A thing to prepare.

    Attributes:
        function: Takes the root folder and the options, as keywords, and returns what to print: a path or a report.
        options: Names of the options that apply to it.
    """

    function: Callable[..., object]
    options: tuple[str, ...] = ()


class Option(NamedTuple):
    """An option of ``icnn-zoo prepare``.

    Attributes:
        help: What it does.
        kind: Makes its value from a word; None for a flag, off by default.
    """

    help: str
    kind: Callable[[str], object] | None = None


OPTIONS = {
    "download": Option("fetch what is missing and can be had without a registration: VOC 2012 and SBD; VOC 2010"),
    "train_ids": Option("write labelTrainIds files beside Cityscapes' labelIds, for other programs"),
    "any_number": Option("accept numbers of images that are not the official ones"),
    "pdfs": Option("folder of your own PDFs (default: fetch Debian's packages of TeX documentation)", user_path),
    "pages": Option("pages to prepare in all (default: 24000)", int),
    "workers": Option("processes that label pages, at most (default: one for each processor, up to 8)", int),
}


def _drawn_voc(root: Path) -> Path:
    from icnn_zoo.data.preparation.drawn_voc import prepare_drawn_voc

    return prepare_drawn_voc(root)


def _efficientnet_lite0(root: Path) -> Path:
    from icnn_zoo.data.preparation.efficientnet_lite0 import prepare_efficientnet_lite0

    return prepare_efficientnet_lite0(root)


def _vgg16(root: Path) -> Path:
    from icnn_zoo.data.preparation.vgg16 import prepare_vgg16

    return prepare_vgg16(root)


def _documents(root: Path, pdfs: Path | None = None, pages: int | None = None, workers: int | None = None) -> str:
    from icnn_zoo.data.preparation.documents import PAGES, prepare_documents

    return prepare_documents(
        root,
        pdfs=pdfs,
        pages=PAGES if pages is None else pages,
        workers=min(os.cpu_count() or 1, _WORKERS) if workers is None else workers,
    )


def _voc2012(root: Path, download: bool = False, any_number: bool = False) -> str:
    from icnn_zoo.data.preparation.voc2012 import prepare_voc2012

    return prepare_voc2012(root, download=download, any_number=any_number)


def _pascal_context(root: Path, download: bool = False, any_number: bool = False) -> str:
    from icnn_zoo.data.preparation.pascal_context import prepare_pascal_context

    return prepare_pascal_context(root, download=download, any_number=any_number)


def _cityscapes(root: Path, train_ids: bool = False, any_number: bool = False) -> str:
    from icnn_zoo.data.preparation.cityscapes import prepare_cityscapes

    return prepare_cityscapes(root, train_ids=train_ids, any_number=any_number)


DATASETS: dict[str, Preparation] = {
    "cityscapes": Preparation(_cityscapes, ("train_ids", "any_number")),
    "documents": Preparation(_documents, ("pdfs", "pages", "workers")),
    "drawn-voc": Preparation(_drawn_voc),
    "efficientnet-lite0": Preparation(_efficientnet_lite0),
    "pascal-context": Preparation(_pascal_context, ("download", "any_number")),
    "vgg16": Preparation(_vgg16),
    "voc2012": Preparation(_voc2012, ("download", "any_number")),
}


def prepare(name: str, root: Path, **options: Any) -> str:
    """Prepares a thing and returns what to tell the user.

    Args:
        name: One of ``DATASETS``.
        root: Folder to store it in.
        **options: Of ``OPTIONS``; those that are False or None are not set.

    Raises:
        ValueError: An option that does not apply to the thing.
        FileNotFoundError, ImportError, RuntimeError: As the thing's function.
    """
    preparation = DATASETS[name]
    chosen = {option: value for option, value in options.items() if value is not None and value is not False}
    for option in chosen:
        if option not in preparation.options:
            names = ", ".join(key for key, entry in DATASETS.items() if option in entry.options)
            raise ValueError(f"--{option.replace('_', '-')} does not apply to {name}, only to {names}.")
    return f"Ready: {preparation.function(user_path(root), **chosen)}"

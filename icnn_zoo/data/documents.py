"""Pages of real PDFs with pixel labels from their own structure; validation and test are of other authors."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np

from icnn_zoo.data.datamodule import SegmentationDataModule, Split
from icnn_zoo.data.folders import files_in, read_manifest
from icnn_zoo.data.label_files import class_table, read_classes
from icnn_zoo.data.samples import Sample
from icnn_zoo.data.transforms import Size, size_pair
from icnn_zoo.io.files import user_path
from icnn_zoo.io.images import read_image

FOLDER = "documents"
FORMAT = 1
DOCUMENT_CLASSES = (
    "background",
    "text",
    "heading",
    "code",
    "formula",
    "figure",
    "table",
    "rule",
    "header_footer",
)
PALETTE = np.array(
    [
        (255, 255, 255),
        (120, 160, 255),
        (255, 60, 60),
        (60, 190, 60),
        (240, 170, 0),
        (190, 80, 230),
        (0, 190, 190),
        (120, 60, 20),
        (150, 150, 150),
    ],
    np.uint8,
)
_SPLITS = ("train", "val", "test")
_TABLE = class_table({index: index for index in range(len(DOCUMENT_CLASSES))})
_WHITE = 255
_TRIES = 8  # places to choose an evaluation crop from
_EDGE = 24  # pixels of empty paper that training keeps around what is on a page


class Page(NamedTuple):
    """A prepared page.

    Attributes:
        name: Of its files, without ending.
        document: The PDF's name.
        package: Whose it is.
    """

    name: str
    document: str
    package: str


class DocumentsDataModule(SegmentationDataModule):
    """Pages of PDFs: text, headings, code, formulas, figures, tables, rules, headers and footers.

    Splits share no package and no author. Labels come from what the PDFs draw with which fonts, not from people:
    ``docs/results/documents.md`` says how often they are wrong. Training sees random crops of whole pages; validation,
    test and prediction see one crop of each page, always the same, chosen among a few places for how much is on it.

    Make the files once with ``icnn-zoo prepare documents --root data``.

    Args:
        root: The folder given to ``icnn-zoo prepare documents``.
        crop_size: Training crop in pixels: one number or (height, width). Pages measure 800 on their longer side.
        eval_crop: Crop of evaluation likewise; None for whole pages, of many sizes.
        num_train: Training pages, the first ones of the list, documents in random order; None for all.
        num_val: Validation pages likewise.
        num_test: Test pages likewise.
        scans: Makes scans of the pages of evaluation: tilted, blurred, faded, noisy. Each is a pure function of the
            page's name.
        train_scans: Share of the training pages that are made scans, always the same pages: 0 for none. A network that
            saw none labels scans as background.
        predict_split: The pages that ``predict`` runs on: "train", "val" or "test".
        mirror: Mirrors training samples; mirrored text is not text.
        **kwargs: Those of :class:`SegmentationDataModule`.

    Raises:
        ValueError: An argument out of its range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] = "data",
        *,
        crop_size: Size = 161,
        eval_crop: Size | None = 161,
        num_train: int | None = None,
        num_val: int | None = None,
        num_test: int | None = None,
        scans: bool = False,
        train_scans: float = 0.0,
        predict_split: Literal["train", "val", "test"] = "val",
        mirror: bool = False,
        fill: tuple[int, int, int] | None = (_WHITE, _WHITE, _WHITE),
        **kwargs: Any,
    ) -> None:
        for name, number in (("num_train", num_train), ("num_val", num_val), ("num_test", num_test)):
            if number is not None and number < 1:
                raise ValueError(f"`{name}` must be at least 1, or None for all; got {number}.")
        if not 0 <= train_scans <= 1:
            raise ValueError(f"`train_scans` must be a share of the pages, 0 to 1; got {train_scans}.")
        if predict_split not in _SPLITS:
            raise ValueError(f"`predict_split` must be one of {', '.join(_SPLITS)}; got {predict_split!r}.")
        super().__init__(crop_size=crop_size, mirror=mirror, fill=fill, **kwargs)
        self.folder = user_path(root) / FOLDER
        self.eval_crop = None if eval_crop is None else size_pair("eval_crop", eval_crop)
        self.numbers = {"train": num_train, "val": num_val, "test": num_test}
        self.scans = scans
        self.train_scans = train_scans
        self.predict_split: Split = predict_split

    @property
    def classes(self) -> tuple[str, ...]:
        return DOCUMENT_CLASSES

    @property
    def palette(self) -> np.ndarray:
        return PALETTE

    def prepare_data(self) -> None:
        """Checks that the prepared files are there and complete; it never downloads.

        Raises:
            FileNotFoundError: They are not there, or some are missing; the message names the command that makes them.
            ValueError: They were made by another version of this package.
        """
        check_folder(self.folder)

    def make_dataset(self, split: Split) -> DocumentPages:
        check_folder(self.folder)
        on_disk = self.predict_split if split == "predict" else split
        pages = read_pages(self.folder)[on_disk]
        number = self.numbers[on_disk]
        if number is not None and number > len(pages):
            raise ValueError(f"`num_{on_disk}` must be at most {len(pages)}, the pages prepared; got {number}.")
        evaluates = split != "train"
        return DocumentPages(
            self.folder,
            on_disk,
            pages[:number],
            crop=self.eval_crop if evaluates else None,
            scans=float(self.scans) if evaluates else self.train_scans,
            trim=not evaluates,
        )


class DocumentPages:
    """Prepared pages, or one crop of each.

    Args:
        folder: Of the dataset.
        split: "train", "val" or "test".
        pages: Of that split.
        crop: (height, width) of the crop; None for whole pages.
        scans: Share of them that are made scans.
        trim: Whether to leave out the empty edges of paper.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        pages: list[Page],
        *,
        crop: tuple[int, int] | None = None,
        scans: float = 0.0,
        trim: bool = False,
    ) -> None:
        self.folder = folder
        self.split = split
        self.pages = pages
        self.crop = crop
        self.scans = scans
        self.trim = trim

    def __len__(self) -> int:
        return len(self.pages)

    def __getitem__(self, index: int, /) -> Sample:
        name = self.pages[index].name
        image = read_image(self.folder / "images" / self.split / f"{name}.png")
        mask = read_classes(self.folder / "labels" / self.split / f"{name}.png", _TABLE)
        if self.trim:
            image, mask = _trimmed(image, mask)
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
        window = None if self.crop is None else _crop(mask, self.crop, rng)
        if self.scans == 1 or rng.random() < self.scans:
            image, mask = scan(image, mask, rng)
        if window is not None:
            image, mask = image[window], mask[window]
        return {"image": np.ascontiguousarray(image), "mask": np.ascontiguousarray(mask), "name": name}


def scan(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A page as a scanner might give it: tilted up to 2 degrees, blurred, on gray paper, noisy, stored as JPEG.

    Args:
        image: uint8 [H, W, 3].
        mask: uint8 [H, W], tilted alike; what comes in from outside is background.
        rng: Decides everything.

    Returns:
        Image and mask of the same sizes.
    """
    height, width = mask.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-2, 2), 1.0)
    size = (width, height)
    image = cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR, borderValue=(_WHITE, _WHITE, _WHITE))
    mask = cv2.warpAffine(mask, matrix, size, flags=cv2.INTER_NEAREST, borderValue=0)
    light = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.0)).astype(np.float32)
    low, high = rng.uniform(20, 70), rng.uniform(205, 250)  # of faded ink and gray paper
    light = low + light * ((high - low) / 255)
    light += np.linspace(-1, 1, width, dtype=np.float32)[None, :, None] * rng.uniform(-15, 15)  # of the lamp
    light += rng.normal(0, rng.uniform(3, 10), (height, width, 1)).astype(np.float32)
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(40, 80))]
    _, encoded = cv2.imencode(".jpg", np.clip(light, 0, 255).astype(np.uint8), quality)
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    assert decoded is not None
    return decoded, mask


def _trimmed(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows, cols = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    top, left = max(rows[0] - _EDGE, 0), max(cols[0] - _EDGE, 0)
    window = slice(top, rows[-1] + _EDGE + 1), slice(left, cols[-1] + _EDGE + 1)
    return image[window], mask[window]


def _crop(mask: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> tuple[slice, slice]:
    """Of a few random places the one with most classes, and with least paper among those."""
    height, width = (min(wanted, there) for wanted, there in zip(size, mask.shape, strict=True))
    best, window = (-1, -1), (slice(0, height), slice(0, width))
    for _ in range(_TRIES):
        top, left = rng.integers(mask.shape[0] - height + 1), rng.integers(mask.shape[1] - width + 1)
        place = slice(top, top + height), slice(left, left + width)
        counts = np.bincount(mask[place].ravel(), minlength=len(DOCUMENT_CLASSES))
        value = int((counts[1:] > 0).sum()), int(counts[1:].sum())
        if value > best:
            best, window = value, place
    return window


def read_pages(folder: Path) -> dict[str, list[Page]]:
    """The prepared pages by split, in the order of the list."""
    pages: dict[str, list[Page]] = {split: [] for split in _SPLITS}
    with (folder / "pages.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            pages[row["split"]].append(Page(row["name"], row["document"], row["package"]))
    return pages


def check_folder(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder, after checking that the pages it counts are there.

    Raises:
        FileNotFoundError: The folder or pages of it are missing.
        ValueError: It has another format than this version of the package makes.
    """
    command = f"icnn-zoo prepare {FOLDER} --root {folder.parent}"
    manifest = read_manifest(folder, FORMAT, command)
    listed = {split: {page.name for page in pages} for split, pages in read_pages(folder).items()}
    numbers = Counter({split: len(names) for split, names in listed.items()})
    if dict(numbers) != manifest["pages"]:
        raise ValueError(f"{str(folder / 'pages.tsv')!r} and the manifest beside it do not agree. Run: {command}")
    for kind in ("images", "labels"):
        for split, names in listed.items():
            missing = sorted(names - set(files_in(folder / kind / split, ".png")))
            if missing:
                raise FileNotFoundError(
                    f"{len(missing)} of {len(names)} files are missing in {str(folder / kind / split)!r}, such as "
                    f"{missing[0]}.png. Remove {str(folder)!r} and run: {command}"
                )
    return manifest

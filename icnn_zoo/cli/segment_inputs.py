"""What ``icnn-zoo segment`` reads and writes: images, pages and files, one after the other; large ones in bands."""

from __future__ import annotations

import argparse
import glob
import io
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from icnn_zoo.cli.options import named_where
from icnn_zoo.io.files import check_writable, replacing, require_file, user_path, write_whole
from icnn_zoo.io.images import read_header
from icnn_zoo.io.label_pictures import color_map, palette_picture, segmentation_picture
from icnn_zoo.io.overviews import Overview
from icnn_zoo.io.png import LabelWriter
from icnn_zoo.io.rasters import TIFF_ENDINGS, MeasuredRaster, Raster, read_pixels, visible
from icnn_zoo.models.evaluation import Evaluation
from icnn_zoo.models.segmentation import SegmentationModel
from icnn_zoo.zoo.segmenting import Segmented, label_bands, segment_images

PAGE_SIDE = 800  # pixels of a page's longer side, as the networks of documents were trained
BIG = 25_000_000  # pixels from which on an image is seen in windows
BIG_WINDOW = 1025
_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", *TIFF_ENDINGS, ".pdf")


class Input(NamedTuple):
    """A file to look at, and the name of what is written for it."""

    path: Path
    name: str


@dataclass(frozen=True)
class Network:
    """A network with the names and colors of its classes, and how it looks at whole images."""

    model: SegmentationModel
    classes: Sequence[str]
    palette: np.ndarray
    evaluation: Evaluation

    def label(self, pixels: np.ndarray, longest_side: int | None) -> Segmented:
        """What it says of one image."""
        return next(segment_images(self.model, [pixels], evaluation=self.evaluation, longest_side=longest_side))


def find_inputs(named: Sequence[str], to: Path) -> list[Input]:
    """The files that a person named: themselves, those in folders and below, or those that a pattern matches.

    Args:
        named: As they were named.
        to: Where results go. What lies in such a folder is taken only where it is named itself.

    Raises:
        FileNotFoundError: There is no such file, or none in a folder.
        ValueError: A pattern matches nothing, or two files would be written under one name.
    """
    found: list[Input] = []
    for text in named:
        if not text:
            raise ValueError("an image's name is empty; a shell's variable may not be set.")
        path = user_path(text)
        if path.is_dir():
            inside = sorted(each for each in path.rglob("*") if each.suffix.lower() in _ENDINGS and _shown(each, path))
            if path.resolve() in (results := to.resolve()).parents:
                inside = [each for each in inside if results not in each.resolve().parents]
            if not inside:
                raise FileNotFoundError(f"the folder {text!r} holds no image ({', '.join(_ENDINGS)}).")
            found += [Input(each, str(each.relative_to(path).with_suffix(""))) for each in inside]
        elif not path.exists() and glob.has_magic(text):
            matches = sorted(Path(each) for each in glob.glob(str(path), recursive=True) if Path(each).is_file())
            if not matches:
                raise ValueError(f"no file matches {text!r}.")
            found += [Input(each, each.stem) for each in matches]
        else:
            found.append(Input(require_file(path), path.stem))
    names: dict[str, Path] = {}
    for each in found:
        if names.setdefault(each.name, each.path) != each.path:
            raise ValueError(
                f"{str(names[each.name])!r} and {str(each.path)!r} would both be written as {each.name!r}: name the "
                "folder that holds both, or rename one."
            )
    return found


def check_folder(inputs: Sequence[Input], options: argparse.Namespace) -> None:
    """Checks that results can be written into the folder ``--to``.

    Raises:
        ValueError: It is a file, or cannot be written.
    """
    if options.to.exists() and not options.to.is_dir():
        raise ValueError(f"--to must be a folder for {len(inputs)} images; {str(options.to)!r} is a file.")
    if options.to.suffix and not options.to.is_dir():
        raise ValueError(f"--to must be a folder for more than one image, such as {options.to.with_suffix('')}.")
    check_writable("--to", options.to)


def check_outputs(inputs: Sequence[Input], options: argparse.Namespace) -> None:
    """Checks what would be written for each input, all of which can be read.

    Raises:
        ValueError: Two would be written under one name, or files be replaced without ``--force``.
    """
    owners: dict[str, Input] = {}
    for each in inputs:
        for name in _outputs(each, options):
            if (other := owners.setdefault(name, each)) is not each:
                raise ValueError(
                    f"{str(other.path)!r} and {str(each.path)!r} would both be written as {name!r}: rename one."
                )
            if (options.to / name).exists() and not options.force:
                raise ValueError(f"{str(options.to / name)!r} exists; choose another folder, or --force.")


def _outputs(each: Input, options: argparse.Namespace) -> list[str]:
    names = [each.name]
    if each.path.suffix.lower() == ".pdf":
        from icnn_zoo.io.pdf import open_pdf

        document = open_pdf(each.path)
        names = [f"{each.name}_page{number}" for number in range(1, len(document) + 1)]
        document.close()
    endings = [".png"]
    if options.pictures:
        endings.append("_picture.png")
    if options.probabilities:
        endings.append("_probabilities.npz")
    return [name + ending for name in names for ending in endings]


def check_input(path: Path, options: argparse.Namespace) -> None:
    """Looks at a file before anything is computed.

    Raises:
        ValueError: It is not an image, or not one that is read like this; or it is too large for what was asked of it.
    """
    if path.suffix.lower() == ".pdf":
        from icnn_zoo.io.pdf import open_pdf

        open_pdf(path).close()
    elif is_large(path, options) and options.probabilities:
        raise ValueError(
            f"{str(path)!r} is too large for --probabilities: of images of more than {BIG:,} pixels, which are seen "
            "band by band, labels and pictures are written."
        )


def load_network(options: argparse.Namespace) -> Network:
    """The network that ``options.name`` means: of the zoo, of a run, or of a checkpoint."""
    from icnn_zoo.training.network_sources import find_source, load_task

    source = find_source(options.name, **named_where(options))
    task, card = load_task(source), source.card()
    palette = color_map(len(task.class_names)) if card is None else np.array(card.colors, np.uint8)
    way = task.evaluation if options.window is None else Evaluation("sliding", options.window, options.batch)
    return Network(task.model.to(options.device), task.class_names, palette, way)


def pages_of(path: Path, options: argparse.Namespace, channels: int = 3) -> Iterator[np.ndarray]:
    """The image, or the rendered pages of a PDF; errors name the page. What is not a photograph has ``channels``."""
    if path.suffix.lower() != ".pdf":
        yield read_pixels(path, channels, options.white_level)
        return
    if channels != 3:
        raise ValueError(f"{str(path)!r} is rendered in three colors; the network takes {channels} channels.")
    from icnn_zoo.io.pdf import open_pdf, render_page

    document = open_pdf(path)
    try:
        for number in range(len(document)):
            try:
                yield render_page(document[number], options.longest_side or PAGE_SIDE)
            except Exception as error:  # what a broken page leads pdfium to
                raise ValueError(f"page {number + 1} of {str(path)!r} cannot be rendered: {error}") from error
    finally:
        document.close()


def write_all(network: Network, inputs: Sequence[Input], options: argparse.Namespace) -> int:
    """Writes what the network says of every image and page, each file whole; returns the number of label maps."""
    plain = [each for each in inputs if not is_large(each.path, options)]
    large = [each for each in inputs if each not in plain]
    for each in large:
        if _in_bands(each.path, network.model.in_channels):
            with MeasuredRaster(each.path, network.model.in_channels, options.white_level):
                pass  # channels and depth fit
    waiting: list[tuple[str, np.ndarray]] = []

    def images() -> Iterator[np.ndarray]:
        for each in track(plain, description="Images"):
            pdf = each.path.suffix.lower() == ".pdf"
            for number, pixels in enumerate(pages_of(each.path, options, network.model.in_channels), 1):
                waiting.append((f"{each.name}_page{number}" if pdf else each.name, pixels))
                yield pixels

    written = 0
    results = segment_images(
        network.model,
        images(),
        evaluation=network.evaluation,
        batch=options.batch,
        longest_side=options.longest_side,
        probabilities=options.probabilities,
    )
    for result in results:
        name, pixels = waiting.pop(0)
        _write(network, options.to / name, pixels, result, options.pictures)
        written += 1
    for each in large:
        place = options.to / each.name
        picture = place.with_name(f"{place.name}_picture.png") if options.pictures else None
        write_large(network, each.path, options, place.with_name(f"{place.name}.png"), picture)
    return written + len(large)


def _write(network: Network, place: Path, pixels: np.ndarray, result: Segmented, pictures: bool) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place.with_name(f"{place.name}.png")) as file:
        palette_picture(result.labels, network.palette).save(file)
    if pictures:
        with replacing(place.with_name(f"{place.name}_picture.png")) as file:
            segmentation_picture(visible(pixels), result.labels, network.classes, network.palette).save(file)
    if result.probabilities is not None:
        data = io.BytesIO()
        np.savez_compressed(data, probabilities=result.probabilities.astype(np.float16), classes=list(network.classes))
        write_whole(place.with_name(f"{place.name}_probabilities.npz"), data.getvalue())


def write_large(
    network: Network, path: Path, options: argparse.Namespace, labels: Path | None, picture: Path | None
) -> None:
    """Writes the label map of a large image band by band, and an overview of both; each file whole, or none."""
    with ExitStack() as stack:
        image: Any = stack.enter_context(_rows(network, path, options))
        overview = Overview(image, len(network.classes))
        writer = None
        for file in (labels, picture):
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
        if picture is not None:
            drawn = stack.enter_context(replacing(picture))
            image = overview
        if labels is not None:
            written = stack.enter_context(replacing(labels))
            writer = stack.enter_context(LabelWriter(written, image.shape[:2], network.palette))
        bands = label_bands(network.model, image, window=options.window or BIG_WINDOW, batch=options.batch)
        for band in track(bands, description=path.name, total=None):
            if writer is not None:
                writer.write(band)
            if picture is not None:
                overview.add(band)
        if picture is not None:
            overview.picture(network.classes, network.palette).save(drawn)


def is_large(path: Path, options: argparse.Namespace) -> bool:
    """Whether an image is seen in windows and its labels are written in bands: unless it is scaled down first."""
    if path.suffix.lower() == ".pdf":
        return False
    height, width = _size(path)
    return height * width > BIG and options.longest_side is None


def _size(path: Path) -> tuple[int, int]:
    if path.suffix.lower() in TIFF_ENDINGS:
        try:
            with Raster(path) as raster:
                return raster.shape[0], raster.shape[1]
        except ValueError:
            pass  # a photograph of several pages, the first of which is read
    return read_header(path).size


class _Decoded(NamedTuple):
    """An image in memory, whose rows are taken as those of a file are read."""

    pixels: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pixels.shape

    def rows(self, top: int, bottom: int) -> np.ndarray:
        return self.pixels[top:bottom]


def _rows(network: Network, path: Path, options: argparse.Namespace) -> AbstractContextManager[Any]:
    channels = network.model.in_channels
    if _in_bands(path, channels):
        return MeasuredRaster(path, channels, options.white_level)
    return nullcontext(_Decoded(next(pages_of(path, options, channels))))


def _in_bands(path: Path, channels: int) -> bool:
    """Whether rows can be taken from the file itself: of photographs those that need no turning or mixing of colors."""
    if path.suffix.lower() not in TIFF_ENDINGS or channels != 3:
        return path.suffix.lower() in TIFF_ENDINGS
    try:
        with Raster(path) as raster:
            return raster.is_photograph
    except ValueError:
        return False


def _shown(path: Path, folder: Path) -> bool:
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)

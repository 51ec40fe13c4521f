"""What ``icnn-zoo segment`` reads and writes: images, pages and files, one after the other."""

from __future__ import annotations

import argparse
import glob
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import track

from icnn_zoo.io.files import replacing, require_file, user_path, write_whole
from icnn_zoo.io.images import read_header, read_image
from icnn_zoo.io.label_pictures import color_map, palette_picture, segmentation_picture
from icnn_zoo.io.png import LabelWriter
from icnn_zoo.io.rasters import TIFF_ENDINGS, Raster, read_measured, visible
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


def find_inputs(named: Sequence[str]) -> list[Input]:
    """The files that a person named: themselves, those in folders and below, or those that a pattern matches.

    Raises:
        FileNotFoundError: There is no such file, or none in a folder.
        ValueError: A pattern matches nothing, or two files would be written under one name.
    """
    found: list[Input] = []
    for text in named:
        path = user_path(text)
        if path.is_dir():
            inside = sorted(each for each in path.rglob("*") if each.suffix.lower() in _ENDINGS and _shown(each, path))
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
        ValueError: It is a file, or would replace files without ``--force``.
    """
    if options.to.exists() and not options.to.is_dir():
        raise ValueError(f"--to must be a folder for {len(inputs)} images; {str(options.to)!r} is a file.")
    if options.to.suffix and not options.to.is_dir():
        raise ValueError(f"--to must be a folder for more than one image, such as {options.to.with_suffix('')}.")
    for each in inputs:
        there = [*options.to.glob(f"{glob.escape(each.name)}_page*.png"), options.to / f"{each.name}.png"]
        if (taken := [path for path in there if path.exists()]) and not options.force:
            raise ValueError(f"{str(taken[0])!r} exists; choose another folder, or --force.")


def check_input(path: Path, options: argparse.Namespace) -> None:
    """Looks at a file before anything is computed.

    Raises:
        ValueError: It is not an image, or not one that is read like this; or it is too large for what was asked of it.
    """
    if path.suffix.lower() == ".pdf":
        from icnn_zoo.io.pdf import open_pdf

        open_pdf(path).close()
    elif path.suffix.lower() in TIFF_ENDINGS:
        if _is_banded(path, options) and (options.probabilities or options.pictures):
            raise ValueError(
                f"{str(path)!r} is too large for pictures and probabilities of it: of images that are seen band by "
                "band labels alone are written."
            )
    else:
        read_header(path)


def load_network(options: argparse.Namespace) -> Network:
    """The network that ``options.name`` means: of the zoo, of a run, or of a checkpoint."""
    from icnn_zoo.training.network_sources import find_source, load_task
    from icnn_zoo.zoo.networks import load_checkpoint

    where = {"registry": options.registry, "cache": options.cache, "allow": options.allow}
    source = find_source(options.name, **where)
    if source.published is not None and not Path(options.name).exists():
        model = load_checkpoint(options.name, device=options.device, **where)
        network = Network(model, model.classes, model.palette, Evaluation())
    else:
        task = load_task(source)
        card = source.card()
        palette = color_map(len(task.class_names))
        if card is not None:
            palette = np.array([tuple(bytes.fromhex(color[1:])) for color in card.palette], np.uint8)
        network = Network(task.model.to(options.device), task.class_names, palette, task.evaluation)
    if options.window is None:
        return network
    way = Evaluation("sliding", options.window, options.batch)
    return Network(network.model, network.classes, network.palette, way)


def pages_of(path: Path, options: argparse.Namespace, channels: int = 3) -> Iterator[np.ndarray]:
    """The image, or the rendered pages of a PDF; errors name the page. What is not a photograph has ``channels``."""
    if path.suffix.lower() != ".pdf":
        if channels != 3:
            yield read_measured(path, channels, options.white_level)
            return
        yield read_image(path, white_level=options.white_level)
        return
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
    plain = [each for each in inputs if not _is_banded(each.path, options)]
    banded = [each for each in inputs if each not in plain]
    for each in banded:
        _check_bands(network, each.path)
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
    for each in banded:
        _write_bands(network, each, options)
    return written + len(banded)


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


def _write_bands(network: Network, each: Input, options: argparse.Namespace) -> None:
    place = options.to / f"{each.name}.png"
    place.parent.mkdir(parents=True, exist_ok=True)
    with Raster(each.path) as raster:
        window = options.window or BIG_WINDOW
        height, width = raster.shape[:2]
        with replacing(place) as file, LabelWriter(file, (height, width), network.palette) as writer:
            bands = label_bands(network.model, raster, window=window, batch=options.batch)
            for labels in track(bands, description=each.path.name, total=None):
                writer.write(labels)


def _check_bands(network: Network, path: Path) -> None:
    with Raster(path) as raster:
        if raster.dtype != np.uint8 or raster.shape[2] != network.model.in_channels:
            raise ValueError(
                f"{str(path)!r} must have {network.model.in_channels} channels of 8 bits to be read band by band; "
                f"it has {raster.shape[2]} of {raster.dtype}."
            )


def _is_banded(path: Path, options: argparse.Namespace) -> bool:
    """Whether an image is a TIFF that is too large to be decoded at once."""
    if path.suffix.lower() not in TIFF_ENDINGS:
        return False
    with Raster(path) as raster:
        height, width, _ = raster.shape
    return height * width > BIG and not options.to.suffix


def _shown(path: Path, folder: Path) -> bool:
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)

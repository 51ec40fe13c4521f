"""``icnn-zoo segment``: what a network sees in photographs, in pages of PDFs, and in images larger than memory."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from icnn_zoo.cli.options import NETWORK, Command, add_allow, add_registry, add_white_level, check_output
from icnn_zoo.io.files import user_path

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def _segment_options(parser: argparse.ArgumentParser) -> None:
    add_registry(parser)
    parser.add_argument("name", help=NETWORK)
    parser.add_argument("images", nargs="+", help="photographs, PDFs, folders of them, or patterns such as 'a/*.jpg'")
    parser.add_argument(
        "--to",
        type=user_path,
        required=True,
        help="of one image: picture to write, such as picture.png (of a PDF, a PDF). Else a folder: label maps, PNGs "
        "of class indices in their colors, <name>.png or <name>_page<n>.png",
    )
    parser.add_argument("--labels", type=user_path, help="of one image: label map to write, a PNG; of a PDF a TIFF")
    parser.add_argument(
        "--pictures", action="store_true", help="in a folder: write <name>_picture.png too, of large images an overview"
    )
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="in a folder: write <name>_probabilities.npz too",
    )
    parser.add_argument(
        "--longest-side",
        type=int,
        help="scale larger images down to this many pixels for the network (then none is seen in windows); "
        "render pages of a PDF with this many (default: 800)",
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="see images in overlapping windows of this side, labels written band by band (default: the run's own way; "
        "1025 for images of more than 25 million pixels)",
    )
    parser.add_argument("--batch", type=int, default=1, help="images of one size, or windows, at once (default: 1)")
    add_white_level(parser)
    add_allow(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument("--force", action="store_true", help="replace existing files")


def _segment(options: argparse.Namespace) -> None:
    """Labels images, or every page of PDFs: label maps, pictures beside their labels, probabilities."""
    for name in ("longest_side", "window", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1{_unit(name)}; got {value}.")

    from icnn_zoo.cli.segment_inputs import find_inputs

    single = len(options.images) == 1 and options.to.suffix and not options.to.is_dir()
    single = single and not user_path(options.images[0]).is_dir()
    inputs = find_inputs(options.images, options.to)
    if single and len(inputs) == 1:
        _one(inputs[0].path, options)
    else:
        _many(inputs, options)


def _one(image: Path, options: argparse.Namespace) -> None:
    is_pdf = image.suffix.lower() == ".pdf"
    check_output(options.to, options.force, (".pdf",) if is_pdf else _PICTURES)
    if options.labels is not None:  # formats that keep indices
        check_output(options.labels, options.force, (".tif", ".tiff") if is_pdf else (".png",))
        if options.labels.resolve() == options.to.resolve():
            raise ValueError(f"--labels and --to must be two files; both are {str(options.to)!r}.")
    if options.pictures or options.probabilities:
        raise ValueError(f"--pictures and --probabilities are for a folder: --to {options.to.with_suffix('')}.")

    from icnn_zoo.cli.segment_inputs import check_input, is_large, load_network, pages_of, write_large
    from icnn_zoo.io.files import replacing
    from icnn_zoo.io.label_pictures import palette_picture, segmentation_picture
    from icnn_zoo.io.rasters import TIFF_ENDINGS, visible

    check_input(image, options)
    if not is_pdf and is_large(image, options):
        write_large(load_network(options), image, options, options.labels, options.to)
        _tell(options, "")
        return
    ready = image.suffix.lower() not in TIFF_ENDINGS  # TIFFs are read as the network takes them
    pages = pages_of(image, options)
    first = next(pages) if ready else None  # before the network is fetched
    network = load_network(options)
    if first is None or network.model.in_channels != 3:
        pages = pages_of(image, options, network.model.in_channels)
        first = next(pages)
    pictures, maps = [], []
    for pixels in (first, *pages):
        labels = network.label(pixels, None if is_pdf else options.longest_side).labels
        pictures.append(segmentation_picture(visible(pixels), labels, network.classes, network.palette))
        maps.append(palette_picture(labels, network.palette))
    with ExitStack() as stack:  # both files, or none
        for path, images in ((options.to, pictures), (options.labels, maps)):
            if path is not None:
                target = stack.enter_context(replacing(path))
                more: dict[str, Any] = {"save_all": True, "append_images": images[1:]} if is_pdf else {}
                images[0].save(target, **more)
    _tell(options, f", {len(pictures)} pages" if is_pdf else "")


def _tell(options: argparse.Namespace, number: str) -> None:
    print("\n".join(f"Written: {path}{number}" for path in (options.to, options.labels) if path is not None))


def _many(inputs: Any, options: argparse.Namespace) -> None:
    if options.labels is not None:
        raise ValueError("--labels is for one image; into a folder label maps are written anyway.")

    from icnn_zoo.cli.segment_inputs import check_folder, check_input, check_outputs, load_network, write_all

    check_folder(inputs, options)
    for each in inputs:
        check_input(each.path, options)
    check_outputs(inputs, options)
    written = write_all(load_network(options), inputs, options)
    print(f"Written: {written} label maps in {options.to}")


def _unit(name: str) -> str:
    return "" if name == "batch" else " pixel"


COMMANDS = {"segment": Command(_segment, _segment_options)}

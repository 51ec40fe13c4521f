"""``icnn-zoo segment``: what a published network sees in a photograph, or in every page of a PDF."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icnn_zoo.cli.options import Command, add_registry, add_white_level, check_output
from icnn_zoo.io.files import user_path

if TYPE_CHECKING:
    import numpy as np

_PAGE_SIDE = 800  # pixels of a page's longer side, as the networks of documents were trained


def _segment_options(parser: argparse.ArgumentParser) -> None:
    add_registry(parser)
    parser.add_argument("name", help="arch.tag")
    parser.add_argument("image", type=user_path, help="photograph, or PDF")
    parser.add_argument(
        "--to",
        type=user_path,
        required=True,
        help="picture to write, such as picture.png; of a PDF, a PDF",
    )
    parser.add_argument(
        "--labels",
        type=user_path,
        help="label map to write, a PNG of class indices in their colors; of a PDF a TIFF, page by page",
    )
    parser.add_argument(
        "--longest-side",
        type=int,
        help="scale larger images down to this many pixels for the network; "
        f"render pages of a PDF with this many (default: {_PAGE_SIDE})",
    )
    add_white_level(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument("--force", action="store_true", help="replace existing files")


def _segment(options: argparse.Namespace) -> None:
    """Labels an image, or every page of a PDF: a picture of it beside its labels, with a legend."""
    is_pdf = options.image.suffix.lower() == ".pdf"
    check_output(options.to, options.force, (".pdf",) if is_pdf else (".png", ".jpg", ".jpeg", ".webp"))
    if options.labels is not None:  # formats that keep indices
        check_output(options.labels, options.force, (".tif", ".tiff") if is_pdf else (".png",))
    if options.longest_side is not None and options.longest_side < 1:
        raise ValueError(f"--longest-side must be at least 1 pixel; got {options.longest_side}.")

    from icnn_zoo.io.files import replacing
    from icnn_zoo.io.images import read_image
    from icnn_zoo.io.label_pictures import palette_picture, segmentation_picture
    from icnn_zoo.zoo.networks import load_checkpoint

    if is_pdf:
        pages = _pages(options.image, options.longest_side or _PAGE_SIDE)
        longest_side = None
    else:
        pages = iter([read_image(options.image, white_level=options.white_level)])
        longest_side = options.longest_side
    first = next(pages)  # before the network is fetched
    model = load_checkpoint(options.name, device=options.device, registry=options.registry, cache=options.cache)
    pictures, maps = [], []
    for pixels in (first, *pages):
        labels = model.predict(pixels, longest_side=longest_side)
        pictures.append(segmentation_picture(pixels, labels, model.classes, model.palette))
        maps.append(palette_picture(labels, model.palette))
    with ExitStack() as stack:  # both files, or none
        for path, images in ((options.to, pictures), (options.labels, maps)):
            if path is not None:
                target = stack.enter_context(replacing(path))
                more: dict[str, Any] = {"save_all": True, "append_images": images[1:]} if is_pdf else {}
                images[0].save(target, **more)
    number = f", {len(pictures)} pages" if is_pdf else ""
    print("\n".join(f"Written: {path}{number}" for path in (options.to, options.labels) if path is not None))


def _pages(path: Path, longest_side: int) -> Iterator[np.ndarray]:
    """The rendered pages of a PDF; errors name the page."""
    from icnn_zoo.io.pdf import open_pdf, render_page

    document = open_pdf(path)
    try:
        for number in range(len(document)):
            try:
                yield render_page(document[number], longest_side)
            except Exception as error:  # what a broken page leads pdfium to
                raise ValueError(f"page {number + 1} of {str(path)!r} cannot be rendered: {error}") from error
    finally:
        document.close()


COMMANDS = {"segment": Command(_segment, _segment_options)}

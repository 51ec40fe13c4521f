"""A segmentation network ready for photographs: label maps of images of any size, and pictures of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from icnn_zoo.models.segmentation import SegmentationModel
from icnn_zoo.zoo.cards import Card

ImageLike = str | Path | Image.Image | np.ndarray


class Segmenter(SegmentationModel):
    """A :class:`icnn_zoo.models.SegmentationModel` that knows its classes and takes photographs.

    Args:
        backbone: As in :class:`icnn_zoo.models.SegmentationModel`.
        num_classes: Likewise.
        classes: Names by index, background first; None for numbers.
        palette: RGB, 0 to 255, by class; None for PASCAL VOC's colours.
        **network: Further arguments of :class:`icnn_zoo.models.SegmentationModel`.

    Attributes:
        classes: Names by index.
        palette: uint8 [num_classes, 3], RGB.
        card: What is known of a published checkpoint; None for a network made anew.

    Raises:
        ValueError: The number of names or colours is not that of classes; a choice that does not exist.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        classes: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        **network: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **network)
        for name, values in (("classes", classes), ("palette", palette)):
            if values is not None and len(values) != num_classes:
                raise ValueError(f"`{name}` must have num_classes = {num_classes} items; got {len(values)}.")
        self.classes = tuple(classes or map(str, range(num_classes)))
        self.palette = _voc_colors(num_classes) if palette is None else np.array(palette, dtype=np.uint8)
        self.card: Card | None = None

    @torch.inference_mode()
    def predict(self, image: ImageLike, *, longest_side: int | None = None) -> np.ndarray:
        """Labels every pixel of an image, in eval mode, on the network's device.

        The network sees the image with its right and bottom edge repeated up to ``output_stride * k + 1`` pixels,
        where a logit lies on every ``output_stride``-th pixel as in training. Memory grows with the image: 4 bytes
        for each class and pixel, twice.

        Args:
            image: A file, a PIL image (both turned upright by their EXIF orientation, transparency on white), or a
                uint8 array [H, W, 3] (RGB) or [H, W] (grey).
            longest_side: Scales larger images down to this many pixels before the network sees them, for photographs
                that are larger than what the network was trained on; None never does.

        Returns:
            uint8 [H, W], class indices, of the image's own size.

        Raises:
            FileNotFoundError: There is no such file.
            TypeError: No image: another type, or an array that is not uint8.
            ValueError: A file that is no image, an array of another shape, an empty image.
        """
        pixels = read_image(image)
        if longest_side is not None and longest_side < 1:
            raise ValueError(f"`longest_side` must be at least 1 pixel; got {longest_side}.")
        height, width = pixels.shape[:2]
        scale = 1.0 if longest_side is None else min(1.0, longest_side / max(height, width))
        if scale < 1:
            smaller = (max(1, round(width * scale)), max(1, round(height * scale)))
            pixels = np.asarray(Image.fromarray(pixels).resize(smaller, Image.Resampling.BILINEAR))
        images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(self.mean.device)
        logits = self._logits(images)
        if scale < 1:
            logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
        return logits.argmax(dim=1)[0].to(torch.uint8).cpu().numpy()

    def _logits(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        missing = [-(extent - 1) % self.output_stride for extent in (height, width)]
        images = F.pad(self.preprocess(images), (0, missing[1], 0, missing[0]), mode="replicate")
        training = self.training
        self.eval()
        try:
            logits = self(images).float()
        finally:
            self.train(training)
        return self.upsample(logits, images.shape[-2:])[..., :height, :width]


def read_image(image: ImageLike) -> np.ndarray:
    """An image as uint8 [H, W, 3], RGB; what is taken and refused is said in :meth:`Segmenter.predict`."""
    if isinstance(image, (str, Path)):
        if not Path(image).is_file():
            raise FileNotFoundError(f"`image`: there is no file {str(image)!r}.")
        try:
            with Image.open(image) as opened:
                return _upright_rgb(opened)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, for broken files
            raise ValueError(f"`image`: {str(image)!r} cannot be read as an image: {error}") from error
    if isinstance(image, Image.Image):
        return _upright_rgb(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"`image` must be a path, a PIL image or a uint8 array; got {type(image).__name__}.")
    if image.dtype != np.uint8:
        raise TypeError(f"`image` must be uint8, 0 to 255; got {image.dtype}.")
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        hint = " Channels come last: image.transpose(1, 2, 0)." if image.ndim == 3 and image.shape[0] == 3 else ""
        raise ValueError(f"`image` must be [H, W, 3] or [H, W] and not empty; got {list(image.shape)}.{hint}")
    return image


def segmentation_picture(image: np.ndarray, labels: np.ndarray, model: Segmenter, opacity: float = 0.6) -> Image.Image:
    """The image, beside it the image under the colours of its labels, and a legend of the classes that occur.

    Args:
        image: uint8 [H, W, 3].
        labels: uint8 [H, W].
        model: Gives names and colours.
        opacity: Of the colours, 0 to 1; class 0, the background, stays as it is.

    Returns:
        RGB picture.
    """
    colors = model.palette[labels].astype(np.float32)
    mixed = np.where(labels[..., None] > 0, (1 - opacity) * image + opacity * colors, image)
    height, width = labels.shape
    shares = np.bincount(labels.ravel(), minlength=len(model.classes)) / labels.size
    present = [index for index in np.argsort(-shares, kind="stable") if shares[index]]
    gap = 8
    text = max(12, min(32, height // 24))
    font = ImageFont.load_default(size=text)
    entries = [f"{model.classes[index]}  {shares[index]:.1%}" for index in present]
    line = text * 3 // 2
    legend = int(max(font.getlength(entry) for entry in entries)) + line + 3 * gap
    picture = Image.new("RGB", (2 * width + legend + 2 * gap, max(height, line * len(entries) + gap)), "white")
    picture.paste(Image.fromarray(image), (0, 0))
    picture.paste(Image.fromarray(mixed.astype(np.uint8)), (width + gap, 0))
    draw = ImageDraw.Draw(picture)
    left = 2 * (width + gap)
    for place, (index, entry) in enumerate(zip(present, entries, strict=True)):
        top = place * line + gap // 2
        box = (left, top, left + line - 6, top + line - 6)
        draw.rectangle(box, fill=tuple(int(value) for value in model.palette[index]), outline="black")
        draw.text((left + line + gap, top), entry, fill="black", font=font)
    return picture


def _voc_colors(num_classes: int) -> np.ndarray:
    from icnn_zoo.data.voc_classes import color_map  # brings Lightning, which a published network does not need

    return color_map(num_classes)


def _upright_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"`image` must have 8 bits a channel; got one of mode {image.mode}.")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))

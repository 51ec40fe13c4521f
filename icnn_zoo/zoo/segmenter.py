"""A segmentation network ready for photographs: label maps of images of any size, and pictures of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from icnn_zoo.io.images import ImageLike, read_image
from icnn_zoo.io.label_pictures import check_classes, color_map
from icnn_zoo.models.segmentation import SegmentationModel
from icnn_zoo.nn.modules import evaluating
from icnn_zoo.zoo.cards import Card


class Segmenter(SegmentationModel):
    """A :class:`icnn_zoo.models.SegmentationModel` that knows its classes and takes photographs.

    Args:
        backbone: As in :class:`icnn_zoo.models.SegmentationModel`.
        num_classes: Likewise.
        classes: Names by index, background first; None for numbers.
        palette: RGB, 0 to 255, by class; None for PASCAL VOC's colors.
        **network: Further arguments of :class:`icnn_zoo.models.SegmentationModel`.

    Attributes:
        classes: Names by index.
        palette: uint8 [num_classes, 3], RGB.
        card: What is known of a published checkpoint; None for a network made anew.

    Raises:
        ValueError: The number of names or colors is not that of classes; a choice that does not exist.
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
        self.classes = check_classes("classes", classes or [str(index) for index in range(num_classes)])
        self.palette = color_map(num_classes) if palette is None else np.array(palette, dtype=np.uint8)
        self.card: Card | None = None

    @torch.inference_mode()
    def predict(
        self, image: ImageLike, *, longest_side: int | None = None, white_level: int | None = None
    ) -> np.ndarray:
        """Labels every pixel of an image, in eval mode, on the network's device.

        Logits are those of :meth:`icnn_zoo.models.SegmentationModel.full_logits`. Memory grows with the image: 4 bytes
        for each class and pixel, twice.

        Args:
            image: A file, a PIL image, or a uint8 array [H, W, 3] (RGB) or [H, W] (gray), read as
                :func:`icnn_zoo.io.images.read_image` says: upright, transparency on white, the first page.
            longest_side: Scales larger images down to this many pixels before the network sees them, for photographs
                that are larger than what the network was trained on; None never does.
            white_level: The value that is white in images of 16 bits, which are refused without it.

        Returns:
            uint8 [H, W], class indices, of the image's own size.

        Raises:
            FileNotFoundError: There is no such file.
            TypeError: Not an image: another type, or an array of another dtype.
            ValueError: A file that is not an image, an array of another shape, an empty image.
        """
        pixels = read_image(image, white_level=white_level)
        if longest_side is not None and longest_side < 1:
            raise ValueError(f"`longest_side` must be at least 1 pixel; got {longest_side}.")
        height, width = pixels.shape[:2]
        scale = 1.0 if longest_side is None else min(1.0, longest_side / max(height, width))
        if scale < 1:
            smaller = (max(1, round(width * scale)), max(1, round(height * scale)))
            pixels = np.asarray(Image.fromarray(pixels).resize(smaller, Image.Resampling.BILINEAR))
        images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(self.mean.device)
        with evaluating(self):
            logits = self.full_logits(self.preprocess(images))
        if scale < 1:
            logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
        return logits.argmax(dim=1)[0].to(torch.uint8).cpu().numpy()

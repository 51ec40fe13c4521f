"""A segmentation network ready for photographs: label maps of images of any size, and pictures of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icnn_zoo.io.images import ImageLike, read_image
from icnn_zoo.io.label_pictures import check_classes, color_map
from icnn_zoo.io.rasters import read_pixels
from icnn_zoo.models.evaluation import Evaluation
from icnn_zoo.models.segmentation import SegmentationModel
from icnn_zoo.zoo.cards import Card
from icnn_zoo.zoo.segmenting import segment_images


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
        backbone: str | None,
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

    def predict(
        self,
        image: ImageLike,
        *,
        longest_side: int | None = None,
        white_level: int | None = None,
        evaluation: Evaluation | None = None,
    ) -> np.ndarray:
        """Labels every pixel of an image, in eval mode, on the network's device.

        Logits are those of :meth:`icnn_zoo.models.SegmentationModel.full_logits`. Memory grows with the image: 4 bytes
        for each class and pixel, twice. For many images see :func:`icnn_zoo.zoo.segmenting.segment_images`, for those
        that are larger than memory :func:`icnn_zoo.zoo.segmenting.label_bands`.

        Args:
            image: A file, a PIL image, or a uint8 array [H, W, 3] (RGB) or [H, W] (gray), read as
                :func:`icnn_zoo.io.images.read_image` says: upright, transparency on white, the first page. For a
                network of other than three channels a file or an array [H, W, C] in 0..255.
            longest_side: Scales larger images down to this many pixels before the network sees them, for photographs
                that are larger than what the network was trained on; None never does.
            white_level: The value that is white in images of 16 bits, which are refused without it.
            evaluation: Windows, mirroring and scales; None runs the image in one forward.

        Returns:
            uint8 [H, W], class indices, of the image's own size.

        Raises:
            FileNotFoundError: There is no such file.
            TypeError: Not an image: another type, or an array of another dtype.
            ValueError: A file that is not an image, an array of another shape, an empty image.
        """
        if self.in_channels == 3:
            pixels = read_image(image, white_level=white_level)
        elif isinstance(image, np.ndarray):
            pixels = image if image.ndim == 3 else image[..., None]
        elif isinstance(image, (str, Path)):
            pixels = read_pixels(image, self.in_channels, white_level)
        else:
            raise TypeError(f"`image` must be a path or an array for {self.in_channels} channels; got {type(image)}.")
        if pixels.shape[2] != self.in_channels:
            raise ValueError(f"`image` must be [H, W, {self.in_channels}]; got {list(pixels.shape)}.")
        (found,) = segment_images(self, [pixels], evaluation=evaluation, longest_side=longest_side)
        return found.labels

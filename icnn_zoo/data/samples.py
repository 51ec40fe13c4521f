"""From datasets to batches: samples checked, augmented or padded, and stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from icnn_zoo.data.transforms import IMAGENET_FILL, TrainTransform

Sample = dict[str, Any]
Batch = dict[str, Any]


class SampleDataset(Protocol):
    """A map-style dataset whose samples hold "image", uint8 or float32 [H, W, C], "mask", uint8 [H, W], and "name"."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def check_sample(sample: Sample, num_classes: int, ignore_index: int) -> Sample:
    """Returns a sample unchanged if a network of ``num_classes`` can learn from it.

    Raises:
        TypeError: The image is neither uint8 nor float32, or the mask not uint8.
        ValueError: Their shapes do not fit, or the mask holds a value that is neither a class nor ``ignore_index``.
    """
    image, mask, name = sample["image"], sample["mask"], sample["name"]
    if image.dtype not in (np.uint8, np.float32) or mask.dtype != np.uint8:
        raise TypeError(f"{name}: image and mask must be uint8; got {image.dtype} and {mask.dtype}.")
    if image.ndim != 3 or mask.shape != image.shape[:2]:
        raise ValueError(f"{name}: expected image [H, W, C] and mask [H, W]; got {image.shape} and {mask.shape}.")
    allowed = np.zeros(256, dtype=bool)
    allowed[:num_classes] = True
    allowed[ignore_index] = True
    if not allowed[mask].all():
        values = np.unique(mask)
        raise ValueError(
            f"{name}: mask values must be below num_classes = {num_classes} or ignore_index = {ignore_index}; "
            f"got {values[~allowed[values]].tolist()[:10]}."
        )
    return sample


def check_dataset(dataset: SampleDataset, num_classes: int, ignore_index: int, number: int = 8) -> None:
    """Looks at a few samples before training begins: each is checked, and a class to learn must be found.

    Where the few hold none, further ones are looked at until one does, as a class may be rare.

    Raises:
        TypeError: As :func:`check_sample`.
        ValueError: As :func:`check_sample`, or all masks together hold nothing but 0 and ``ignore_index``.
    """
    values: set[int] = set()
    few = np.linspace(0, len(dataset) - 1, min(number, len(dataset))).astype(int).tolist()
    for place, index in enumerate([*few, *sorted(set(range(len(dataset))) - set(few))]):
        if place >= len(few) and values != {0, ignore_index}:
            return
        sample = check_sample(dataset[index], num_classes, ignore_index)
        values.update(np.unique(sample["mask"]).tolist())
    if values == {0, ignore_index}:
        raise ValueError(
            f"masks such as {sample['name']} hold only 0 and {ignore_index}, which is the ignore_index and not a "
            f"class. Masks that show one class as {ignore_index} must be stored with 1 instead."
        )


class TrainSamples(Dataset[Sample]):
    """Augmented training samples. The key (epoch, index) and the seed decide a sample, whichever process makes it."""

    def __init__(
        self, dataset: SampleDataset, transform: TrainTransform, *, num_classes: int, ignore_index: int, seed: int
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        sample = check_sample(self.dataset[index], self.num_classes, self.ignore_index)
        seed = int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0])
        image, mask = self.transform(sample["image"], sample["mask"], seed)
        return {"image": image, "mask": mask, "name": sample["name"], "padding": False}


class EvalSamples(Dataset[Sample]):
    """Samples at their native size, or padded to ``size`` at the right and the bottom, the image with ``fill``.

    The key is (index, padding); the mask of padding, of pixels and of whole images, is ``ignore_index``.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        *,
        num_classes: int,
        ignore_index: int,
        size: tuple[int, int] | None = None,
        fill: Sequence[int] = IMAGENET_FILL,
    ) -> None:
        self.dataset = dataset
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.size = size
        self.fill = fill

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, bool]) -> Sample:
        index, padding = key
        sample = check_sample(self.dataset[index], self.num_classes, self.ignore_index)
        image, mask, native = sample["image"], sample["mask"], sample["mask"].shape
        if self.size is not None:
            image, mask = self._pad(image, mask, sample["name"])
        if padding:
            mask = np.full_like(mask, self.ignore_index)
        return {"image": image, "mask": mask, "name": sample["name"], "padding": padding, "size": native}

    def _pad(self, image: np.ndarray, mask: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        assert self.size is not None
        height, width = mask.shape
        if height > self.size[0] or width > self.size[1]:
            raise ValueError(
                f"{name}: an image of {height} x {width} does not fit into `eval_size` = {self.size[0]} x "
                f"{self.size[1]} (height x width): set a larger one, of 8k + 1, or null for native sizes."
            )
        padded = np.empty((*self.size, image.shape[2]), dtype=image.dtype)
        padded[:] = np.asarray(self.fill, dtype=image.dtype)
        padded[:height, :width] = image
        labels = np.full(self.size, self.ignore_index, dtype=np.uint8)
        labels[:height, :width] = mask
        return padded, labels


def collate(samples: Sequence[Sample]) -> Batch:
    """Stacks samples to a batch.

    Returns:
        "image", uint8 or float32 [B, C, H, W] in 0..255; "mask", int64 [B, H, W]; "name", list of str; "padding", bool
        [B]; of samples of evaluation also "size", int64 [B, 2].

    Raises:
        ValueError: The images differ in size.
    """
    sizes = {sample["image"].shape[:2] for sample in samples}
    if len(sizes) > 1:
        raise ValueError(
            f"images of one batch must have one size, got {sorted(sizes)}: set eval_batch_size to 1 or an eval_size."
        )
    batch = {
        "image": torch.from_numpy(np.stack([sample["image"].transpose(2, 0, 1) for sample in samples])),
        "mask": torch.from_numpy(np.stack([sample["mask"] for sample in samples]).astype(np.int64)),
        "name": [sample["name"] for sample in samples],
        "padding": torch.tensor([sample["padding"] for sample in samples]),
    }
    if "size" in samples[0]:
        batch["size"] = torch.tensor([sample["size"] for sample in samples])
    return batch

"""From datasets to batches: who sees which image when, in one process or many, from the start or resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from icnn_zoo.data.transforms import IMAGENET_FILL, TrainTransform

Sample = dict[str, Any]
Batch = dict[str, Any]


class SampleDataset(Protocol):
    """A map-style dataset whose samples hold "image", uint8 [H, W, 3] RGB, "mask", uint8 [H, W], and "name"."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def check_sample(sample: Sample, num_classes: int, ignore_index: int) -> Sample:
    """Returns a sample unchanged if a network of ``num_classes`` can learn from it.

    Raises:
        TypeError: Image or mask is no uint8 array.
        ValueError: Their shapes do not fit, or the mask holds a value that is neither a class nor ``ignore_index``.
    """
    image, mask, name = sample["image"], sample["mask"], sample["name"]
    if image.dtype != np.uint8 or mask.dtype != np.uint8:
        raise TypeError(f"{name}: image and mask must be uint8; got {image.dtype} and {mask.dtype}.")
    if image.ndim != 3 or image.shape[2] != 3 or mask.shape != image.shape[:2]:
        raise ValueError(f"{name}: expected image [H, W, 3] and mask [H, W]; got {image.shape} and {mask.shape}.")
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
    """Looks at a few samples before training begins: each is checked, and together they must hold a class to learn.

    Raises:
        TypeError: As :func:`check_sample`.
        ValueError: As :func:`check_sample`, or all masks together hold nothing but 0 and ``ignore_index``.
    """
    values: set[int] = set()
    for index in np.linspace(0, len(dataset) - 1, min(number, len(dataset))).astype(int).tolist():
        sample = check_sample(dataset[index], num_classes, ignore_index)
        values.update(np.unique(sample["mask"]).tolist())
    if values == {0, ignore_index}:
        raise ValueError(
            f"masks such as {sample['name']} hold only 0 and {ignore_index}, which is the ignore_index and no class. "
            f"Masks that show one class as {ignore_index} must be stored with 1 instead."
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
        padded = np.empty((*self.size, 3), dtype=np.uint8)
        padded[:] = np.asarray(self.fill, dtype=np.uint8)
        padded[:height, :width] = image
        labels = np.full(self.size, self.ignore_index, dtype=np.uint8)
        labels[:height, :width] = mask
        return padded, labels


class TrainSampler(DistributedSampler[tuple[int, int]]):
    """(epoch, index) keys in an order that (seed, epoch) decides, the same total batches on any number of processes.

    Total batch k of an epoch is the k-th run of ``batch_size`` images of the permutation; processes and accumulation
    only divide it among themselves. The incomplete last one is dropped. (A DistributedSampler by type, so that
    Lightning does not shard it once more.)

    Args:
        length: Images of the dataset.
        batch_size: Images of a total batch.
        shares: Parts of a total batch that one process takes one after the other: gradient accumulation.
        rank: This process.
        world_size: Number of processes.
        seed: Of the permutations.

    Raises:
        ValueError: ``batch_size`` is not divisible by ``world_size * shares``, or exceeds ``length``.
    """

    def __init__(
        self, length: int, *, batch_size: int, shares: int = 1, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        super().__init__(range(length), num_replicas=world_size, rank=rank, shuffle=False, seed=seed)  # type: ignore[arg-type]
        if batch_size < 1 or batch_size % (world_size * shares):
            multiple = world_size * shares
            near = max(round(batch_size / multiple), 1) * multiple
            raise ValueError(
                f"`batch_size` is the total per optimizer step and must be divisible by devices x accumulation = "
                f"{world_size} x {shares}; got {batch_size}, the nearest is {near}."
            )
        if length < batch_size:
            raise ValueError(f"`batch_size` must not exceed the number of training images, {length}; got {batch_size}.")
        self.length = length
        self.batch_size = batch_size
        self.shares = shares
        self.local_batch_size = batch_size // (world_size * shares)
        self._start: tuple[int, int] | None = None

    def start_at(self, epoch: int, skip: int) -> None:
        """Makes the next iteration, once, that of an epoch without the first ``skip`` of this process's batches."""
        self._start = (epoch, skip)

    def __len__(self) -> int:
        return self.length // self.batch_size * self.shares * self.local_batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        (epoch, skip), self._start = self._start or (self.epoch, 0), None
        order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
        steps = self.length // self.batch_size
        parts = order[: steps * self.batch_size].reshape(steps, self.shares, self.num_replicas, self.local_batch_size)
        for index in parts[:, :, self.rank].reshape(-1)[skip * self.local_batch_size :].tolist():
            yield epoch, index


class EvalSampler(DistributedSampler[tuple[int, bool]]):
    """(index, padding) keys: every image once over all processes, and the same number of keys for each of them.

    An uneven number would leave one process waiting for another that has finished, so images are repeated as padding.
    """

    def __init__(self, length: int, *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(length), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.length = length

    def __len__(self) -> int:
        return -(-self.length // self.num_replicas)

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        for place in range(self.rank, len(self) * self.num_replicas, self.num_replicas):
            yield place % self.length, place >= self.length


class TrainLoader(DataLoader[Sample]):
    """A DataLoader over a :class:`TrainSampler` that continues where a checkpoint left it.

    Its state is how far which epoch is, and Lightning saves it with every checkpoint: as order and augmentation are
    pure functions of seed, epoch and index, nothing else needs saving, and the number of workers may change.

    The loader counts epochs by itself. Lightning's number, which comes by ``set_epoch``, is where a new loader begins;
    after resuming at the end of an epoch it is one too high, but it still tells whether the saved epoch goes on.
    """

    sampler: TrainSampler
    _epoch: int | None = None  # None: no batch yet
    _consumed = 0  # batches of that epoch that this process has seen
    _resumed_at: int | None = None  # the sampler's epoch when the loaded state was saved

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator: Lightning makes the iterator before it sets the epoch, and workers must not start on another one.
        if self._epoch is None:
            epoch, skip = self.sampler.epoch, 0
        elif self._resumed_at == self.sampler.epoch and self._consumed < len(self):
            epoch, skip = self._epoch, self._consumed
        else:
            epoch, skip = self._epoch + 1, 0
        self._resumed_at = None
        self._epoch, self._consumed = epoch, skip
        self.sampler.start_at(epoch, skip)
        for batch in super().__iter__():
            self._consumed += 1
            yield batch

    def state_dict(self) -> dict[str, int | None]:
        """The epoch, images of it that all processes have seen, and what decides the order of images."""
        images = self._consumed * self._images_per_batch()
        return {"epoch": self._epoch, "images": images, "sampler_epoch": self.sampler.epoch, **self._order()}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Makes the next iteration continue from a state.

        Raises:
            ValueError: The order of images is not the one of the state, so that "the next image" has no meaning.
        """
        for name, value in self._order().items():
            if state[name] != value:
                raise ValueError(
                    f"to resume, the data's {name} must be {state[name]} as in the checkpoint; got {value}."
                )
        self._epoch, self._resumed_at = state["epoch"], state["sampler_epoch"]
        self._consumed, rest = divmod(state["images"] or 0, self._images_per_batch())
        if rest:
            raise ValueError(
                "the checkpoint is from within an accumulated batch: resume with as many devices as before."
            )

    def _images_per_batch(self) -> int:
        return self.sampler.local_batch_size * self.sampler.num_replicas

    def _order(self) -> dict[str, int]:
        return {"seed": self.sampler.seed, "length": self.sampler.length, "batch_size": self.sampler.batch_size}


def collate(samples: Sequence[Sample]) -> Batch:
    """Stacks samples to a batch.

    Returns:
        "image", uint8 [B, 3, H, W], RGB in 0..255; "mask", int64 [B, H, W]; "name", list of str; "padding", bool [B];
        of samples of evaluation also "size", int64 [B, 2].

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


def start_worker(worker: int) -> None:
    """Keeps OpenCV of a worker process to one thread: threads that a fork inherited can hang."""
    cv2.setNumThreads(0)

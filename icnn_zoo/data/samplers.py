"""Who sees which image when, in one process or many, from the start or resumed."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
from torch.utils.data import DataLoader, DistributedSampler

from icnn_zoo.data.samples import Batch, Sample


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


def start_worker(worker: int) -> None:
    """Keeps OpenCV of a worker process to one thread: threads that a fork inherited can hang."""
    cv2.setNumThreads(0)

"""What all datasets share: batches, processes, determinism, resumption. A dataset adds only its samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from PIL import Image
from torch.utils.data import DataLoader

from icnn_zoo.data.samplers import EvalSampler, TrainLoader, TrainSampler, start_worker
from icnn_zoo.data.samples import EvalSamples, Sample, SampleDataset, TrainSamples, check_dataset, collate
from icnn_zoo.data.transforms import IMAGENET_FILL, Size, TrainTransform, size_pair
from icnn_zoo.io.label_pictures import check_classes, color_map, palette_picture

Split = Literal["train", "val", "test", "predict"]
_STAGES: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}


class SegmentationDataModule(pl.LightningDataModule, ABC):
    """Images and masks for training and evaluating a segmentation network.

    A subclass gives ``classes`` and implements :meth:`make_dataset`. Order and augmentation of training samples are
    pure functions of (seed, epoch, index), for any number of devices and workers; a run resumes mid-epoch with exactly
    the next batch. In evaluation every image comes exactly once, at its native size or padded to ``eval_size``; where
    processes need an equal number, repeated images fill up, their mask all ``ignore_index`` and flagged in "padding".

    Batches hold "image", uint8 or float32 [B, C, H, W] in 0..255 (the network normalizes, on its device), "mask", int64
    [B, H, W], "name", list of str, and "padding", bool [B]; in evaluation also "size", int64 [B, 2], the height and
    width of the image without what was added at its right and bottom.

    Args:
        batch_size: Total images per optimizer step, over all devices and gradient accumulation.
        eval_batch_size: Images per batch and device in evaluation; above 1 only where all have one size.
        eval_size: Size that images are padded to in evaluation, at the right and the bottom, with ``fill`` and
            ``ignore_index``: one number or (height, width); None for native sizes.
        num_workers: Processes that load samples, for each device; 0 loads in the training process.
        seed: Decides order and augmentation, and the scenes of procedural datasets.
        crop_size: Training crop in pixels: one number or (height, width).
        scales: Scale augmentation: factors to choose from, or the ends of a range.
        scale_mode: "choice" or "uniform"; see :class:`icnn_zoo.data.TrainTransform`.
        mirror: Mirrors training samples with probability 0.5.
        fill: Value of each channel, 0 to 255, of padded pixels; None for the mean that the network subtracts, which is
            ImageNet's where there is none to ask.
        augmentations: File of further training augmentations, as ``albumentations.save`` writes it; they come first.

    Attributes:
        channels: 3, the channels of an image.
        ignore_index: 255, the label that is not a class.
        transform: The training augmentation.

    Raises:
        ValueError: An argument out of its range.
    """

    ignore_index: int = 255
    channels: int = 3

    def __init__(
        self,
        *,
        batch_size: int = 16,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
        crop_size: Size = 321,
        scales: Sequence[float] = (0.5, 0.75, 1.0, 1.25, 1.5),
        scale_mode: Literal["choice", "uniform"] = "choice",
        mirror: bool = True,
        eval_size: Size | None = None,
        fill: Sequence[int] | None = None,
        augmentations: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}; got {value}.")
        if not 2 <= len(self.classes) <= self.ignore_index:
            raise ValueError(
                f"`class_names` must be 2 to {self.ignore_index} classes, background first; got {len(self.classes)}: "
                f"{list(self.classes)[:3]}."
            )
        check_classes("class_names", self.classes)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.eval_size = None if eval_size is None else size_pair("eval_size", eval_size)
        self.fill = fill
        self._augmentation = (crop_size, scales, scale_mode, mirror)
        self.augmentations = augmentations
        self.transform = self._make_transform()
        self._datasets: dict[Split, SampleDataset] = {}

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Class names by index, background first. Known without data and before ``__init__`` of this class."""

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return len(self.classes)

    @property
    def palette(self) -> np.ndarray:
        """Colors to draw masks with: uint8 [num_classes, 3], RGB. PASCAL VOC's unless a subclass says otherwise."""
        return color_map(self.num_classes)

    @abstractmethod
    def make_dataset(self, split: Split) -> SampleDataset:
        """The samples of a split, unshuffled and not augmented.

        "image" uint8 or float32 [H, W, C], "mask" uint8 [H, W], "name".

        Raises:
            FileNotFoundError: The data are not there; the message names the command that fetches them.
        """

    def prediction_file(self, name: str) -> str:
        """Where the prediction for an image goes, below the folder of predictions."""
        return f"{name}.png"

    def encode_labels(self, labels: np.ndarray) -> Image.Image:
        """A predicted label map, uint8 [H, W], as the picture to store: of class indices in the dataset's colors."""
        return palette_picture(labels, self.palette)

    def count_pixels(self) -> np.ndarray:
        """Pixels of every class in the training masks, int64 [num_classes]; processes count their share of images."""
        dataset = self._dataset("train")
        rank, world_size = self._process()
        read = getattr(dataset, "read_mask", lambda index: dataset[index]["mask"])  # files need no image for it
        counts = torch.zeros(256, dtype=torch.int64)
        for index in range(rank, len(dataset), world_size):
            counts += torch.from_numpy(np.bincount(read(index).ravel(), minlength=256))
        if world_size > 1:
            assert self.trainer is not None
            on_device = counts.to(self.trainer.strategy.root_device)
            counts = self.trainer.strategy.reduce(on_device, reduce_op="sum").cpu()
        return counts[: self.num_classes].numpy()

    def measure_channels(self, images: int = 500) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the channels in 0 to 1, of up to ``images`` training images, spread evenly."""
        dataset = self._dataset("train")
        number = 0
        total, squares = np.zeros(self.channels), np.zeros(self.channels)
        for index in np.linspace(0, len(dataset) - 1, min(images, len(dataset))).astype(int).tolist():
            pixels = dataset[index]["image"].reshape(-1, self.channels).astype(np.float64) / 255
            number += len(pixels)
            total += pixels.sum(0)
            squares += (pixels**2).sum(0)
        mean = total / number
        std = np.sqrt(np.maximum(squares / number - mean**2, 1e-12))
        return [round(float(value), 6) for value in mean], [max(round(float(value), 6), 1e-6) for value in std]

    def setup(self, stage: str) -> None:
        """Makes the datasets of a stage and looks at a few masks, so that errors come before training begins."""
        if self.trainer is not None:
            if self.trainer.overfit_batches:  # type: ignore[attr-defined]
                raise ValueError("trainer.overfit_batches would replace the order of images: use limit_train_batches.")
            if any(isinstance(callback, GradientAccumulationScheduler) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
                raise ValueError("`batch_size` is a total: set trainer.accumulate_grad_batches, not a schedule of it.")
        self.transform = self._make_transform()
        for split in _STAGES[stage]:
            self._dataset(split)
        if stage == "fit":
            check_dataset(self._dataset("train"), self.num_classes, self.ignore_index)

    def train_dataloader(self) -> TrainLoader:
        """Batches of augmented samples; ``batch_size`` is shared among devices and accumulation.

        Raises:
            ValueError: ``batch_size`` cannot be shared equally.
        """
        shares = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        rank, world_size = self._process()
        self.transform = self._make_transform()  # again: the network's mean may have been measured meanwhile
        samples = TrainSamples(
            self._dataset("train"),
            self.transform,
            num_classes=self.num_classes,
            ignore_index=self.ignore_index,
            seed=self.seed,
        )
        sampler = TrainSampler(
            len(samples), batch_size=self.batch_size, shares=shares, rank=rank, world_size=world_size, seed=self.seed
        )
        return TrainLoader(
            samples,
            batch_size=sampler.local_batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate,
            worker_init_fn=start_worker,
            pin_memory=self._on_cuda(),
            generator=_generator(self.seed),
        )

    def val_dataloader(self) -> DataLoader[Sample]:
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        return self._eval_dataloader("predict")

    def _eval_dataloader(self, split: Split) -> DataLoader[Sample]:
        rank, world_size = self._process()
        self.transform = self._make_transform()
        samples = EvalSamples(
            self._dataset(split),
            num_classes=self.num_classes,
            ignore_index=self.ignore_index,
            size=self.eval_size,
            fill=self.transform.fill,
        )
        return DataLoader(
            samples,
            batch_size=self.eval_batch_size,
            sampler=EvalSampler(len(samples), rank=rank, world_size=world_size),
            num_workers=self.num_workers,
            collate_fn=collate,
            worker_init_fn=start_worker,
            pin_memory=self._on_cuda(),
            generator=_generator(self.seed),
        )

    def _dataset(self, split: Split) -> SampleDataset:
        if split not in self._datasets:
            self._datasets[split] = self.make_dataset(split)
        return self._datasets[split]

    def _make_transform(self) -> TrainTransform:
        crop_size, scales, scale_mode, mirror = self._augmentation
        fill = self._network_mean() if self.fill is None else self.fill
        return TrainTransform(
            crop_size,
            scales,
            scale_mode,
            mirror,
            fill=fill,
            ignore_index=self.ignore_index,
            augmentations=self.augmentations,
        )

    def _network_mean(self) -> Sequence[int]:
        network: Any = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        mean = getattr(network, "mean", None)  # RGB in 0 to 1, as SegmentationModel has it from timm
        if not isinstance(mean, torch.Tensor) or mean.numel() != self.channels:
            return IMAGENET_FILL if self.channels == 3 else [128] * self.channels
        return [round(255 * value) for value in mean.flatten().tolist()]

    def _process(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _on_cuda(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


def _generator(seed: int) -> torch.Generator:
    # Loaders draw their workers' seed from it; from the global one they would shift the network's dropout.
    return torch.Generator().manual_seed(seed)

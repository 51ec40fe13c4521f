"""Training and evaluating a segmentation network with Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from icnn_zoo.conversion.converter import convert
from icnn_zoo.io.label_pictures import check_classes
from icnn_zoo.models.segmentation import SegmentationModel, shrink_labels
from icnn_zoo.nn.irregular_conv import irregular_layers
from icnn_zoo.nn.spreads import Interpolation, SpreadPer
from icnn_zoo.nn.tying import tie_by_name
from icnn_zoo.ops.sharing import Shapes, rename_per_kernel
from icnn_zoo.optim import poly_policy
from icnn_zoo.training.callbacks.monitors import DisplacementMonitor
from icnn_zoo.training.callbacks.resuming import GeneratorStates
from icnn_zoo.training.evaluation import check_evaluation, multi_scale, sliding_logits, whole_logits
from icnn_zoo.training.finiteness import all_finite, find_nonfinite
from icnn_zoo.training.given_options import check_agreement
from icnn_zoo.training.optimizers import make_optimizer
from icnn_zoo.training.provenance import find_provenance
from icnn_zoo.training.scores import background_miou, iou_and_accuracy, iou_names
from icnn_zoo.training.strategies import check_strategy
from icnn_zoo.zoo.pretrained import load_pretrained

Batch = dict[str, Any]


class SegmentationTask(pl.LightningModule):
    """Segmentation with learnable kernel shapes, by the paper's recipe.

    The loss is the cross-entropy summed over the valid pixels of the global batch and divided by their number, however
    many processes share it; gradient accumulation averages those, as Caffe does. Evaluation fills one confusion matrix
    over the whole set: mIoU is the mean over the classes that occur in it or are predicted.

    Training and evaluation end with an error where a loss or an output is not a finite number.

    Attributes:
        architecture: Names of the options that a network and a checkpoint of it must share.

    Args:
        backbone: Any timm name that can be dilated.
        num_classes: Classes, background included: 2 to 256, as label maps have 8 bits. The command line takes it from
            the data.
        ignore_index: Label that does not stand for a class. The command line takes it from the data.
        class_names: Different names for logs and tables, None for numbers. The command line takes them from the data.
        start: First module to make irregular: a backbone module ("layer3.11"), "classifier" for the head alone, None
            for the regular baseline.
        epsilon: Initial displacement in pixels.
        shapes: Who shares a shape: a "layer", "group", input "channel", or nobody, "kernel"; see `icnn_zoo.convert`.
        tied: Groups of irregular layers, by name, that share one displacement (:func:`icnn_zoo.tie_shapes`).
        output_stride: Input pixels per logit: 8, 16, or what else the backbone can.
        head: "largefov".
        head_dilation: Dilation of the head; None for 12 at output stride 8 and 6 at 16. Smaller for feature maps that
            its taps would not meet.
        dilation_rule: "caffe" as in the paper's baseline or "timm"; see :class:`icnn_zoo.models.SegmentationModel`.
        backbone_args: Sizes and rates for timm's network, such as ``{channels: [32, 64, 128, 256]}``.
        pretrained: True for timm's default backbone weights, a path for a local file, "zoo:NAME" for a checkpoint of
            the zoo, False for none. Loaded when training begins, so that a checkpoint can be loaded without them; one
            of the zoo, which has a head, also when a network without other weights is evaluated.
        pretrained_partial: Accepts a file that lacks tensors of the backbone, which is refused otherwise.
        freeze_norm: Freezes norm layers' statistics and affine parameters.
        mean: RGB mean in 0 to 1, None for timm's.
        std: RGB standard deviation in 0 to 1, None for timm's.
        optimizer: "sgd" or "adamw".
        lr: Rate of the backbone's weights.
        head_lr_factor: Rate of the head's weights over ``lr``; its biases have twice that. DeepLab's 10 is for SGD.
        position_lr: Rate of the positions: with the rule "layer" the most that a step moves a tap, in pixels; with
            "optimizer" about that for adamw (0.01 to 0.03), for sgd pixels per unit of gradient (the paper's 50).
        position_rule: How positions move: "layer" where their gradients agree, by what is large for their layer
            (:func:`icnn_zoo.move_positions`), "optimizer" by the optimizer's own rule, as in the paper.
        momentum: Momentum of SGD.
        weight_decay: Decay of weights; never of positions, biases and norm parameters.
        poly_power: Power of the poly policy, over the run's whole number of steps.
        bound_epsilon: How far one step may carry a position across its cell's border, in pixels (Eq. 7).
        loss_resolution: "logits" shrinks labels to the logit grid (image sizes of 8k + 1), "image" upsamples logits.
        evaluation: "whole" runs an image in one forward, "sliding" in overlapping windows.
        window: Side of the windows in pixels, 8k + 1. They lie two thirds of it apart.
        window_batch: Windows that the network gets at once; more is faster where memory allows.
        flip: Averages the logits with those of the mirrored image.
        scales: Factors of image size in evaluation, probabilities averaged; [1.0] for none.
        channels_last: Runs the network in the channels_last memory format.
        compile: Compiles the network with torch.compile.
        interpolation: What a tap reads: "bilinear", or "triangle" and "gaussian" with a learned spread, as in DCLS.
        spread: Initial spread in pixels; None for 1 (triangle: bilinear) or 0.5 (gaussian).
        spread_per: Who has a spread of its own: each "tap", "channel" (shape), or the "layer".
        spread_lr: Rate of the spreads, in pixels with adamw; None for ``lr``.
        per_kernel: What says ``shapes`` in configurations and checkpoints of version 0.1: true is "kernel".

    Raises:
        ValueError: A backbone, ``start`` or other choice that does not exist; the message names the nearest.
    """

    architecture: tuple[str, ...] = (
        "backbone",
        "num_classes",
        "start",
        "shapes",
        "interpolation",
        "spread_per",
        "tied",
        "output_stride",
        "head",
        "head_dilation",
        "dilation_rule",
        "backbone_args",
    )

    def __init__(
        self,
        backbone: str = "resnet101",
        num_classes: int = 21,
        ignore_index: int = 255,
        class_names: Sequence[str] | None = None,
        start: str | None = None,
        epsilon: float = 1e-3,
        shapes: Shapes = "channel",
        interpolation: Interpolation = "bilinear",
        spread: float | None = None,
        spread_per: SpreadPer = "tap",
        spread_lr: float | None = None,
        tied: Sequence[Sequence[str]] = (),
        output_stride: int = 8,
        head: str = "largefov",
        head_dilation: int | None = None,
        dilation_rule: Literal["caffe", "timm"] = "timm",
        backbone_args: dict[str, int | float | list[int | float]] | None = None,
        pretrained: bool | str = False,
        pretrained_partial: bool = False,
        freeze_norm: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 1e-3,
        head_lr_factor: float = 10.0,
        position_lr: float = 0.1,
        position_rule: Literal["layer", "optimizer"] = "layer",
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        poly_power: float = 0.9,
        bound_epsilon: float = 1e-3,
        loss_resolution: Literal["logits", "image"] = "logits",
        evaluation: Literal["whole", "sliding"] = "whole",
        window: int = 713,
        window_batch: int = 1,
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        channels_last: bool = False,
        compile: bool = False,
        per_kernel: bool | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="per_kernel")
        shapes = rename_per_kernel({"shapes": shapes, "per_kernel": per_kernel})["shapes"]
        self.hparams.update(shapes=shapes, tied=[list(names) for names in tied])
        if optimizer not in ("sgd", "adamw"):
            raise ValueError(f"`optimizer` must be sgd or adamw; got {optimizer!r}.")
        if position_rule not in ("layer", "optimizer"):
            raise ValueError(f"`position_rule` must be layer or optimizer; got {position_rule!r}.")
        if loss_resolution not in ("logits", "image"):
            raise ValueError(f"`loss_resolution` must be logits or image; got {loss_resolution!r}.")
        check_evaluation(evaluation, window, scales, window_batch)
        if not 2 <= num_classes <= 256:
            raise ValueError(f"`num_classes` must be 2 to 256, as label maps have 8 bits; got {num_classes}.")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"`class_names` must have num_classes = {num_classes} names; got {len(class_names)}.")
        self.ignore_index = ignore_index
        self.class_names = check_classes("class_names", class_names or [str(index) for index in range(num_classes)])
        self.start = start
        self.pretrained = pretrained
        self.pretrained_partial = pretrained_partial
        self._has_weights = False
        self.optimizer_name = optimizer
        self.lr = lr
        self.head_lr_factor = head_lr_factor
        self.position_lr = position_lr
        self.position_rule = position_rule
        self.poly_power = poly_power
        self.bound_epsilon = bound_epsilon
        self.loss_resolution = loss_resolution
        self.evaluation = evaluation
        self.window = window
        self.window_batch = window_batch
        self.flip = flip
        self.scales = tuple(scales)
        self.channels_last = channels_last
        self.compile_network = compile
        self.model = SegmentationModel(
            backbone,
            num_classes,
            output_stride=output_stride,
            head=head,
            head_dilation=head_dilation,
            dilation_rule=dilation_rule,
            backbone_args=backbone_args,
            freeze_norm=freeze_norm,
            mean=mean,
            std=std,
        )
        if start is not None:
            reading: Any = {"interpolation": interpolation, "spread": spread, "spread_per": spread_per}
            convert(self.model, start, epsilon=epsilon, shapes=shapes, **reading)
            tie_by_name(self.model, tied)
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=ignore_index)

    def configure_callbacks(self) -> list[pl.Callback]:
        """The callbacks without which a run is not what it says: its generators resume, its positions are watched."""
        return [GeneratorStates(), *([DisplacementMonitor()] if self.start is not None else [])]

    def setup(self, stage: str) -> None:
        """Refuses strategies that would change the network silently, chooses the memory format and compiles."""
        check_strategy(self.trainer, self.model)
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if self.compile_network:
            self.model.compile()

    def on_fit_start(self) -> None:
        """Loads pretrained weights, unless a checkpoint was restored, which holds all weights."""
        # Not in setup: there Lightning does not yet say whether it resumes.
        if self.pretrained and self.trainer.ckpt_path is None:
            self.load_pretrained()
        self._has_weights = True

    def on_validation_start(self) -> None:
        self._load_from_zoo()

    def on_test_start(self) -> None:
        self._load_from_zoo()

    def on_predict_start(self) -> None:
        self._load_from_zoo()

    def load_pretrained(self) -> None:
        """Loads what ``pretrained`` names."""
        names, partial = self.hparams["class_names"], self.pretrained_partial
        rank_zero_info(str(load_pretrained(self.model, self.pretrained, names, partial=partial)))

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module; weights that were loaded are not replaced by those of ``pretrained``."""
        self._has_weights = True
        return super().load_state_dict(*args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another network, and to go on with what it holds no optimizer state for."""
        saved = rename_per_kernel(checkpoint.get("hyper_parameters", {}))
        check_agreement(self.architecture, self.hparams, saved)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            check_agreement(("optimizer", "freeze_norm"), self.hparams, saved)
            if "position_rule" not in saved:  # a run from before there was one goes on as it began
                self.position_rule = "optimizer"

    def describe(self) -> str:
        """The network in a line: backbone, size and what is irregular."""
        layers = len(irregular_layers(self.model))
        form = f"irregular from {self.start} on ({layers} layers)" if layers else "regular"
        number = sum(parameter.numel() for parameter in self.model.parameters())
        return f"{self.hparams['backbone']}, {number:,} parameters, {len(self.class_names)} classes, {form}"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a published checkpoint has to say of its making."""
        checkpoint["provenance"] = find_provenance()

    def _load_from_zoo(self) -> None:
        if not self._has_weights and isinstance(self.pretrained, str) and self.pretrained.startswith("zoo:"):
            self.load_pretrained()
            self._has_weights = True

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("The poly policy needs the run's length: set trainer.max_steps or trainer.max_epochs.")
        optimizer = make_optimizer(
            self.model,
            self.optimizer_name,
            self.position_rule if self.start is not None else None,
            lr=self.lr,
            head_lr_factor=self.head_lr_factor,
            position_lr=self.position_lr,
            momentum=self.hparams["momentum"],
            weight_decay=self.hparams["weight_decay"],
            bound_epsilon=self.bound_epsilon,
            spread_lr=self.hparams["spread_lr"],
        )
        scheduler = poly_policy(optimizer, int(steps), self.poly_power)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def forward(self, images: Tensor) -> Tensor:
        """RGB images [B, 3, H, W] in 0..255 to logits at the output stride."""
        return self._logits(self.model.preprocess(images))

    def _logits(self, images: Tensor) -> Tensor:
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits, labels = self(batch["image"]).float(), batch["mask"]
        if self.loss_resolution == "logits":
            labels = shrink_labels(labels, self.model.output_stride)
        else:
            logits = self.model.upsample(logits, labels.shape[-2:])
        total = F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum")
        valid = (labels != self.ignore_index).sum()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(valid)
        # Distributed training averages gradients over processes; times their number makes that the global sum.
        loss = total * self.trainer.world_size / valid.clamp(min=1)
        self._check_loss(loss, batch["image"])
        self.log("train/loss", loss, prog_bar=True, sync_dist=self.trainer.world_size > 1)
        return loss

    def _check_loss(self, loss: Tensor, images: Tensor) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if all_finite(loss) or scaler is not None:  # a scaler leaves such a step out and goes on with a smaller scale
            return
        place = find_nonfinite(self.model, self.model.preprocess(images))
        raise FloatingPointError(
            f"the loss of step {self.trainer.global_step} is {float(loss)}: {place}. Nothing of this step is kept; "
            f"checkpoints are of earlier ones. Lower model.lr ({self.lr:g}) or model.position_lr "
            f"({self.position_lr:g}), or set trainer.gradient_clip_val; a half precision may be too narrow."
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor | dict[str, list[Any]]:
        """Predicts label maps.

        Args:
            batch: "image" [B, 3, H, W] and perhaps "name", list of str, and "size", the (height, width) of each image
                before it was padded at the right and bottom.
            batch_idx: Unused.

        Returns:
            With names "labels", a list of uint8 label maps [height, width] at the image's own size, and "name", the
            list of names; without names one uint8 tensor [B, H, W].
        """
        labels = self._predict(batch["image"]).to(torch.uint8)
        if "name" not in batch:
            return labels
        sizes = batch.get("size", [labels.shape[-2:]] * len(labels))
        maps = [of_image[: int(height), : int(width)] for of_image, (height, width) in zip(labels, sizes, strict=True)]
        return {"labels": maps, "name": list(batch["name"])}

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _predict(self, images: Tensor) -> Tensor:
        if self.evaluation == "sliding":
            logits = partial(
                sliding_logits,
                self._full_logits,
                window=self.window,
                flip=self.flip,
                window_batch=self.window_batch,
            )
        else:
            logits = partial(whole_logits, self._full_logits, flip=self.flip)
        pixels = self.model.preprocess(images)
        values = multi_scale(logits, pixels, self.scales)
        if not all_finite(values):
            raise FloatingPointError(
                f"the network's output is not finite: {find_nonfinite(self.model, pixels)}. Take a checkpoint of an "
                "earlier step, train with lower rates, or evaluate with trainer.precision 32-true."
            )
        return values.argmax(dim=1)

    def _full_logits(self, images: Tensor) -> Tensor:
        return self.model.upsample(self._logits(images).float(), images.shape[-2:])

    def _evaluate(self, batch: Batch) -> None:
        self.confusion.update(self._predict(batch["image"]), batch["mask"])

    def _log_scores(self, split: str) -> None:
        confusion = self.confusion.compute()  # summed over processes
        self.confusion.reset()
        iou, accuracy = iou_and_accuracy(confusion)
        values: dict[str, Any] = dict(zip(iou_names(split, self.class_names), iou, strict=True))
        values |= {f"{split}/mIoU_background": background_miou(confusion), f"{split}/pixel_accuracy": accuracy}
        # All processes hold the same numbers; sync_dist only keeps Lightning from warning that they might not.
        self.log_dict(values, sync_dist=True)
        self.log(f"{split}/mIoU", iou.nanmean(), prog_bar=True, sync_dist=True)

"""Training and evaluating a segmentation network with Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from icnn_zoo.conversion.converter import convert
from icnn_zoo.models.evaluation import Evaluation
from icnn_zoo.models.segmentation import SegmentationModel, shrink_labels
from icnn_zoo.nn.class_paths import asked_weights
from icnn_zoo.nn.irregular_conv import irregular_layers
from icnn_zoo.nn.spreads import Interpolation, SpreadPer
from icnn_zoo.nn.tap_restriction import Axes, Limit
from icnn_zoo.nn.tying import tie_by_name
from icnn_zoo.ops.sharing import Shapes, rename_per_kernel
from icnn_zoo.optim import poly_policy
from icnn_zoo.training.callbacks.monitors import DisplacementMonitor
from icnn_zoo.training.callbacks.resuming import GeneratorStates
from icnn_zoo.training.checkpoints import NO_LOSS, check_network, read_task
from icnn_zoo.training.finiteness import all_finite, check_output, raise_not_finite_loss
from icnn_zoo.training.given_options import check_agreement, check_choice, named_classes
from icnn_zoo.training.losses import PixelLoss, balanced_weights
from icnn_zoo.training.optimizers import make_optimizer
from icnn_zoo.training.provenance import find_provenance
from icnn_zoo.training.scores import class_scores
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
        backbone: Any timm name that can be dilated, with the head "fpn" any with stages; None for resnet101.
        num_classes: Classes, background included: 2 to 256, as label maps have 8 bits. The command line takes it from
            the data.
        ignore_index: Label that does not stand for a class. The command line takes it from the data.
        class_names: Different names for logs and tables, None for numbers. The command line takes them from the data.
        start: First module to make irregular: a backbone module ("layer3.11"), "classifier" for the head alone, None
            for the regular baseline.
        epsilon: Initial displacement in pixels.
        shapes: Who shares a shape: a "layer", "group", input "channel", or nobody, "kernel"; see `icnn_zoo.convert`.
        tied: Groups of irregular layers, by name, that share one displacement (:func:`icnn_zoo.tie_shapes`).
        network: In the place of a backbone and its head, any network of images to logits by class path; see
            :class:`icnn_zoo.models.SegmentationModel`. All of its weights have the rate ``lr``.
        output_stride: Input pixels per logit: 8, 16, or what else the backbone can.
        head: "largefov", "aspp", "fcn" or "fpn".
        head_dilation: Dilation of the head; None for 12 at output stride 8 and 6 at 16. Smaller for feature maps that
            its taps would not meet.
        dilation_rule: "caffe" as in the paper's baseline or "timm"; see :class:`icnn_zoo.models.SegmentationModel`.
        backbone_args: Sizes and rates for timm's network, such as ``{channels: [32, 64, 128, 256]}``.
        pretrained: True for timm's default backbone weights (of a ``network``: those that its arguments ask for), the
            path of a file or run folder, "zoo:NAME" or "hf://user/repo/NAME" for a published checkpoint, False for
            none. Loaded when training begins, so that a checkpoint loads without them; one of the zoo also when a
            network without weights is evaluated.
        pretrained_partial: Accepts a file that lacks tensors of the backbone, which is refused otherwise.
        freeze_norm: Freezes norm layers' statistics and affine parameters.
        in_channels: Channels of the images. The command line takes it from the data.
        mean: Mean of the channels in 0 to 1, None for timm's, "auto" to measure mean and std of the training images.
        std: Standard deviation of the channels likewise.
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
        loss: None for the cross-entropy, or any, also several; see :class:`icnn_zoo.training.losses.PixelLoss`.
        class_weights: One number for each class, or "auto" for the median of their pixels over those of each.
        aux_weight: Weight of the loss of each further output of a ``network``, such as torchvision's "aux"; 0.4 as in
            PSPNet (torchvision's references have 0.5), 0 for none.
        loss_resolution: "logits" shrinks labels to the logit grid (sizes of output_stride * k + 1), "image" upsamples.
        evaluation: "whole" runs an image in one forward, "sliding" in overlapping windows.
        window: Side of the windows in pixels, output_stride * k + 1. They lie two thirds of it apart.
        window_batch: Windows that the network gets at once; more is faster where memory allows.
        flip: Averages the logits with those of the mirrored image.
        scales: Factors of image size in evaluation, probabilities averaged; [1.0] for none.
        channels_last: Runs the network in the channels_last memory format.
        compile: Compiles the network with torch.compile.
        interpolation: What a tap reads: "bilinear", or "triangle" and "gaussian" with a learned spread, as in DCLS.
        spread: Initial spread in pixels; None for 1 (triangle: bilinear) or 0.5 (gaussian).
        spread_per: Who has a spread of its own: each "tap", "channel" (shape), or the "layer".
        spread_lr: Rate of the spreads, in pixels with adamw; None for ``lr``.
        axes: Which coordinates are learned: "rows", "columns" or "both"; see :func:`icnn_zoo.limit_taps`.
        limit: The most that one may be away from the regular grid, in pixels, or "extent"; likewise.
        per_kernel: What says ``shapes`` in configurations and checkpoints of version 0.1: true is "kernel".

    Raises:
        ValueError: A backbone, ``start`` or other choice that does not exist; the message names the nearest.
    """

    architecture: tuple[str, ...] = (
        *("backbone", "network", "num_classes"),
        *("start", "shapes", "interpolation", "spread_per", "axes", "limit", "tied"),
        *("output_stride", "head", "head_dilation", "dilation_rule", "backbone_args", "in_channels"),
    )

    def __init__(
        self,
        backbone: str | None = None,
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
        axes: Axes = "both",
        limit: Limit = None,
        tied: Sequence[Sequence[str]] = (),
        output_stride: int = 8,
        head: str = "largefov",
        head_dilation: int | None = None,
        dilation_rule: Literal["caffe", "timm"] = "timm",
        backbone_args: dict[str, int | float | list[int | float]] | None = None,
        pretrained: bool | str = False,
        pretrained_partial: bool = False,
        freeze_norm: bool = False,
        in_channels: int = 3,
        mean: Sequence[float] | Literal["auto"] | None = None,
        std: Sequence[float] | Literal["auto"] | None = None,
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
        network: dict[str, Any] | None = None,
        loss: dict[str, Any] | list[dict[str, Any]] | None = None,
        class_weights: Literal["auto"] | list[float] | None = None,
        aux_weight: float = 0.4,
        per_kernel: bool | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="per_kernel")
        shapes = rename_per_kernel({"shapes": shapes, "per_kernel": per_kernel})["shapes"]
        self.hparams.update(shapes=shapes, tied=[list(names) for names in tied])
        if backbone is None and network is None:
            self.hparams["backbone"] = backbone = "resnet101"
        check_choice("optimizer", optimizer, ("sgd", "adamw"))
        check_choice("position_rule", position_rule, ("layer", "optimizer"))
        if not aux_weight >= 0:
            raise ValueError(f"`aux_weight` must be at least 0; got {aux_weight}.")
        check_choice("loss_resolution", loss_resolution, ("logits", "image"))
        self.ignore_index = ignore_index
        self.class_names = named_classes(num_classes, class_names)
        self.start = start
        self.pretrained = pretrained
        self._has_weights = False
        self.lr = lr
        self.head_lr_factor = head_lr_factor
        self.position_lr = position_lr
        self.position_rule = position_rule
        self.poly_power = poly_power
        self.loss_resolution = loss_resolution
        self.aux_weight = aux_weight
        self.evaluation = Evaluation(evaluation, window, window_batch, flip, tuple(scales))
        self.channels_last = channels_last
        self.compile_network = compile
        self.model = SegmentationModel(
            backbone,
            num_classes,
            network=network,
            output_stride=output_stride,
            head=head,
            head_dilation=head_dilation,
            dilation_rule=dilation_rule,
            backbone_args=backbone_args,
            freeze_norm=freeze_norm,
            in_channels=in_channels,
            mean=None if isinstance(mean, str) else mean,
            std=None if isinstance(std, str) else std,
        )
        if start is not None:
            reading: Any = {"interpolation": interpolation, "spread": spread, "spread_per": spread_per}
            convert(self.model, start, epsilon=epsilon, shapes=shapes, axes=axes, limit=limit, **reading)
            tie_by_name(self.model, tied)
        self.loss = PixelLoss(loss, num_classes, ignore_index, class_weights)
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=ignore_index)

    def configure_callbacks(self) -> list[pl.Callback]:
        """The callbacks without which a run is not what it says: its generators resume, its positions are watched."""
        return [GeneratorStates(), *([DisplacementMonitor()] if irregular_layers(self.model) else [])]

    def setup(self, stage: str) -> None:
        """Refuses strategies that would change the network silently, chooses the memory format and compiles."""
        check_strategy(self.trainer, self.model)
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if self.compile_network:
            self.model.compile()

    def _load_start(self) -> None:
        """Measures "auto" statistics and loads pretrained weights, unless the task has weights already."""
        if self.trainer.ckpt_path is None and not self._has_weights:
            if "auto" in (self.hparams["mean"], self.hparams["std"]):
                self._set_statistics(*self.trainer.datamodule.measure_channels())  # type: ignore[attr-defined]
            if self.pretrained:
                self.load_pretrained()
            elif self.model.spec is not None and (asked := asked_weights("network", self.model.spec)):
                raise ValueError(f"`network` asks for weights, {asked}: set model.pretrained true, or leave them out.")
        self._has_weights = True

    def on_fit_start(self) -> None:
        """Loads the start where the command line's optimizer took the place of ours, and weighs classes."""
        self._load_start()
        if self.hparams["class_weights"] == "auto":
            weights = balanced_weights(self.trainer.datamodule.count_pixels())  # type: ignore[attr-defined]
            rank_zero_info(f"Class weights: {', '.join(f'{weight:.4g}' for weight in weights)}")
            self.loss = PixelLoss(self.hparams["loss"], len(weights), self.ignore_index, weights)

    def _set_statistics(self, mean: Any, std: Any) -> None:
        """Puts numbers in the place of "auto", here and in the network."""
        for name, values in (("mean", mean), ("std", std)):
            if self.hparams[name] == "auto" and isinstance(values, (list, tuple)):
                self.hparams[name] = list(values)
                self.model.set_statistic(name, values)

    def on_validation_start(self) -> None:
        self._load_from_zoo()

    on_test_start = on_predict_start = on_validation_start

    def load_pretrained(self) -> None:
        """Loads what ``pretrained`` names."""
        names, partial = self.hparams["class_names"], self.hparams["pretrained_partial"]
        rank_zero_info(str(load_pretrained(self.model, self.pretrained, names, partial=partial)))

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module; weights that were loaded are not replaced by those of ``pretrained``."""
        self._has_weights = True
        return super().load_state_dict(*args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another network, and to go on with what it holds no optimizer state for."""
        saved = {"axes": "both", "limit": None, **rename_per_kernel(checkpoint.get("hyper_parameters", {}))}
        check_agreement(self.architecture, self.hparams, saved)
        if "auto" in (self.hparams["mean"], self.hparams["std"]):
            self._set_statistics(saved.get("mean"), saved.get("std"))
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            check_agreement(("optimizer", "position_rule", "freeze_norm"), self.hparams, saved)
            if "position_rule" not in saved:  # a run from before there was one goes on as it began
                self.position_rule = "optimizer"

    def describe(self) -> str:
        """The network in a line."""
        layers = len(irregular_layers(self.model))
        where = "by itself" if self.start is None else f"from {self.start} on"
        form = f"irregular {where} ({layers} layers)" if layers else "regular"
        number = sum(parameter.numel() for parameter in self.model.parameters())
        return f"{self.model.backbone_name}, {number:,} parameters, {len(self.class_names)} classes, {form}"

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> SegmentationTask:
        """As Lightning's; a network of another package is built only where ``ICNN_ZOO_ALLOW`` lists it, no loss is."""
        check_network(read_task(checkpoint_path), checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **{**NO_LOSS, **kwargs})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a published checkpoint has to say of its making."""
        checkpoint["provenance"] = find_provenance()

    def _load_from_zoo(self) -> None:
        if not self._has_weights and isinstance(self.pretrained, str) and self.pretrained.startswith("zoo:"):
            self.load_pretrained()
            self._has_weights = True

    def configure_optimizers(self) -> Any:
        # The first hook after a checkpoint was restored, and before callbacks begin, which may train or draw shapes.
        self._load_start()
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("The poly policy needs the run's length: set trainer.max_steps or trainer.max_epochs.")
        rule = self.position_rule if irregular_layers(self.model) else None
        options = {name: self.hparams[name] for name in ("momentum", "weight_decay", "bound_epsilon", "spread_lr")}
        options |= {name: getattr(self, name) for name in ("lr", "head_lr_factor", "position_lr")}
        optimizer = make_optimizer(self.model, self.hparams["optimizer"], rule, **options)
        scheduler = poly_policy(optimizer, int(steps), self.poly_power)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in 0..255 to logits at the output stride."""
        return self._outputs(self.model.preprocess(images))

    def _outputs(self, images: Tensor, further: bool = False) -> Any:
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.model(images, further)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        pixels = self.model.preprocess(batch["image"])
        outputs = self._outputs(pixels, further=True) if self.aux_weight else {"out": self._outputs(pixels)}
        losses = {name: self._loss(logits.float(), batch["mask"]) for name, logits in outputs.items()}
        loss = losses.pop("out") + self.aux_weight * sum(losses.values())
        self._check_loss(loss, pixels)
        self.log("train/loss", loss, prog_bar=True, sync_dist=self.trainer.world_size > 1)
        return loss

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.loss_resolution == "logits":
            labels = shrink_labels(labels, self.model.output_stride)
        else:
            logits = self.model.upsample(logits, labels.shape[-2:])
        return self.loss(logits, labels, self.trainer.world_size)

    def _check_loss(self, loss: Tensor, pixels: Tensor) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if all_finite(loss) or scaler is not None:  # a scaler leaves such a step out and goes on with a smaller scale
            return
        advice = f"Lower model.lr ({self.lr:g}) or model.position_lr ({self.position_lr:g})"
        raise_not_finite_loss(loss, self.model, pixels, self.trainer.global_step, advice)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor | dict[str, list[Any]]:
        """Predicts label maps.

        Args:
            batch: "image" [B, C, H, W] and perhaps "name", list of str, and "size", the (height, width) of each image
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
        pixels = self.model.preprocess(images)
        values = self.evaluation.scores(self._full_logits, pixels)
        check_output(values, self.model, pixels)
        return values.argmax(dim=1)

    def _full_logits(self, images: Tensor) -> Tensor:
        return self.model.full_logits(images, self._outputs).float()

    def _evaluate(self, batch: Batch) -> None:
        self.confusion.update(self._predict(batch["image"]), batch["mask"])

    def _log_scores(self, split: str) -> None:
        confusion = self.confusion.compute()  # summed over processes
        self.confusion.reset()
        values: dict[str, Any] = class_scores(split, self.class_names, confusion)
        miou = values.pop(f"{split}/mIoU")
        # All processes hold the same numbers; sync_dist only keeps Lightning from warning that they might not.
        self.log_dict(values, sync_dist=True)
        self.log(f"{split}/mIoU", miou, prog_bar=True, sync_dist=True)

"""Which rule moves positions best: the same short trainings with one rule after the other.

python benchmarks/position_rules.py --tasks lines lines-pretrained --rules regular "adamw 0.03" "layer 0.1" --seeds 0 1

Adds a line to runs.jsonl for each finished training and skips what is there; ``position_rules_report.py`` makes tables.
Within a task and seed all rules see the same batches and start from the same weights: in ``lines`` from random ones, in
``lines-pretrained`` from those of a regular network that learned the task from other pages, with a new head, in
``drawn-voc`` from ImageNet's, with a new head. Weights are always AdamW's, with the poly policy. A rule's name is its
kind and its rate:

- regular, dilation N: no learned positions.
- layer: icnn_zoo.move_positions. ``layer-shared``: the same with the mean gradient of all channels, hence one shape.
- soft: the same with threshold 0, Adam whose epsilon is the layer's root mean square gradient.
- steep: the mean gradient over the layer's root mean square, which lets some taps go much faster than the rate.
  ``steep-trust``: that, scaled by the trust of ``layer``.
- adamw, sgd (momentum 0.9): that optimizer.
- unit: ACU's rule, each tap's momentum brought to unit length, the center tap fixed.
- layer-hold: layer after 40 steps in which positions stay. layer-wide: layer from normal displacements of 0.5 px.
  layer-average: layer, evaluated with an exponential average of the positions (0.95).
- walk: layer with normal numbers in place of the gradient. frozen: normal displacements of that standard deviation.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import icnn_zoo
from icnn_zoo.data import DrawnVOCDataModule, LinesDataModule, SegmentationDataModule
from icnn_zoo.models import SegmentationModel
from icnn_zoo.zoo.pretrained import load_pretrained

RESULTS = Path(__file__).parents[1] / "docs/results/position_rules"
EVALUATE = 50  # steps between evaluations
HOLD, WIDE, AVERAGE = 40, 0.5, 0.95


@dataclass(frozen=True)
class Task:
    """A short training: network, data and recipe."""

    data: Callable[[int, Path], SegmentationDataModule]
    network: dict[str, Any]
    start: str
    lr: float
    weight_decay: float
    head_lr_factor: float
    steps: int
    schedule: int  # steps that the poly policy spans
    pages: int = 0  # to evaluate on
    pretrained: str | None = None


def _lines(seed: int, root: Path) -> SegmentationDataModule:
    return LinesDataModule(image_size=65, num_classes=4, num_val=128, batch_size=16, num_workers=0, seed=seed)


def _drawn_voc(seed: int, root: Path) -> SegmentationDataModule:
    return DrawnVOCDataModule(root, image_size=97, num_train=6000, batch_size=8, num_workers=0, seed=seed)


_PLAIN = {"backbone": "plain5", "num_classes": 4, "output_stride": 2, "head_dilation": 1}
_LITE0 = {"backbone": "tf_efficientnet_lite0", "num_classes": 21, "output_stride": 16}
TASKS = {
    "lines": Task(_lines, _PLAIN, "layer1", 2e-3, 1e-4, 1, 150, 150, 128),
    "lines-pretrained": Task(_lines, _PLAIN, "layer1", 2e-3, 1e-4, 1, 150, 150, 128, "lines"),
    "drawn-voc": Task(_drawn_voc, _LITE0, "blocks.4", 5e-4, 0.01, 4, 120, 3000, 0, "efficientnet-lite0"),
}


class PositionTrainer:
    """An optimizer of its own for the positions, by the rule of a name."""

    def __init__(self, model: nn.Module, rule: str, schedule: int) -> None:
        kind, number = rule.split()
        self.kind, rate = kind, float(number)
        self.displacements = [layer.displacement for layer in icnn_zoo.irregular_layers(model).values()]
        self.noise = torch.Generator().manual_seed(3)
        self.steps = 0
        self.momentum = [torch.zeros_like(it) for it in self.displacements]
        self.square = [torch.zeros_like(it) for it in self.displacements]
        if kind == "layer-wide":
            for displacement in self.displacements:
                displacement.data.add_(torch.randn(displacement.shape, generator=self.noise) * WIDE)
        self.average = [it.detach().clone() for it in self.displacements]
        if kind == "frozen":
            for displacement in self.displacements:
                displacement.requires_grad_(False).add_(torch.randn(displacement.shape, generator=self.noise) * rate)
            return
        adamw = kind == "adamw"
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(self.displacements, lr=rate, weight_decay=0.0)
            if adamw
            else torch.optim.SGD(self.displacements, lr=rate, momentum=0.9 if kind == "sgd" else 0.0)
        )
        own = kind in ("adamw", "sgd", "unit", "steep", "steep-trust")
        if own:
            icnn_zoo.bound_positions(self.optimizer, model)
        else:
            icnn_zoo.move_positions(self.optimizer, model, threshold=0.0 if kind in ("soft", "walk") else 2.0)
        self.policy = icnn_zoo.poly_policy(self.optimizer, schedule)

    def step(self) -> None:
        """Moves the positions once, from the gradients that the displacements hold."""
        if self.kind == "frozen":
            return
        self.steps += 1
        if self.kind == "layer-hold" and self.steps <= HOLD:
            self.policy.step()
            return
        for displacement, momentum, square in zip(self.displacements, self.momentum, self.square, strict=True):
            assert displacement.grad is not None
            self._change(displacement.grad, momentum, square)
        self.optimizer.step()
        self.policy.step()
        for displacement, average in zip(self.displacements, self.average, strict=True):
            average.lerp_(displacement.detach(), 1 - AVERAGE)

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[None]:
        """Positions as they are evaluated: averaged for layer-average."""
        kept = [it.detach().clone() for it in self.displacements]
        if self.kind == "layer-average":
            for displacement, average in zip(self.displacements, self.average, strict=True):
                displacement.data.copy_(average)
        yield
        for displacement, old in zip(self.displacements, kept, strict=True):
            displacement.data.copy_(old)

    def _change(self, gradient: Tensor, momentum: Tensor, square: Tensor) -> None:
        if self.kind == "walk":
            gradient.copy_(torch.randn(gradient.shape, generator=self.noise))
        elif self.kind == "layer-shared":
            gradient.copy_(gradient.mean(dim=0, keepdim=True).expand_as(gradient))
        elif self.kind == "unit":
            gradient.copy_(F.normalize(momentum.mul_(0.9).add_(gradient), dim=-1))
            gradient[..., gradient.shape[-2] // 2, :] = 0
        elif self.kind.startswith("steep"):
            started = 1 - 0.9**self.steps
            mean = momentum.lerp_(gradient, 0.1) / started
            variance = square.lerp_(gradient.square(), 0.01) / (1 - 0.99**self.steps)
            gradient.copy_(mean / variance.mean().sqrt())
            if self.kind == "steep-trust":
                noise = (variance * 0.1 / 1.9 * (2 - started) / started).sum(dim=-1, keepdim=True)
                gradient.mul_((1 - 2 * noise / mean.square().sum(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(min=0))


def make_network(name: str, rule: str, seed: int, folder: Path) -> SegmentationModel:
    """The network of a task with its first weights, converted unless the rule is regular or dilated."""
    task = TASKS[name]
    torch.manual_seed(0 if task.pretrained else seed)
    model = SegmentationModel(**task.network)
    if task.pretrained == "lines":
        model.backbone.load_state_dict(_regular_backbone(folder))
    elif task.pretrained:
        load_pretrained(model, folder / task.pretrained / "tf_efficientnet_lite0.safetensors")
    if rule.startswith("dilation"):
        for module in list(model.modules())[1:]:
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.in_channels == 32:
                module.dilation = module.padding = (int(rule.split()[1]),) * 2
    elif rule != "regular":
        icnn_zoo.convert(model, task.start)
    return model.to(memory_format=torch.channels_last).train()


def _regular_backbone(folder: Path) -> dict[str, Tensor]:
    path = folder / "lines_regular.pt"
    if not path.exists():
        model = make_network("lines", "regular", 1000, folder)
        train(model, "lines", "regular", 1000, folder)
        torch.save(model.backbone.state_dict(), path)
    weights: dict[str, Tensor] = torch.load(path)
    return weights


def batches(name: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """The batches of a task and seed, made once."""
    path = folder / f"{name.removesuffix('-pretrained')}_{seed}.pt"
    if not path.exists():
        data = TASKS[name].data(seed, folder)
        data.setup("fit")
        made = iter(data.train_dataloader())
        torch.save([{key: next_[key] for key in ("image", "mask")} for next_ in _take(made, TASKS[name].steps)], path)
    result: list[dict[str, Any]] = torch.load(path)
    return result


def _take(iterator: Iterator[dict[str, Any]], number: int) -> Iterator[dict[str, Any]]:
    return (next(iterator) for _ in range(number))


@torch.inference_mode()
def accuracy(model: SegmentationModel, name: str, folder: Path) -> float:
    """Share of right pixels on the validation pages."""
    data = TASKS[name].data(0, folder)
    data.eval_batch_size = 32
    data.setup("fit")
    model.eval()
    right = total = 0
    for batch in data.val_dataloader():
        mask = batch["mask"]
        labels = model.upsample(model(model.preprocess(batch["image"])), mask.shape[-2:]).argmax(dim=1)
        right += int((labels == mask).sum())
        total += int((mask != data.ignore_index).sum())
    model.train()
    return right / total


def train(model: SegmentationModel, name: str, rule: str, seed: int, folder: Path) -> dict[str, Any]:
    """Trains and returns losses, accuracies and seconds a step."""
    task = TASKS[name]
    groups = icnn_zoo.parameter_groups(
        model,
        lr=task.lr,
        position_lr=1.0,
        weight_decay=task.weight_decay,
        head_lr_factor=task.head_lr_factor,
        head_bias_lr_factor=2 * task.head_lr_factor,
    )
    optimizer = torch.optim.AdamW(group for group in groups if group["name"] != "positions")
    policy = icnn_zoo.poly_policy(optimizer, task.schedule)
    positions = PositionTrainer(model, rule, task.schedule) if icnn_zoo.irregular_layers(model) else None
    torch.manual_seed(seed)  # dropout
    losses, accuracies, seconds = [], {}, 0.0
    for step, batch in enumerate(batches(name, seed, folder), start=1):
        began = time.perf_counter()
        model.zero_grad()
        logits = model(model.preprocess(batch["image"]).contiguous(memory_format=torch.channels_last))
        logits = model.upsample(logits, batch["mask"].shape[-2:])
        loss = F.cross_entropy(logits, batch["mask"], ignore_index=255)
        loss.backward()
        if positions:
            positions.step()
        optimizer.step()
        policy.step()
        losses.append(round(loss.item(), 4))
        seconds += time.perf_counter() - began
        if task.pages and step % EVALUATE == 0:
            with positions.evaluated() if positions else contextlib.nullcontext():
                accuracies[step] = round(accuracy(model, name, folder), 5)
    return {"losses": losses, "accuracy": accuracies, "seconds_per_step": round(seconds / len(losses), 3)}


def run(options: argparse.Namespace) -> None:
    """Runs what is not in runs.jsonl yet."""
    options.folder.mkdir(parents=True, exist_ok=True)
    log = options.out / "runs.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.tasks:
            for rule in options.rules:
                if any((it["task"], it["rule"], it["seed"]) == (name, rule, seed) for it in read_runs(log)):
                    continue
                model = make_network(name, rule, seed, options.folder)
                start = {key: layer.displacement.detach().clone() for key, layer in _layers(model).items()}
                result = train(model, name, rule, seed, options.folder)
                moved = {key: layer.displacement.detach() - start[key] for key, layer in _layers(model).items()}
                lengths = {key: value.norm(dim=-1).flatten() for key, value in moved.items()}
                entry = {
                    "task": name,
                    "rule": rule,
                    "seed": seed,
                    **result,
                    "displacement": {
                        key: {"mean": round(float(it.mean()), 3), "p95": round(float(it.quantile(0.95)), 3)}
                        for key, it in lengths.items()
                    },
                    "spread": {  # standard deviations of positions along rows and columns
                        key: [round(float(it), 3) for it in layer.positions.detach().reshape(-1, 2).std(dim=0)]
                        for key, layer in _layers(model).items()
                    },
                    "versions": {"icnn_zoo": icnn_zoo.__version__, "torch": torch.__version__},
                    "machine": f"{platform.machine()}, {torch.get_num_threads()} thread",
                    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                }
                np.savez(options.folder / f"{name}_{rule}_{seed}.npz", **{k: v.numpy() for k, v in moved.items()})
                with log.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                print(name, rule, seed, result["accuracy"] or statistics.fmean(result["losses"][-50:]), flush=True)


def _layers(model: nn.Module) -> dict[str, icnn_zoo.IrregularConv2d]:
    return icnn_zoo.irregular_layers(model)


def read_runs(log: Path) -> list[dict[str, Any]]:
    """The finished trainings, in the order they finished."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def main() -> None:
    """Runs the trainings asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rules", nargs="+", default=["regular", "adamw 0.01", "layer 0.1"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--folder", type=Path, default=Path("data"), help="prepared data; batches and shapes go there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run(options)


if __name__ == "__main__":
    main()

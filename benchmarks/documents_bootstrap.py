"""How sure the gains on documents are over the documents: the test crops drawn again, group of authors by group.

python benchmarks/documents_bootstrap.py runs/reproduce/documents --json docs/results/documents/bootstrap.json

Evaluates the last checkpoint of every finished run of ``icnn-zoo reproduce documents`` on the crops of the test split
and keeps one confusion matrix for each group of documents that share an author or a package, which are never split. The
gain of a row is the mean over the seeds that it shares with ``regular``; its interval comes from drawing groups with
replacement, all of a row's seeds with the same draw.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from training_report import attempts

from icnn_zoo.data import DocumentsDataModule
from icnn_zoo.experiments.peers import PeerTask
from icnn_zoo.training.checkpoints import read_task, task_options
from icnn_zoo.training.task import SegmentationTask

DRAWS = 2000


@torch.inference_mode()
def confusion_by_group(checkpoint: Path, pages: Any, groups: dict[str, str]) -> dict[str, np.ndarray]:
    """The confusion matrix [truth, prediction] of a checkpoint for each group of documents."""
    stored = read_task(checkpoint)
    options = task_options(stored)
    task = (PeerTask if "peer" in options else SegmentationTask)(**options).eval()
    task.load_state_dict(stored["state_dict"])
    classes = len(task.class_names)
    found: dict[str, np.ndarray] = {}
    for index in range(len(pages)):
        sample = pages[index]
        images = torch.from_numpy(sample["image"].copy()).permute(2, 0, 1)[None]
        labels = task.model.full_logits(task.model.preprocess(images))[0].argmax(dim=0).numpy()
        valid = sample["mask"] != task.ignore_index
        pairs = sample["mask"][valid].astype(np.int64) * classes + labels[valid]
        counts = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
        group = groups[sample["name"]]
        found[group] = found.get(group, 0) + counts
    return found


def miou(matrices: np.ndarray) -> np.ndarray:
    """In points, over the classes in truth or prediction, of confusion matrices [..., K, K]."""
    hits = np.diagonal(matrices, axis1=-2, axis2=-1).astype(float)
    union = matrices.sum(-1) + matrices.sum(-2) - hits
    with np.errstate(invalid="ignore"):
        return 100 * np.nanmean(np.where(union > 0, hits / union, np.nan), axis=-1)


def pixel_accuracy(matrices: np.ndarray) -> np.ndarray:
    """In per cent, of confusion matrices [..., K, K]."""
    return 100 * np.trace(matrices, axis1=-2, axis2=-1) / matrices.sum((-2, -1))


METRICS = {"mIoU": miou, "pixel_accuracy": pixel_accuracy}


def gain(
    row: dict[str, Any],
    regular: dict[str, Any],
    rng: np.random.Generator,
    metric: Callable[[np.ndarray], np.ndarray] = miou,
) -> dict[str, Any]:
    """The mean gain over common seeds, and its 95 % interval over groups of documents."""
    seeds = sorted(row.keys() & regular.keys(), key=int)
    groups = sorted(row[seeds[0]])
    stacked = np.array([[[kind[seed][group] for group in groups] for seed in seeds] for kind in (row, regular)])
    drawn = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=DRAWS)
    # [kind, seed, K, K] for each draw; one draw at a time keeps memory small.
    values = [metric(np.einsum("g,ksgij->ksij", weights, stacked)) for weights in (np.ones(len(groups)), *drawn)]
    differences = np.array([(value[0] - value[1]).mean() for value in values])
    low, high = np.quantile(differences[1:], [0.025, 0.975])
    return {"seeds": seeds, "gain": round(float(differences[0]), 3), "interval": [round(low, 3), round(high, 3)]}


def main() -> None:
    """Evaluates and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="OUT/documents of icnn-zoo reproduce")
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    with (options.root / "documents/pages.tsv").open(encoding="utf-8") as file:
        groups = {row["name"]: row["group"] for row in csv.DictReader(file, delimiter="\t")}
    counts: dict[str, dict[str, Any]] = {}
    for file in sorted(options.folder.glob("*/seed_*/result.json")):
        row, seed = file.parts[-3], file.parts[-2].removeprefix("seed_")
        settings = json.loads(file.read_text(encoding="utf-8"))["config"]["data"]["init_args"]
        data = DocumentsDataModule(**{**settings, "root": options.root})
        checkpoint = attempts(file.parent)[-1] / "checkpoints" / "last.ckpt"
        counts.setdefault(row, {})[seed] = confusion_by_group(checkpoint, data.make_dataset("test"), groups)
        print(row, seed, flush=True)
    regular = counts.pop("regular")
    gains = {
        row: {name: gain(found, regular, np.random.default_rng(0), metric) for name, metric in METRICS.items()}
        for row, found in counts.items()
    }
    number = len(next(iter(regular.values())))
    result = {"groups": number, "draws": DRAWS, "split": "test", "gains": gains}
    options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

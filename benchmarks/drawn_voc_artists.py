"""Where trained networks stand with artists that they know: new scenes of these, beside the validation artist's.

python benchmarks/drawn_voc_artists.py runs/reproduce/drawn-voc --json docs/results/drawn_voc/artists.json

Evaluates the last checkpoint of every finished run of ``icnn-zoo reproduce drawn-voc`` on scenes that no run has seen
(their seed is none of a run's). The test artist is left to the runs' own results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from training_report import attempts

from icnn_zoo.analysis.heatmaps import image_scores
from icnn_zoo.data import DrawnVOCDataModule
from icnn_zoo.training.network_sources import load_task

SEED = 1000
BATCH = 20


@torch.inference_mode()
def evaluate(checkpoint: Path, scenes: Any) -> float:
    """The mIoU of a checkpoint over all scenes, by one confusion matrix."""
    task = load_task(checkpoint)
    task.confusion.reset()
    for start in range(0, len(scenes), BATCH):
        samples = [scenes[index] for index in range(start, min(start + BATCH, len(scenes)))]
        images = torch.stack([torch.from_numpy(sample["image"].copy()).permute(2, 0, 1) for sample in samples])
        masks = torch.stack([torch.from_numpy(sample["mask"].copy()).long() for sample in samples])
        task.confusion.update(image_scores(task, images).argmax(dim=1), masks)
    matrix = task.confusion.compute().double()
    hits = matrix.diagonal()
    return float((hits / (matrix.sum(0) + matrix.sum(1) - hits)).mean())


def main() -> None:
    """Evaluates and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="OUT/drawn-voc of icnn-zoo reproduce")
    parser.add_argument("--rows", nargs="+", default=["regular", "blocks.4"])
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    result: dict[str, Any] = {"scenes": options.scenes, "seed": SEED, "rows": {}}
    for file in sorted(options.folder.glob("*/seed_*/result.json")):
        row, seed = file.parts[-3], file.parts[-2].removeprefix("seed_")
        if row not in options.rows:
            continue
        settings = json.loads(file.read_text(encoding="utf-8"))["config"]["data"]["init_args"]
        new = {"seed": SEED, "eval_seed": SEED, "num_train": options.scenes, "num_val": options.scenes}
        data = DrawnVOCDataModule(**{**settings, **new})
        checkpoint = attempts(file.parent)[-1] / "checkpoints" / "last.ckpt"
        scores = {split: evaluate(checkpoint, data.make_dataset(split)) for split in ("train", "val")}
        result["rows"].setdefault(row, {})[seed] = scores
        print(row, seed, scores, flush=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

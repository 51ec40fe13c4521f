"""Sweeps the rate of the positions with Optuna (pip install optuna): trials that score badly are stopped early.

    python benchmarks/sweep_position_lr.py --trials 20 --json sweep.json

Each trial trains plain5 on pages of lines, as configs/quickstart.yaml does; only ``position_lr`` differs. To sweep on
data of your own, change ``make_task`` and ``make_data``. With ``--storage sqlite:///sweep.db`` several processes share
the trials, and a sweep that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import optuna
from lightning.pytorch.callbacks import Callback

from icnn_zoo.data import LinesDataModule
from icnn_zoo.training.task import SegmentationTask

METRIC = "val/mIoU"


class Pruning(Callback):
    """Reports the score of every validation to a trial, and ends the run where Optuna says so."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reports."""
        self.trial.report(float(trainer.callback_metrics[METRIC]), trainer.global_step)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def make_task(position_lr: float) -> SegmentationTask:
    """The network and its recipe, as in configs/quickstart.yaml."""
    return SegmentationTask(
        backbone="plain5",
        num_classes=4,
        start="layer1",
        output_stride=2,
        head_dilation=1,
        optimizer="adamw",
        lr=0.004,
        head_lr_factor=1.0,
        weight_decay=1e-4,
        position_lr=position_lr,
        loss_resolution="image",
    )


def make_data(image_size: int, num_val: int) -> LinesDataModule:
    """Pages of lines."""
    return LinesDataModule(
        image_size=image_size, num_val=num_val, batch_size=8, eval_batch_size=20, num_workers=0, seed=0
    )


def sweep(options: argparse.Namespace) -> optuna.Study:
    """Runs the trials."""

    def score(trial: optuna.Trial) -> float:
        pl.seed_everything(0, verbose=False)
        task = make_task(trial.suggest_float("position_lr", options.low, options.high, log=True))
        trainer = pl.Trainer(
            max_steps=options.steps,
            val_check_interval=max(1, options.steps // 3),
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            callbacks=[Pruning(trial)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator=options.accelerator,
            devices=1,
        )
        trainer.fit(task, make_data(options.image_size, options.num_val))
        return float(trainer.callback_metrics[METRIC])

    study = optuna.create_study(
        study_name="position_lr",
        storage=options.storage,
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=options.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
    )
    study.optimize(score, n_trials=options.trials)
    return study


def main(arguments: list[str] | None = None) -> None:
    """Sweeps and prints the trials, the best first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a trial")
    parser.add_argument("--low", type=float, default=0.005, help="smallest rate, in pixels a step")
    parser.add_argument("--high", type=float, default=1.0, help="largest rate")
    parser.add_argument("--image-size", type=int, default=49)
    parser.add_argument("--num-val", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the rates that are tried")
    parser.add_argument("--storage", help="Optuna's storage, such as sqlite:///sweep.db (default: memory)")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--json", type=Path, help="write the trials to this file")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of few workers
        study = sweep(options)
    rows: list[dict[str, Any]] = [
        {"position_lr": trial.params["position_lr"], "state": trial.state.name.lower(), METRIC: trial.value}
        for trial in study.trials
    ]
    for row in sorted(rows, key=lambda row: (row["state"] != "complete", -(row[METRIC] or 0))):
        print(f"{row['position_lr']:8.4f}  {row[METRIC]:.3f}  {row['state']}")
    if options.json is not None:
        options.json.write_text(json.dumps({"steps": options.steps, "trials": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

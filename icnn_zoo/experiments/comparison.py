"""At the end of a run: a table and a picture of it beside stored results of the same configuration."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback
from matplotlib.figure import Figure
from rich.table import Table

from icnn_zoo.analysis.kernel_shapes import LayerShapes, layer_shapes
from icnn_zoo.analysis.shape_figures import draw_layer, reach
from icnn_zoo.experiments.catalog import EXPERIMENTS
from icnn_zoo.io.console import print_table
from icnn_zoo.io.files import replacing
from icnn_zoo.io.label_pictures import colored
from icnn_zoo.nn.irregular_conv import irregular_layers
from icnn_zoo.training.run_folder import RunFolder
from icnn_zoo.zoo.networks import load_checkpoint
from icnn_zoo.zoo.segmenter import Segmenter

STORED = Path(__file__).parent / "stored"
_SHOWN = ("regular", "dilation-2", "dilation-3", "dilation-4")
_ANY = ("seed", "num_workers", "eval_batch_size", "num_test")  # of data: without a part in the result


class Comparison(Callback):
    """Prints a run's score beside stored ones, and draws what it and a stored network make of one image.

    The stored results come with the package: mean and standard deviation over seeds of an experiment's rows, with the
    command that repeats them. A run whose data, network or length differ is not compared; what differs is printed.
    The picture, ``comparison.png`` of the run folder, has image, truth, the stored network's labels and this one's, and
    below them the kernel shapes that this run learned.

    Args:
        experiment: Name of the experiment, see :data:`icnn_zoo.experiments.catalog.EXPERIMENTS`.
        network: Checkpoint of the zoo, with regular layers, to draw beside this run's network.

    Raises:
        ValueError: No such experiment, or one without stored results; no such checkpoint, when training begins.
    """

    def __init__(self, experiment: str, network: str) -> None:
        file = STORED / f"{experiment}.json"
        if experiment not in EXPERIMENTS or not file.is_file():
            known = ", ".join(sorted(path.stem for path in STORED.glob("*.json")))
            raise ValueError(f"`experiment` must be one with stored results, {known}; got {experiment!r}.")
        self.experiment = experiment
        self.network = network
        self._stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        self._regular: Segmenter | None = None
        self._differences: list[str] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._differences = differences(self._stored["config"], _config(trainer))
        if not self._differences and irregular_layers(pl_module):
            self._regular = load_checkpoint(self.network, registry="default")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Later than on_fit_end, so that this comes last, below the run's own table. Not called after an error.
        if stage == "fit":
            self._compare(trainer, pl_module)

    def _compare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        key = f"val/{EXPERIMENTS[self.experiment].metric}"
        if not trainer.is_global_zero or key not in trainer.callback_metrics or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self._differences:
            print(f"Not compared with stored results, as this run differs in {', '.join(self._differences)}.")
            return
        print_table(self._table(key, float(trainer.callback_metrics[key]), bool(irregular_layers(pl_module))))
        print(f"The stored rows again: icnn-zoo reproduce {self.experiment} --rows {' '.join(_SHOWN)}")
        if self._regular is not None:
            path = RunFolder.of(trainer).path / "comparison.png"
            with replacing(path) as temporary:
                self._draw(trainer, pl_module, self._regular).savefig(temporary, dpi=110)
            print(f"Picture: {path.resolve()}")

    def _table(self, key: str, score: float, irregular: bool) -> Table:
        table = Table(title="accuracy in per cent", title_justify="left")
        for name in ("network", "accuracy", "from"):
            table.add_column(name, justify="right" if name == "accuracy" else "left")
        for row in _SHOWN:
            values = self._stored["rows"][row][key]["values"]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            where = f"stored, {len(values)} seeds" if len(values) > 1 else "stored, one seed"
            table.add_row(row, f"{statistics.fmean(values):.1f}{spread}", where)
        table.add_section()
        table.add_row("learned" if irregular else "regular", f"{100 * score:.1f}", "this run")
        return table

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, regular: Segmenter) -> Figure:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        sample = data.make_dataset("val")[0]
        image, truth = sample["image"], sample["mask"]
        was_training = pl_module.training
        pl_module.eval()
        with torch.inference_mode():
            images = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].to(pl_module.device)
            learned = pl_module.predict_step({"image": images}, 0)[0].cpu().numpy()
        pl_module.train(was_training)
        panels = {"image": image, "truth": colored(truth, data.palette)}
        for name, labels in (("regular", regular.predict(image)), ("learned", learned)):
            known = truth != data.ignore_index
            right = (labels[known] == truth[known]).mean()
            panels[f"{name}: {100 * right:.0f} %"] = colored(np.where(known, labels, truth), data.palette)
        return draw_comparison(panels, layer_shapes(pl_module))


def draw_comparison(panels: Mapping[str, np.ndarray], shapes: list[LayerShapes]) -> Figure:
    """Pictures in a row, and below them the shapes of layers.

    Args:
        panels: Title to picture, uint8 [H, W, 3], RGB.
        shapes: Layers; the last ones are drawn where there are more than pictures.

    Returns:
        A figure apart from pyplot.
    """
    cols = len(panels)
    figure = Figure(figsize=(2.5 * cols, 5.4), layout="constrained")
    for place, (title, picture) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(2, cols, place)
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    for place, layer in enumerate(shapes[-cols:], start=cols + 1):
        draw_layer(figure.add_subplot(2, cols, place), layer, reach(layer))
    return figure


def differences(stored: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """Names of the keys in which a run differs from a stored configuration, of those that have a part in the result.

    Where layers are irregular, and how their positions move, is what is compared: it may differ.
    """
    found = []
    for key, value in _leaves(stored):
        section, _, name = key.partition(".")
        last = name.rpartition(".")[2]
        if section == "model":
            relevant = not (
                name in ("start", "epsilon", "shapes", "per_kernel", "tied", "axes", "limit", "interpolation")
                or name.startswith(("position_", "bound_", "spread"))
            )
        elif section == "data":
            relevant = last not in _ANY
        else:
            relevant = key == "trainer.max_steps"
        if relevant and dict(_leaves(run)).get(key) != value:
            found.append(key)
    return found


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _config(trainer: pl.Trainer) -> dict[str, Any]:
    """The configuration that the command line gave a run; empty without one."""
    found = [callback.config for callback in trainer.callbacks if isinstance(callback, SaveConfigCallback)]  # type: ignore[attr-defined]
    return found[0].as_dict() if found else {}

"""The metrics of a card, measured: what ``lightning validate`` and ``lightning test`` say of its network."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from icnn_zoo.models.segmentation import SegmentationModel
from icnn_zoo.training.checkpoints import NO_LOSS
from icnn_zoo.training.lightning_cli import ZooCLI
from icnn_zoo.zoo.card_config import run_config
from icnn_zoo.zoo.cards import Card

TOLERANCE = 1e-3  # of a metric in 0 to 1: rounding turns over single pixels


def measure(
    model: SegmentationModel, config: Mapping[str, Any], metrics: Iterable[str], overrides: Sequence[str] = ()
) -> dict[str, float]:
    """Evaluates a network as a run's configuration says, in float32, on the device that Lightning chooses.

    Args:
        model: The network.
        config: A run's config.yaml, for its data and for how it evaluates.
        metrics: Names that validating or testing logs ("val/mIoU", "test/mIoU").
        overrides: Further arguments of the command line, such as "--data.init_args.root=elsewhere".

    Returns:
        The metrics by name.

    Raises:
        ValueError: The configuration does not fit, or a metric is not among those that are logged.
        FileNotFoundError: The data are not there; the message names the command that fetches them.
    """
    metrics = list(metrics)
    logging.disable(logging.INFO)  # Lightning tells of devices
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that `args` replace sys.argv, and that loaders have few workers
            cli = ZooCLI.build(
                {**config, "model": {**config.get("model", {}), **NO_LOSS, "pretrained": False, "compile": False}},
                overrides,
            )
            try:
                cli.model.model.load_state_dict(model.state_dict())
            except RuntimeError as error:
                raise ValueError(f"the configuration is of another network: {error}") from error
            found: dict[str, float] = {}
            for prefix, run in (("val/", cli.trainer.validate), ("test/", cli.trainer.test)):
                if any(name.startswith(prefix) for name in metrics):
                    run(cli.model, datamodule=cli.datamodule, verbose=False)
                    found |= {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    finally:
        logging.disable(logging.NOTSET)
    unknown = [name for name in metrics if name not in found]
    if unknown:
        raise ValueError(f"metrics {', '.join(unknown)} are not logged; there are {', '.join(sorted(found))}.")
    return {name: found[name] for name in metrics}


def check_metrics(model: SegmentationModel, card: Card, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Measures the metrics of a card and compares them with what it says.

    Args:
        model: Its network.
        card: The card; its training configuration says on which data.
        overrides: As in :func:`measure`.

    Returns:
        The measured metrics by name.

    Raises:
        ValueError: One differs by more than 0.001; else as :func:`measure`.
        FileNotFoundError: As :func:`measure`.
    """
    allow = [] if card.spec is None else [card.architecture]  # the network is of that class
    found = measure(model, run_config(card, allow), [metric.name for metric in card.metrics], overrides)
    for metric in card.metrics:
        if not abs(found[metric.name] - metric.value) <= TOLERANCE:
            raise ValueError(
                f"{card.name}: {metric.name} is {found[metric.name]:.4f}, its card says {metric.value:.4f}."
            )
    return found

"""What Hugging Face reads in a README: library, task, licence and metrics, as YAML at its beginning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index

from icnn_zoo.zoo.cards import Card

# Identifiers of the hub; what is not among them is "other" there, with a name.
_LICENCES = re.compile(
    r"apache-2\.0|mit|bsd-[23]-clause|isc|zlib|unlicense|wtfpl|openrail|cc0-1\.0|cc-by(-nc)?(-nd|-sa)?-4\.0|"
    r"[al]?gpl-3\.0|gpl-2\.0|mpl-2\.0|epl-2\.0|eupl-1\.[12]"
)
_METRICS = {"mIoU": "mean_iou", "pixel_accuracy": "accuracy"}  # names of the hub's own metrics


def front_matter(cards: Sequence[Card]) -> str:
    """The metadata of one or several checkpoints, for the beginning of a README.

    Args:
        cards: At least one.
    """
    licences = sorted({card.weights.licence for card in cards})
    known = all(_LICENCES.fullmatch(licence.lower()) for licence in licences)
    names = [licence.lower() for licence in licences]
    values: dict[str, Any] = ModelCardData(
        license=(names[0] if len(names) == 1 else names) if known else "other",  # type: ignore[arg-type]
        license_name=None if known else "-and-".join(map(_slug, names)),
        library_name="icnn-zoo",
        pipeline_tag="image-segmentation",
        tags=["image-segmentation", "semantic-segmentation", "irregular-convolution", *_backbones(cards)],
        metrics=sorted({_type(metric.name) for card in cards for metric in card.metrics}),
    ).to_dict()
    values["model-index"] = [
        model for card in cards for model in eval_results_to_model_index(card.name, _results(card))
    ]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n\n"


def _results(card: Card) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name="Semantic segmentation",
            dataset_type=_slug(card.dataset.name),
            dataset_name=card.dataset.name,
            dataset_split=metric.name.partition("/")[0],
            metric_type=_type(metric.name),
            metric_name=f"{metric.name} ({metric.protocol})",
            metric_value=metric.value,
        )
        for metric in card.metrics
    ]


def _type(name: str) -> str:
    short = name.partition("/")[2]
    return _METRICS.get(short, short.replace("/", "_"))


def _backbones(cards: Sequence[Card]) -> list[str]:
    return sorted({card.name.partition(".")[0] for card in cards})


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "other"

"""Cards for people: the README of a checkpoint, and the configuration that repeats its score."""

from __future__ import annotations

from collections.abc import Mapping

import jinja2
import yaml

from icnn_zoo.zoo.cards import Card

_README = """\
# {{ card.name }}

{{ card.description }}

| metric | value | protocol |
|---|---|---|
{% for metric in card.metrics -%}
| {{ metric.name|cell }} | {{ "%.4f"|format(metric.value) }} | {{ metric.protocol|cell }} |
{% endfor %}
| | |
|---|---|
{% for name, value in rows.items() -%}
| {{ name }} | {{ value|cell }} |
{% endfor %}
```python
import icnn_zoo

model = icnn_zoo.load_checkpoint("{{ card.name }}")
labels = model.predict("photograph.jpg")
```

```bash
icnn-zoo segment {{ card.name }} photograph.jpg --to picture.png
icnn-zoo show {{ card.name }} --config > config.yaml
lightning test -c config.yaml
```

{% for file, what in pictures.items() -%}
![{{ what }}]({{ file }})

{% endfor -%}
Everything else is in [card.json](card.json).
"""


def readme(card: Card, pictures: Mapping[str, str]) -> str:
    """The card for people, as Markdown.

    Args:
        card: The card.
        pictures: File names beside it, and what they show.
    """
    form = "regular" if card.conversion is None else f"irregular from `{card.conversion.start or 'the first layer'}` on"
    run = card.training
    rows = {
        "backbone": f"`{card.network['backbone']}`, {form}",
        "parameters": f"{card.weights.parameters:,}",
        "weights": f"{card.weights.size / 1e6:.1f} MB, {card.weights.licence}, sha256 `{card.weights.sha256}`",
        "training data": f"{card.dataset.name}, {card.dataset.split} ({card.dataset.licence})",
        "attribution": card.dataset.attribution,
        "trained": f"{run.steps} steps, seed {run.seed}, commit {run.commit or 'unknown'}",
        "classes": ", ".join(card.classes),
    }
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters["cell"] = _cell
    return environment.from_string(_README).render(card=card, rows=rows, pictures=pictures)


def training_config(card: Card) -> str:
    """The configuration of the run as YAML, with the checkpoint itself as ``pretrained``.

    ``lightning test -c`` on it gives the card's metric; ``lightning fit -c`` trains on from the checkpoint.
    """
    config = {
        **card.training.config,
        "model": {**card.training.config.get("model", {}), "pretrained": f"zoo:{card.name}"},
    }
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")

"""Cards for people: the README of a checkpoint, and the configuration that repeats its score."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jinja2
import yaml

from icnn_zoo.zoo.card_config import run_config
from icnn_zoo.zoo.cards import Card

_README = """\
# {{ card.name }}

{{ card.description|escaped }}

| metric | value | protocol |
|---|---|---|
{% for metric in card.metrics -%}
| {{ metric.name|escaped }} | {{ "%.4f"|format(metric.value) }} | {{ metric.protocol|escaped }} |
{% endfor %}
| | |
|---|---|
{% for name, value in rows.items() -%}
| {{ name }} | {{ value }} |
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
![{{ what|escaped }}]({{ file }})

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
        "weights": f"{card.weights.size / 1e6:.1f} MB, {_escape(card.weights.licence)}, sha256 `{card.weights.sha256}`",
        "training data": _escape(f"{card.dataset.name}, {card.dataset.split} ({card.dataset.licence})"),
        "attribution": _escape(" ".join(card.dataset.attribution.split())),
        "trained": f"{run.steps} steps, seed {run.seed}, commit {_escape(run.commit or 'unknown')}",
        "classes": _escape(", ".join(card.classes)),
    }
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters["escaped"] = _escape
    return environment.from_string(_README).render(card=card, rows=rows, pictures=pictures)


def training_config(card: Card, pin: str) -> str:
    """Seed, network and data of the run as YAML, with the checkpoint itself as ``pretrained``.

    ``lightning test -c`` on it gives the card's metric; ``lightning fit -c`` trains on from the checkpoint.

    Args:
        card: The card.
        pin: SHA-256 of card.json, so that the name keeps its meaning.

    Raises:
        ValueError: As :func:`icnn_zoo.zoo.card_config.run_config`.
    """
    config = run_config(card)
    config["model"] = {**config.get("model", {}), "pretrained": f"zoo:{card.name}@sha256:{pin}"}
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _escape(text: str) -> str:
    """Text that Markdown shows as it is: no links, pictures, tags or further cells of a table."""
    return re.sub(r"([\\`*<>\[\]|])", r"\\\1", text)

"""Cards for people: the README of a checkpoint, and the configuration that repeats its score."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import yaml

from icnn_zoo.zoo.card_config import run_config
from icnn_zoo.zoo.cards import Card
from icnn_zoo.zoo.indices import Index, Mark

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
![{{ what|escaped }}]({{ file|quoted }})

{% endfor -%}
Everything else is in [card.json](card.json).
"""


_REGISTRY = """\
{{ generated }}
# Checkpoints for icnn-zoo

| checkpoint | what |
|---|---|
{% for entry in entries -%}
| [{{ entry.name }}]({{ entry.name }}/README.md) | {% if entry.mark %}**{{ entry.mark|string|escaped }}** {% endif %}\
{{ entry.summary|escaped }} |
{% endfor %}
```python
import icnn_zoo

model = icnn_zoo.load_checkpoint("{{ example }}", registry="the address of this folder")
labels = model.predict("photograph.jpg")
```
"""

GENERATED = "<!-- made by icnn-zoo publish: remove this line to keep a text of your own -->"


def registry_readme(index: Index) -> str:
    """The README of a registry: what it lists, and how to take one.

    Args:
        index: The list, with at least one checkpoint.
    """
    example = next((entry.name for entry in index.checkpoints if not entry.mark), index.checkpoints[0].name)
    return _render(_REGISTRY, entries=index.checkpoints, example=example, generated=GENERATED)


def marked(text: str, mark: Mark | None) -> str:
    """A checkpoint's README that says below its title why it should not be used any more, or not any longer.

    Args:
        text: The README.
        mark: Why; None takes what it says off.
    """
    text = re.sub(r"^> \*\*(Superseded|Yanked)\*\*: .*\n\n", "", text, count=1, flags=re.MULTILINE)
    if mark is None:
        return text
    successor = f" Take [{mark.successor}](../{mark.successor}/README.md)." if mark.successor else ""
    note = f"> **{mark.kind.capitalize()}**: {_escape(mark.reason)}{successor}\n\n"
    return re.sub(r"^# .*\n\n", lambda title: title[0] + note, text, count=1, flags=re.MULTILINE)


def readme(card: Card, pictures: Mapping[str, str]) -> str:
    """The card for people, as Markdown.

    Args:
        card: The card.
        pictures: File names beside it, and what they show.
    """
    form = "regular" if card.conversion is None else f"irregular from `{card.conversion.start or 'the first layer'}` on"
    run = card.training
    rows = {
        "backbone" if card.spec is None else "network": f"`{card.architecture}`, {form}",
        "parameters": f"{card.weights.parameters:,}",
        "weights": f"{card.weights.size / 1e6:.1f} MB, {_escape(card.weights.licence)}, sha256 `{card.weights.sha256}`",
        "training data": _escape(f"{card.dataset.name}, {card.dataset.split} ({card.dataset.licence})"),
        "attribution": _escape(" ".join(card.dataset.attribution.split())),
        "trained": f"{run.steps} steps, seed {run.seed}, commit {_escape(run.commit or 'unknown')}",
        "classes": _escape(", ".join(card.classes)),
    }
    return _render(_README, card=card, rows=rows, pictures=pictures)


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters["escaped"] = _escape
    environment.filters["quoted"] = urllib.parse.quote
    return environment.from_string(template).render(values)


def training_config(card: Card, pin: str, allow: Sequence[str] | None = None) -> str:
    """Seed, network and data of the run as YAML, with the checkpoint itself as ``pretrained``.

    ``lightning test -c`` on it gives the card's metric; ``lightning fit -c`` trains on from the checkpoint.

    Args:
        card: The card.
        pin: SHA-256 of card.json, so that the name keeps its meaning.
        allow: As in :func:`icnn_zoo.load_checkpoint`.

    Raises:
        ValueError: As :func:`icnn_zoo.zoo.card_config.run_config`.
    """
    config = run_config(card, allow)
    config["model"] = {**config.get("model", {}), "pretrained": f"zoo:{card.name}@sha256:{pin}"}
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, as one paragraph: no links, pictures, tags, headings or cells of a table."""
    text = re.sub(r"([\\`*<>\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
    text = re.sub(r"(?i)\b(https?|www)(?=[:.])", r"\1\\", text)  # else a link by itself
    return re.sub(r"^([#+=~-])", r"\\\1", re.sub(r"^(\d+)([.)])", r"\1\\\2", text))  # a heading, list or rule

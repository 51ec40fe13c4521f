"""Metadata the checkpoint lacks (about.yaml)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from icnn_zoo.zoo.cards import Color, Dataset, Provenance, Record, Text, complaints

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg")


class MetricToBe(Record):
    """A metric of a card; where ``value`` is missing, it is measured."""

    name: Text
    value: float | None = None
    protocol: Text


class About(Record):
    """What a checkpoint does not say of itself: the file about.yaml.

    Attributes:
        description: One paragraph.
        licence: Of the weights.
        dataset: Name, split, licence and attribution of the training data.
        metrics: Names as ``lightning validate`` and ``test`` log them, protocols, and values, or none to measure them.
        palette: Colors by class, as #rrggbb; None for PASCAL VOC's colors.
        pictures: Picture files to publish too, and what they show.
        provenance: Packages and commit, for checkpoints that do not hold them.
    """

    description: Text
    licence: Text
    dataset: Dataset
    metrics: Annotated[list[MetricToBe], Field(min_length=1)]
    palette: list[Color] | None = None
    pictures: dict[str, Text] = Field(default_factory=dict)
    provenance: Provenance | None = None


def read_about(about: str | Path | Mapping[str, Any]) -> tuple[About, dict[str, Path]]:
    """What about.yaml says, and the pictures that it names, by their file names.

    Raises:
        FileNotFoundError: The file or a picture is not there.
        ValueError: It is not as :class:`About` wants it; the message names the keys.
    """
    base = Path()
    values: Any = about
    if isinstance(about, (str, Path)):
        base = Path(about).parent
        try:
            values = yaml.safe_load(Path(about).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"`about`: there is no file {str(about)!r}.") from error
        except yaml.YAMLError as error:
            raise ValueError(f"`about`: {str(about)!r} is not YAML: {' '.join(str(error).split())}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"`about`: {str(about)!r} is not a text in UTF-8: {error}") from error
    try:
        # Lists of YAML stand for tuples, as those of JSON do.
        wanted = About.model_validate(values, strict=False)
    except ValidationError as error:
        raise ValueError(f"`about`: {complaints(error)}") from error
    pictures: dict[str, Path] = {}
    for name in wanted.pictures:
        file = base / name
        if file.suffix.lower() not in _PICTURES:
            raise ValueError(f"`about`: a picture must be one of {', '.join(_PICTURES)}; got {name!r}.")
        if not file.is_file():
            raise FileNotFoundError(f"`about`: there is no picture {str(file)!r}.")
        if file.name in pictures:
            raise ValueError(f"`about`: two pictures are named {file.name!r}, and one folder will hold both.")
        pictures[file.name] = file
    return wanted, pictures

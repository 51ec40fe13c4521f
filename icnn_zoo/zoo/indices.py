"""The index of a registry: what it lists, what the files must be, and what should not be used any more."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, StringConstraints, model_serializer, model_validator

from icnn_zoo.zoo.cards import Line, Name, Record, Sha256, Size

INDEX = "index.json"
WEIGHTS = "model.safetensors"
CARD = "card.json"
README = "README.md"
PIN = "@sha256:"
_CARD_LIMIT = 5_000_000

Date = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$")]


class File(Record):
    """What a file must be."""

    sha256: Sha256
    size: Size


class Mark(Record):
    """Why a checkpoint should not be used any more.

    Attributes:
        kind: "superseded": there is a better one, and it loads with a warning. "yanked": it is wrong, and loads by its
            pin alone.
        reason: In a line.
        successor: The checkpoint to take instead.
    """

    kind: Literal["superseded", "yanked"]
    reason: Line
    successor: Name | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}" + (f" (take {self.successor})" if self.successor else "")


class Entry(Record):
    """A checkpoint in an index; its files are in the folder of its name."""

    name: Name
    summary: Line
    card: File
    weights: File
    mark: Mark | None = None

    @property
    def pin(self) -> str:
        """The name with the hash of the card, which holds that of the weights: it means the same for ever."""
        return f"{self.name}{PIN}{self.card.sha256}"

    @model_serializer(mode="wrap")
    def _without_no_mark(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What readers of format 2 know, unless there is a mark."""
        values: dict[str, Any] = handler(self)
        return values if self.mark else {key: value for key, value in values.items() if key != "mark"}

    @model_validator(mode="after")
    def _small_card(self) -> Entry:
        if self.card.size > _CARD_LIMIT:
            raise ValueError(f"the card of {self.name} must have at most {_CARD_LIMIT} bytes; got {self.card.size}")
        return self


class Index(Record):
    """The file index.json of a registry.

    Attributes:
        format: Version of this schema; 1 had neither version nor date, 3 has marks.
        version: Counts the changes of the index, so that an older one can be told from a newer one.
        date: Of the last change, UTC.
        checkpoints: What there is.
    """

    format: Literal[1, 2, 3]
    version: Annotated[int, Field(ge=0)] = 0
    date: Date | None = None
    checkpoints: tuple[Entry, ...]

    @model_validator(mode="after")
    def _parts_agree(self) -> Index:
        names = [entry.name for entry in self.checkpoints]
        if len(set(names)) < len(names):
            raise ValueError("`checkpoints` must have different names")
        if self.format == 1 and (self.version or self.date):
            raise ValueError("an index with `version` and `date` must have `format` 2")
        if self.format > 1 and not (self.version and self.date):
            raise ValueError(f"an index of `format` {self.format} must have a `version` of at least 1 and a `date`")
        if self.format < 3 and any(entry.mark for entry in self.checkpoints):
            raise ValueError("an index with a `mark` must have `format` 3")
        return self

    def changed(self, *entries: Entry) -> Index:
        """The next version, in which these entries are added or take the place of those of their names."""
        by_name = {entry.name: entry for entry in (*self.checkpoints, *entries)}
        return Index(
            format=3 if any(entry.mark for entry in by_name.values()) else 2,
            version=self.version + 1,
            date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            checkpoints=tuple(by_name[name] for name in sorted(by_name)),
        )

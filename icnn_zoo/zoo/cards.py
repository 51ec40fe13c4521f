"""The card of a checkpoint: all that is needed to rebuild its network, and to know where it comes from."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from icnn_zoo.models.backbones import check_backbone_args
from icnn_zoo.nn.class_paths import read_spec
from icnn_zoo.nn.spreads import Interpolation, SpreadPer
from icnn_zoo.nn.tap_restriction import Axes
from icnn_zoo.ops.sharing import Shapes, rename_per_kernel

FORMAT: Final = 1
NAME = r"[a-z0-9_]+\.[a-z0-9_-]+"

Text = Annotated[str, StringConstraints(pattern=r"\S")]
Line = Annotated[str, StringConstraints(pattern=r"^[^\n\t]*\S[^\n\t]*$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$", max_length=100)]
Module = Annotated[str, StringConstraints(pattern=r"^[\w.]*$", max_length=200)]
Color = Annotated[str, StringConstraints(pattern=r"^#[0-9a-f]{6}$")]
Size = Annotated[int, Field(gt=0, le=2**40)]
Side = Annotated[int, Field(gt=0, le=1025)]
Channels = Annotated[tuple[float, ...], Field(min_length=1, max_length=1024)]

_BOUNDS = {"head_dilation": 128, "output_stride": 64}  # of the network's arguments, where a larger one costs memory
_JOINERS = "\u200c\u200d"  # invisible, and needed by some scripts and emoji


class Record(BaseModel):
    """Data of a JSON file that is read strictly: no key too many or too few, no number written as text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Conversion(Record):
    """The arguments of :func:`icnn_zoo.convert`, and which layers share a shape (:func:`icnn_zoo.tie_shapes`)."""

    start: Module
    epsilon: Annotated[float, Field(ge=-16, le=16)]
    shapes: Shapes
    interpolation: Interpolation = "bilinear"
    spread_per: SpreadPer = "tap"
    axes: Axes = "both"
    limit: Annotated[float, Field(gt=0, le=4096)] | Literal["extent"] | None = None
    tied: list[list[Module]] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, data: Any) -> Any:
        return rename_per_kernel(data) if isinstance(data, dict) else data


class Dataset(Record):
    """What the network was trained on."""

    name: Line
    split: Line
    licence: Line
    attribution: Text


class Metric(Record):
    """A result; ``name`` is what ``lightning validate`` or ``lightning test`` logs, such as "test/mIoU"."""

    name: Annotated[str, StringConstraints(pattern=r"^(val|test)/\S[^\n\t]*$")]
    value: float
    protocol: Line


class Provenance(Record):
    """Versions of the packages and the commit that trained; None for an installed package without a repository."""

    packages: Annotated[dict[str, Line], Field(min_length=1)]
    commit: Line | None


Drawn = Annotated[float, Field(ge=-1e30, le=1e30)]  # what a curve can show


class Training(Provenance):
    """The run: its whole configuration (config.yaml), what else decided its result, and curves as (step, value)."""

    config: Annotated[dict[str, Any], Field(min_length=1)]
    seed: int
    steps: Annotated[int, Field(ge=0)]
    curves: dict[str, Annotated[tuple[tuple[int, Drawn], ...], Field(min_length=1)]] = Field(default_factory=dict)


class Weights(Record):
    """The file model.safetensors, and the licence under which it may be used."""

    sha256: Sha256
    size: Size
    parameters: Size
    licence: Line


class Golden(Record):
    """What the network answers to :func:`icnn_zoo.zoo.golden.golden_image`.

    The bounds are those within which a check is cheap and says something.
    """

    seed: Annotated[int, Field(ge=0, lt=2**31)]
    size: tuple[Side, Side]
    logits: Annotated[tuple[float, ...], Field(min_length=16, max_length=4096)]
    tolerance: Annotated[float, Field(gt=0, le=0.01)]
    labels: Annotated[
        tuple[Annotated[str, StringConstraints(pattern=r"^\d{1,3}( \d{1,3})*$")], ...],
        Field(min_length=1, max_length=1025),
    ]
    agreement: Annotated[float, Field(ge=0.9, le=1)]


class Card(Record):
    """A checkpoint, described: the file card.json.

    Attributes:
        format: Version of this schema.
        name: ``arch.tag``, with the backbone's timm name or the network's class as arch.
        description: One paragraph.
        network: Arguments of :class:`icnn_zoo.models.SegmentationModel` but for the classes, mean and std. A network of
            another package is named by its class; it is imported where the user allows it.
        conversion: Arguments of :func:`icnn_zoo.convert`; None for a regular network.
        classes: Names by index, background first.
        palette: Colors by class, as #rrggbb.
        mean: Of the channels in 0 to 1.
        std: Likewise.
        dataset: The training data.
        metrics: At least one result.
        training: The run.
        weights: The file.
        golden: A golden input and output.
    """

    format: Literal[1]
    name: Name
    description: Text
    network: dict[str, Any]
    conversion: Conversion | None
    classes: Annotated[tuple[Line, ...], Field(min_length=2, max_length=255)]
    palette: tuple[Color, ...]
    mean: Channels
    std: Channels
    dataset: Dataset
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)]
    training: Training
    weights: Weights
    golden: Golden

    @model_validator(mode="after")
    def _parts_agree(self) -> Card:
        check_backbone_args(self.network.get("backbone_args") or {})
        if self.spec is not None:
            path, arguments = read_spec("network", self.spec)
            for key, value in arguments.items():
                check_plain(value, f"`network.init_args.{key}`", 4096)
            architecture = path.rpartition(".")[2].lower()
        else:
            backbone = self.network.get("backbone")
            if not isinstance(backbone, str) or not re.fullmatch(r"\w+(\.\w+)?", backbone):
                raise ValueError("`network` must name its backbone as timm does")
            architecture = backbone.partition(".")[0]
        plain = {key: value for key, value in self.network.items() if key not in ("network", "backbone_args")}
        for key, value in plain.items():
            check_plain(value, f"`network.{key}`", _BOUNDS.get(key, 4096))
        if not self.name.startswith(f"{architecture}."):
            raise ValueError(f"`name` must be {architecture}.<tag>, after the backbone or class; got {self.name!r}")
        if len(self.palette) != len(self.classes):
            raise ValueError(f"`palette` must have a color for each of {len(self.classes)} classes")
        if min(self.std) <= 0:
            raise ValueError(f"`std` must be positive; got {self.std}")
        return self

    @property
    def spec(self) -> dict[str, Any] | None:
        """Class path and arguments of a network of another package; None for a backbone and its head."""
        return self.network.get("network")

    @property
    def colors(self) -> list[tuple[int, int, int]]:
        """The palette as numbers: red, green and blue in 0..255 of each class."""
        return [(color[0], color[1], color[2]) for color in (bytes.fromhex(text[1:]) for text in self.palette)]

    @property
    def architecture(self) -> str:
        """The backbone's timm name, or the network's class path."""
        return str(self.network.get("backbone") if self.spec is None else self.spec["class_path"])


AnyRecord = TypeVar("AnyRecord", bound=Record)


def check_plain(value: object, name: str, bound: float) -> None:
    """Checks that a value of a card is one that nothing can be made of: no class to build, no place to read.

    Args:
        value: None, a truth value, a number, a text, or a list of those.
        name: What to call it in messages.
        bound: The largest absolute value that a number may have.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(value, (list, tuple)):
        if len(value) > 256:
            raise ValueError(f"{name} must have at most 256 items; got {len(value)}")
        for item in value:
            if isinstance(item, (list, tuple)):
                raise ValueError(f"{name} must not hold lists of lists")
            check_plain(item, name, bound)
    elif isinstance(value, str):
        if len(value) > 300 or re.search(r"^[/\\~]|^\w:|\.\.|://|\$\{", value):
            raise ValueError(f"{name} must be a short text or a folder below the current one; got {value[:80]!r}")
    elif isinstance(value, (int, float)):
        if not abs(value) <= bound:
            raise ValueError(f"{name} must be at most {bound:g}; got {value:.6g}")
    elif value is not None:
        raise ValueError(
            f"{name} must be a number, a text, a truth value or a list of them; got a {type(value).__name__}"
        )


def parse(kind: type[AnyRecord], text: str | bytes, source: str) -> AnyRecord:
    """Reads a record from JSON.

    Args:
        kind: What to read.
        text: The JSON.
        source: What to call it in messages.

    Returns:
        The record.

    Raises:
        ValueError: It is not JSON, of a newer format, or not as the schema wants it; the message names the keys.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    version = data.get("format") if isinstance(data, dict) else None
    newest = max(get_args(kind.model_fields["format"].annotation), default=0) if "format" in kind.model_fields else 0
    if newest and isinstance(version, int) and version > newest:
        raise ValueError(
            f"{source} has format {version}; this version of icnn_zoo reads formats up to {newest}. "
            "Upgrade: pip install --upgrade icnn-zoo."
        )
    for string in _texts(data):
        if hidden := next((sign for sign in string if _is_hidden(sign)), None):
            raise ValueError(f"{source} has a control character, U+{ord(hidden):04X}, in {string[:80]!r}")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{source}: {complaints(error)}") from error


def _texts(data: Any) -> Iterator[str]:
    left = [data]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list):
            left += item


def _is_hidden(sign: str) -> bool:
    """Whether a character moves the cursor, turns the direction of writing, or ends a line unseen."""
    return sign not in "\n\t" + _JOINERS and unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def complaints(error: ValidationError) -> str:
    """One line on what a schema found wrong: the first five keys."""
    found = []
    for item in error.errors(include_url=False):
        place = ".".join(map(str, item["loc"]))
        came = "" if item["type"] in ("missing", "value_error") else f" (got {str(item['input'])[:80]!r})"
        found.append(f"{place}: {item['msg']}{came}" if place else item["msg"])
    more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
    return "; ".join(found[:5]) + more


def dump(record: Record) -> bytes:
    """A record as JSON, as it is stored and hashed."""
    return (json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n").encode()


def check_name(name: str) -> None:
    """Checks that a name is of the form ``arch.tag``, which is also what keeps it from leaving its folder.

    Raises:
        ValueError: It is not, or the tag is a file's ending, by which commands would take it for a file.
    """
    if name.endswith((".ckpt", ".yaml", ".yml", ".safetensors")):
        raise ValueError(f"a checkpoint's tag must not be the ending of a file; got {name!r}.")
    if not re.fullmatch(NAME, name) or len(name) > 100:
        raise ValueError(f"a checkpoint's name must be arch.tag, of a-z, 0-9, _ and - in the tag; got {name!r}.")

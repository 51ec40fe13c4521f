"""The experiments that can be repeated: the paper's tables and ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
ROWS = {"regular": "null", "classifier": "classifier", "layer4": "layer4", "layer3.11": "layer3.11", "layer3": "layer3"}


@dataclass(frozen=True)
class Experiment:
    """A table of the paper, or one of ours on data without a licence.

    Attributes:
        title: Heading of the table.
        config: Name of the file in ``configs/``.
        rows: What ``model.start`` is, by the name of the row; the first is the regular baseline.
        splits: Splits to evaluate with the weights of the last step.
        paper_gain: Gain of the irregular network in the paper, in points of mIoU; None where it says nothing.
        peers: Rows with a peer's layers in the place of irregular ones: what they are and where they start. Their
            program is ``icnn_zoo.experiments.peers``.
    """

    title: str
    config: str
    rows: Mapping[str, str] = field(default_factory=lambda: ROWS)
    splits: tuple[str, ...] = ("val",)
    paper_gain: float | None = None
    peers: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def starts(self) -> dict[str, str]:
        """What ``model.start`` is, by the name of the row, peers included."""
        return {**self.rows, **dict.fromkeys(self.peers, "null")}


EXPERIMENTS = {
    "table1": Experiment("PASCAL VOC 2012", "voc2012.yaml", paper_gain=2.5),
    "table2": Experiment("PASCAL-Context", "pascal_context.yaml", paper_gain=1.4),
    "table3": Experiment("Cityscapes", "cityscapes.yaml", paper_gain=1.9),
    "drawn-voc": Experiment(
        "Drawings of the VOC classes",
        "drawn_voc.yaml",
        {
            "regular": "null",
            "classifier": "classifier",
            "blocks.6": "blocks.6",
            "blocks.4": "blocks.4",
            "blocks.2": "blocks.2",
        },
        ("val", "test"),
        peers={"dilation": ("dilation", "blocks.4"), "deformable": ("deformable", "blocks.4")},
    ),
    "drawn-voc-dense": Experiment(
        "Drawings of the VOC classes, dense convolutions (ResNet-18 from scratch)",
        "drawn_voc_dense.yaml",
        {"regular": "null", "classifier": "classifier", "layer4": "layer4", "layer3": "layer3"},
        ("val", "test"),
    ),
}


def find_config(name: str) -> Path:
    """The file of a config that comes with the package, such as "quickstart.yaml".

    Raises:
        FileNotFoundError: There is none of this name; the message lists those there are.
    """
    path = CONFIGS / name
    if not path.is_file():
        known = ", ".join(sorted(file.name for file in CONFIGS.glob("*.yaml")))
        raise FileNotFoundError(f"there is no config {name!r} in the package; it has {known}.")
    return path

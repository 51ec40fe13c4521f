"""The experiments that can be repeated: the paper's tables, and ours on data without a license."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
_CONTROLS = "icnn_zoo.training.callbacks.position_controls"
# By the optimizer alone: the rule "layer" does not follow gradients that disagree, so that nothing would walk.
_WALK = ("--trainer.callbacks+", f"{_CONTROLS}.RandomWalk", "--model.position_rule", "optimizer")
_RANDOM = ("--trainer.callbacks+", f"{_CONTROLS}.RandomShapes")
_NEVER_MOVED = ("--model.position_lr", "0")


@dataclass(frozen=True)
class Row:
    """One network of a table.

    Attributes:
        start: What ``model.start`` is.
        peer: Name of a peer that stands in the place of irregular layers, and the first module with its layers; empty
            for none. Its program is ``icnn_zoo.experiments.peers``.
        arguments: What the row says beyond that, such as ``("--model.position_lr", "0")``.
        baseline: Row over which the gain is taken; None for the table's first.
        seeds: Seeds that are run unless others are asked for; None for the experiment's.
    """

    start: str = "null"
    peer: tuple[str, str] | tuple[()] = ()
    arguments: tuple[str, ...] = ()
    baseline: str | None = None
    seeds: tuple[int, ...] | None = None

    def command(self) -> list[str]:
        """The row's part of a command line."""
        peer = ["--model.peer", self.peer[0], "--model.peer_start", self.peer[1]] if self.peer else []
        return [*peer, "--model.start", self.start, *self.arguments]


@dataclass(frozen=True)
class Experiment:
    """A table of the paper, or one of ours on data without a license.

    Attributes:
        title: Heading of the table.
        config: Name of the file in ``configs/``.
        rows: The networks by name; the first is the regular baseline.
        splits: Splits to evaluate with the weights of the last step.
        variants: Further evaluations on the test split by name, and the arguments that make each differ.
        metric: Which of the metrics of a split the table is of, such as "mIoU".
        seeds: Seeds of the rows that do not name their own.
        paper_gain: Gain of the irregular network in the paper, in points of mIoU; None where it says nothing.
    """

    title: str
    config: str
    rows: Mapping[str, Row]
    splits: tuple[str, ...] = ("val",)
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    metric: str = "mIoU"
    seeds: tuple[int, ...] = (0,)
    paper_gain: float | None = None

    @property
    def regular(self) -> str:
        """Name of the row that gains are taken over, unless a row names another."""
        return next(iter(self.rows))

    @property
    def evaluations(self) -> tuple[str, ...]:
        """Names of the splits and variants, in the order of the table's columns."""
        return (*self.splits, *self.variants)

    def seeds_of(self, row: str) -> tuple[int, ...]:
        """The seeds that a row is run with unless others are asked for."""
        return self.rows[row].seeds or self.seeds


def _starts(*starts: str) -> dict[str, Row]:
    return {"regular": Row(), **{start: Row(start) for start in starts}}


_PAPER = _starts("classifier", "layer4", "layer3.11", "layer3")


def _lines() -> dict[str, Row]:
    first = "layer1"
    regular, learned = Row(), Row(first)
    rows = {
        "regular": regular,
        **{f"dilation-{step}": _dilated(first, step) for step in (2, 3, 4)},
        "learned": learned,
        "walk": Row(first, arguments=_WALK),
        "frozen": Row(first, arguments=(*_RANDOM, *_NEVER_MOVED)),
        "oracle-1x9": Row(peer=("row", first)),
        "dcls": Row(peer=("dcls", first), seeds=(0, 1, 2)),  # ten to fifteen minutes of a core each
        "deformable": Row(peer=("deformable", first), seeds=(0, 1, 2)),
    }
    # How anisotropic the task is: pages turned by up to so many degrees; by up to 90 no direction is preferred.
    for degrees in (10, 20, 45, 90):
        turned = ("--data.init_args.rotation", f"[-{degrees}, {degrees}]")
        suffix = f"-turned-{degrees}"
        for name, row in {"regular": regular, "dilation-2": rows["dilation-2"], "learned": learned}.items():
            rows[name + suffix] = Row(row.start, row.peer, (*row.arguments, *turned), baseline="regular" + suffix)
    return rows


def _geometries(first: str, *arguments: str) -> dict[str, Row]:
    """Every interpolation and sharing by name."""
    rows = {}
    for interpolation in ("bilinear", "triangle", "gaussian"):
        for shapes in ("layer", "channel", "kernel"):
            choice = ("--model.interpolation", interpolation, "--model.shapes", shapes)
            rows[f"{interpolation}-{shapes}"] = Row(first, arguments=(*choice, *arguments))
    return rows


def _turned_geometries() -> dict[str, Row]:
    """On pages turned by up to 20 degrees: upright ones are too easy to tell them."""
    turned = ("--data.init_args.rotation", "[-20, 20]")
    return {"regular": Row(arguments=turned), **_geometries("layer1", *turned)}


def _documents() -> dict[str, Row]:
    first = "layer3"
    steps = ("--trainer.max_steps", "2400")
    last = "layer4.0.conv2"  # the layers whose displacements several trainings agree on by half
    geometries = _geometries("classifier")  # where all of the gain can be had; a shape per kernel is dear elsewhere
    del geometries["bilinear-channel"]  # the row "classifier"
    return {
        **_starts("classifier", "layer4"),
        "learned": Row(first),
        "layer2": Row("layer2"),
        last: Row(last),
        **{f"dilation-{step}": _dilated(first, step) for step in (2, 3)},
        # By AdamW, as on the lines; at this rate positions come about as far as learned ones, 0.4 px in the mean.
        "walk": Row(first, arguments=(*_WALK, "--model.position_lr", "0.02")),
        "frozen": Row(first, arguments=(*_RANDOM, *_NEVER_MOVED)),
        # Equal time: a learned step takes nearly half as long again. Equal parameters: 1.27 million, as learned.
        "longer": Row(arguments=("--trainer.max_steps", "1200")),
        "wider": Row(
            arguments=("--model.backbone_args", '{"channels": [32, 64, 128, 260], "stem_width": 16}'),
        ),
        # Three times the steps: whether a difference is still there when the curves are flatter.
        "regular-2400": Row(arguments=steps),
        "learned-2400": Row(first, arguments=steps, baseline="regular-2400"),
        "classifier-2400": Row("classifier", arguments=steps, baseline="regular-2400"),
        f"{last}-2400": Row(last, arguments=steps, baseline="regular-2400"),
        "head-dilation-1-2400": Row(arguments=("--model.head_dilation", "1", *steps), baseline="regular-2400"),
        # As far as learned positions come in these layers in so many steps, 0.9 px and 0.6 px in the mean.
        f"{last}-walk-2400": Row(
            last, arguments=(*_WALK, "--model.position_lr", "0.017", *steps), baseline="regular-2400"
        ),
        # Equal time: a step that learns shapes there takes 1.24 times as long.
        "regular-2976": Row(arguments=("--trainer.max_steps", "2976"), baseline="regular-2400"),
        **geometries,
        **_kernel_controls("classifier"),
    }


def _kernel_controls(head: str) -> dict[str, Row]:
    """What a shape per kernel in the head is compared with."""
    rows = _geometries(head)
    kernel = rows["bilinear-kernel"].arguments
    return {
        # Walking positions end as far as learned ones in the mean, 0.24 px; random ones 0.31 px.
        "kernel-walk": Row(head, arguments=(*_WALK, "--model.position_lr", "0.012", *kernel)),
        "kernel-frozen": Row(head, arguments=(*_RANDOM, "--trainer.callbacks.spread", "0.25", *_NEVER_MOVED, *kernel)),
        # The head's own dilation, 2, was chosen by the pitch of the lines.
        **{f"head-dilation-{step}": Row(arguments=("--model.head_dilation", str(step))) for step in (1, 3, 4)},
        "kernel-dilation-1": Row(head, arguments=(*kernel, "--model.head_dilation", "1"), baseline="head-dilation-1"),
        "channel-dilation-1": Row(head, arguments=("--model.head_dilation", "1"), baseline="head-dilation-1"),
        # 36,864 weights more, where positions of a shape per kernel are 41,472.
        "head-filled": Row(peer=("filled", head)),
    }


def _dilated(start: str, dilation: int) -> Row:
    return Row(peer=("dilation", start), arguments=("--model.peer_dilation", str(dilation)))


EXPERIMENTS = {
    "table1": Experiment("PASCAL VOC 2012", "voc2012.yaml", _PAPER, paper_gain=2.5),
    "table2": Experiment("PASCAL-Context", "pascal_context.yaml", _PAPER, paper_gain=1.4),
    "table3": Experiment("Cityscapes", "cityscapes.yaml", _PAPER, paper_gain=1.9),
    "drawn-voc": Experiment(
        "Drawings of the VOC classes",
        "drawn_voc.yaml",
        {
            **_starts("classifier", "blocks.6", "blocks.4", "blocks.2"),
            "dilation": Row(peer=("dilation", "blocks.4")),
            "deformable": Row(peer=("deformable", "blocks.4")),
        },
        ("val", "test"),
    ),
    "drawn-voc-dense": Experiment(
        "Drawings of the VOC classes, dense convolutions (ResNet-18 from scratch)",
        "drawn_voc_dense.yaml",
        _starts("classifier", "layer4", "layer3"),
        ("val", "test"),
    ),
    "documents": Experiment(
        "Pages of documents (half a ResNet-10t, from scratch)",
        "documents.yaml",
        _documents(),
        ("val", "test"),
        {"scans": ("--data.init_args.scans", "true")},
        seeds=(0, 1, 2, 3, 4),
    ),
    "geometries": Experiment(
        "Which interpolation and sharing, on turned lines of glyphs",
        "quickstart.yaml",
        _turned_geometries(),
        metric="pixel_accuracy",
        seeds=(0, 1, 2, 3, 4),
    ),
    "lines": Experiment(
        "Lines of glyphs, the positive control",
        "quickstart.yaml",
        _lines(),
        metric="pixel_accuracy",
        seeds=tuple(range(10)),
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

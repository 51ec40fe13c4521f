"""``icnn-zoo reproduce``: the paper's tables and those of the documentation."""

from __future__ import annotations

import argparse
from pathlib import Path

from icnn_zoo.cli.options import Command
from icnn_zoo.io.files import user_path


def _reproduce_options(parser: argparse.ArgumentParser) -> None:
    from icnn_zoo.experiments.catalog import EXPERIMENTS

    rows = "; ".join(f"{name}: {', '.join(experiment.rows)}" for name, experiment in EXPERIMENTS.items())
    parser.description = f"{_reproduce.__doc__} Interrupted runs go on, finished ones are kept."
    parser.epilog = f"What follows -- goes to every run, such as -- --trainer.devices 4. Rows of {rows}."
    parser.add_argument("name", choices=list(EXPERIMENTS), help="which table")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="rows to run (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="seeds of each row (default: the row's own)")
    parser.add_argument("--out", type=user_path, default=Path("runs/reproduce"), help="folder of the runs and tables")
    parser.add_argument("--config", type=user_path, help="YAML file (default: the experiment's own)")


def _reproduce(options: argparse.Namespace) -> None:
    """Runs the rows of a table of the paper that are missing, and writes the table."""
    from icnn_zoo.experiments.runner import reproduce

    table = reproduce(
        options.name,
        rows=options.rows,
        seeds=options.seeds,
        out=options.out,
        config=options.config,
        overrides=options.overrides,
    )
    print(f"{table.read_text(encoding='utf-8')}\nTable: {table.resolve()}")


COMMANDS = {"reproduce": Command(_reproduce, _reproduce_options, overrides=True)}

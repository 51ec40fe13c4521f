"""Printing on any terminal: names that people chose may hold characters that it cannot show."""

from __future__ import annotations

import sys

from rich.console import Console, RenderableType
from rich.measure import Measurement


def print_table(table: RenderableType) -> None:
    """Prints a table, whole, with ``?`` for characters that the terminal's encoding lacks, as a Windows console's may.

    Cells with names that people chose must be :class:`rich.text.Text`: in a string, brackets would be markup.
    """
    console = Console()
    # Rich would cut what is too narrow, a number like any text: a terminal breaks the line, and loses nothing.
    needed = Measurement.get(console, console.options.update(width=10_000), table).minimum
    console.width = max(console.width, needed)
    with console.capture() as captured:
        console.print(table)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    sys.stdout.write(captured.get().encode(encoding, "replace").decode(encoding))


def replace_unprintable() -> None:
    """Makes ``print`` write ``?`` for characters that the terminal's encoding lacks, where it would raise an error."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:  # a notebook's has none, and takes everything
        reconfigure(errors="replace")

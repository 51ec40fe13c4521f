"""Tables as plain text, for reports that are printed, logged or stored."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence


def text_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Lines of columns that are as wide as their longest cell, however wide the terminal is.

    Args:
        rows: Cells of each row, which are not read as markup.
        right: Columns that are aligned to the right.
    """
    # Here, as a plan can be had without rich being loaded.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    for column in range(max(map(len, rows), default=0)):
        table.add_column(justify="right" if column in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    file = io.StringIO()
    Console(file=file, width=10_000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

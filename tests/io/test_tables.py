"""Tables as plain text."""

from icnn_zoo.io.tables import text_table


def test_columns_are_aligned_and_cells_stay_as_they_are():
    rows = [("a", "1.0", "[red]x"), ("bb", "10.0", "y" * 300)]
    assert text_table(rows, right=[1]) == f"a    1.0  [red]x\nbb  10.0  {'y' * 300}"
    assert text_table([]) == ""

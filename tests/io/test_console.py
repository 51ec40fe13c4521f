"""Names that people chose are printed as they are, on any terminal."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.table import Table
from rich.text import Text

from icnn_zoo.analysis import shape_statistics, statistics_table
from icnn_zoo.cli.programs import zoo_main
from icnn_zoo.io.console import print_table
from icnn_zoo.nn.irregular_conv import IrregularConv2d
from icnn_zoo.training.callbacks.monitors import ScoreTable
from icnn_zoo.training.scores import score_names

NAMES = ["[wet]", "a[/b]", ":dog:", "日本"]


def windows_console(monkeypatch) -> io.BytesIO:
    """Makes the terminal a Windows console; returns what is written to it, bytes of cp1252."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252", write_through=True))
    return written


def show_scores() -> None:
    values = {name: torch.tensor(0.5) for name in score_names("val", NAMES)}
    values |= {
        key: torch.tensor(0.5) for kind in ("Dice", "precision", "recall") for key in score_names("val", NAMES, kind)
    }
    values |= {f"val/{name}": torch.tensor(0.5) for name in ("mIoU", "mIoU_background", "pixel_accuracy")}
    trainer = SimpleNamespace(callback_metrics=values, is_global_zero=True)
    ScoreTable().on_fit_end(trainer, SimpleNamespace(class_names=NAMES))


def test_scores_of_classes_with_any_names_are_printed(capsys):
    show_scores()
    text = capsys.readouterr().out
    for name in [*NAMES, "mIoU of [wet] everywhere"]:
        assert name in text


def test_a_console_without_the_characters_shows_question_marks(monkeypatch):
    windows = windows_console(monkeypatch)
    show_scores()
    text = windows.getvalue().decode("cp1252")
    assert "a[/b]" in text
    assert "??" in text


def test_layers_with_any_names_are_listed(capsys):
    network = torch.nn.Module()
    network.add_module("a[/b]", IrregularConv2d(2, 2, 3))
    print_table(statistics_table(shape_statistics(network)))
    assert "a[/b]" in capsys.readouterr().out


def test_programs_print_on_any_console(monkeypatch):
    windows = windows_console(monkeypatch)
    with pytest.raises(SystemExit):
        zoo_main(["plan", "--help"])
    print("日本")
    assert windows.getvalue().endswith(b"??\n")


def test_cells_are_not_markup(capsys):
    table = Table("name")
    table.add_row(Text("[red]x"))
    print_table(table)
    assert "[red]x" in capsys.readouterr().out


def test_what_is_wider_than_the_terminal_is_not_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    table = Table("name", "signal")
    table.add_row("a_layer_with_a_name_that_is_much_too_long", "73 %")
    print_table(table)
    out = capsys.readouterr().out
    assert "a_layer_with_a_name_that_is_much_too_long" in out
    assert "73" in out

"""The study of rules of positions runs every rule, goes on where it stopped, and reports."""

import dataclasses
import json
import sys

import position_rules
import position_rules_report
import pytest
import torch

from icnn_zoo.data import LinesDataModule

RULES = ("regular", "dilation 2", "layer 0.1", "layer-shared 0.1", "steep 0.1")
OTHERS = ("adamw 0.03", "soft 0.1", "steep-trust 0.1", "sgd 5", "unit 0.01", "walk 0.1", "frozen 0.5")


def tiny_lines(seed, root):
    return LinesDataModule(image_size=33, num_classes=4, num_val=4, batch_size=4, num_workers=0, seed=seed)


@pytest.fixture
def study(monkeypatch):
    monkeypatch.setattr(position_rules, "EVALUATE", 6)
    monkeypatch.setattr(position_rules_report, "SETTLED", 1)
    monkeypatch.setattr(position_rules_report, "WINDOW", 2)
    for name in ("lines", "lines-pretrained"):
        short = dataclasses.replace(position_rules.TASKS[name], data=tiny_lines, steps=6, schedule=6)
        monkeypatch.setitem(position_rules.TASKS, name, short)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("study")
def test_every_rule_runs_once_and_is_reported(tmp_path, monkeypatch, capsys):
    def main(module, *arguments):
        monkeypatch.setattr(
            sys, "argv", ["program", "--folder", str(tmp_path / "work"), "--out", str(tmp_path), *arguments]
        )
        module.main()

    for _ in range(2):  # the second time there is nothing left to do
        main(position_rules, "--tasks", "lines", "--rules", *RULES, *OTHERS)
        main(position_rules, "--tasks", "lines-pretrained", "--rules", "regular", "layer 0.1", "--seeds", "0", "1")
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == len(RULES) + len(OTHERS) + 4
    first = [run["losses"][0] for run in runs if run["task"] == "lines-pretrained" and run["seed"] == 0]
    assert first[0] == pytest.approx(first[1], abs=1e-3)  # the same weights, and positions epsilon apart
    moved = {run["rule"]: run["displacement"] for run in runs if run["task"] == "lines"}
    assert not moved["regular"]
    assert not moved["dilation 2"]
    assert all(moved[rule]["classifier"]["mean"] > 0 for rule in (*OTHERS, "layer 0.1", "steep 0.1"))
    main(position_rules_report)
    assert "| layer 0.1 | 0, 1 |" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "signal.json").read_text())["lines-pretrained"]) == {"layer 0.1"}
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_page_shows_the_tables_that_the_stored_runs_give(tmp_path, monkeypatch, capsys):
    results = position_rules.RESULTS
    for name in ("runs.jsonl", "signal.json"):
        (tmp_path / name).write_text((results / name).read_text())
    monkeypatch.setattr(sys, "argv", ["program", "--folder", str(tmp_path), "--out", str(tmp_path)])
    position_rules_report.main()
    page = (results.parent / "position_rules.md").read_text()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows
    assert all(row in page for row in rows)

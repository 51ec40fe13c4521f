"""The report of trainings: what is summed up, and that the page about them says so."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import training_report
from PIL import Image
from training_report import read_run, summarise, table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def write_run(folder, val, test, *attempts):
    """A run as reproduce leaves it; each attempt is a list of (step, loss)."""
    for number, steps in enumerate(attempts):
        pictures = folder / f"attempt_{number}" / "pictures"
        pictures.mkdir(parents=True)
        rows = "".join(f"{step},{loss},\n" for step, loss in steps)
        text = f"step,train/loss,val/mIoU\n{rows}{steps[-1][0]},,{val}\n"
        (folder / f"attempt_{number}" / "metrics.csv").write_text(text)
        Image.fromarray(np.full((8, 24, 3), number, np.uint8)).save(pictures / "step_000004_scene.png")
    record = {"metrics": {"val/mIoU": val, "test/mIoU": test}, "attempts": len(attempts), "finished": "now"}
    record |= {"versions": {"torch": "2"}, "overrides": [], "config": {"seed_everything": 0}}
    (folder / "result.json").write_text(json.dumps(record))


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "regular" / "seed_0", 0.30, 0.20, [(1, 3.0), (2, 2.0), (3, 1.9)], [(3, 1.5), (4, 1.0)])
    write_run(tmp_path / "regular" / "seed_1", 0.32, 0.22, [(1, 3.0), (4, 1.0)])
    write_run(tmp_path / "blocks.4" / "seed_1", 0.35, 0.21, [(1, 3.0), (4, 0.9)])
    return tmp_path


def test_a_step_that_was_repeated_counts_as_it_was_repeated(runs):
    assert read_run(runs / "regular" / "seed_0")["train/loss"] == [(1, 3.0), (2, 2.0), (3, 1.5), (4, 1.0)]
    assert summarise(runs / "regular" / "seed_0")["val/mIoU best on the way"] == 0.30


def test_the_report_takes_gains_seed_by_seed_and_shows_the_last_predictions(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    write_run(runs / "blocks.4" / "seed_0", 0.33, 0.20, [(1, 3.0), (4, 0.9)])
    monkeypatch.setattr(sys, "argv", ["training_report.py", str(runs), "--out", str(out)])
    training_report.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| regular | 0, 1 | 31.00 ± 1.41 | - | 21.00 ± 1.41 | - |")
    assert lines[3].startswith("| blocks.4 | 0, 1 | 34.00 ± 1.41 | 3.00 ± 0.00 | 20.50 ± 0.71 | -0.50 ± 0.71 |")
    with Image.open(out / "predictions.png") as picture:
        assert picture.size == (32, 8)
        assert picture.getpixel((20, 0)) == (1, 1, 1)  # of the attempt that ended the run
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rows"].keys() == {"regular", "blocks.4"}
    assert (out / "curves.png").is_file()


def test_runs_of_two_experiments_are_no_report(runs, tmp_path, monkeypatch):
    record = json.loads((runs / "regular" / "seed_1" / "result.json").read_text())
    (runs / "regular" / "seed_1" / "result.json").write_text(json.dumps({**record, "overrides": ["--x", "1"]}))
    monkeypatch.setattr(sys, "argv", ["training_report.py", str(runs), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        training_report.main()
    assert not (tmp_path / "out").exists()


def test_the_page_of_the_drawings_has_the_reports_table():
    summary = json.loads((RESULTS / "drawn_voc" / "summary.json").read_text())
    page = (RESULTS / "drawn_voc.md").read_text(encoding="utf-8")
    for line in table(summary["rows"]).splitlines():
        assert line in page
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in ("regular", "blocks.4"):
        mean = 100 * np.mean([run["metrics"]["val/mIoU"] for run in summary["rows"][row].values()])
        assert re.search(rf"\| {mean:.2f} ±", readme)


def test_new_scenes_of_known_artists_stand_on_the_page_as_measured():
    scores = json.loads((RESULTS / "drawn_voc" / "artists.json").read_text())["rows"]
    page = (RESULTS / "drawn_voc.md").read_text(encoding="utf-8")
    for split in ("train", "val"):
        gains = [100 * (scores["blocks.4"][seed][split] - scores["regular"][seed][split]) for seed in scores["regular"]]
        assert f"{np.mean(gains):.2f}, {np.std(gains, ddof=1):.2f} |" in page

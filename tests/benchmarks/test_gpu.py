"""The command for those who have a GPU runs here, in small, without what such a machine may lack."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the package triton (pip install triton)")

ROOT = Path(__file__).parents[2]
ABSENT = ["albumentations", "wandb", "jsonargparse", "pydantic", "platformdirs", "tenacity", "lightning", "DCLS"]
REHEARSAL = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT}))  # an import of these raises
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def test_one_command_writes_a_folder_and_goes_on_where_time_was_short(tmp_path):
    folder = tmp_path / "results"

    def rehearse(seconds):
        command = [sys.executable, "-W", "ignore", "-c", REHEARSAL, "--rehearse", "--out", folder, "--seconds", seconds]
        return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)

    short = rehearse(0)
    assert short.returncode == 3, short.stderr
    assert "card: no time left; the same command goes on from here" in short.stdout
    full = rehearse(10**6)
    assert full.returncode == 0, full.stderr
    states = json.loads((folder / "parts.json").read_text())
    assert {part: state["status"] for part, state in states.items()} == dict.fromkeys(
        ("card", "gate", "layers", "step", "tests"), "done"
    )
    assert all(result["passed"] for result in json.loads((folder / "gate.json").read_text()))
    report = (folder / "report.md").read_text()
    for text in ("rehearsal on ", "0 failed.", "| head | ", "| layer3 | ", "irregular from layer4.1: "):
        assert text in report
    assert (tmp_path / "results.zip").is_file()

"""Examples in docstrings and in the README run as they stand."""

import doctest
import importlib
import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "icnn_zoo").rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_readme_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_readme_numbers_stand_in_the_committed_results():
    """The table of training results is the one that the report makes of the committed metrics."""
    summary = json.loads((ROOT / "benchmarks" / "results" / "drawn_voc" / "summary.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for run in summary.values():
        for key in ("val_mIoU_last", "val_mIoU_best", "test_mIoU"):
            assert f"{100 * run[key]:.1f}" in readme


def test_readme_speeds_stand_in_the_committed_results():
    """Every ratio of this package's column, and that of the whole training steps."""
    results = ROOT / "benchmarks" / "results"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first, second = (json.loads((results / name).read_text()) for name in ("cpu_2cores.json", "cpu_2cores_spread.json"))
    shapes = [*first["shapes"], *(shape for shape in second["shapes"] if shape["name"] != "layer3")]
    assert len(shapes) == 11
    for shape in shapes:
        ratios = [statistics.median(record["ratios"]) for record in shape["records"] if record["peer"] == "icnn_zoo"]
        assert f"| {ratios[0]:.2f} / {ratios[1]:.2f} |" in readme, shape["name"]
    for step in (second["training_step"], json.loads((results / "training_step_cpu_2cores.json").read_text())):
        regular, irregular = step["seconds_per_step"].values()
        ratio = statistics.median(ours / base for ours, base in zip(irregular, regular, strict=True))
        assert re.search(rf"{ratio:.2f} times the\s+regular one's", readme)

"""Examples in docstrings and in the README run as they stand."""

import doctest
import importlib
import re
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
    import json

    summary = json.loads((ROOT / "benchmarks" / "results" / "drawn_voc" / "summary.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for run in summary.values():
        for key in ("val_mIoU_last", "val_mIoU_best", "test_mIoU"):
            assert f"{100 * run[key]:.1f}" in readme

"""How the package is built: what an import loads, what lies where, what a module may reach."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import icnn_zoo

ROOT = Path(__file__).parents[1]
PACKAGE = Path(icnn_zoo.__file__).parent
SOURCES = {path.relative_to(PACKAGE): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("library", ["lightning", "timm", "matplotlib", "albumentations", "wandb", "torchvision"])
def test_importing_the_package_does_not_load(library):
    code = f"import sys, icnn_zoo; sys.exit({library!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_package_holds_rooms_and_few_files():
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    files = {name for name in entries if (PACKAGE / name).is_file()}
    assert files == {"__init__.py", "__main__.py", "_version.py", "optim.py", "py.typed"}


def test_the_package_reads_nothing_outside_of_itself():
    for path, text in SOURCES.items():
        for steps in re.findall(r"Path\(__file__\)\.parents\[(\d+)\]", text):
            assert int(steps) < len(path.parts), path
        assert "Path(__file__).parent.parent" not in text, path


def test_no_function_has_the_name_of_its_module():
    for path, text in SOURCES.items():
        defined = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert path.stem not in defined, path


def test_no_file_holds_two_ideas():
    assert {path: lines for path, text in SOURCES.items() if (lines := text.count("\n")) > 400} == {}


def test_the_picture_of_the_rooms_shows_the_rules():
    rooms = runpy.run_path(str(ROOT / "docs" / "rooms.py"))
    assert rooms["PICTURE"].read_text(encoding="utf-8") == rooms["draw"]()
    drawn = {room for floor in rooms["floors"]() for room in floor}
    assert drawn == {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} | {"optim"}


def test_the_files_that_contributors_are_sent_to_are_there():
    for page in (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"):
        for name in re.findall(r"`([\w./-]+/[\w./-]*)`", page.read_text(encoding="utf-8")):
            if "NAME" not in name and not name.startswith(("build/", "bash")):
                assert (ROOT / name).exists() or (PACKAGE / name).exists(), (page.name, name)

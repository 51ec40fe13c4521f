"""What the package imports is what pyproject.toml declares."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
COME_WITH_OTHERS = {"jsonargparse", "cuda", "triton"}  # with lightning's extra, and with torch where there is CUDA


def imported() -> set[str]:
    """Top-level names of all imports of other packages, those within functions too."""
    names: set[str] = set()
    for file in (ROOT / "icnn_zoo").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"icnn_zoo"}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def test_every_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {plain(entry) for entries in lists for entry in entries}
    known = packages_distributions()
    missing = {name for name in imported() if name in known and not {plain(dist) for dist in known[name]} & declared}
    assert missing <= COME_WITH_OTHERS

"""Draws the rooms of the package, floor by floor, from the rules of dependency: ``python docs/rooms.py``.

Floors come from the import-linter contract in ``pyproject.toml``, what a room is for from the first line of its
docstring. Writes ``docs/pictures/rooms.svg``; a test keeps it up to date.
"""

import ast
import textwrap
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "pictures" / "rooms.svg"
WIDTH, HEIGHT, GAP, LINE = 1080, 92, 14, 15


def floors() -> list[list[str]]:
    """Rooms of each floor, the highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[room.strip() for room in layer.split("|")] for layer in layers]


def purpose(room: str) -> str:
    """The first line of a room's docstring."""
    place = ROOT / "icnn_zoo" / room
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]


def draw() -> str:
    """The picture as SVG, in colors that fit light and dark pages."""
    rows = floors()
    height = len(rows) * (HEIGHT + GAP) + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="Helvetica, Arial, sans-serif">',
        "<title>Rooms of icnn_zoo: each imports only what lies below it</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for number, rooms in enumerate(rows):
        top = GAP + number * (HEIGHT + GAP)
        width = (WIDTH - GAP * (len(rooms) + 1)) / len(rooms)
        for place, room in enumerate(rooms):
            left = GAP + place * (width + GAP)
            lines.append(
                f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{HEIGHT}" rx="6" fill="#eef1fb" '
                'stroke="#3f51b5"/>'
                f'<text x="{left + 12:.1f}" y="{top + 24}" font-size="16" font-weight="bold" fill="#1a237e">'
                f"{room}</text>"
            )
            for row, text in enumerate(textwrap.wrap(purpose(room), max(int(width / 7.2), 12))[:4]):
                lines.append(
                    f'<text x="{left + 12:.1f}" y="{top + 44 + row * LINE}" font-size="12.5" fill="#222">'
                    f"{escape(text)}</text>"
                )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")

"""Makes the files of the drawn PASCAL VOC: icons fetched from npm and rendered, backgrounds from installed packages."""

from __future__ import annotations

import csv
import hashlib
import importlib.resources
import importlib.util
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.progress import track

from icnn_zoo.data.drawn_voc import FOLDER, FORMAT, check_folder
from icnn_zoo.data.preparation.backgrounds import PHOTOGRAPHS, write_backgrounds

ICON_SIDE = 384  # pixels of the square that an icon is rendered in, before cropping

# Icon set: its split, and the version of its npm package, so that the dataset is the same for everybody.
SETS = {
    "noto": ("train", "1.2.9"),
    "twemoji": ("train", "1.2.5"),
    "fluent-emoji": ("train", "1.2.7"),
    "fluent-emoji-flat": ("train", "1.2.6"),
    "emojione": ("train", "1.2.3"),
    "emojione-v1": ("train", "1.2.3"),
    "noto-v1": ("val", "1.2.5"),
    "openmoji": ("test", "1.2.29"),
}


def prepare_drawn_voc(root: Path) -> Path:
    """Fetches, renders and stores icons and backgrounds.

    The folder appears only when it is complete. An interrupted call leaves ``drawn-voc.partial`` with the downloaded
    packages, from which the next call goes on. If the folder is there, it is only checked.

    Args:
        root: Folder that gets the folder ``drawn-voc`` (35 MB).

    Returns:
        The folder.

    Raises:
        FileNotFoundError: There is no npm, an installed package lacks a photograph, or the folder is incomplete.
        ImportError: The packages of the extra ``drawn-voc`` are not installed.
        RuntimeError: npm failed.
        ValueError: A fetched icon set lacks an icon, or an existing folder has another format.
    """
    folder = root / FOLDER
    if folder.exists():
        check_folder(folder)
        return folder
    _require_packages()
    partial = root / f"{FOLDER}.partial"
    packages = partial / "packages"
    content = partial / "content"
    shutil.rmtree(content, ignore_errors=True)

    fetched = {name: _fetch(name, version, packages, root) for name, (_, version) in SETS.items()}
    sets = {name: _IconSet(name, file) for name, file in fetched.items()}
    counts = _write_icons(sets, content / "icons")
    backgrounds = write_backgrounds(content / "backgrounds")
    manifest = {
        "format": FORMAT,
        "icon_side": ICON_SIDE,
        "icon_sets": {name: {"split": SETS[name][0], **sets[name].source} for name in SETS},
        "icons": counts,
        "backgrounds": backgrounds,
        "photographs": {photograph.name: photograph.split for photograph in PHOTOGRAPHS},
    }
    (content / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    (content / "LICENSES.md").write_text(_licenses(sets), encoding="utf-8")
    os.replace(content, folder)
    shutil.rmtree(partial)
    check_folder(folder)
    return folder


def icon_table() -> list[tuple[str, str, tuple[str, ...]]]:
    """Class, icon name and the sets that have it, for every icon of the dataset."""
    text = importlib.resources.files("icnn_zoo.data").joinpath("drawn_voc_icons.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text), delimiter="\t")
    return [(row["class"], row["icon"], tuple(name for name in SETS if row[name] == "1")) for row in rows]


class _IconSet:
    """The icons of a fetched npm package, as SVG, and where they come from."""

    def __init__(self, name: str, file: Path) -> None:
        with tarfile.open(file) as archive:
            data, info, package = (_member(archive, f"package/{part}.json") for part in ("icons", "info", "package"))
        self.name = name
        self.icons: dict[str, Any] = data["icons"]
        self.aliases: dict[str, Any] = data.get("aliases", {})
        self.default_size = (data.get("width", 16), data.get("height", 16))
        self.source = {
            "package": package["name"],
            "version": package["version"],
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "title": info["name"],
            "author": info["author"]["name"],
            "license": info["license"].get("spdx", info["license"]["title"]),
            "license_url": info["license"].get("url", ""),
        }

    def svg(self, icon: str) -> str:
        alias = self.aliases.get(icon, {})
        entry = self.icons.get(alias.get("parent", icon))
        if entry is None or set(alias) - {"parent"}:
            raise ValueError(f"icon set {self.name} {self.source['version']} has no icon {icon!r}.")
        width, height = (entry.get(key, side) for key, side in zip(("width", "height"), self.default_size, strict=True))
        origin = f"{entry.get('left', 0)} {entry.get('top', 0)}"
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{origin} {width} {height}">{entry["body"]}</svg>'


def _member(archive: tarfile.TarFile, name: str) -> Any:
    member = archive.extractfile(name)
    assert member is not None, name
    return json.load(member)


def _fetch(name: str, version: str, folder: Path, root: Path) -> Path:
    """The tarball of an icon set, downloaded unless it is there."""
    package = f"@iconify-json/{name}"
    file = folder / f"{name}-{version}.tgz"
    if file.exists():
        return file
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"npm is needed to fetch {package} and is not on the PATH. Install Node.js (https://nodejs.org, or "
            f"`apt install npm`) and run again: icnn-zoo prepare {FOLDER} --root {root}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", "--silent", "--pack-destination", str(folder.resolve()), f"{package}@{version}"]
    print(f"Fetching {package} {version}")
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    made = folder / f"iconify-json-{name}-{version}.tgz"
    if done.returncode or not made.exists():
        raise RuntimeError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()[-500:]}")
    os.replace(made, file)
    return file


def _write_icons(sets: dict[str, _IconSet], folder: Path) -> dict[str, dict[str, int]]:
    """Renders every icon of the table and returns how many each class has per split."""
    counts: dict[str, Counter[str]] = {split: Counter() for split, _ in SETS.values()}
    jobs = [(category, icon, name) for category, icon, names in icon_table() for name in names]
    for category, icon, name in track(jobs, description="Rendering icons"):
        split = SETS[name][0]
        file = folder / split / category / f"{name}__{icon}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(render_icon(sets[name].svg(icon), ICON_SIDE))
        counts[split][category] += 1
    return {split: dict(number) for split, number in counts.items()}


def render_icon(svg: str, side: int) -> bytes:
    """A PNG of an SVG in a square of ``side`` pixels, cropped to what is not transparent.

    Raises:
        ValueError: Nothing of it is visible.
    """
    import resvg_py

    # No system fonts: what a picture shows must not depend on the machine.
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    picture = cv2.imdecode(np.frombuffer(bytes(png), np.uint8), cv2.IMREAD_UNCHANGED)
    assert picture is not None
    rows, cols = np.nonzero(picture[..., 3] > 127)
    if not len(rows):
        raise ValueError(f"an icon renders to nothing visible: {svg[:200]}")
    picture = picture[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1]
    done, encoded = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    assert done
    return encoded.tobytes()


def _require_packages() -> None:
    missing = [name for name in ("resvg_py", "skimage", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'preparing drawn-voc needs {", ".join(missing)}: pip install "icnn-zoo[drawn-voc]"')


def _licenses(sets: dict[str, _IconSet]) -> str:
    lines = [
        "# Licenses of the pictures in this folder",
        "",
        "Icons were rendered and cropped; scenes recolor them.",
        "",
    ]
    lines += ["| icon set | author | license | npm package |", "|---|---|---|---|"]
    for icon_set in sets.values():
        source = icon_set.source
        lines.append(
            f"| {source['title']} | {source['author']} | [{source['license']}]({source['license_url']}) | "
            f"{source['package']} {source['version']} |"
        )
    lines += ["", "| photograph | from | license |", "|---|---|---|"]
    lines += [f"| {photo.name} | {photo.package} | {photo.license} |" for photo in PHOTOGRAPHS]
    lines += ["", "Backgrounds whose names begin with `texture` are procedural and free of rights.", ""]
    return "\n".join(lines)

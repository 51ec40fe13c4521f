"""Backgrounds free of the 20 VOC classes: photographs out of installed packages, and procedural textures."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from icnn_zoo.data.scenes import texture

_TEXTURES = {"train": 20, "val": 6, "test": 6}
_TEXTURE_SIDE = 512
_SPLIT_SEEDS = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Photograph:
    """A photograph in an installed package: importable package, file in it, split and license.

    ``inner`` is the share of both sides to use, around the middle.
    """

    package: str
    file: str
    split: str
    license: str
    inner: float = 1.0

    @property
    def name(self) -> str:
        return Path(self.file).stem

    def read(self) -> np.ndarray:
        """uint8 [H, W, 3], BGR.

        Raises:
            FileNotFoundError: The installed package has no such file.
        """
        spec = importlib.util.find_spec(self.package)
        folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        for folder in folders:
            path = Path(folder) / self.file
            if path.is_file():
                picture = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
                assert picture is not None, path
                height, width = picture.shape[:2]
                top, left = int(height * (1 - self.inner) / 2), int(width * (1 - self.inner) / 2)
                return picture[top : height - top, left : width - left]
        raise FileNotFoundError(
            f'the installed {self.package} lacks {self.file}: pip install --force-reinstall "icnn-zoo[drawn-voc]"'
        )


_CC_BY = "[CC-BY-2.0](https://creativecommons.org/licenses/by/2.0/)"
PHOTOGRAPHS = (
    Photograph("sklearn", "datasets/images/china.jpg", "train", f"{_CC_BY}, danielbuechele"),
    Photograph("skimage", "data/rocket.jpg", "train", "public domain, SpaceX"),
    Photograph("skimage", "data/brick.png", "train", "CC0, CC0Textures"),
    Photograph("skimage", "data/gravel.png", "train", "CC0, CC0Textures"),
    Photograph("skimage", "data/hubble_deep_field.jpg", "train", "public domain, NASA"),
    Photograph("skimage", "data/ihc.png", "train", "no known copyright restrictions, CMMI"),
    Photograph("skimage", "data/text.png", "train", "public domain, Wikipedia"),
    Photograph("sklearn", "datasets/images/flower.jpg", "val", f"{_CC_BY}, vultilion"),
    Photograph("skimage", "data/retina.jpg", "val", "CC0, Mikael Häggström", inner=0.68),
    Photograph("skimage", "data/coffee.png", "test", "CC0, Rachel Michetti"),
    Photograph("skimage", "data/grass.png", "test", "CC0, linolafett"),
)


def write_backgrounds(folder: Path) -> dict[str, int]:
    """Writes photographs and textures as PNG files to ``folder/<split>``, every one to one split only.

    Returns:
        Pictures per split.
    """
    for split in _TEXTURES:
        (folder / split).mkdir(parents=True)
    for photograph in PHOTOGRAPHS:
        _write(folder / photograph.split / f"photograph-{photograph.name}.png", photograph.read())
    for split, count in _TEXTURES.items():
        for number in range(count):
            rng = np.random.default_rng((_SPLIT_SEEDS[split], number))
            picture = np.clip(texture(rng, _TEXTURE_SIDE, _TEXTURE_SIDE, rng.uniform(0.3, 1.0)), 0, 255)
            _write(folder / split / f"texture-{number:02d}.png", picture.astype(np.uint8))
    return {split: sum(1 for _ in (folder / split).iterdir()) for split in _TEXTURES}


def _write(file: Path, picture: np.ndarray) -> None:
    done, encoded = cv2.imencode(".png", picture)
    assert done, file
    file.write_bytes(encoded.tobytes())

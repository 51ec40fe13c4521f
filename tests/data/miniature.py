"""Miniature datasets in the layouts in which their owners distribute them, written by the tests."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from icnn_zoo.data import color_map
from icnn_zoo.data.label_files import read_table
from icnn_zoo.io.label_pictures import palette_picture

VOC_TRAIN = ["2007_000032", "2007_000039", "2008_000008"]
VOC_VAL = ["2007_000033", "2009_000001"]
VOC_TEST = ["2008_000006"]
SBD_TRAIN = ["2008_000008", "2008_000015", "2009_000001"]  # one of VOC's train list, one new, one of VOC's val list
SBD_VAL = ["2010_000003", "2011_000010"]
TRAIN_AUG = ["2007_000032", "2007_000039", "2008_000008", "2008_000015", "2010_000003", "2011_000010"]
CONTEXT_TRAIN = ["2008_000002", "2008_000003"]
CONTEXT_VAL = ["2008_000007", "2009_000004"]
CITIES = {"train": ("aachen", "bochum"), "val": ("lindau",), "test": ("mainz",)}


def voc_labels(name: str, border: int = 255) -> np.ndarray:
    """A box of one class with a border around it, at a size of its own for each image."""
    rng = np.random.default_rng(int(name.replace("_", "")))
    labels = np.zeros((int(rng.integers(30, 50)), int(rng.integers(30, 50))), np.uint8)
    labels[4:24, 6:22] = border
    labels[6:22, 8:20] = rng.integers(1, 21)
    return labels


def image_of(labels: np.ndarray) -> Image.Image:
    """A picture that a network can learn the labels from."""
    return Image.fromarray(color_map(256)[labels])


def values_of(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def write_list(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))  # some lists that are about have no newline at their end


def write_voc2012(root: Path, sbd: bool = True) -> Path:
    """VOCdevkit as VOCtrainval_11-May-2012.tar and SBD as benchmark.tgz hold them."""
    voc = root / "VOCdevkit" / "VOC2012"
    for name in {*VOC_TRAIN, *VOC_VAL, *VOC_TEST, *SBD_TRAIN, *SBD_VAL}:
        save(image_of(voc_labels(name)), voc / "JPEGImages" / f"{name}.jpg")
    for name in VOC_TRAIN + VOC_VAL:
        save(palette_picture(voc_labels(name), color_map(256)), voc / "SegmentationClass" / f"{name}.png")
    for split, names in {"train": VOC_TRAIN, "val": VOC_VAL, "test": VOC_TEST}.items():
        write_list(voc / "ImageSets" / "Segmentation" / f"{split}.txt", names)
    if sbd:
        folder = root / "benchmark_RELEASE" / "dataset"
        for split, names in {"train": SBD_TRAIN, "val": SBD_VAL}.items():
            write_list(folder / f"{split}.txt", names)
            for name in names:
                write_sbd_mat(folder / "cls" / f"{name}.mat", voc_labels(name, border=0))
    return voc


def write_sbd_mat(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    record = np.zeros((1, 1), dtype=[("Segmentation", object), ("CategoriesPresent", object)])
    record[0, 0] = (labels, np.unique(labels)[1:])
    savemat(path, {"GTcls": record}, do_compression=True)


def context_labels(name: str) -> np.ndarray:
    """Class indices in the official order: background, a class of VOC's 20 and two others."""
    rng = np.random.default_rng(int(name.replace("_", "")))
    labels = np.zeros((40, 48), np.uint8)
    labels[:20] = rng.integers(21, 60)
    labels[20:, :10] = rng.integers(21, 60)
    labels[10:30, 12:40] = rng.integers(2, 21)
    return labels


def write_pascal_context(root: Path, labels: str = "mat", voc_labels: bool = False) -> Path:
    """VOC 2010 and labels: "mat", or PNGs "official" or "alphabetical"; ``voc_labels`` adds VOC's own."""
    voc = root / "VOCdevkit" / "VOC2010"
    rows = read_table("pascal_context_59")
    for split, names in {"train": CONTEXT_TRAIN, "val": CONTEXT_VAL}.items():
        write_list(voc / "ImageSets" / "Main" / f"{split}.txt", names)
        for name in names:
            truth = context_labels(name)
            save(image_of(truth), voc / "JPEGImages" / f"{name}.jpg")
            if labels == "mat":
                maps = np.array([int(row["id459"]) for row in rows], np.uint16)[truth]
                maps[0, :5] = 1  # accordion, which is none of the 59
                (root / "trainval").mkdir(exist_ok=True)
                savemat(root / "trainval" / f"{name}.mat", {"LabelMap": maps}, do_compression=True)
            else:
                column = {"official": "index", "alphabetical": "mmseg_index"}[labels]
                values = np.array([int(row[column]) for row in rows], np.uint8)[truth]
                save(Image.fromarray(values), voc / "SegmentationClassContext" / f"{name}.png")
            if voc_labels:
                own = np.where((truth >= 1) & (truth <= 20), truth, 0).astype(np.uint8)
                save(palette_picture(own, color_map(256)), voc / "SegmentationClass" / f"{name}.png")
    return voc


def write_cityscapes(root: Path, size: tuple[int, int] = (64, 128), number: int = 2) -> Path:
    """leftImg8bit and gtFine: polygons, and the labelIds that Cityscapes' own tool makes of them."""
    from cityscapesscripts.preparation.json2labelImg import json2labelImg

    height, width = size
    names = [row["name"] for row in read_table("cityscapes_labels")]
    for split, cities in CITIES.items():
        for place, city in enumerate(cities):
            for index in range(number):
                rng = np.random.default_rng((len(split), place, index))
                name = f"{city}_{index:06d}_000019"
                polygons = []
                for label in [*rng.choice(names, 12), "license plate", "cargroup"]:
                    left, top = int(rng.integers(width - 16)), int(rng.integers(height - 8))
                    right, bottom = left + int(rng.integers(8, 60)), top + int(rng.integers(6, 30))
                    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
                    polygons.append({"label": str(label), "polygon": corners})
                folder = root / "gtFine" / split / city
                folder.mkdir(parents=True, exist_ok=True)
                file = folder / f"{name}_gtFine_polygons.json"
                file.write_text(json.dumps({"imgHeight": height, "imgWidth": width, "objects": polygons}))
                ids = folder / f"{name}_gtFine_labelIds.png"
                json2labelImg(str(file), str(ids), "ids")
                save(image_of(values_of(ids)), root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
    return root


def write_folder(root: Path) -> Path:
    """A person's own images and masks of two classes, two images a split."""
    for split in ("train", "val"):
        for number in range(2):
            labels = np.zeros((40, 56), np.uint8)
            labels[8 : 20 + 4 * number, 10:30] = 1
            save(image_of(labels), root / "images" / split / f"{split}{number}.jpg")
            save(Image.fromarray(labels), root / "masks" / split / f"{split}{number}.png")
    return root

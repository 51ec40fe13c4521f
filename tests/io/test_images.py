"""One policy for images: everybody who reads a file sees the same pixels, or the same error."""

import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from icnn_zoo.analysis.heatmaps import image_scores
from icnn_zoo.data import FolderDataModule
from icnn_zoo.data.label_files import read_labels
from icnn_zoo.io.images import read_header, read_image, read_upright
from icnn_zoo.models.segmentation import PixelsToLogits
from icnn_zoo.report.samples import Sample, find_samples
from icnn_zoo.zoo.segmenter import Segmenter

SCENE = np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels that a camera stores so that ``orientation`` turns them to ``upright``, by the EXIF table."""
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }
    return np.ascontiguousarray(turned[orientation])


def turned_photograph(path: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored(SCENE, orientation)).save(path, exif=exif)
    return path


def deep_picture(path: Path, values: np.ndarray) -> Path:
    cv2.imwrite(str(path), values[..., ::-1] if values.ndim == 3 else values)
    return path


def transparent(path: Path) -> Path:
    pixels = np.dstack([SCENE, np.zeros(SCENE.shape[:2], np.uint8)])
    pixels[:12, :, 3] = 255
    Image.fromarray(pixels).save(path)
    return path


def several_pages(path: Path) -> Path:
    Image.fromarray(SCENE).save(path, save_all=True, append_images=[Image.fromarray(255 - SCENE)] * 2)
    return path


def seen_in_training(path: Path, **kwargs) -> np.ndarray:
    for split in ("train", "val"):
        image = path.parent / "data/images" / split / path.name
        mask = path.parent / "data/masks" / split / f"{path.stem}.png"
        for file in (image, mask):
            file.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(path.read_bytes())
        Image.fromarray((np.arange(36) % 2).astype(np.uint8)[None].repeat(24, 0)).save(mask)
    data = FolderDataModule(path.parent / "data", class_names=["a", "b"], num_workers=0, crop_size=17, **kwargs)
    data.prepare_data()
    data.setup("fit")
    return data.make_dataset("train")[0]["image"]


def seen_in_prediction(path: Path, **kwargs) -> np.ndarray:
    seen_in_training(path, **kwargs)
    data = FolderDataModule(path.parent / "data", class_names=["a", "b"], num_workers=0, crop_size=17, **kwargs)
    batch = next(iter(data.predict_dataloader()))
    return batch["image"][0].permute(1, 2, 0).numpy()


def seen_by_heatmap_and_page(path: Path, **kwargs) -> np.ndarray:
    samples: list[Sample] = find_samples(None, SimpleNamespace(model=SimpleNamespace(in_channels=3)), [path], **kwargs)
    return samples[0].image


def seen_by_segment(path: Path, **kwargs) -> np.ndarray:
    model = Segmenter("test_resnet", 2)
    seen = []
    model.preprocess = lambda images: seen.append(images) or images.float()
    model.predict(path, **kwargs)
    return seen[0][0].permute(1, 2, 0).numpy()


READERS = [seen_in_training, seen_in_prediction, seen_by_heatmap_and_page, seen_by_segment]
everywhere = pytest.mark.parametrize("seen", READERS)


@everywhere
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photographs_are_upright_everywhere(tmp_path, seen, orientation):
    path = turned_photograph(tmp_path / "photo.png", orientation)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Of 2 photographs the camera was turned")
        assert np.array_equal(seen(path), SCENE)


@everywhere
def test_what_is_transparent_is_white_everywhere(tmp_path, seen):
    image = seen(transparent(tmp_path / "cut-out.png"))
    assert np.array_equal(image[:12], SCENE[:12])
    assert (image[12:] == 255).all()


@everywhere
@pytest.mark.parametrize("values", [SCENE.astype(np.uint16) * 16, SCENE[..., 0].astype(np.uint16) * 16])
def test_16_bits_are_refused_or_scaled_by_choice_everywhere(tmp_path, seen, values):
    path = deep_picture(tmp_path / "scan.png", values)
    with pytest.raises(ValueError, match=r"scan.png' has 16 bits a channel.* set `white_level`"):
        seen(path)
    expected = SCENE if values.ndim == 3 else SCENE[..., :1].repeat(3, axis=2)
    assert np.array_equal(seen(path, white_level=16 * 255), expected)


@everywhere
def test_of_several_pages_the_first_is_read_and_that_is_told_everywhere(tmp_path, seen):
    with pytest.warns(UserWarning, match=r"scan.tif' holds 3 pictures: the first|2 image files hold more than one"):
        image = seen(several_pages(tmp_path / "scan.tif"))
    assert np.array_equal(image, SCENE)


@everywhere
def test_pictures_above_pillows_limit_are_refused_by_name_everywhere(tmp_path, seen, monkeypatch):
    Image.fromarray(SCENE).save(tmp_path / "ortho.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SCENE[..., 0].size // 2 - 1)
    with pytest.raises(ValueError, match=r"ortho.png' is too large: .*Cut it into tiles"):
        seen(tmp_path / "ortho.png")


@everywhere
def test_links_to_nothing_and_damaged_files_are_named_everywhere(tmp_path, seen):
    whole = tmp_path / "a.png"
    Image.fromarray(SCENE).save(whole)
    whole.write_bytes(whole.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"a.png' is not a readable image"):
        seen(whole)


def test_the_page_and_segment_give_a_photograph_the_same_labels():
    """Of a size that is no multiple of the output stride and one."""
    model = Segmenter("test_resnet", 5)
    torch.nn.init.normal_(model.classifier.weight)
    image = np.random.default_rng(1).integers(0, 256, (31, 43, 3), np.uint8)
    scores = image_scores(PixelsToLogits(model).eval(), torch.from_numpy(image).permute(2, 0, 1)[None])
    assert np.array_equal(scores.argmax(dim=1)[0], model.predict(image))
    assert len(np.unique(model.predict(image))) > 1


def test_a_link_to_nothing_says_where_it_points(tmp_path):
    (tmp_path / "a.png").symlink_to("elsewhere.png")
    for read in (read_image, read_header, read_labels):
        with pytest.raises(FileNotFoundError, match=r"a.png' is a link to 'elsewhere.png', which is not there"):
            read(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_image(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "tif", "png", "webp"])
def test_headers_have_the_upright_size_and_the_orientation(tmp_path, ending, orientation):
    path = turned_photograph(tmp_path / f"photo.{ending}", orientation)
    assert read_header(path)[:3] == ((24, 36), orientation, 1)
    image = read_image(path)
    if ending in ("tif", "png"):
        assert np.array_equal(image, SCENE)
    assert image.shape == SCENE.shape


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("gray", [False, True])
def test_16_bits_and_orientation_go_together(tmp_path, gray, orientation):
    upright = SCENE[..., 0] if gray else SCENE
    for ending in ("png", "tif"):
        path = deep_picture(tmp_path / f"scan.{ending}", stored(upright, orientation).astype(np.uint16) * 257)
        add_orientation(path, orientation)
        assert read_header(path) == ((24, 36), orientation, 1, True)
        image = read_image(path, white_level=65535)
        assert np.array_equal(image, SCENE[..., :1].repeat(3, axis=2) if gray else SCENE), ending


def add_orientation(path: Path, orientation: int) -> None:
    data = path.read_bytes()
    if path.suffix == ".png":
        exif = b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + b"\0\0\0\0"
        import zlib

        chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
        path.write_bytes(data[:33] + chunk + data[33:])
        return
    start = struct.unpack("<I", data[4:8])[0]
    (number,) = struct.unpack("<H", data[start : start + 2])
    entries = [data[start + 2 + 12 * index :][:12] for index in range(number)]
    entries = [entry for entry in entries if struct.unpack("<H", entry[:2])[0] != 274]
    entries.append(struct.pack("<HHIHH", 274, 3, 1, orientation, 0))
    entries.sort(key=lambda entry: struct.unpack("<H", entry[:2])[0])
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + b"\0\0\0\0"
    path.write_bytes(data[:4] + struct.pack("<I", len(data)) + data[8:] + directory)


def test_label_maps_are_upright_too_and_keep_their_values(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    labels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for ending in ("png", "tif"):
        Image.fromarray(stored(labels, 6)).save(tmp_path / f"mask.{ending}", exif=exif)
        assert np.array_equal(read_labels(tmp_path / f"mask.{ending}"), labels)
        assert read_upright(tmp_path / f"mask.{ending}").size == (3, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"no picture"), "is not a readable image"),
        (lambda path: Image.fromarray(np.zeros((4, 5), np.float32)).save(path, "TIFF"), "mode F"),
        (lambda path: Image.fromarray(np.full((4, 5), 70000, np.int32)).save(path, "TIFF"), "more than 16 bits"),
    ],
)
def test_what_is_not_an_image_of_8_or_16_bits_is_refused_by_name(tmp_path, make: Callable, message):
    make(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"a.tif' is not a readable image.*{re.escape(message)}|a.tif' {message}"):
        read_image(tmp_path / "a.tif", white_level=65535)


def test_reduced_versions_and_previews_are_not_pages(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(SCENE, photometric="rgb")
        file.write(SCENE[::2, ::2], photometric="rgb", subfiletype=1)
    Image.fromarray(SCENE).save(tmp_path / "a.mpo", save_all=True, append_images=[Image.fromarray(SCENE)])
    assert read_header(tmp_path / "a.tif").pages == 1
    assert read_header(tmp_path / "a.mpo").pages == 1


def test_arrays_and_pictures_are_taken_too():
    gray = SCENE[..., 0]
    assert np.array_equal(read_image(gray), gray[..., None].repeat(3, axis=2))
    assert np.array_equal(read_image(SCENE.astype(np.uint16) * 257, white_level=65535), SCENE)
    assert np.array_equal(read_image(Image.fromarray(SCENE)), SCENE)
    with pytest.raises(ValueError, match="`image` has 16 bits"):
        read_image(Image.fromarray(gray.astype(np.uint16)))
    with pytest.raises(ValueError, match="`white_level` must be from 1 to 65535; got 0"):
        read_image(SCENE, white_level=0)
    with pytest.raises(TypeError, match="must be a path"):
        read_image(3)

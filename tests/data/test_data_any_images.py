"""Images of any channels and depth, masks of colors, names by patterns, augmentations from a file."""

from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import icnn_zoo
from icnn_zoo.cli.programs import lightning_main, zoo_main
from icnn_zoo.data import FolderDataModule
from icnn_zoo.io.rasters import read_measured
from icnn_zoo.models import SegmentationModel
from icnn_zoo.training.network_sources import load_task
from icnn_zoo.zoo.pretrained import load_pretrained

ROOT = Path(__file__).parents[2]
COLORS = ["#000000", [255, 0, 128]]
LAYOUT = {"images": "{split}/*_bands.tif", "masks": "{stem}_mask.png", "mask_colors": COLORS}
BANDS = {"channels": 5, "white_level": 4095}


@pytest.fixture
def root(tmp_path) -> Path:
    """Two images a split of five channels and 12 bits, masks of two colors beside them."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for name in ("a", "b.1"):
            labels = np.zeros((40, 48), np.uint8)
            labels[8:25, 10:30] = 1
            wet = 2000 * labels[..., None].astype(int) * np.array([1, 0, 1, 0, 1])
            image = generator.integers(0, 2000, (40, 48, 5)) + wet
            stored = image.astype(np.uint16)
            tifffile.imwrite(
                tmp_path / "data" / split / f"{name}_bands.tif", stored, photometric="minisblack", planarconfig="contig"
            )
            colors = np.array([[0, 0, 0], [255, 0, 128]], np.uint8)[labels]
            Image.fromarray(colors).save(tmp_path / "data" / split / f"{name}_mask.png")
    return tmp_path / "data"


def folder(root, **options) -> FolderDataModule:
    names = {"class_names": ["land", "water"], "num_workers": 0, "crop_size": 33, "batch_size": 2}
    return FolderDataModule(root, **{**names, **LAYOUT, **BANDS, **options})


def test_channels_bits_colors_and_names_are_read_as_they_lie_there(root):
    data = folder(root)
    data.prepare_data()
    sample = data.make_dataset("train")[1]
    assert sample["name"] == "b.1"
    stored = tifffile.imread(root / "train" / "b.1_bands.tif")
    np.testing.assert_allclose(sample["image"], stored * (255 / 4095), rtol=1e-6)
    assert (sample["mask"] == (stored[..., 0] >= 2000)).all()
    batch = next(iter(data.train_dataloader()))
    assert (batch["image"].shape, batch["image"].dtype) == ((2, 5, 33, 33), torch.float32)
    whole = np.stack([data.make_dataset("train")[index]["image"] for index in range(2)]) / 255
    mean, std = data.measure_channels()
    np.testing.assert_allclose(mean, whole.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(std, whole.std((0, 1, 2)), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_five_channels_of_12_bits_are_trained_tested_and_segmented(root, monkeypatch, capsys):
    monkeypatch.chdir(root.parent)
    A.save(A.Compose([A.VerticalFlip(p=1.0)]), "own.yaml", data_format="yaml")
    config = ["-c", str(ROOT / "configs" / "folder.yaml"), "--model.backbone", "test_resnet", "--model.start", "layer4"]
    config += ["--model.pretrained", "false", "--model.mean", "auto", "--model.std", "auto", "--model.lr", "0.01"]
    config += ["--data.init_args.root", "data", "--data.init_args.class_names", "[land, water]"]
    config += ["--data.init_args.images", LAYOUT["images"], "--data.init_args.masks", LAYOUT["masks"]]
    config += ["--data.init_args.mask_colors", "['#000000','#ff0080']", "--data.init_args.augmentations", "own.yaml"]
    config += ["--data.init_args.channels", "5", "--data.init_args.white_level", "4095"]
    config += [
        "--data.init_args.crop_size",
        "33",
        "--data.init_args.batch_size",
        "2",
        "--data.init_args.num_workers",
        "0",
    ]
    config += ["--trainer.accelerator", "cpu", "--trainer.max_steps", "4", "--trainer.val_check_interval", "1"]
    lightning_main(["fit", *config])
    last = root.parent / "runs" / "folder" / "version_0" / "checkpoints" / "last.ckpt"
    task = load_task(last)
    np.testing.assert_allclose(task.model.mean.flatten(), folder(root).measure_channels()[0], rtol=1e-5)
    lightning_main(["test", *config, "--ckpt_path", str(last)])
    assert "test/IoU/water" in (last.parents[2] / "version_1" / "metrics.csv").read_text()
    assert list((last.parents[1] / "pictures").glob("*.png"))
    zoo_main(["segment", str(last), "data/val/*.tif", "--to", "out", "--white-level", "4095", "--pictures"])
    assert Image.open("out/a_bands.png").size == (48, 40)


def test_the_first_convolution_is_adapted_as_timm_does(tmp_path):
    rgb = SegmentationModel("test_resnet", 3)
    torch.save(rgb.state_dict(), tmp_path / "rgb.pth")
    model = SegmentationModel("test_resnet", 3, in_channels=5)
    load_pretrained(model, tmp_path / "rgb.pth")
    name = next(name for name, value in rgb.state_dict().items() if value.dim() == 4)
    weight = rgb.state_dict()[name]
    expected = torch.cat([weight, weight[:, :2]], dim=1) * 3 / 5
    torch.testing.assert_close(model.state_dict()[name], expected)
    network = {"class_path": "torchvision.models.segmentation.lraspp_mobilenet_v3_large"}
    assert SegmentationModel(None, 3, network=network, in_channels=2).eval()(torch.zeros(1, 2, 32, 32)).shape[1] == 3


def test_png_of_16_bits_and_floats_keep_their_depth(tmp_path):
    values = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_allclose(read_measured(tmp_path / "a.png", 1, 65535)[..., 0], values * (255 / 65535), rtol=1e-6)
    tifffile.imwrite(tmp_path / "a.tif", values.astype(np.float32) / 60000)
    np.testing.assert_allclose(read_measured(tmp_path / "a.tif", 1, 1.0)[..., 0], values * (255 / 60000), rtol=1e-6)


def test_a_segmenter_takes_its_number_of_channels():
    model = icnn_zoo.create_model("test_resnet", 3, in_channels=2)
    assert model.predict(np.zeros((20, 30, 2), np.float32)).shape == (20, 30)
    with pytest.raises(ValueError, match=r"must be \[H, W, 2\]; got \[20, 30, 3\]"):
        model.predict(np.zeros((20, 30, 3), np.uint8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 4}, r"a_bands\.tif' has 5 channels; the network \(`channels`\) takes 4"),
        ({"white_level": None}, r"holds uint16, and nothing says which value is white.*4095"),
        ({"channels": 0}, r"`channels` must be at least 1, or null"),
        ({"mask_colors": ["#000000"]}, r"`mask_colors` must be 2 colors.*got 1"),
        ({"mask_colors": ["#000000", "#ff0081"]}, r"colors must be #000000, #ff0081; got #ff0080"),
        ({"mask_colors": ["black", "white"]}, r"'#rrggbb' or \(R, G, B\).*got 'black'"),
        ({"masks": "{name}_mask.png"}, r"`masks` may hold \{split\} and \{stem\}; got \{name\}"),
        ({"masks": "masks"}, r"`masks` must hold \{stem\}"),
        ({"images": "{split}"}, r"`images` must be a pattern with one \*"),
        ({"augmentations": "none.yaml"}, r"`augmentations`: there is no file 'none\.yaml'"),
        (
            {"images": "pics/*.tif"},
            r"no images of the split train\. `images` and `masks` are the patterns 'pics/\*\.tif'",
        ),
    ],
)
def test_mistakes_name_the_option(root, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        folder(root, **options).prepare_data()


def test_a_file_that_holds_no_augmentation_is_refused(root, tmp_path):
    (tmp_path / "own.json").write_text('{"transform": {"__class_fullname__": "os.system"}}')
    with pytest.raises(ValueError, match=r"`augmentations`.*own\.json' is not a file of albumentations\.save"):
        folder(root, augmentations=str(tmp_path / "own.json"))

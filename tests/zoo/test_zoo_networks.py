"""Networks of the zoo in use: label maps of any image, training that starts from them, the commands, the wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from zoo_cases import NAME

import icnn_zoo
from icnn_zoo.cli.programs import zoo_main
from icnn_zoo.training.task import SegmentationTask
from icnn_zoo.zoo.pretrained import load_start

ROOT = Path(__file__).parents[2]
CLASSES = ["background", *"abcde"]


@pytest.fixture(autouse=True)
def _registry(zoo_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ICNN_ZOO_REGISTRY", str(zoo_folder))
    monkeypatch.setenv("ICNN_ZOO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(zoo_folder):
    return icnn_zoo.load_checkpoint(NAME, registry=zoo_folder)


def picture(height: int, width: int, *rest: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, *rest), dtype=np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (64, 65), (65, 65), (101, 37)])
def test_a_label_map_has_the_images_size(model, size):
    labels = model.predict(picture(*size, 3))
    assert (labels.shape, labels.dtype) == (size, np.uint8)
    assert labels.max() < 6
    assert model.predict(picture(*size, 3), longest_side=33).shape == size


def test_at_sizes_of_training_the_prediction_is_the_tasks(model):
    pixels = picture(65, 97, 3)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = model.upsample(model(model.preprocess(images)), (65, 97))
    assert np.array_equal(model.predict(pixels), logits.argmax(1)[0].numpy())
    # At other sizes, the network sees the same pixels at the same places.
    assert np.mean(model.predict(pixels[:60, :90]) == model.predict(pixels)[:60, :90]) > 0.6


def test_files_pictures_and_arrays_say_the_same(model, tmp_path):
    pixels = picture(40, 50, 3)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    expected = model.predict(pixels)
    assert np.array_equal(model.predict(tmp_path / "picture.png"), expected)
    assert np.array_equal(model.predict(str(tmp_path / "picture.png")), expected)
    assert np.array_equal(model.predict(Image.open(tmp_path / "picture.png")), expected)
    grey = picture(40, 50)
    assert np.array_equal(model.predict(grey), model.predict(Image.fromarray(grey)))
    opaque = Image.fromarray(pixels).convert("RGBA")
    assert np.array_equal(model.predict(opaque), expected)


def test_photographs_are_turned_upright(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (40, 20)).save(tmp_path / "photograph.jpg", exif=exif)
    assert model.predict(tmp_path / "photograph.jpg").shape == (40, 20)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("none.png", FileNotFoundError, r"no file 'none\.png'"),
        (ROOT / "pyproject.toml", ValueError, "is not a readable image"),
        (np.zeros((4, 4, 3)), TypeError, "must be uint8, 0 to 255, or uint16; got float64"),
        (np.zeros((3, 4, 5), np.uint8), ValueError, r"got \[3, 4, 5\]. Channels come last"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "not empty"),
        (torch.zeros(3, 4, 4), TypeError, "got Tensor"),
        (Image.new("I;16", (4, 4)), ValueError, "has 16 bits a channel"),
    ],
)
def test_what_is_no_image_is_refused(model, image, error, message):
    with pytest.raises(error, match=message):
        model.predict(image)


def test_predicting_leaves_the_mode_as_it_was(model):
    model.train()
    first = model.predict(picture(33, 33, 3))
    assert model.training
    assert np.array_equal(model.eval().predict(picture(33, 33, 3)), first)


def test_create_model_names_wrong_arguments_before_building():
    with pytest.raises(TypeError, match="no argument `outputstride`; the nearest are output_stride"):
        icnn_zoo.create_model("test_resnet", 3, outputstride=8)
    with pytest.raises(ValueError, match="`classes` must have num_classes = 3 items; got 2"):
        icnn_zoo.create_model("test_resnet", 3, classes=["a", "b"])
    model = icnn_zoo.create_model("test_resnet", 3, output_stride=16, start="classifier")
    assert list(icnn_zoo.irregular_layers(model)) == ["classifier"]
    assert model.training


def test_a_start_from_the_zoo_loads_all_where_all_is_the_same(model):
    options = {"head_dilation": 3, "start": "layer3", "pretrained": f"zoo:{NAME}", "classes": model.classes}
    started = icnn_zoo.create_model("test_resnet", 6, **options)
    assert all(torch.equal(value, started.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("number", "classes"), [(4, None), (6, CLASSES)])
def test_a_start_with_other_classes_keeps_a_fresh_head(model, number, classes):
    own = icnn_zoo.create_model("test_resnet", number, start="layer3")
    head = {key: value.clone() for key, value in own.classifier.state_dict().items()}
    load_start(own, NAME, classes)
    assert all(torch.equal(value, own.classifier.state_dict()[key]) for key, value in head.items())
    theirs = model.backbone.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in own.backbone.state_dict().items())


@pytest.mark.parametrize("start", [None, "layer4", "layer2"])
def test_a_start_elsewhere_loads_the_displacements_that_both_have(model, start):
    own = icnn_zoo.create_model("test_resnet", 6, start=start, epsilon=0.25)
    load_start(own, f"zoo:{NAME}", model.classes)
    theirs = model.state_dict()
    for key, value in own.state_dict().items():
        if key in theirs:
            assert torch.equal(value, theirs[key])
        else:
            assert key.endswith(".displacement")
            assert (value == 0.25).all()


def test_a_start_within_a_limit_takes_displacements_up_to_it(model):
    own = icnn_zoo.create_model("test_resnet", 6, start="layer3", axes="rows", limit=1e-4)
    load_start(own, NAME, model.classes)
    for layer in icnn_zoo.irregular_layers(own).values():
        assert (layer.displacement[..., 1] == 0).all()
        assert 0 < layer.displacement[..., 0].abs().max() < 1.01e-4


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("resnet18", {}, "is of test_resnet, the network is resnet18"),
        ("test_resnet", {"mean": (0.1, 0.2, 0.3)}, r"was trained with mean .*set mean"),
        ("test_resnet", {"start": "layer3", "shapes": "kernel"}, "does not fit the network: .*displacement must be"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(backbone, options, message):
    own = icnn_zoo.create_model(backbone, 6, **options)
    with pytest.raises(ValueError, match=message):
        load_start(own, NAME)


def test_a_task_starts_from_the_zoo_and_never_over_other_weights(model):
    task = SegmentationTask("test_resnet", 6, start="layer3", head_dilation=3, pretrained=f"zoo:{NAME}")
    task.on_test_start()
    assert torch.equal(task.model.classifier.weight, model.classifier.weight)
    with torch.no_grad():
        task.model.classifier.weight.zero_()
    task.on_test_start()  # after training, say
    assert not task.model.classifier.weight.any()
    other = SegmentationTask("test_resnet", 6, start="layer3", head_dilation=3, pretrained=f"zoo:{NAME}")
    other.load_state_dict(task.state_dict())
    other.on_test_start()
    assert not other.model.classifier.weight.any()


def test_segment_writes_a_picture_to_look_at_and_a_label_map(tmp_path, capsys):
    photograph = pytest.importorskip("skimage.data").astronaut()[:200, 50:350]
    Image.fromarray(photograph).save(tmp_path / "photograph.png")
    outputs = [tmp_path / "picture.png", tmp_path / "labels.png"]
    command = ["segment", NAME, str(tmp_path / "photograph.png"), "--to", str(outputs[0]), "--labels", str(outputs[1])]
    zoo_main(command)
    assert capsys.readouterr().out.count("Written: ") == 2
    picture = np.asarray(Image.open(outputs[0]))
    assert np.array_equal(picture[:200, :300], photograph)
    assert picture.shape[1] > 2 * 300 + 50  # and a legend
    labels = Image.open(outputs[1])
    assert (labels.mode, labels.size) == ("P", (300, 200))
    assert np.array_equal(np.asarray(labels), icnn_zoo.load_checkpoint(NAME).predict(photograph))
    with pytest.raises(SystemExit, match="exists; choose another name, or --force"):
        zoo_main(command)
    zoo_main([*command, "--force"])
    with pytest.raises(SystemExit, match=r"must end in \.png or"):
        zoo_main([*command[:4], str(tmp_path / "picture.txt")])
    with pytest.raises(SystemExit, match="no folder"):
        zoo_main([*command[:4], str(tmp_path / "none" / "picture.png")])


def test_list_show_load_and_verify_speak_to_people(tmp_path, capsys, zoo_folder):
    zoo_main(["list", "*shapes"])
    assert capsys.readouterr().out.startswith(f"{NAME}  ")
    zoo_main(["show", NAME])
    assert "| val/mIoU |" in capsys.readouterr().out
    zoo_main(["show", NAME, "--json"])
    assert capsys.readouterr().out == (zoo_folder / NAME / "card.json").read_text()
    zoo_main(["load", NAME, "--to", str(tmp_path / "weights.safetensors")])
    assert "Verified: sha256 " in capsys.readouterr().out
    assert (tmp_path / "weights.safetensors").read_bytes() == (zoo_folder / NAME / "model.safetensors").read_bytes()
    zoo_main(["verify", NAME])
    assert "1 checked" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"icnn-zoo list: no checkpoint of .* matches 'none'"):
        zoo_main(["list", "none"])
    with pytest.raises(SystemExit, match="the nearest are"):
        zoo_main(["verify", "test_resnet.shape"])


@pytest.mark.slow
def test_the_wheel_alone_brings_the_checkpoints_and_loads_them_offline(tmp_path, zoo_folder):
    source = shutil.copytree(
        ROOT, tmp_path / "source", symlinks=True, ignore=shutil.ignore_patterns(".git", "build", "data")
    )
    shutil.copytree(zoo_folder, source / "checkpoints", dirs_exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ICNN", "PYTHONPATH"))}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    command = [*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, env=environment)
    wheel = next(tmp_path.glob("*.whl"))
    assert f"icnn_zoo/checkpoints/{NAME}/model.safetensors" in zipfile.ZipFile(wheel).namelist()
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    code = (
        "import socket; socket.socket.connect = None; import icnn_zoo; assert 'site' in icnn_zoo.__file__; "
        f"assert '{NAME}' in icnn_zoo.list_checkpoints(); icnn_zoo.load_checkpoint('{NAME}')"
    )
    offline = {**environment, "PYTHONPATH": str(tmp_path / "site"), "ICNN_ZOO_CACHE": "/dev/null/none"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=offline)

"""Networks of other packages through the one command line, and what may be imported because a file says so."""

import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from zoo_cases import ABOUT

import icnn_zoo
from icnn_zoo.cli.programs import lightning_main, zoo_main
from icnn_zoo.models import SegmentationModel
from icnn_zoo.training.callbacks import DisplacementMonitor
from icnn_zoo.training.network_sources import load_task
from icnn_zoo.training.task import SegmentationTask

ROOT = Path(__file__).parents[2]
UNET = {"class_path": "segmentation_models_pytorch.Unet", "init_args": {"encoder_name": "tu-test_resnet"}}
UNET["init_args"] |= {"encoder_depth": 3, "decoder_channels": [16, 8, 8], "encoder_weights": None}
DEEPLAB = {
    "class_path": "torchvision.models.segmentation.deeplabv3_mobilenet_v3_large",
    "init_args": {"aux_loss": True},
}

pytestmark = pytest.mark.filterwarnings("ignore")


class Tiny(nn.Sequential):
    """A network of one's own: half of the image's size, whatever that is."""

    size_multiple = 2

    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.Conv2d(width, num_classes, 3, padding=1)
        )


class Two(Tiny):
    """One with a further output, on its way to the logits."""

    def __init__(self, num_classes: int, further: int | None = None) -> None:
        super().__init__(num_classes)
        self.aux = nn.Conv2d(4, further or num_classes, 1)

    def forward(self, images):
        features = self[1](self[0](images))
        return {"out": self[2](features), "aux": self.aux(features)}


class Free(Tiny):
    """One that has learned shapes by itself, of free taps."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        options = {"padding": 2, "taps": 6, "interpolation": "gaussian"}
        self[2] = icnn_zoo.IrregularConv2d(4, num_classes, 5, **options)


class Named(Tiny):
    def forward(self, images):
        return {"logits": super().forward(images)}


OWN = {"class_path": f"{__name__}.Tiny"}


def config(folder: Path, network, start, **model) -> list[str]:
    """Arguments of the command line: the run of the tests with another network."""
    options = yaml.safe_load((ROOT / "tests" / "shapes.yaml").read_text())
    for name in ("head", "head_dilation", "output_stride"):
        del options["model"][name]
    options["model"] |= {"backbone": None, "network": network, "start": start, **model}
    options["data"]["init_args"] |= {"num_workers": 0, "num_val": 3, "batch_size": 2, "eval_batch_size": 3}
    options["data"]["init_args"] |= {"num_train": 6, "crop_size": 64}
    options["trainer"] |= {"max_steps": 2, "val_check_interval": 1, "accelerator": "cpu", "enable_progress_bar": False}
    options["trainer"]["logger"]["init_args"]["save_dir"] = str(folder)
    options["pictures"]["num_samples"] = 0
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(options))
    return ["-c", str(path)]


@pytest.mark.parametrize(
    ("network", "start", "arch", "allow"),
    [
        pytest.param(UNET, "decoder.blocks.1", "unet", "segmentation_models_pytorch", id="smp"),
        pytest.param(
            DEEPLAB, "classifier", DEEPLAB["class_path"].rpartition(".")[2], DEEPLAB["class_path"], id="torchvision",
            marks=pytest.mark.slow,
        ),
        pytest.param({"class_path": f"{__name__}.Free"}, None, "free", f"{__name__}.Free", id="free taps of its own"),
    ],
)  # fmt: skip
def test_a_network_of_another_package_is_trained_resumed_tested_published_loaded_and_exported(
    network, start, arch, allow, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    run = config(tmp_path, network, start, class_weights="auto")
    lightning_main(["fit", *run])
    last = tmp_path / "shapes" / "version_0" / "checkpoints" / "last.ckpt"
    lightning_main(["fit", *run, "--ckpt_path", str(last), "--trainer.max_steps", "3"])
    last = tmp_path / "shapes" / "version_1" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    lightning_main(["test", *run, "--ckpt_path", str(last)])
    header = (tmp_path / "shapes" / "version_2" / "metrics.csv").read_text().splitlines()[0]
    assert all(f"test/{score}/disk" in header for score in ("IoU", "Dice", "precision", "recall")), header

    (tmp_path / "about.yaml").write_text(yaml.safe_dump(ABOUT))
    publish = ["publish", str(last.parents[1]), "--name", f"{arch}.mine", "--to", "zoo", "--about", "about.yaml"]
    zoo_main([*publish, "--allow", allow])
    card = json.loads((tmp_path / "zoo" / f"{arch}.mine" / "card.json").read_text())
    assert card["network"]["network"]["class_path"] == network["class_path"]
    with pytest.raises(ValueError, match="which is imported only if you allow it"):
        icnn_zoo.load_checkpoint(f"{arch}.mine", registry="zoo")
    model = icnn_zoo.load_checkpoint(f"{arch}.mine", registry="zoo", allow=[allow])
    task = load_task(last, allow=[allow])
    image = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
    logits = task.model.full_logits(task.model.preprocess(torch.from_numpy(image).permute(2, 0, 1)[None]))
    assert (model.predict(image) == logits.argmax(1)[0].numpy()).all()
    assert any(isinstance(callback, DisplacementMonitor) for callback in task.configure_callbacks())
    assert len(icnn_zoo.irregular_layers(model)) == len(icnn_zoo.irregular_layers(task)) > 0
    zoo_main(["verify", f"{arch}.mine", "--registry", "zoo", "--metrics", "--allow", allow])
    zoo_main(["export", str(last), "--to", "net.onnx", "--size", "64", "64", "--allow", allow])
    assert "Written: net.onnx" in capsys.readouterr().out


def test_logits_of_any_network_are_brought_to_the_images_size():
    model = SegmentationModel(None, 3, network=OWN).eval()
    images = torch.randn(1, 3, 31, 40)
    whole = nn.functional.interpolate(model.network(images[..., [*range(31), 30], :]), (32, 40), mode="bilinear")
    torch.testing.assert_close(model(images), whole[..., :31, :])
    assert model.head_names() == ("network.2.weight", "network.2.bias")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"class_path": "segmentation_models_pytorch.Unett"}, "nearest are .*Unet"),
        ({"class_path": "no_such_package.Unet"}, "cannot be imported.*no_such_package"),
        ({"class_path": "Unet"}, "dotted name"),
        ({"class_path": "a.B", "encoder": 1}, "the key encoder.*init_args"),
        ({"class_path": f"{__name__}.Tiny", "init_args": {"widht": 3}}, "cannot be built"),
        ({"class_path": f"{__name__}.Tiny", "init_args": {"num_classes": 7}}, "num_classes must be 3.*got 7"),
        ({"class_path": "pathlib.Path"}, "must give a torch.nn.Module"),
    ],
)
def test_a_network_that_cannot_be_made_says_why(network, message):
    with pytest.raises(ValueError, match=f"`network`.*{message}"):
        SegmentationModel(None, 3, network=network)


def scene(size=32):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (2, size, size), generator=generator)
    return {"image": torch.randint(256, (2, 3, size, size), generator=generator).float(), "mask": labels}


def two(aux_weight=0.4, **arguments):
    torch.manual_seed(0)
    network = {"class_path": f"{__name__}.Two", "init_args": arguments}
    task = SegmentationTask(None, 3, network=network, loss_resolution="image", aux_weight=aux_weight).double()
    task.trainer = Mock(world_size=1)
    return task


def test_further_outputs_add_their_loss_with_a_weight_in_training_alone():
    task, batch = two(), scene()
    outputs = task.model.network(task.model.preprocess(batch["image"].double()))
    losses = [
        nn.functional.cross_entropy(nn.functional.interpolate(outputs[name], (32, 32), mode="bilinear"), batch["mask"])
        for name in ("out", "aux")
    ]
    torch.testing.assert_close(task.training_step(batch, 0), losses[0] + 0.4 * losses[1], check_dtype=False)
    torch.testing.assert_close(two(0.0).training_step(batch, 0), losses[0], check_dtype=False)
    assert task.eval()(batch["image"]).shape == (2, 3, 32, 32)
    assert task.model.head_names() == ("network.2.weight", "network.2.bias", "network.aux.weight", "network.aux.bias")


def test_outputs_that_are_not_logits_are_refused():
    with pytest.raises(ValueError, match=r"\[B, 3, h, w\]; got \[2, 7, 16, 16\] as 'aux'.*aux_weight 0"):
        two(further=7).training_step(scene(), 0)
    two(0.0, further=7).training_step(scene(), 0)
    with pytest.raises(ValueError, match=r"must give logits, alone or as 'out'; got \['logits'\]"):
        SegmentationModel(None, 3, network={"class_path": f"{__name__}.Named"})(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"`aux_weight` must be at least 0; got -0\.4"):
        two(-0.4)
    with pytest.raises(ValueError, match="`backbone` must name a timm network, or be None"):
        SegmentationModel("test_resnet", 3, network=OWN)


def test_weights_that_nobody_would_load_are_an_error_before_training(tmp_path):
    network = {**UNET, "init_args": {**UNET["init_args"], "encoder_weights": "imagenet"}}
    with pytest.raises(ValueError, match=r"encoder_weights.*pretrained true"):
        lightning_main(["fit", *config(tmp_path, network, None)])


def test_no_class_is_imported_because_a_checkpoint_says_so(tmp_path, monkeypatch):
    lightning_main(["fit", *config(tmp_path, OWN, "network.2")])
    last = tmp_path / "shapes" / "version_0" / "checkpoints" / "last.ckpt"
    assert load_task(last, allow=[__name__]).model.network.size_multiple == 2
    monkeypatch.setenv("ICNN_ZOO_ALLOW", f"other,{__name__}.Tiny")
    load_task(last)
    monkeypatch.setenv("ICNN_ZOO_ALLOW", "")
    checkpoint = torch.load(last, weights_only=True)
    (tmp_path / "evil.py").write_text("open('ran', 'w')\nclass Tiny: pass\n")
    checkpoint["hyper_parameters"]["network"] = {"class_path": "evil.Tiny"}
    torch.save(checkpoint, tmp_path / "evil.ckpt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="which is imported only if you allow it"):
        load_task("evil.ckpt")
    with pytest.raises(ValueError, match="which is imported only if you allow it"):
        icnn_zoo.training.task.SegmentationTask.load_from_checkpoint("evil.ckpt")
    with pytest.raises(ValueError, match="`network`: the checkpoint was made with"):
        lightning_main(["fit", "-c", str(ROOT / "tests" / "shapes.yaml"), "--ckpt_path", "evil.ckpt"])
    assert not Path("ran").exists()


def test_what_a_package_only_imports_is_not_allowed_with_it():
    card = {"class_path": f"{__name__}.nn.Module"}
    from icnn_zoo.nn.class_paths import check_allowed

    for path in (f"{__name__}.lightning_main", f"{__name__}.SegmentationModel"):  # a function, and another package's
        with pytest.raises(ValueError, match=r"not a subclass|is defined in"):
            check_allowed("network", {"class_path": path}, [__name__], "the card")
    with pytest.raises(ValueError, match="cannot be imported"):
        check_allowed("network", card, [__name__], "the card")

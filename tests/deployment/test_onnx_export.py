"""The contract of ONNX export: dynamic sizes, the network's outputs in onnxruntime, no file unless all is well."""

import builtins
import importlib

import onnx
import onnxruntime
import pytest
import torch
import yaml
from timm.layers import Conv2dSame
from torch import nn

from icnn_zoo import IrregularConv2d, convert, irregular_layers
from icnn_zoo.cli.programs import zoo_main
from icnn_zoo.deployment.onnx_export import export_onnx
from icnn_zoo.models import SegmentationModel
from icnn_zoo.ops.operators import DECOMPOSITIONS
from icnn_zoo.training.network_sources import load_task
from icnn_zoo.training.task import SegmentationTask


def moved(model: nn.Module, start: str) -> nn.Module:
    convert(model.eval(), start)
    with torch.no_grad():
        for number, layer in enumerate(irregular_layers(model).values()):
            layer.displacement.uniform_(-0.7, 0.7)
            layer.displacement.view(-1)[number] += 40
    return model


def small(start: str = "0") -> nn.Module:
    return moved(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()), start)


def run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]


def assert_same(path, model: nn.Module, *shapes) -> None:
    for shape in shapes:
        images = torch.rand(shape)
        with torch.no_grad():
            expected = model(images)
        for found, truth in zip(run(path, images), [expected] if torch.is_tensor(expected) else expected, strict=True):
            assert found.shape == truth.shape
            assert (found - truth).abs().max() < 1e-5 * truth.abs().max()


def test_a_whole_woken_network_computes_the_same_in_onnxruntime_at_any_batch_and_size(tmp_path, waken):
    model = moved(waken(SegmentationModel("test_resnet", 5)), "layer3")
    report = export_onnx(model, tmp_path / "model.onnx", (3, 64, 64), rounds=1)
    assert_same(report.path, model, (1, 3, 64, 64), (3, 3, 65, 97), (2, 3, 33, 40), (1, 3, 110, 64))
    assert report.shapes == ((1, 3, 64, 64), (2, 3, 65, 67), (3, 3, 96, 128))
    assert report.difference < 1e-5
    assert set(report.milliseconds) == {"PyTorch, irregular", "PyTorch, deployed", "onnxruntime"}
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def wide() -> nn.Module:
    options = {"padding": 1, "stride": (2, 1), "groups": 3}
    layers = [
        IrregularConv2d(3, 6, 3, **options, interpolation="triangle"),
        IrregularConv2d(6, 6, 5, padding=2, groups=6, taps=4, shapes="kernel", interpolation="gaussian"),
    ]
    for layer in layers:
        nn.init.uniform_(layer.displacement, -0.9, 0.9)
        nn.init.uniform_(layer.widening, 0.1, 0.6)
    return nn.Sequential(*layers).eval()


def test_triangles_and_gaussians_compute_the_same_in_onnxruntime(tmp_path):
    model = wide()
    report = export_onnx(model, tmp_path / "model.onnx", (3, 17, 23), rounds=1)
    assert_same(report.path, model, (1, 3, 17, 23), (2, 3, 12, 31))


@pytest.mark.slow
def test_layers_that_are_not_deployed_are_exported_by_their_formula_at_any_size(tmp_path):
    model, path, images = wide(), tmp_path / "model.onnx", torch.rand(2, 3, 17, 23)
    sizes = {"input": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)}
    program = torch.export.export(model, (images,), dynamic_shapes=sizes).run_decompositions(DECOMPOSITIONS)
    torch.onnx.export(program, (images,), path, input_names=["images"], external_data=False, verbose=False)
    assert_same(path, model, (1, 3, 17, 23), (2, 3, 12, 31))


def test_padding_by_input_size_stays_dynamic_in_irregular_and_regular_layers(tmp_path, waken):
    layers = [Conv2dSame(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), Conv2dSame(4, 4, 5, stride=2, groups=4)]
    model = moved(waken(nn.Sequential(*layers)), "3")
    path = export_onnx(model, tmp_path / "model.onnx", (3, 32, 32), rounds=1).path
    assert_same(path, model, *((1, 3, 20 + rows, 31 - rows) for rows in range(5)))


def test_several_outputs_and_sizes_that_the_network_refuses(tmp_path):
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)

        def forward(self, images):
            torch._check(images.shape[-1] % 16 == 0)
            first = self.first(images)
            return first, self.second(first)

    model = moved(Pyramid(), "")
    report = export_onnx(model, tmp_path / "model.onnx", (3, 32, 48), rounds=1)
    assert report.shapes == ((1, 3, 32, 48), (3, 3, 64, 112))
    assert_same(report.path, model, (2, 3, 17, 32))


def test_an_existing_file_is_kept_unless_told(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"exists\. Choose another name, or overwrite=True"):
        export_onnx(small(), path, (3, 16, 16))
    assert path.read_text() == "mine"
    export_onnx(small(), path, (3, 16, 16), overwrite=True, rounds=1)
    onnx.checker.check_model(str(path))


def test_nothing_is_left_when_the_file_computes_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr("icnn_zoo.deployment.onnx_export.TOLERANCE", 0.0)
    with pytest.raises(
        RuntimeError, match=r"onnxruntime differs from the network by .* at input shape \(1, 3, 16, 16\)"
    ):
        export_onnx(small(), tmp_path / "model.onnx", (3, 16, 16))
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_exported_says_why_and_leaves_nothing(tmp_path):
    class Data(nn.Sequential):
        def forward(self, images):
            return super().forward(images) if images.sum() > 0 else images

    with pytest.raises(RuntimeError, match="cannot export Data with dynamic batch, height and width"):
        export_onnx(moved(Data(nn.Conv2d(3, 3, 3)), ""), tmp_path / "model.onnx", (3, 16, 16))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": (16, 16)}, r"`input_size` must be \(channels, height, width\)"),
        ({"path": "no/model.onnx"}, "no folder"),
        ({"model": small().half()}, r"must be float32; got torch\.float16"),
    ],
)
def test_wrong_arguments_are_named(change, message, tmp_path):
    arguments = {"model": small(), "path": "model.onnx", "input_size": (3, 16, 16)} | change
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        export_onnx(arguments["model"], tmp_path / arguments["path"], arguments["input_size"])
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    def import_module(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ImportError, match=r'needs onnx: pip install "icnn-zoo\[export\]"'):
        export_onnx(small(), tmp_path / "model.onnx", (3, 16, 16))


@pytest.fixture
def task() -> SegmentationTask:
    task = SegmentationTask(backbone="test_byobnet", num_classes=3, start="classifier", head_dilation=2)
    with torch.no_grad():
        task.model.classifier.displacement.uniform_(-0.7, 0.7)
    return task.eval()


@pytest.fixture
def checkpoint(task, tmp_path):
    import lightning.pytorch as pl

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    return tmp_path / "last.ckpt"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    model = {"backbone": "test_byobnet", "start": "classifier", "head_dilation": 2, "pretrained": False}
    data = {"class_path": "icnn_zoo.data.ShapesDataModule", "init_args": {"num_classes": 4}}
    path.write_text(yaml.safe_dump({"seed_everything": 3, "model": model, "data": data, "ckpt_path": None}))
    return path


def test_the_command_exports_a_checkpoint_and_prints_forms_difference_and_times(checkpoint, task, tmp_path, capsys):
    path = tmp_path / "model.onnx"
    zoo_main(["export", str(checkpoint), "--to", str(path), "--size", "33", "48"])
    output = capsys.readouterr().out
    for text in ("model.classifier", "Largest difference", "PyTorch, irregular", "onnxruntime", f"Written: {path}"):
        assert text in output
    images = torch.randint(0, 256, (2, 3, 41, 40)).float()
    with torch.no_grad():
        expected = task(images)  # RGB in 0..255, as the task takes
    torch.testing.assert_close(run(path, images)[0], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_checkpoint_gives_the_task_that_was_saved(checkpoint, task):
    loaded = load_task(checkpoint)
    assert not loaded.training
    images = torch.rand(1, 3, 33, 33) * 255
    assert torch.equal(loaded(images), task(images))


def test_a_config_gives_its_network_and_its_datas_classes(config):
    first, second = load_task(config), load_task(config)
    assert first.model.num_classes == 4
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_files_that_are_neither_are_refused_with_what_is_wrong(tmp_path):
    cases = {
        "none.ckpt": (None, FileNotFoundError, "no file"),
        "model.bin": ("", ValueError, r"must be a checkpoint \(\.ckpt\) or a config \(\.yaml\)"),
        "text.ckpt": ("hello", ValueError, "cannot be read as a checkpoint"),
        "empty.yaml": ("", ValueError, "no section model and no data"),
        "wrong.yaml": ("a: [", ValueError, "is not valid YAML"),
    }
    for name, (text, error, message) in cases.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(error, match=message):
            load_task(tmp_path / name)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="no hyper_parameters and no state_dict"):
        load_task(tmp_path / "weights.ckpt")
    torch.save({"hyper_parameters": {"depth": 3}, "state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"not a checkpoint of a SegmentationTask: .*depth"):
        load_task(tmp_path / "other.ckpt")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return builtins.print, ("ran",)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="tensors and plain values"):
        load_task(tmp_path / "evil.ckpt")


def test_the_command_says_what_is_wrong(tmp_path):
    with pytest.raises(SystemExit, match=r"icnn-zoo export: There is no file"):
        zoo_main(["export", str(tmp_path / "last.ckpt"), "--to", str(tmp_path / "model.onnx")])


def test_a_regular_network_is_exported_as_it_is(config, tmp_path, capsys):
    described = yaml.safe_load(config.read_text())
    described["model"]["start"] = None
    config.write_text(yaml.safe_dump(described))
    zoo_main(["export", str(config), "--to", str(tmp_path / "model.onnx"), "--size", "65", "65"])
    assert "A regular network: exported as it is." in capsys.readouterr().out
    assert (tmp_path / "model.onnx").is_file()

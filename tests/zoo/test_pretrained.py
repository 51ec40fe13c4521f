"""Starting weights: counted by name, found under the names of others, refused where they do not cover the backbone."""

import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from zoo_cases import NAME

from icnn_zoo import convert
from icnn_zoo.models import SegmentationModel
from icnn_zoo.zoo.pretrained import load_pretrained


@pytest.fixture(scope="module")
def source() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return timm.create_model("resnet18").state_dict()


def test_local_weights_load_before_or_after_converting(source, tmp_path):
    save_file(source, tmp_path / "weights.safetensors")
    for model in (SegmentationModel("resnet18", 3), convert(SegmentationModel("resnet18", 3), "layer3")):
        report = load_pretrained(model, tmp_path / "weights.safetensors")
        assert torch.equal(model.backbone.layer4[1].conv2.weight, source["layer4.1.conv2.weight"])
        assert (report.missing, set(report.unused)) == ((), {"fc.weight", "fc.bias"})
        assert len(report.loaded) == len(source) - 2


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["module.", "model.", "encoder.", "backbone.", "model.backbone.", "module.encoder."])
def test_the_names_of_other_packages_are_understood(source, tmp_path, prefix, wrap):
    renamed = {prefix + name: tensor for name, tensor in source.items()} | {"decode_head.weight": torch.ones(1)}
    torch.save(renamed if wrap is None else {wrap: renamed, "epoch": 3}, tmp_path / "weights.pth")
    model = SegmentationModel("resnet18", 3)
    report = load_pretrained(model, tmp_path / "weights.pth")
    assert torch.equal(model.backbone.conv1.weight, source["conv1.weight"])
    assert len(report.loaded) == len(source) - 2
    assert "decode_head.weight" in report.unused


def test_names_that_timm_joins_in_extractors_are_found(tmp_path):
    network = timm.create_model("convnext_atto")
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    model = SegmentationModel("convnext_atto", 3)
    load_pretrained(model, tmp_path / "weights.safetensors")
    theirs = network.state_dict()["stages.3.blocks.1.conv_dw.weight"]
    assert torch.equal(model.backbone.stages_3.blocks[1].conv_dw.weight, theirs)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (lambda name: False, r"must hold tensors by name; it holds nothing"),
        (lambda name: name == "fc.weight", r"has 0 of 100 tensors .* nothing in it has the network's names"),
        (
            lambda name: name.startswith("layer1"),
            r"has 20 of 100 tensors .*missing \(backbone.conv1.weight.*partial=True",
        ),
        (lambda name: name != "layer4.0.conv1.weight", r"has 99 of 100 .*missing \(backbone.layer4.0.conv1.weight\)"),
    ],
)
def test_files_that_do_not_cover_the_backbone_are_refused_and_change_nothing(source, tmp_path, kept, message):
    save_file({name: tensor for name, tensor in source.items() if kept(name)}, tmp_path / "weights.safetensors")
    model = SegmentationModel("resnet18", 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, tmp_path / "weights.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_part_is_loaded_where_that_is_asked_for(source, tmp_path):
    part = {name: tensor for name, tensor in source.items() if name.startswith("layer1")}
    save_file(part, tmp_path / "weights.safetensors")
    model = SegmentationModel("resnet18", 3)
    report = load_pretrained(model, tmp_path / "weights.safetensors", partial=True)
    assert {name.removeprefix("backbone.") for name in report.loaded} == set(part)
    assert "backbone.conv1.weight" in report.missing
    assert "80 missing (backbone.conv1.weight" in str(report)
    save_file({"other.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="nothing in it has the network's names"):
        load_pretrained(model, tmp_path / "other.safetensors", partial=True)


def test_other_shapes_are_refused_with_the_name(source, tmp_path):
    save_file({**source, "conv1.weight": torch.ones(64, 1, 7, 7)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"backbone.conv1.weight must be torch.float32 \[64, 3, 7, 7\]"):
        load_pretrained(SegmentationModel("resnet18", 3), tmp_path / "weights.safetensors")


@pytest.mark.parametrize(("start", "number"), [("layer3", 6), ("layer3", 4), (None, 6), ("layer4", 6)])
def test_a_checkpoint_of_a_run_loads_with_other_classes_and_starts_too(zoo_run, start, number):
    file = zoo_run / "checkpoints" / "best.ckpt"
    theirs = torch.load(file, weights_only=True)
    model = SegmentationModel("test_resnet", number)
    if start:
        convert(model, start, epsilon=0.25)
    head = model.classifier.weight.clone()
    names = theirs["hyper_parameters"]["class_names"]
    report = load_pretrained(model, file, names[:number])
    state = theirs["state_dict"]
    assert torch.equal(model.backbone.layer4[0].conv1.weight, state["model.backbone.layer4.0.conv1.weight"])
    assert torch.equal(model.classifier.weight, head if number == 4 else state["model.classifier.weight"])
    assert report.missing == ()
    if start == "layer4":
        assert torch.equal(
            model.backbone.layer4[0].conv1.displacement, state["model.backbone.layer4.0.conv1.displacement"]
        )
        assert report.unused == ("model.backbone.layer3.0.conv2.displacement",)


def test_a_checkpoint_of_another_backbone_is_refused_by_name(zoo_run):
    with pytest.raises(ValueError, match="is of test_resnet, the network is resnet18"):
        load_pretrained(SegmentationModel("resnet18", 6), zoo_run / "checkpoints" / "best.ckpt")


def test_missing_and_damaged_files_are_named(tmp_path):
    model = SegmentationModel("test_resnet", 3)
    with pytest.raises(FileNotFoundError, match=r"`pretrained`: there is no file .*none\.safetensors"):
        load_pretrained(model, tmp_path / "none.safetensors")
    for name, data in (
        ("cut.ckpt", b"PK\x03\x04"),
        ("empty.pth", b""),
        ("text.safetensors", b"text"),
        ("list.pth", None),
    ):
        if data is None:
            torch.save([1], tmp_path / name)
        else:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            load_pretrained(model, tmp_path / name)


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "planted"), "w"))

    for name, save in (
        ("a.pth", torch.save),
        ("a.ckpt", torch.save),
        ("a.pkl", lambda x, f: f.write_bytes(pickle.dumps(x))),
    ):
        save({"state_dict": Payload()}, tmp_path / name)
        with pytest.raises(ValueError, match=name):
            load_pretrained(SegmentationModel("test_resnet", 3), tmp_path / name)
    assert not (tmp_path / "planted").exists()


def test_a_run_folder_and_an_address_start_a_network_of_other_classes(zoo_run, zoo_folder, tmp_path):
    for source in (zoo_run, str(zoo_run), f"file://{zoo_folder}/{NAME}"):
        model = convert(SegmentationModel("test_resnet", 2, head_dilation=3), "layer3")
        report = load_pretrained(model, source)
        assert set(report.fresh) == set(model.head_names())
        assert "the head is new), 0 missing" in str(report)
        assert sum(name.endswith("displacement") for name in report.loaded) == 3  # not the head's
    with pytest.raises(FileNotFoundError, match=r"is not that of a run.*it has no checkpoints/best\.ckpt"):
        load_pretrained(model, tmp_path)
    model = convert(SegmentationModel("test_resnet", 6, head_dilation=3), "layer3")
    assert not load_pretrained(model, zoo_run).fresh


def test_a_network_of_another_package_starts_from_one_of_other_classes(tmp_path):
    spec = {"class_path": "segmentation_models_pytorch.FPN", "init_args": {"encoder_name": "tu-test_resnet"}}
    first, second = (SegmentationModel(None, classes, network=spec) for classes in (3, 5))
    torch.save(first.network.state_dict(), tmp_path / "theirs.pth")  # under its own names
    report = load_pretrained(second, tmp_path / "theirs.pth")
    assert report.fresh == ("network.segmentation_head.0.weight", "network.segmentation_head.0.bias")
    assert len(report.loaded) == len(first.state_dict()) - 2
    weight = next(name for name in report.loaded if name.endswith("weight"))
    assert torch.equal(first.state_dict()[weight], second.state_dict()[weight])

"""Publishing: exact, complete, all or nothing; and the published network gives the metric of its card."""

import json
import shutil
import signal
from importlib import metadata

import pytest
import safetensors.torch
import torch
import yaml
from safetensors import safe_open
from zoo_cases import ABOUT, NAME, files, interpreter

import icnn_zoo
from icnn_zoo import irregular_layers
from icnn_zoo.cli.programs import lightning_main, zoo_main
from icnn_zoo.nn.tying import tie_by_name
from icnn_zoo.publishing import publisher
from icnn_zoo.publishing.about import read_about
from icnn_zoo.publishing.publisher import _plain_tensors, publish
from icnn_zoo.training.network_sources import load_task
from icnn_zoo.zoo.cards import Card, parse
from icnn_zoo.zoo.networks import assemble, rebuild, verify_checkpoint
from icnn_zoo.zoo.registry import find_checkpoint

# Lightning's own warnings on short CPU runs say nothing about the package.
pytestmark = pytest.mark.filterwarnings("ignore")
MEASURED = {**ABOUT, "metrics": [{"name": "val/mIoU", "protocol": "none", "value": 0.5}]}


@pytest.fixture
def card(zoo_folder) -> Card:
    return parse(Card, (zoo_folder / NAME / "card.json").read_bytes(), "card")


def test_the_network_comes_back_with_no_difference_and_without_training_state(zoo_folder, zoo_run):
    original = load_task(zoo_run / "checkpoints" / "best.ckpt").model
    loaded = icnn_zoo.load_checkpoint(NAME, registry=zoo_folder)
    images = torch.randn(2, 3, 65, 65)
    with torch.no_grad():
        assert torch.equal(original(images), loaded(images))
    with safe_open(zoo_folder / NAME / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(original.state_dict())
        assert file.metadata() == {"format": "pt"}


def test_half_the_space_keeps_displacements_and_gives_the_rounded_network(zoo_run, tmp_path):
    original = load_task(zoo_run / "checkpoints" / "best.ckpt").model
    publish(zoo_run, NAME, tmp_path / "whole", MEASURED)
    folder = publish(zoo_run, NAME, tmp_path / "half", MEASURED, half=True)
    whole, half = ((tmp_path / kind / NAME / "model.safetensors").stat().st_size for kind in ("whole", "half"))
    assert half < 0.6 * whole
    verify_checkpoint(NAME, registry=tmp_path / "half")
    assert str(folder).endswith(NAME)
    loaded = icnn_zoo.load_checkpoint(NAME, registry=tmp_path / "half").state_dict()
    for name, tensor in original.state_dict().items():
        kernel = name.endswith(".weight") and tensor.dim() > 1
        assert torch.equal(loaded[name], tensor.half().float() if kernel else tensor), name


def test_the_card_holds_the_run(card, zoo_run):
    config = yaml.safe_load((zoo_run / "config.yaml").read_text())
    del config["ckpt_path"]
    assert card.training.config.keys() == config.keys()
    assert all(card.training.config[key] == config[key] for key in config.keys() - {"trainer"})
    assert card.training.config["trainer"]["max_steps"] == config["trainer"]["max_steps"]
    assert (card.training.seed, card.network["head_dilation"]) == (0, 3)
    assert 1 <= card.training.steps <= 2
    assert card.training.packages["torch"] == metadata.version("torch")
    assert card.conversion.start == "layer3"
    assert card.weights.parameters == sum(
        p.numel() for p in load_task(zoo_run / "checkpoints" / "best.ckpt").model.parameters()
    )


def test_lightning_validate_on_the_published_checkpoint_gives_the_cards_metric(
    zoo_folder, card, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ICNN_ZOO_REGISTRY", str(zoo_folder))
    monkeypatch.chdir(tmp_path)
    zoo_main(["show", NAME, "--config"])
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "runs", "--trainer.logger.name", "own"]
    lightning_main(["validate", "-c", "config.yaml", *logger])
    rows = (tmp_path / "runs" / "own" / "version_0" / "metrics.csv").read_text().splitlines()
    values = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
    assert float(values["val/mIoU"]) == pytest.approx(card.metrics[0].value, abs=1e-6)


def test_one_line_of_a_configuration_starts_a_run_from_the_zoo(zoo_folder, zoo_run, tmp_path, monkeypatch):
    monkeypatch.setenv("ICNN_ZOO_REGISTRY", str(zoo_folder))
    config = yaml.safe_load((zoo_run / "config.yaml").read_text())
    config["model"] |= {"pretrained": f"zoo:{NAME}", "start": "layer2", "lr": 0.0, "position_lr": 0.0}
    config["data"]["init_args"]["num_classes"] = 4
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    lightning_main(["fit", "-c", str(tmp_path / "config.yaml"), "--trainer.max_steps", "1"])
    trained = load_task(tmp_path / "shapes" / "version_0" / "checkpoints" / "last.ckpt").model
    loaded = icnn_zoo.load_checkpoint(NAME)
    assert torch.equal(trained.backbone.layer4[0].conv1.displacement, loaded.backbone.layer4[0].conv1.displacement)
    assert torch.equal(trained.backbone.layer1[0].conv1.weight, loaded.backbone.layer1[0].conv1.weight)
    assert (trained.backbone.layer2[0].conv1.displacement == 1e-3).all()
    assert trained.num_classes == 4


def test_verify_measures_the_metric_and_finds_a_wrong_one(zoo_folder, zoo_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    zoo_main(["verify", "--metrics", "--registry", str(zoo_folder)])
    output = capsys.readouterr().out
    assert "golden output reproduced" in output
    assert "val/mIoU" in output
    assert not list(tmp_path.iterdir())  # evaluating leaves nothing
    publish(zoo_run, NAME, tmp_path, MEASURED)
    with pytest.raises(SystemExit, match=r"val/mIoU is 0\.\d+, its card says 0\.5000"):
        zoo_main(["verify", NAME, "--metrics", "--registry", str(tmp_path)])


def test_an_existing_name_is_refused_and_others_are_added_in_order(zoo_run, tmp_path):
    publish(zoo_run, NAME, tmp_path, MEASURED)
    before = (tmp_path / "index.json").read_bytes()
    with pytest.raises(ValueError, match=f"{NAME} is published in .* already"):
        publish(zoo_run, NAME, tmp_path, MEASURED)
    assert (tmp_path / "index.json").read_bytes() == before
    publish(zoo_run / "checkpoints" / "last.ckpt", "test_resnet.another", tmp_path, MEASURED)
    assert [entry["name"] for entry in json.loads((tmp_path / "index.json").read_text())["checkpoints"]] == [
        "test_resnet.another",
        NAME,
    ]
    for name in icnn_zoo.list_checkpoints(registry=tmp_path):
        verify_checkpoint(name, registry=tmp_path)


def without(place: str) -> dict:
    about = json.loads(json.dumps(MEASURED))
    outer, _, inner = place.rpartition(".")
    del (about[outer] if outer else about)[inner]
    return about


@pytest.mark.parametrize(
    ("about", "name", "message"),
    [
        (without("licence"), NAME, "licence: Field required"),
        (without("metrics"), NAME, "metrics: Field required"),
        (without("dataset.attribution"), NAME, r"dataset\.attribution: Field required"),
        ({**MEASURED, "description": " "}, NAME, "description: String should match"),
        ({**MEASURED, "metrics": [{"name": "mIoU", "value": 0.5, "protocol": "p"}]}, NAME, "String should match"),
        ({**MEASURED, "metrics": [{"name": "val/none", "protocol": "p"}]}, NAME, "val/none are not logged; there are"),
        ({**MEASURED, "surplus": 1}, NAME, "surplus: Extra inputs"),
        (MEASURED, "resnet18.shapes", "`name` must be test_resnet.<tag>"),
        (MEASURED, "../test_resnet.x", "name must be arch.tag"),
    ],
)
def test_a_dirty_card_is_refused_and_nothing_is_written(zoo_run, tmp_path, about, name, message):
    with pytest.raises(ValueError, match=message):
        publish(zoo_run, name, tmp_path / "zoo", about)
    assert not (tmp_path / "zoo").exists()


def test_what_is_no_run_is_refused_with_the_reason(zoo_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a checkpoint"):
        publish(tmp_path, NAME, tmp_path / "zoo", MEASURED)
    with pytest.raises(FileNotFoundError, match=r"no '.*config\.yaml'"):
        publish(shutil.copy(zoo_run / "checkpoints" / "last.ckpt", tmp_path), NAME, tmp_path / "zoo", MEASURED)
    with pytest.raises(ValueError, match="`to` must be a folder"):
        publish(zoo_run, NAME, "https://example.org/zoo", MEASURED)
    with pytest.raises(FileNotFoundError, match=r"no picture 'none\.png'"):
        publish(zoo_run, NAME, tmp_path / "zoo", {**MEASURED, "pictures": {"none.png": "Nothing"}})
    run = shutil.copytree(zoo_run, tmp_path / "run")
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    del checkpoint["provenance"]
    torch.save(checkpoint, run / "checkpoints" / "best.ckpt")
    with pytest.raises(ValueError, match="does not say which software made it"):
        publish(run, NAME, tmp_path / "zoo", MEASURED)
    made = {"packages": {"torch": "2.11"}, "commit": None}
    publish(run, NAME, tmp_path / "zoo", {**MEASURED, "provenance": made})


@pytest.mark.parametrize("moment", ["_read_back", "write_whole"])
def test_a_kill_while_publishing_leaves_the_old_state_and_the_way_free(zoo_run, tmp_path, moment):
    killed = """
import json, os, signal, sys
from icnn_zoo.publishing import publisher
moment, run, name, folder, about = sys.argv[1:]
setattr(publisher, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
publisher.publish(run, name, folder, json.loads(about))
"""
    publish(zoo_run, "test_resnet.first", tmp_path, MEASURED)
    before = (tmp_path / "index.json").read_bytes()
    assert interpreter(killed, moment, zoo_run, NAME, tmp_path, json.dumps(MEASURED)).wait() == -signal.SIGKILL
    assert (tmp_path / "index.json").read_bytes() == before
    assert icnn_zoo.list_checkpoints(registry=tmp_path) == ["test_resnet.first"]
    publish(zoo_run, NAME, tmp_path, MEASURED)
    verify_checkpoint(NAME, registry=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {NAME, "test_resnet.first", "index.json", "README.md", ".lock"}


def test_another_output_after_reading_back_is_not_published(zoo_run, tmp_path, monkeypatch):
    def rounded(model):
        return {name: value.bfloat16().to(value.dtype) for name, value in model.state_dict().items()}

    monkeypatch.setattr(publisher, "_plain_tensors", rounded)
    with pytest.raises(ValueError, match="does not come back as it was"):
        publish(zoo_run, NAME, tmp_path, MEASURED)
    assert files(tmp_path) <= {".lock"}


def test_a_folder_of_somebody_else_is_not_overwritten(zoo_run, tmp_path):
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match=r"in the way and holds thesis\.tex"):
        publish(zoo_run, NAME, tmp_path, MEASURED)


def test_the_command_publishes_with_pictures_from_a_yaml_file(zoo_run, tmp_path, capsys):
    shutil.copy(next((zoo_run / "pictures").glob("*.png"), None) or make_picture(tmp_path), tmp_path / "picture.png")
    about = {**MEASURED, "pictures": {"picture.png": "Predictions"}, "palette": ["#000000", *(5 * ["#ff8000"])]}
    (tmp_path / "about.yaml").write_text(yaml.safe_dump(about))
    command = ["publish", str(zoo_run), "--name", NAME, "--to", str(tmp_path / "zoo")]
    zoo_main([*command, "--about", str(tmp_path / "about.yaml")])
    assert "Published: " in capsys.readouterr().out
    assert files(tmp_path / "zoo" / NAME) == {"card.json", "model.safetensors", "README.md", "picture.png"}
    assert "![Predictions](picture.png)" in (tmp_path / "zoo" / NAME / "README.md").read_text()
    assert icnn_zoo.load_checkpoint(NAME, registry=tmp_path / "zoo").palette[1].tolist() == [255, 128, 0]


def make_picture(folder):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(folder / "new.png")
    return folder / "new.png"


def test_a_card_names_no_folder_of_the_machine_that_trained(zoo_folder, zoo_run):
    """The run went into an absolute folder, and may have gone on from a checkpoint that nobody else has."""
    assert str(zoo_run.parents[1]) in (zoo_run / "config.yaml").read_text()
    config = json.loads((zoo_folder / NAME / "card.json").read_text())["training"]["config"]
    assert str(zoo_run.parents[1]) not in json.dumps(config)
    assert "ckpt_path" not in config
    assert config["trainer"]["logger"]["init_args"]["save_dir"] == "runs"


def test_tied_shapes_are_published_and_come_back_tied(zoo_folder):
    model, card = rebuild(*find_checkpoint(NAME, registry=zoo_folder))
    sizes = {}
    for name, layer in irregular_layers(model).items():
        sizes.setdefault(layer.displacement.shape, []).append(name)
    names = next(names for names in sizes.values() if len(names) > 1)
    tie_by_name(model, [names])
    tensors = safetensors.torch.load(safetensors.torch.save(_plain_tensors(model)))
    update = {
        "conversion": card.conversion.model_copy(update={"tied": [names]}),
        "weights": card.weights.model_copy(update={"parameters": sum(it.numel() for it in model.parameters())}),
    }
    loaded = assemble(card.model_copy(update=update), tensors)
    for network in (model, loaded):
        assert len({id(irregular_layers(network)[name].displacement) for name in names}) == 1
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_spreads_and_limits_are_published_and_come_back(zoo_folder):
    regular, card = rebuild(*find_checkpoint(NAME, registry=zoo_folder))
    options = {"interpolation": "gaussian", "spread_per": "channel", "axes": "rows", "limit": 1.5}
    conversion = card.conversion.model_copy(update=options)
    network = {**card.network, "start": conversion.start, "shapes": conversion.shapes}
    model = icnn_zoo.create_model(num_classes=len(card.classes), mean=card.mean, std=card.std, **network, **options)
    for layer in irregular_layers(model).values():
        torch.nn.init.uniform_(layer.widening)
    tensors = safetensors.torch.load(safetensors.torch.save(_plain_tensors(model)))
    parameters = sum(it.numel() for it in model.parameters())
    update = {"conversion": conversion, "weights": card.weights.model_copy(update={"parameters": parameters})}
    loaded = assemble(card.model_copy(update=update), tensors)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert {(layer.axes, layer.limit) for layer in irregular_layers(loaded).values()} == {("rows", 1.5)}
    assert parameters > sum(it.numel() for it in regular.parameters())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/p.png", "b/p.png"], "two pictures are named 'p.png'"),
        (["README.md"], "a picture must be one of .png"),
        (["card.json"], "a picture must be one of .png"),
    ],
)
def test_pictures_replace_nothing(names, message, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "about.yaml").write_text(yaml.safe_dump({**ABOUT, "pictures": dict.fromkeys(names, "what")}))
    with pytest.raises(ValueError, match=message):
        read_about(tmp_path / "about.yaml")

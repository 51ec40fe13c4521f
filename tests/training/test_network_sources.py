"""A network by its name: checkpoint, run folder, config, name or folder of the zoo."""

import shutil

import pytest
import torch
from zoo_cases import NAME

from icnn_zoo.training.network_sources import find_source, load_task


@pytest.fixture
def image():
    return torch.randint(0, 256, (1, 3, 65, 81)).float()


def test_every_way_to_name_a_checkpoint_gives_the_same_network(zoo_run, zoo_folder, image, monkeypatch):
    monkeypatch.setenv("ICNN_ZOO_REGISTRY", str(zoo_folder))
    ways = [zoo_run, zoo_run / "checkpoints" / "best.ckpt", NAME, f"zoo:{NAME}", zoo_folder / NAME]
    ways.append(zoo_folder / NAME / "model.safetensors")
    with torch.no_grad():
        scores = [load_task(way)(image) for way in ways]
    for other in scores[1:]:
        assert torch.equal(scores[0], other)


def test_a_task_of_the_zoo_knows_what_its_run_knew(zoo_run, zoo_folder):
    published, original = load_task(zoo_folder / NAME), load_task(zoo_run)
    assert published.class_names == original.class_names
    changed = {key for key in original.hparams if published.hparams[key] != original.hparams[key]}
    # What was None is written out in the card.
    assert changed <= {"mean", "std", "head_dilation", "pretrained", "class_names"}
    assert not published.training


def test_a_config_beside_a_checkpoint_and_on_a_card_describe_the_same_run(zoo_run, zoo_folder):
    beside, on_card = find_source(zoo_run).config(), find_source(zoo_folder / NAME).config()
    assert on_card.keys() == {"seed_everything", "model", "data"}
    assert beside["data"] == on_card["data"]
    # What the run started from is of its machine, how it was compiled too; losses are of training.
    assert {key: beside["model"][key] for key in on_card["model"]} == on_card["model"]
    assert beside["model"].keys() - on_card["model"].keys() == {
        *("pretrained", "pretrained_partial", "compile", "loss", "class_weights", "network", "backbone_args")
    }


def test_export_takes_a_name_of_the_zoo(zoo_folder, tmp_path, monkeypatch):
    from icnn_zoo.cli.programs import zoo_main

    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("ICNN_ZOO_REGISTRY", str(zoo_folder))
    zoo_main(["export", NAME, "--to", str(tmp_path / "model.onnx"), "--size", "65", "65"])
    assert (tmp_path / "model.onnx").stat().st_size > 100_000


@pytest.mark.parametrize("missing", ["card.json", "model.safetensors"])
def test_a_published_folder_without_its_card_or_weights_is_refused(zoo_folder, tmp_path, missing):
    folder = tmp_path / "zoo"
    shutil.copytree(zoo_folder, folder)
    (folder / NAME / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {missing}.*checkpoint .*of a run"):
        load_task(folder / NAME)


def test_near_names_are_told_and_folders_without_a_checkpoint_refused(zoo_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ICNN_ZOO_REGISTRY", str(zoo_folder))
    with pytest.raises(ValueError, match=f"the nearest are {NAME}"):
        find_source("test_resnet.shape")
    with pytest.raises(FileNotFoundError, match=r"neither a checkpoint \(.ckpt\) nor a run folder"):
        find_source(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        find_source(tmp_path / "last.ckpt")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="must be a checkpoint"):
        find_source(tmp_path / "notes.txt")


def test_a_name_of_the_zoo_that_is_a_file_too_means_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.yaml").write_text("model: {}\n")
    assert find_source("net.yaml").file is not None


def test_a_source_says_which_weights_it_has(zoo_run, zoo_folder, tmp_path):
    assert find_source(zoo_run).weights().startswith(f"{zoo_run / 'checkpoints' / 'best.ckpt'}, step ")
    assert find_source(zoo_run / "checkpoints" / "last.ckpt").weights().endswith("last.ckpt, step 2")
    assert find_source(zoo_run / "config.yaml").weights() == "random"
    assert find_source(NAME, registry=zoo_folder).weights().startswith(f"{NAME} of ")

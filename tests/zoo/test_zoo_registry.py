"""Finding and loading checkpoints, in folders and over HTTP, and refusing what does not fit together."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from zoo_cases import HASTY, NAME, interpreter, rewrite, rewrite_card, sha256

import icnn_zoo
from icnn_zoo.io.downloads import cache_folder
from icnn_zoo.io.transports import DownloadError
from icnn_zoo.zoo.networks import verify_checkpoint
from icnn_zoo.zoo.registry import Registry, find_entry


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ICNN_ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ICNN_ZOO_REGISTRY", raising=False)


@pytest.fixture
def own(zoo_folder, tmp_path):
    """A copy of the registry, to change."""
    return shutil.copytree(zoo_folder, tmp_path / "own")


@pytest.mark.parametrize("kind", ["folder", "file://", "http"])
def test_a_checkpoint_is_listed_loaded_and_verified_from(kind, zoo_folder, zoo_server):
    place = {"folder": zoo_folder, "file://": f"file://{zoo_folder}", "http": zoo_server.serve(zoo_folder)}[kind]
    assert icnn_zoo.list_checkpoints("*shapes", registry=place) == [NAME]
    assert icnn_zoo.list_checkpoints("resnet*", registry=place) == []
    model = icnn_zoo.load_checkpoint(NAME, registry=place, progress=False)
    assert not model.training
    assert model.classes[0] == "background"
    assert model.palette.shape == (6, 3)
    assert model.card.name == NAME
    assert list(icnn_zoo.irregular_layers(model))[-1] == "classifier"
    assert verify_checkpoint(NAME, registry=place) < 1e-6


def test_processes_that_load_at_once_download_once(zoo_folder, zoo_server):
    load = "import sys, icnn_zoo; icnn_zoo.load_checkpoint(sys.argv[1], registry=sys.argv[2], progress=False)"
    place = zoo_server.serve(zoo_folder)
    zoo_server.manners = ["slow"] * 20
    processes = [interpreter(load, NAME, place) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    paths = [path for path, _, _ in zoo_server.requests]
    assert (paths.count(f"/{NAME}/model.safetensors"), paths.count(f"/{NAME}/card.json")) == (1, 1)


def test_loading_does_not_change_what_is_drawn_next(zoo_folder):
    state = torch.get_rng_state()
    icnn_zoo.load_checkpoint(NAME, registry=zoo_folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_warm_cache_serves_an_unreachable_registry_and_says_so(zoo_folder, zoo_server):
    place = zoo_server.serve(zoo_folder)
    before = icnn_zoo.load_checkpoint(NAME, registry=place)
    zoo_server.manners = [500] * 100
    hasty = Registry(place, cache_folder(), patience=HASTY)
    with pytest.warns(UserWarning, match="its last known index is used"):
        after = icnn_zoo.load_checkpoint(NAME, registry=hasty)
    assert torch.equal(before.classifier.weight, after.classifier.weight)
    with pytest.raises(DownloadError, match=r"the registry .*elsewhere' cannot be read.*Tried 5 times"):
        icnn_zoo.list_checkpoints(registry=dataclasses.replace(hasty, url=f"{place}/elsewhere"))


def test_registries_are_searched_in_order_and_the_variable_names_several(zoo_folder, own, monkeypatch):
    rewrite_card(own, description="Another one.")
    for first, second, description in ((zoo_folder, own, "A network of"), (own, zoo_folder, "Another one.")):
        model = icnn_zoo.load_checkpoint(NAME, registry=["default", first, second])
        assert model.card.description.startswith(description)
        monkeypatch.setenv("ICNN_ZOO_REGISTRY", f"{first}, {second}")
        assert icnn_zoo.load_checkpoint(NAME).card.description.startswith(description)
    monkeypatch.setenv("ICNN_ZOO_REGISTRY", f"{own},,")
    with pytest.raises(ValueError, match="ICNN_ZOO_REGISTRY"):
        icnn_zoo.list_checkpoints()


@pytest.mark.parametrize("name", ["test_resnet.shape", "test_resnet", "test_resent.shapes"])
def test_near_misses_are_suggested(name, zoo_folder):
    with pytest.raises(ValueError, match=rf"{name}' is not a checkpoint of .*; the nearest are {NAME}"):
        icnn_zoo.load_checkpoint(name, registry=zoo_folder)


def test_a_place_without_an_index_is_no_registry(tmp_path, zoo_server):
    with pytest.raises(FileNotFoundError, match=r"has no index\.json"):
        icnn_zoo.list_checkpoints(registry=tmp_path)
    with pytest.raises(FileNotFoundError, match="HTTP 404"):
        icnn_zoo.list_checkpoints(registry=zoo_server.url)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(format=4), "has format 4; .* Upgrade"),
        (lambda index: index["checkpoints"][0].update(name="../outside.tag"), r"checkpoints\.0\.name"),
        (lambda index: index["checkpoints"][0].update(name="/etc/passwd"), r"checkpoints\.0\.name"),
        (lambda index: index["checkpoints"][0]["weights"].update(sha256="../x"), "sha256"),
        (lambda index: index["checkpoints"].append(index["checkpoints"][0]), "different names"),
        (lambda index: index.pop("checkpoints"), "checkpoints: Field required"),
        (lambda index: index.pop("version"), "an index of `format` 2 must have a `version`"),
        (lambda index: index.update(date="soon"), "date: String should match"),
        (lambda index: index["checkpoints"][0].update(summary="a\nforged 1 MB"), "summary: String should match"),
        (lambda index: index["checkpoints"][0].update(summary="\x1b]0;x\x07"), "control character, U\\+00(1B|07)"),
        (lambda index: index["checkpoints"][0].update(summary="a\u202eb"), "control character, U\\+202E"),
        (lambda index: index["checkpoints"][0]["card"].update(size=10**9), "must have at most 5000000 bytes"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "http"])
def test_a_bad_index_is_refused_and_the_last_good_one_kept(own, zoo_server, change, message, kind, tmp_path):
    place = zoo_server.serve(own) if kind == "http" else own
    icnn_zoo.list_checkpoints(registry=place)
    copies = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.json")}
    rewrite(own, change)
    zoo_server.serve(own)
    with pytest.raises(ValueError, match=message):
        icnn_zoo.list_checkpoints(registry=place)
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.json")} == copies


@pytest.mark.parametrize("kind", ["folder", "http"])
@pytest.mark.parametrize("file", ["card.json", "model.safetensors"])
def test_files_that_are_missing_or_not_the_promised_are_refused(own, zoo_server, kind, file):
    path = own / NAME / file
    for damage, error, message in (
        (lambda: path.write_bytes(path.read_bytes()[:-9]), ValueError, "expected .* with sha256 .* got .* with sha256"),
        (path.unlink, FileNotFoundError, f"{file}"),
    ):
        damage()
        place = zoo_server.serve(own) if kind == "http" else own
        with pytest.raises(error, match=message):
            icnn_zoo.load_checkpoint(NAME, registry=place, progress=False)


def test_a_renamed_checkpoint_is_refused(own):
    (own / NAME).rename(own / "test_resnet.other")
    rewrite(own, lambda index: index["checkpoints"][0].update(name="test_resnet.other"))
    with pytest.raises(ValueError, match=f"does not belong to its entry in the index: name is {NAME}"):
        icnn_zoo.load_checkpoint("test_resnet.other", registry=own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conversion": None}, r"and its weights disagree: missing .*extra .*displacement"),
        ({"classes": list("abc"), "palette": 3 * ["#000000"]}, r"and its weights disagree: classifier.weight must be"),
        ({"network": {"backbone": "test_resnet", "attention": 1}}, "does not know: attention. Upgrade"),
        ({"network": {"backbone": "test_resnet.shrunk"}}, "describes no network that can be built"),
        ({"format": 9}, "has format 9"),
    ],
)
def test_cards_that_do_not_fit_their_weights_or_this_version_are_refused(own, changes, message):
    rewrite_card(own, **changes)
    with pytest.raises(ValueError, match=message):
        icnn_zoo.load_checkpoint(NAME, registry=own)


def test_weights_are_data_only(own):
    file = own / NAME / "model.safetensors"
    bad = b"\x80\x04cos\nsystem\n".ljust(file.stat().st_size)  # how a pickle begins
    file.write_bytes(bad)
    card = json.loads((own / NAME / "card.json").read_text())
    promised = {"sha256": sha256(bad), "size": len(bad)}
    rewrite(own, lambda index: index["checkpoints"][0].update(weights=promised))
    rewrite_card(own, weights={**card["weights"], **promised})
    with pytest.raises(ValueError, match="not a safetensors file"):
        icnn_zoo.load_checkpoint(NAME, registry=own)


def test_an_unknown_device_costs_no_download(zoo_folder, zoo_server):
    place = zoo_server.serve(zoo_folder)
    with pytest.raises(RuntimeError, match="cpux"):
        icnn_zoo.load_checkpoint(NAME, registry=place, device="cpux")
    assert not zoo_server.requests


def test_the_top_level_names_come_on_first_use():
    code = (
        "import sys, icnn_zoo; light = {'timm', 'lightning', 'requests', 'pydantic'} & set(sys.modules); "
        "assert not light, light; assert icnn_zoo.list_checkpoints('none') == []; icnn_zoo.load_checkpoint; "
        "heavy = {'lightning', 'albumentations'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="load_chekpoint"):
        icnn_zoo.load_chekpoint  # noqa: B018


def test_predictions_do_not_depend_on_where_the_network_came_from(zoo_folder, zoo_server):
    image = np.random.default_rng(0).integers(0, 255, (50, 71, 3), dtype=np.uint8)
    places = (zoo_folder, zoo_server.serve(zoo_folder))
    first, second = (icnn_zoo.load_checkpoint(NAME, registry=place, progress=False) for place in places)
    assert np.array_equal(first.predict(image), second.predict(image))


@pytest.mark.parametrize("address", ["hf://user/repo", "hf://datasets/user/repo"])
def test_an_address_of_a_repository_lacks_a_name(address: str) -> None:
    """Said before anything is asked of a server, which would be asked for the user's index."""
    with pytest.raises(ValueError, match=f"{address}/arch.tag"):
        find_entry(address)

"""What of a card may be used: plain values for this package's own network and data, of bounded size."""

import json

import pytest
import yaml

import icnn_zoo.data
from icnn_zoo.zoo.card_config import DATA_MODULES, run_config
from icnn_zoo.zoo.card_readme import training_config
from icnn_zoo.zoo.cards import Card, parse
from icnn_zoo.zoo.registry import find_checkpoint, list_checkpoints

PIN = 64 * "a"


@pytest.fixture
def text(zoo_folder) -> dict:
    return json.loads((zoo_folder / "test_resnet.shapes" / "card.json").read_text())


def changed(text: dict, place: str, value: object) -> Card:
    """The card with another value at a place of its configuration."""
    section = text["training"]["config"]
    *outer, key = place.split(".")
    for name in outer:
        section = section[name]
    section[key] = value
    return parse(Card, json.dumps(text), "card")


def test_all_data_modules_of_the_package_are_known_by_name():
    modules = {
        f"icnn_zoo.data.{name}"
        for name in icnn_zoo.data.__all__
        if name.endswith("DataModule") and name != "SegmentationDataModule"
    }
    assert modules == DATA_MODULES


@pytest.mark.parametrize("name", list_checkpoints(registry="default"))
def test_shipped_cards_can_be_repeated(name):
    place, entry = find_checkpoint(name, registry="default")
    assert run_config(place.read_card(entry)).keys() == {"seed_everything", "model", "data"}


def test_only_seed_network_and_data_are_given_out(text):
    card = changed(text, "ckpt_path", "http://127.0.0.1:8000/evil.ckpt")
    card = changed(text, "trainer.callbacks", [{"class_path": "evil.Callback"}])
    config = yaml.safe_load(training_config(card, PIN))
    assert config.keys() == {"seed_everything", "model", "data"}
    assert config["model"]["pretrained"] == f"zoo:test_resnet.shapes@sha256:{PIN}"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("data.class_path", "evil.Data", "must be a data module of this package.*got 'evil.Data'"),
        ("data.class_path", "icnn_zoo.data.SegmentationDataModule", "must be a data module of this package"),
        ("data.class_path", ["icnn_zoo.data.ShapesDataModule"], "must be a data module of this package"),
        ("data.dict_kwargs", {"a": 1}, "must be a data module of this package"),
        ("data", "other.yaml", "data must be a section of values; got a str"),
        ("model", "other.yaml", "model must be a section of values; got a str"),
        ("data.init_args", "other.yaml", "data.init_args must be a section"),
        ("data.init_args.seed", {"class_path": "evil.Int"}, "data.init_args.seed must be a number, a text"),
        ("data.init_args.fill", [{"class_path": "evil.Int"}], "data.init_args.fill must be a number, a text"),
        ("model.optimizer", {"class_path": "evil.Optimizer"}, "model.optimizer must be a number, a text"),
        ("data.init_args.root", "/home/somebody", "must be a short text or a folder below the current one"),
        ("data.init_args.root", "../private", "must be a short text or a folder below"),
        ("data.init_args.root", "~/private", "must be a short text or a folder below"),
        ("data.init_args.root", "\\\\server\\share", "must be a short text or a folder below"),
        ("data.init_args.root", "https://example.org", "must be a short text or a folder below"),
        ("data.init_args.num_val", 10**12, "data.init_args.num_val must be at most 100000; got 1e\\+12"),
        ("data.init_args.objects", [10**9, 10**9], "data.init_args.objects must be at most 100"),
        ("data.init_args.image_size", 10**6, "data.init_args.image_size must be at most 4096"),
        ("model.scales", 10**6 * [1.0], "model.scales must have at most 256 items"),
        ("model.scales", [1e9], "model.scales must be at most 8"),
        ("model.window", 10**9, "model.window must be at most 10000"),
        ("seed_everything", 10**30, "seed_everything must be at most"),
        ("seed_everything", "evil.yaml/../..", "seed_everything must be a short text"),
    ],
)
def test_what_would_build_reach_outside_or_cost_too_much_is_refused(text, place, value, message):
    card = changed(text, place, value)
    for use in (run_config, lambda card: training_config(card, PIN)):
        with pytest.raises(ValueError, match=f"the card of test_resnet.shapes: .*{message}|{message}"):
            use(card)

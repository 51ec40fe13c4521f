"""What is shipped is valid and computes what it did; cards and indices are read strictly."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from icnn_zoo.zoo.card_readme import _escape, readme, training_config
from icnn_zoo.zoo.cards import Card, dump, parse
from icnn_zoo.zoo.golden import check_golden, golden_image, golden_of
from icnn_zoo.zoo.hub_card import front_matter
from icnn_zoo.zoo.indices import Index
from icnn_zoo.zoo.networks import create_model, rebuild
from icnn_zoo.zoo.registry import PACKAGED, find_checkpoint, list_checkpoints

SHIPPED = list_checkpoints(registry="default")


def test_the_default_registry_is_the_repositorys_and_small():
    assert PACKAGED.resolve() == (Path(__file__).parents[2] / "checkpoints").resolve()
    assert {path.name for path in PACKAGED.iterdir() if path.is_dir()} == set(SHIPPED)
    sizes = {path: path.stat().st_size for path in PACKAGED.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 30e6
    assert all(size < 15e6 for size in sizes.values())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_checkpoint_is_valid_and_gives_its_golden_output(name):
    model, card = rebuild(*find_checkpoint(name, registry="default"))
    check_golden(model, card.golden)
    known = {"card.json", "model.safetensors", "README.md"}
    pictures = {path.name for path in (PACKAGED / name).iterdir()} - known
    text = (PACKAGED / name / "README.md").read_text(encoding="utf-8")
    assert all(f"]({picture})" in text for picture in pictures)
    page = front_matter([card]) + readme(card, {})
    assert text.startswith(page.split("\n## ")[0].rsplit("Everything else", 1)[0].rstrip())


@pytest.fixture
def text(zoo_folder) -> dict:
    return json.loads((zoo_folder / "test_resnet.shapes" / "card.json").read_text())


def test_a_card_comes_back_as_it_was_written(text):
    card = parse(Card, json.dumps(text), "card")
    assert parse(Card, dump(card), "card") == card
    assert json.loads(dump(card)) == text


@pytest.mark.parametrize(("per_kernel", "shapes"), [(False, "channel"), (True, "kernel")])
def test_a_card_of_version_0_1_is_read_in_todays_words(text, per_kernel, shapes):
    del text["conversion"]["shapes"]
    text["conversion"]["per_kernel"] = per_kernel
    conversion = parse(Card, json.dumps(text), "card").conversion
    assert conversion is not None
    assert conversion.shapes == shapes


def wrong(text: dict, place: str, value: object) -> dict:
    inner, *rest = place.split(".")
    if rest:
        return {**text, inner: wrong(text[inner], ".".join(rest), value)}
    return {key: item for key, item in text.items() if key != inner} if value is None else {**text, inner: value}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("dataset.licence", None, "dataset.licence: Field required"),
        ("dataset.licence", "  ", "dataset.licence: String should match"),
        ("metrics", [], "metrics: Tuple should have at least 1 item"),
        ("training.seed", "0", "training.seed: Input should be a valid integer"),
        ("training.config", {}, "training.config: Dictionary should have at least 1 item"),
        ("weights.sha256", "ab", "weights.sha256: String should match"),
        ("surplus", 1, "surplus: Extra inputs are not permitted"),
        ("palette", ["#000000"], "`palette` must have a color for each of 6 classes"),
        ("name", "resnet18.shapes", "`name` must be test_resnet.<tag>"),
        ("name", "../test_resnet.shapes", "name: String should match"),
        ("std", [0.5, 0.0, 0.5], "`std` must be positive"),
        ("conversion.axes", "cols", "conversion.axes: Input should be 'rows', 'columns' or 'both'"),
        ("conversion.limit", -1.0, "Input should be greater than 0"),
        ("format", 2, "card has format 2; this version of icnn_zoo reads formats up to 1. Upgrade"),
        ("format", 0, "format: Input should be 1"),
    ],
)
def test_a_dirty_card_is_refused_with_the_key(text, place, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(Card, json.dumps(wrong(text, place, value)), "card")


def test_what_is_no_json_is_refused():
    with pytest.raises(ValueError, match="index is not JSON"):
        parse(Index, b"<html>", "index")
    with pytest.raises(ValueError, match=r"index: .*dictionary or an instance of Index|index: .*object"):
        parse(Index, b"[]", "index")


def test_the_readme_and_the_configuration_say_how_to_use_it(text):
    card = parse(Card, json.dumps(text), "card")
    page = readme(card, {"picture.png": "Predictions"})
    assert "icnn_zoo.load_checkpoint" in page
    assert "CC0-1.0" in page
    assert "![Predictions](picture.png)" in page
    assert "pretrained: zoo:test_resnet.shapes" in training_config(card, 64 * "a")


def test_the_golden_image_follows_its_formula():
    image = golden_image(3, (40, 50))
    assert image.shape == (1, 3, 40, 50)
    assert image[0, 2, 33, 17] == (7 * 33 + 13 * 3 * 17 + 29 * 2 * 1 + 53 * 2 + 97 * 3) % 256
    digest = hashlib.sha256(golden_image(0, (97, 129)).numpy().tobytes()).hexdigest()
    assert digest.startswith("e54cc3f0cf8210b0")


def test_golden_outputs_forgive_rounding_and_nothing_else():
    model = create_model("test_resnet", 3, start="layer4").eval()
    golden = golden_of(model)
    assert check_golden(model, golden) < 1e-7
    weight = model.classifier.weight.data
    weight.mul_(1 + 1e-5)
    assert 0 < check_golden(model, golden) < golden.tolerance
    weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"does not give its golden output: logits differ by 1\.0e-02"):
        check_golden(model, golden)
    weight[:] = torch.nan
    with pytest.raises(ValueError, match="does not give its golden output"):
        check_golden(model, golden)
    with pytest.raises(ValueError, match="infinities or NaN"):
        golden_of(model)


def test_nothing_of_a_description_is_markup():
    for text, shown in {
        "# a heading": "\\# a heading",
        "one\n\n# two": "one # two",
        "1. a list": "1\\. a list",
        "- another": "\\- another",
        "_em_ and a_b": "\\_em\\_ and a_b",
        "see https://a.b and www.c.d": "see https\\://a.b and www\\.c.d",
    }.items():
        assert _escape(text) == shown

"""What a registry can do to those who read it: nothing runs, nothing large is built, and a pinned name stays."""

import dataclasses
import json
import os
import resource
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo_cases import HASTY, NAME, fork, rewrite, rewrite_card, sha256

import icnn_zoo
from icnn_zoo.cli.programs import zoo_main
from icnn_zoo.io.downloads import cache_folder
from icnn_zoo.zoo import registry as registries
from icnn_zoo.zoo.networks import verify_checkpoint
from icnn_zoo.zoo.registry import Registry, find_checkpoint


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ICNN_ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ICNN_ZOO_REGISTRY", raising=False)


@pytest.fixture
def own(zoo_folder, tmp_path):
    """A copy of the registry, to change."""
    return shutil.copytree(zoo_folder, tmp_path / "own")


def card_of(folder) -> dict:
    return json.loads((folder / NAME / "card.json").read_text())


def test_a_name_is_pinned_by_the_hash_of_its_card_or_of_its_weights(own, monkeypatch):
    _, entry = find_checkpoint(NAME, registry=own)
    assert entry.pin == f"{NAME}@sha256:{sha256((own / NAME / 'card.json').read_bytes())}"
    for pin in (entry.card.sha256, entry.weights.sha256, entry.card.sha256.upper()):
        icnn_zoo.load_checkpoint(NAME, sha256=pin, registry=own)
        icnn_zoo.load_checkpoint(f"{NAME}@sha256:{pin}", registry=own)
        icnn_zoo.load_checkpoint(f"zoo:{NAME}@sha256:{pin}", registry=own)
    monkeypatch.setenv("ICNN_ZOO_REGISTRY", str(own))
    icnn_zoo.create_model("test_resnet", 6, start="layer3", head_dilation=3, pretrained=f"zoo:{entry.pin}")
    rewrite_card(own, description="Another one.")
    icnn_zoo.load_checkpoint(NAME, registry=own)
    for name, pin in ((entry.pin, None), (NAME, entry.card.sha256), (entry.pin, entry.weights.sha256)):
        with pytest.raises(ValueError, match=f"is not the one with {entry.card.sha256}: its card has [0-9a-f]{{64}}"):
            icnn_zoo.load_checkpoint(name, sha256=pin, registry=own)


@pytest.mark.parametrize(
    ("name", "sha256", "message"),
    [
        (f"{NAME}@main", None, r"a name is pinned as test_resnet.shapes@sha256:<64 hexadecimal digits>; got .*@main"),
        (f"{NAME}@sha256:ab", None, "`sha256` must be 64 hexadecimal digits; got 'ab'"),
        (NAME, "zz", "`sha256` must be 64 hexadecimal digits; got 'zz'"),
        (NAME, "", "`sha256` must be 64 hexadecimal digits; got ''"),
    ],
)
def test_what_is_no_pin_is_refused(own, name, sha256, message):
    with pytest.raises(ValueError, match=message):
        icnn_zoo.load_checkpoint(name, sha256=sha256, registry=own)


def test_every_publish_counts_the_index_on_and_dates_it(zoo_folder):
    index = json.loads((zoo_folder / "index.json").read_text())
    assert (index["format"], index["version"]) == (2, 1)
    assert index["date"].endswith("Z")


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(version=index["version"] - 1),
        lambda index: index.update(checkpoints=[], version=index["version"] + 1),
        lambda index: (index.pop("version"), index.pop("date"), index.update(format=1)),
    ],
    ids=["older", "emptied", "without a version"],
)
def test_an_older_or_emptied_index_does_not_replace_a_newer_one_silently(own, zoo_server, tmp_path, change):
    rewrite(own, lambda index: index.update(version=7))
    place = zoo_server.serve(own)
    assert icnn_zoo.list_checkpoints(registry=place) == [NAME]
    rewrite(own, change)
    zoo_server.serve(own)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"gives an older or emptied index .* its last known one is used"):
            assert icnn_zoo.list_checkpoints(registry=place) == [NAME]
    next((tmp_path / "cache" / "indices").glob("*.json")).unlink()  # as the warning says
    icnn_zoo.list_checkpoints(registry=place)


def test_a_newer_index_replaces_the_last_one(own, zoo_server):
    place = zoo_server.serve(own)
    icnn_zoo.list_checkpoints(registry=place)
    rewrite(own, lambda index: (index.update(version=2), index["checkpoints"][0].update(summary="Better.")))
    zoo_server.serve(own)
    assert Registry(place, cache_folder()).read_index().checkpoints[0].summary == "Better."
    assert dataclasses.replace(Registry(place, cache_folder()), patience=HASTY).read_index().version == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff"])
def test_a_damaged_copy_of_an_index_counts_as_none(own, zoo_server, tmp_path, damage):
    place = zoo_server.serve(own)
    icnn_zoo.list_checkpoints(registry=place)
    copy = next((tmp_path / "cache" / "indices").glob("*.json"))
    copy.write_bytes(damage)
    assert icnn_zoo.list_checkpoints(registry=place) == [NAME]
    assert copy.read_bytes() == (own / "index.json").read_bytes()


def test_an_index_of_the_earlier_format_is_read(own):
    rewrite(own, lambda index: (index.pop("version"), index.pop("date"), index.update(format=1)))
    icnn_zoo.load_checkpoint(NAME, registry=own)


def test_a_registry_without_encryption_is_said(own, zoo_server, monkeypatch):
    place = zoo_server.serve(own)
    monkeypatch.setattr(registries, "is_plain_http", lambda _: True)  # the loopback is none
    with pytest.warns(UserWarning, match=r"is read without encryption.*Use https, or pin names"):
        icnn_zoo.list_checkpoints(registry=place)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        icnn_zoo.list_checkpoints(registry=own)


def refused_within(size: int, action: Callable[[], object]) -> bool:
    """Whether an action ends in a ValueError in a process that may take so many bytes more."""

    def run() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + size, used + size))
        try:
            action()
        except ValueError:
            os._exit(1)

    process = fork(run)
    process.join()
    return bool(process.exitcode == 1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_small_registry_cannot_ask_for_a_large_network(own):
    rewrite_card(own, name="regnety_2560.shapes", network={"backbone": "regnety_2560"}, conversion=None)
    (own / NAME).rename(own / "regnety_2560.shapes")
    rewrite(own, lambda index: index["checkpoints"][0].update(name="regnety_2560.shapes"))
    with pytest.raises(ValueError, match=r"its network has 5[0-9]{9} bytes of numbers, the file 1[0-9]{6} bytes"):
        icnn_zoo.load_checkpoint("regnety_2560.shapes", registry=own)
    assert refused_within(300 << 20, lambda: icnn_zoo.load_checkpoint("regnety_2560.shapes", registry=own))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("size", [6000, 6000]),
        ("size", [97, 10**9]),
        ("seed", 10**30),
        ("tolerance", 1e300),
        ("agreement", 1e-300),
        ("logits", [1.0]),
        ("labels", ["0 1 99999999999999999999"]),
        ("labels", ["<script>"]),
    ],
)
def test_a_golden_check_that_costs_much_or_says_nothing_is_refused(own, place, value):
    rewrite_card(own, golden={**card_of(own)["golden"], place: value})
    with pytest.raises(ValueError, match=f"golden.{place}"):
        verify_checkpoint(NAME, registry=own)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"head_dilation": 10**30}, "`network.head_dilation` must be at most 128"),
        ({"head_dilation": 10**6}, "`network.head_dilation` must be at most 128"),
        ({"backbone": "hf-hub:evil/network"}, "must name its backbone as timm does"),
        ({"backbone": "local-dir:/home"}, "must name its backbone as timm does"),
        ({"backbone": {"class_path": "evil.Network"}}, "must name its backbone as timm does"),
        ({"head": {"class_path": "evil.Head"}}, "`network.head` must be a number, a text"),
        ({"pretrained": "evil.pth"}, "network arguments that this version of icnn_zoo does not know: pretrained"),
        ({"start": "layer4"}, "network arguments that this version of icnn_zoo does not know: start"),
        ({"num_classes": 10**9}, "`network.num_classes` must be at most 4096"),
        ({"num_classes": 4}, "network arguments that this version of icnn_zoo does not know: num_classes"),
        ({"mean": [0.5, 0.5, 0.5]}, "describes no network that can be built"),
        ({"output_stride": 3}, "describes no network that can be built"),
    ],
)
def test_a_cards_network_is_plain_and_bounded(own, network, message):
    rewrite_card(own, network={**card_of(own)["network"], **network})
    with pytest.raises(ValueError, match=message):
        icnn_zoo.load_checkpoint(NAME, registry=own)


def replace_weights(folder, data: bytes) -> None:
    """Other weights, and honest hashes of them."""
    (folder / NAME / "model.safetensors").write_bytes(data)
    promised = {"sha256": sha256(data), "size": len(data)}
    rewrite(folder, lambda index: index["checkpoints"][0].update(weights=promised))
    rewrite_card(folder, weights={**card_of(folder)["weights"], **promised})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(own, value, tmp_path):
    tensors = load_file(own / NAME / "model.safetensors")
    tensors["classifier.bias"] = torch.full_like(tensors["classifier.bias"], value)
    save_file(tensors, tmp_path / "changed")
    replace_weights(own, (tmp_path / "changed").read_bytes())
    for use in (icnn_zoo.load_checkpoint, verify_checkpoint):
        with pytest.raises(ValueError, match=r"hold NaN or infinities in classifier\.bias"):
            use(NAME, registry=own)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "F8_E5M2", "I64", "C64", "nonsense"])
def test_dtypes_that_the_network_has_not_are_refused(own, dtype):
    data = (own / NAME / "model.safetensors").read_bytes()
    replace_weights(own, data.replace(b'"F32"', f'"{dtype}"'.encode(), 1).ljust(len(data)))
    with pytest.raises(ValueError, match=r"the weights of test_resnet.shapes are not a safetensors file|disagree"):
        icnn_zoo.load_checkpoint(NAME, registry=own)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("file", ["index.json", f"{NAME}/card.json", f"{NAME}/model.safetensors"])
def test_sparse_files_of_100_gb_are_refused_by_size(own, file):
    with (own / file).open("r+b") as stream:
        stream.truncate(10**11)

    with pytest.raises(ValueError, match="100000000000 bytes"):
        icnn_zoo.load_checkpoint(NAME, registry=own)
    assert refused_within(300 << 20, lambda: icnn_zoo.load_checkpoint(NAME, registry=own))


def test_an_index_may_promise_100_gb_and_nothing_is_read_of_them(own):
    card = card_of(own)
    with (own / NAME / "model.safetensors").open("r+b") as stream:
        stream.truncate(10**11)
    rewrite_card(own, weights={**card["weights"], "size": 10**11})
    rewrite(own, lambda index: index["checkpoints"][0]["weights"].update(size=10**11))
    with pytest.raises(ValueError, match="the file 100000000000 bytes"):
        icnn_zoo.load_checkpoint(NAME, registry=own)


def test_deeply_nested_json_is_refused_in_words(own):
    (own / "index.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"index\.json is not JSON"):
        icnn_zoo.list_checkpoints(registry=own)


def test_what_a_card_says_is_shown_without_markup_and_control_characters(own, capsys):
    rewrite_card(own, classes=["background", "[/red]x", "<script>", "a|b", "`c`", "![d](http://e)"])
    zoo_main(["show", NAME, "--registry", str(own)])
    text = capsys.readouterr().out
    assert r"background, \[/red\]x, \<script\>, a\|b, \`c\`, !\[d\](http\://e)" in text
    for classes in (["a\x1b[2J", *"bcdef"], ["a\nb", *"bcdef"], ["a\u202eb", *"bcdef"], ["\x9b1m", *"bcdef"]):
        rewrite_card(own, classes=classes)
        with pytest.raises(SystemExit) as caught:
            zoo_main(["show", NAME, "--registry", str(own)])
        assert not set("\x1b\n\u202e\x9b") & set(str(caught.value))

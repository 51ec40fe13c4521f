"""Odd command lines of the zoo end in one line that says what was wrong, and leave nothing behind."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image
from zoo_cases import ABOUT, NAME, rewrite, rewrite_card

from icnn_zoo.cli.programs import zoo_main

pytestmark = pytest.mark.filterwarnings("ignore")
LONG = "test_resnet." + 300 * "a"


@pytest.fixture
def place(zoo_folder, tmp_path, monkeypatch) -> Path:
    """A working folder with a registry "zoo", and things of the wrong kind."""
    shutil.copytree(zoo_folder, tmp_path / "work" / "zoo")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("ICNN_ZOO_REGISTRY", "zoo")
    monkeypatch.setenv("ICNN_ZOO_CACHE", str(tmp_path / "cache"))
    Image.new("RGB", (8, 8)).save("image.png")
    for folder in ("folder.safetensors", "folder.png", "folder.yaml", "empty"):
        Path(folder).mkdir()
    Path("about.yaml").write_text(yaml.safe_dump({**ABOUT, "metrics": [{**ABOUT["metrics"][0], "value": 0.5}]}))
    Path("broken.yaml").write_text("a: [")
    Path("list.yaml").write_text("- 1")
    Path("bytes.yaml").write_bytes(b"\xff\xfe\x00")
    return tmp_path / "work"


def fails(command: list[str]) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as caught:
        zoo_main(command)
    message = str(caught.value)
    assert message.startswith(f"icnn-zoo {command[0]}: ")
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["list", "--registry", "none"], "has no index.json"),
        (["list", "--registry", "image.png"], "has no index.json"),
        (["list", "--registry", ""], "must name folders or URLs"),
        (["list", "--registry", "nosuch://host/zoo"], "cannot be opened"),
        (["list", "--registry", "http://["], "is not a valid address"),
        (["list", "--registry", "http://user:secret@127.0.0.1:99999/zoo"], "http://***@127.0.0.1:99999/zoo"),
        (["list", "--registry", "a\0b"], "has no index.json"),
        (["show", LONG], "is not a checkpoint of"),
        (["show", f"{NAME}@"], "a name is pinned as"),
        (["show", "../../etc/passwd"], "is not a checkpoint of"),
        (["load", NAME, "--to", "folder.safetensors", "--force"], "is a folder"),
        (["load", NAME, "--to", "none/a.safetensors"], "there is no folder"),
        (["load", NAME, "--to", f"{300 * 'a'}.safetensors"], "File name too long"),
        (["load", NAME, "--to", "image.png/a.safetensors"], "there is no folder"),
        (["load", NAME, "--registry", "http://127.0.0.1:9"], "cannot be read"),
        (["verify", "none.none"], "is not a checkpoint of"),
        (["verify", NAME, "--metrics", "--data-root", "image.png"], ""),
        (["segment", NAME, "folder.png", "--to", "a.png"], "holds no image"),
        (["segment", NAME, "about.yaml", "--to", "a.png"], "about.yaml"),
        (["segment", NAME, "image.png", "--to", "a.png", "--device", "nonsense"], "nonsense"),
        (["segment", NAME, "image.png", "--to", "a.png", "--longest-side", "0"], "at least 1 pixel"),
        (["publish", "empty", "--name", NAME, "--to", "new", "--about", "about.yaml"], "neither a checkpoint"),
        (["publish", "RUN", "--name", NAME, "--to", "image.png", "--about", "about.yaml"], "'image.png' is a file"),
        (["publish", "RUN", "--name", LONG, "--to", "new", "--about", "about.yaml"], "must be arch.tag"),
        (["publish", "RUN", "--name", NAME, "--to", "new", "--about", "none.yaml"], "there is no file 'none.yaml'"),
        (["publish", "RUN", "--name", NAME, "--to", "new", "--about", "folder.yaml"], "folder.yaml"),
        (["publish", "RUN", "--name", NAME, "--to", "new", "--about", "broken.yaml"], "is not YAML"),
        (["publish", "RUN", "--name", NAME, "--to", "new", "--about", "list.yaml"], "`about`: "),
        (["publish", "RUN", "--name", NAME, "--to", "new", "--about", "bytes.yaml"], "bytes.yaml"),
        (
            ["publish", "RUN", "--name", NAME, "--to", "https://example.org/zoo", "--about", "about.yaml"],
            "`to` must be a folder",
        ),
    ],
)
def test_a_mistake_is_one_line(place, zoo_run, command, message):
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    said = fails([str(zoo_run) if word == "RUN" else word for word in command])
    assert message in said
    assert "secret" not in said
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


@pytest.mark.parametrize("command", [["load", NAME], ["verify"], ["show", NAME], ["list"]], ids=lambda words: words[0])
@pytest.mark.parametrize(
    "change",
    [
        {"golden": None},
        {"golden": {"seed": 10**30}},
        {"network": {"backbone": "test_resnet", "head_dilation": 10**30}},
        {"training": {"config": 5}},
        {"classes": 5},
        {"format": "1"},
        {"mean": ["a", 1, 2]},
    ],
    ids=str,
)
def test_a_damaged_card_is_one_line(place, command, change):
    rewrite_card(place / "zoo", **change)
    if command[0] == "list":  # which reads the index alone
        zoo_main(command)
    else:
        fails(command)


@pytest.mark.parametrize("text", ["", "null", "5", '"text"', "[]", "{}", '{"format": 2}', '{"format": 1e400}', "NaN"])
def test_a_damaged_index_is_one_line(place, text):
    (place / "zoo" / "index.json").write_text(text)
    for command in (["list"], ["load", NAME], ["verify"]):
        assert "index.json" in fails(command)


def test_a_class_name_with_markup_is_shown_as_it_is(place, capsys):
    names = ["background", "[/red]x", "[wet]", "a[/b]", "%s", "{0}"]
    rewrite_card(place / "zoo", classes=names)
    zoo_main(["show", NAME, "--json"])
    assert json.loads(capsys.readouterr().out)["classes"] == names
    zoo_main(["segment", NAME, "image.png", "--to", "picture.png"])
    rewrite(place / "zoo", lambda index: index["checkpoints"][0].update(summary="[/red] %s {0}"))
    zoo_main(["list"])
    assert "[/red] %s {0}" in capsys.readouterr().out

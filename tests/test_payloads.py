"""Nothing that was read ever runs: a payload planted in every place from which a command reads."""

import contextlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from zoo_cases import ABOUT, NAME, rewrite, rewrite_card, sha256

import icnn_zoo
from icnn_zoo.cli.programs import lightning_main, zoo_main

pytestmark = pytest.mark.filterwarnings("ignore")
PACKAGE = Path(icnn_zoo.__file__).parent


def test_the_package_unpickles_nothing():
    """No way to run what a file holds, by its name in the source; ``weights_only`` is always on."""
    source = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    found = {
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path, text in source.items()
        for line in text.splitlines()
        if re.search(r"weights_only\s*=\s*(False|None)\b|\bimport pickle|pickle\.loads?\(|allow_pickle=True", line)
        or re.search(r"yaml\.(load|unsafe_load|full_load)\(|\bexec\(|(?<![.\w])eval\(|torch\.hub|joblib|dill", line)
    }
    assert not found
    for path, text in source.items():
        for call in re.finditer(r"(?<!safetensors\.)torch\.load\(", text):
            assert "weights_only=True" in text[call.start() : call.start() + 200], path
        for call in re.finditer(r"np\.load\(", text):
            assert "allow_pickle=False" in text[call.start() : call.start() + 200], path


class Payload:
    """What a pickle makes a file of when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.file), "w")


@pytest.fixture
def planted(tmp_path, monkeypatch) -> Path:
    """The file that appears when a payload runs: a pickle of :class:`Payload`, or an import of the module ``evil``."""
    file = tmp_path / "planted"
    (tmp_path / "modules").mkdir()
    lines = [f"open({str(file)!r}, 'w')", "from icnn_zoo.data import ShapesDataModule"]
    lines += ["class Data(ShapesDataModule): pass", "class Callback: pass", "def make(*_, **__): pass"]
    (tmp_path / "modules" / "evil.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ICNN_ZOO_CACHE", str(tmp_path / "cache"))
    Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
    return file


def attempt(command: list[str], program: Callable[[list[str]], object] = zoo_main) -> None:
    """Runs a command, whatever comes of it."""
    with contextlib.suppress(SystemExit, Exception):
        program(command)


def test_the_payloads_would_run(planted):
    pickle.loads(pickle.dumps(Payload(planted)))
    assert planted.exists()
    planted.unlink()
    import evil  # noqa: F401

    assert planted.exists()


COMMANDS = [
    ["shapes", "{run}", "--to", "shapes.png"],
    ["shapes", "{run}", "--animate", "--to", "shapes.gif"],
    ["shapes", "{run}", "--html", "page.html"],
    ["heatmap", "{run}", "image.png", "--pixel", "3", "3", "--to", "heatmap.png"],
    ["erf", "{run}", "--to", "erf.png"],
    ["export", "{run}", "--to", "model.onnx"],
    ["publish", "{run}", "--name", NAME, "--to", "zoo", "--about", "about.yaml"],
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "place"), [("best.ckpt", "callbacks"), ("last.ckpt", "all")])
def test_a_checkpoint_of_a_run(zoo_run, planted, tmp_path, name, place):
    run = shutil.copytree(zoo_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    content = torch.load(zoo_run / "checkpoints" / name, weights_only=True)
    payload = Payload(planted)
    torch.save(payload if place == "all" else {**content, place: payload}, run / "checkpoints" / name)
    (tmp_path / "about.yaml").write_text(yaml.safe_dump(ABOUT))
    for command in COMMANDS:
        attempt([word.format(run=run) for word in command])
    config, file = str(run / "config.yaml"), str(run / "checkpoints" / name)
    for program in ("fit", "test"):
        attempt([program, "-c", config, "--ckpt_path", file, "--trainer.max_steps", "3"], lightning_main)
    attempt(["fit", "-c", config, "--model.pretrained", file, "--trainer.max_steps", "1"], lightning_main)
    assert not planted.exists()


@pytest.mark.slow
def test_the_configuration_beside_a_checkpoint(zoo_run, planted, tmp_path):
    run = shutil.copytree(zoo_run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (tmp_path / "about.yaml").write_text(
        yaml.safe_dump({**ABOUT, "metrics": [{"name": "val/mIoU", "protocol": "p", "value": 0.5}]})
    )
    evil = {"class_path": "evil.Data", "init_args": {}}
    changes = [
        yaml.safe_dump({**config, "data": evil}),
        yaml.safe_dump({**config, "data": {**config["data"], "init_args": {"seed": {"class_path": "evil.make"}}}}),
        f"!!python/object/apply:builtins.open [{str(planted)!r}, w]\n",
        yaml.safe_dump({**config, "trainer": {"callbacks": [{"class_path": "evil.Callback"}]}}),
    ]
    for text in changes:
        (run / "config.yaml").write_text(text)
        for command in (COMMANDS[2], COMMANDS[4], COMMANDS[6]):
            attempt([word.format(run=run) for word in command])
        assert not planted.exists(), text


@pytest.mark.slow
def test_records_of_shapes_and_metrics(zoo_run, planted, tmp_path):
    run = shutil.copytree(zoo_run, tmp_path / "run")
    (run / "shapes").mkdir(exist_ok=True)
    np.savez(run / "shapes" / "step_0000001.npz", layers=np.array([Payload(planted)], dtype=object), step=1)
    (run / "metrics.csv").write_bytes(pickle.dumps(Payload(planted)))
    for command in (COMMANDS[1], COMMANDS[2], COMMANDS[6]):
        attempt([word.format(run=run) for word in command])
    assert not planted.exists()


def test_weights_to_start_from(zoo_run, planted, tmp_path):
    for name in ("a.pth", "a.ckpt", "a.pt", "a.bin", "a.npz"):
        torch.save({"state_dict": Payload(planted)}, tmp_path / name)
        with pytest.raises(ValueError, match=name):
            icnn_zoo.create_model("test_resnet", 3, pretrained=tmp_path / name)
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Payload(planted)))
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        icnn_zoo.create_model("test_resnet", 3, pretrained=tmp_path / "a.safetensors")
    assert not planted.exists()


def test_about_yaml(zoo_run, planted, tmp_path):
    (tmp_path / "about.yaml").write_text(f"description: !!python/object/apply:builtins.open [{str(planted)!r}, w]\n")
    attempt(["publish", str(zoo_run), "--name", NAME, "--to", "zoo", "--about", "about.yaml"])
    assert not planted.exists()


READING = [
    ["list"],
    ["show", NAME],
    ["show", NAME, "--config"],
    ["load", NAME, "--to", "weights.safetensors", "--force"],
    ["verify"],
    ["verify", "--metrics"],
    ["segment", NAME, "image.png", "--to", "picture.png", "--force"],
    ["erf", NAME, "--to", "erf.png"],
]


@pytest.mark.parametrize("file", ["index.json", "card.json", "model.safetensors", "config", "ckpt_path", "nested"])
def test_a_registry(zoo_folder, zoo_server, planted, tmp_path, monkeypatch, file):
    own = shutil.copytree(zoo_folder, tmp_path / "own")
    bad = pickle.dumps(Payload(planted))
    card = json.loads((own / NAME / "card.json").read_text())
    training = card["training"]
    if file == "index.json":
        (own / file).write_bytes(bad)
    elif file == "card.json":
        (own / NAME / file).write_bytes(bad)
        promised = {"sha256": sha256(bad), "size": len(bad)}
        rewrite(own, lambda index: index["checkpoints"][0].update(card=promised))
    elif file == "model.safetensors":
        bad = bad.ljust(card["weights"]["size"])
        (own / NAME / file).write_bytes(bad)
        promised = {"sha256": sha256(bad), "size": len(bad)}
        rewrite(own, lambda index: index["checkpoints"][0].update(weights=promised))
        rewrite_card(own, weights={**card["weights"], **promised})
    elif file == "config":
        training["config"]["data"]["class_path"] = "evil.Data"
    elif file == "ckpt_path":
        torch.save({"state_dict": Payload(planted)}, own / "evil.ckpt")
        training["config"]["ckpt_path"] = f"{zoo_server.url}/evil.ckpt"
        training["config"]["trainer"]["callbacks"] = [{"class_path": "evil.Callback"}]
        training["config"]["model"]["pretrained"] = str(own / "evil.ckpt")
    else:
        training["config"]["data"]["init_args"]["seed"] = {"class_path": "evil.make"}
        training["config"]["model"]["lr"] = {"class_path": "evil.make"}
    if file in ("config", "ckpt_path", "nested"):
        rewrite_card(own, training=training)
    zoo_server.files["/evil.ckpt"] = (own / "evil.ckpt").read_bytes() if (own / "evil.ckpt").exists() else b""
    monkeypatch.setenv("ICNN_ZOO_REGISTRY", str(own))
    for command in READING:
        attempt(command)
    assert not planted.exists()


def test_the_configuration_of_a_card_as_it_is_given_out(zoo_folder, planted, tmp_path, monkeypatch, capsys):
    own = shutil.copytree(zoo_folder, tmp_path / "own")
    torch.save({"state_dict": Payload(planted)}, tmp_path / "evil.ckpt")
    training = json.loads((own / NAME / "card.json").read_text())["training"]
    training["config"] |= {"ckpt_path": str(tmp_path / "evil.ckpt"), "optimizer": {"class_path": "evil.make"}}
    training["config"]["trainer"] |= {"callbacks": [{"class_path": "evil.Callback"}], "default_root_dir": "elsewhere"}
    rewrite_card(own, training=training)
    monkeypatch.setenv("ICNN_ZOO_REGISTRY", str(own))
    zoo_main(["show", NAME, "--config"])
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    lightning_main(["validate", "-c", "config.yaml", "--trainer.logger", "false"])  # it runs, and nothing else does
    assert not planted.exists()
    assert not (tmp_path / "elsewhere").exists()


def test_the_cache(zoo_folder, zoo_server, planted, tmp_path):
    place = zoo_server.serve(zoo_folder)
    icnn_zoo.load_checkpoint(NAME, registry=place)
    for path in [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]:
        path.write_bytes(pickle.dumps(Payload(planted)))
        path.with_name(f"{path.name}.partial").write_bytes(pickle.dumps(Payload(planted)))
        path.with_name(f"{path.name}.json").write_bytes(pickle.dumps(Payload(planted)))
    icnn_zoo.load_checkpoint(NAME, registry=place)
    assert not planted.exists()

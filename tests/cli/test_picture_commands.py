"""icnn-zoo shapes, heatmap and erf, as a person would call them."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from zoo_cases import NAME

from icnn_zoo.analysis import shape_statistics
from icnn_zoo.cli.programs import zoo_main
from icnn_zoo.training.network_sources import load_task


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "photograph.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (49, 65, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def regular(zoo_run, tmp_path):
    """The config of the run, without irregular layers."""
    config = yaml.safe_load((zoo_run / "config.yaml").read_text())
    config["model"]["start"] = None
    path = tmp_path / "regular.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_a_checkpoint_is_found_in_the_registry_that_is_named(zoo_folder, capsys):
    zoo_main(["shapes", NAME, "--registry", str(zoo_folder), "--json"])
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 4


def test_shapes_prints_a_table_and_writes_both_views(zoo_run, tmp_path, capsys):
    zoo_main(["shapes", str(zoo_run), "--to", str(tmp_path / "flat.png")])
    printed = lines(capsys)
    assert any("classifier" in line and "3x3" in line for line in printed)
    assert printed[-1] == f"Written: {tmp_path / 'flat.png'}"
    zoo_main(["shapes", str(zoo_run), "--three-d", "--layers", "classifier", "--to", str(tmp_path / "space.svg")])
    assert "channel" in (tmp_path / "space.svg").read_text()


def test_shapes_as_data_are_the_statistics_and_nothing_else(zoo_run, capsys):
    zoo_main(["shapes", str(zoo_run), "--json"])
    data = json.loads(capsys.readouterr().out)
    expected = shape_statistics(load_task(zoo_run).model)
    assert [entry["name"] for entry in data["layers"]] == [entry.name for entry in expected]
    assert data["layers"][0]["length"] == pytest.approx(expected[0].length)
    assert set(data["trends"]) == {"center_shift_over_length", "length", "anisotropy", "elongation"}


def test_shapes_of_repeats_say_the_signal_in_table_and_data(zoo_run, tmp_path, capsys):
    content = torch.load(next(zoo_run.rglob("last.ckpt")), weights_only=True)
    trainings = [tmp_path / "first.ckpt", tmp_path / "second.ckpt"]
    for number, path in enumerate(trainings):
        for name, value in content["state_dict"].items():
            if name.endswith("displacement"):
                value += torch.linspace(-1, 1, value.numel()).view_as(value) * (1 + number / 100)
        torch.save(content, path)
    first, second = map(str, trainings)
    zoo_main(["shapes", first, "--repeats", second])
    assert any("classifier" in line and "80%" in line for line in lines(capsys))
    zoo_main(["shapes", first, "--repeats", second, "--json"])
    share = json.loads(capsys.readouterr().out)["layers"][0]["signal"]["share"]
    assert share == pytest.approx(2 * 1 * 2.01 / (1 + 2.01**2), abs=1e-3)  # the second moved as far again


def test_heatmaps_of_two_networks_stand_side_by_side(zoo_run, regular, picture, tmp_path):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    zoo_main(["heatmap", str(zoo_run), str(picture), "--pixel", "20", "30", "--to", str(one)])
    both = ["--against", str(regular), "--class", load_task(zoo_run).class_names[1]]
    zoo_main(["heatmap", str(zoo_run), str(picture), "--pixel", "20", "30", *both, "--to", str(two)])
    with Image.open(one) as narrow, Image.open(two) as wide:
        assert wide.size[0] > 1.3 * narrow.size[0]


def test_erf_prints_radii_of_both_and_writes_a_picture(zoo_run, regular, picture, tmp_path, capsys):
    target = tmp_path / "field.svg"
    zoo_main(["erf", str(zoo_run), str(picture), "--against", str(regular), "--to", str(target), "--json"])
    radii = json.loads(capsys.readouterr().out)
    assert set(radii) == {"irregular", "regular"}
    for summary in radii.values():
        assert 0 < summary["radius_50"] < summary["radius_90"] <= summary["radius_95"] < 65
    assert target.is_file()
    zoo_main(["erf", str(zoo_run)])  # the run's own validation images
    assert "over 4 images" in lines(capsys)[-1]


def test_both_networks_stand_on_the_page(zoo_run, regular, picture, tmp_path):
    page = tmp_path / "page.html"
    zoo_main(
        ["heatmap", str(zoo_run), str(picture), "--pixel", "3", "4", "--against", str(regular), "--html", str(page)]
    )
    text = page.read_text(encoding="utf-8")
    assert "<figcaption>irregular</figcaption>" in text
    assert "<figcaption>regular</figcaption>" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shapes", "{regular}"], "no irregular layer"),
        (["shapes", "{run}", "--layers", "layer9"], "'layer9' names no irregular layer; the nearest are"),
        (["shapes", "{run}", "--to", "shapes.pdf"], "must end in .png or .svg"),
        (["shapes", "{run}", "--to", "none/shapes.png"], "there is no folder 'none'"),
        (["shapes", "{run}", "--html", "page.pdf"], "must end in .html"),
        (["shapes", "{run}", "--animate"], "--animate needs a file to write"),
        (["shapes", "no_such.network"], "is not a checkpoint of"),
        (["heatmap", "{run}", "{picture}", "--pixel", "49", "2", "--to", "a.png"], r"nearest inside is \(48, 2\)"),
        (["heatmap", "{run}", "{picture}", "--pixel", "1", "2", "--class", "unicorn", "--to", "a.png"], "it knows"),
        (["heatmap", "{run}", "{picture}", "--pixel", "1", "2"], "there is nothing to write"),
        (["heatmap", "{run}", "{regular}", "--pixel", "1", "2", "--to", "a.png"], "is not a readable image"),
        (["heatmap", "{run}", "none.jpg", "--pixel", "1", "2", "--to", "a.png"], "there is no file 'none.jpg'"),
        (["heatmap", "{run}", "{picture}", "--pixel", "1", "2", "--against", "{run}", "--to", "a.png"], "same network"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    arguments, message, zoo_run, regular, picture, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    named = [word.format(run=zoo_run, regular=regular, picture=picture) for word in arguments]
    with pytest.raises(SystemExit) as stopped:
        zoo_main(named)
    assert stopped.value.code not in (0, None)
    error = f"{stopped.value.code} {capsys.readouterr().err}"
    assert re.search(message, error), error
    assert set(tmp_path.iterdir()) == before


def test_positions_that_are_lost_are_told(zoo_run, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    checkpoint = torch.load(zoo_run / "checkpoints" / "last.ckpt", weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if name.endswith("displacement"))
    checkpoint["state_dict"][name][0] = float("nan")
    torch.save(checkpoint, folder / "last.ckpt")
    with pytest.raises(SystemExit, match="the training diverged"):
        zoo_main(["shapes", str(folder / "last.ckpt")])

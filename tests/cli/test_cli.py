"""The command line, the configs and what the README says of them."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from icnn_zoo.cli.programs import COMMANDS, lightning_main, zoo_main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ON_DISK = {
    "voc2012.yaml",
    "pascal_context.yaml",
    "cityscapes.yaml",
    "folder.yaml",
    "documents.yaml",
}  # trained in test_configs.py
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.filterwarnings("ignore")


def fit(config: Path, folder: Path, monkeypatch, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    fast = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--trainer.val_check_interval", "1"]
    fast += ["--trainer.limit_val_batches", "1", "--trainer.precision", "32-true", "--data.init_args.num_workers", "0"]
    lightning_main(["fit", "-c", str(config), *fast, *arguments])


def test_every_config_is_known_here():
    assert {path.name for path in CONFIGS} == {"quickstart.yaml", "drawn_voc.yaml", "drawn_voc_dense.yaml", *ON_DISK}


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.name not in ON_DISK], ids=lambda path: path.name)
def test_every_config_trains(path, tmp_path, monkeypatch, drawn_voc_root):
    drawn = ["--data.init_args.root", str(drawn_voc_root), "--model.pretrained", "false"]
    own = {"drawn_voc.yaml": drawn, "drawn_voc_dense.yaml": drawn}
    fit(path, tmp_path, monkeypatch, *own.get(path.name, []))
    assert list((tmp_path / "runs").glob("*/version_0/checkpoints/last.ckpt"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_key_of_a_config_is_explained(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"\s*(- )?(\w+): [^#]+$", line)
        assert match is None or match.group(2) == "class_path", f"explain {line.strip()!r} in a comment"


def test_quickstart_trains_validates_and_leaves_everything_in_one_run_folder(tmp_path, monkeypatch, capsys):
    fit(ROOT / "configs" / "quickstart.yaml", tmp_path, monkeypatch)
    output = capsys.readouterr().out
    folder = Path(output.strip().splitlines()[-1].removeprefix("Run folder: "))
    assert folder.is_dir()
    assert "mIoU of line a everywhere" in output
    assert "Not compared with stored results, as this run differs in trainer.max_steps." in output
    assert {"checkpoints", "config.yaml", "metrics.csv", "pictures"} <= {path.name for path in folder.iterdir()}
    assert {"best.ckpt", "last.ckpt"} <= {path.name for path in (folder / "checkpoints").iterdir()}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["start"] == "layer1"
    lightning_main(
        ["test", "-c", str(folder / "config.yaml"), "--ckpt_path", str(folder / "checkpoints" / "best.ckpt")]
    )
    assert "test: scores of classes" in capsys.readouterr().out


def test_an_unknown_key_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        fit(ROOT / "configs" / "quickstart.yaml", tmp_path, monkeypatch, "--model.learning_rate", "1")
    assert "learning_rate" in capsys.readouterr().err
    wrong = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    wrong["model"]["positions_lr"] = 1.0
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(SystemExit):
        fit(tmp_path / "wrong.yaml", tmp_path, monkeypatch)
    assert "positions_lr" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_missing_data_name_the_command_that_fetches_them(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="icnn-zoo prepare drawn-voc"):
        fit(ROOT / "configs" / "drawn_voc.yaml", tmp_path, monkeypatch, "--model.pretrained", "false")
    assert not (tmp_path / "data").exists()


def test_missing_weights_name_the_command_that_fetches_them(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="icnn-zoo prepare efficientnet-lite0"):
        fit(
            ROOT / "configs" / "quickstart.yaml",
            tmp_path,
            monkeypatch,
            *("--model.pretrained", "data/efficientnet-lite0/tf_efficientnet_lite0.safetensors"),
        )


def test_plan_prints_the_table_and_the_nearest_names(capsys):
    zoo_main(["plan", "resnet18", "--start", "layer4"])
    assert "From 'layer4' on: 4 converted" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nearest are"):
        zoo_main(["plan", "resnet18", "--start", "layer9"])
    with pytest.raises(SystemExit, match=r"nearest are .*resnet18"):
        zoo_main(["plan", "resnt18", "--start", "layer4"])


def test_plan_as_data_of_a_dilated_feature_extractor_in_execution_order(capsys):
    zoo_main(["plan", "convnext_atto", "--start", "stages.3", "--output-stride", "8", "--order", "execution", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["start"] == "stages_3"
    assert data["order"] == "execution"
    assert [layer["kind"] for layer in data["converted"]] == 3 * ["Conv2d"]
    with pytest.raises(SystemExit, match=r"timm cannot build vgg11 with .*output_stride"):
        zoo_main(["plan", "vgg11", "--start", "features", "--output-stride", "8"])


def test_unknown_things_to_prepare_are_refused_with_the_choices(capsys):
    with pytest.raises(SystemExit):
        zoo_main(["prepare", "voc2013"])
    assert "drawn-voc" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["lightning", "icnn-zoo"])
def test_both_programs_offer_fit(program):
    path = Path(sys.executable).parent / program
    if not path.exists():
        found = shutil.which(program)
        assert found, f"the package installs the program {program}"
        path = Path(found)
    help_text = subprocess.run([path, "--help"], capture_output=True, text=True, check=True).stdout
    assert "fit" in help_text
    assert all(name in help_text for name in COMMANDS) == (program == "icnn-zoo")


def test_the_readme_names_both_programs_and_the_commands_that_ci_runs():
    assert "icnn-zoo fit" in README
    assert "lightning fit -c configs/quickstart.yaml" in README
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    install = next(line for line in lines if "pip install" in line)
    assert "bash .ci/tests --durations=25" in lines
    assert f"{install} && bash .ci/tests\n" in README


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 1)])
def test_the_suite_in_two_processes_fails_where_one_does_and_leaves_no_folder_out(tmp_path, codes):
    pytest_stub = tmp_path / "pytest"
    pytest_stub.write_text(
        '#!/bin/bash\n[[ "$*" == *--ignore* ]] && half=0 || half=1\ncodes=($CODES)\n'
        'if [ "${codes[$half]}" = 1 ]; then echo "FAILED test of half $half"; fi\n'
        'echo "half $half: $*"; exit "${codes[$half]}"\n'
    )
    pytest_stub.chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CODES": f"{codes[0]} {codes[1]}"}
    ran = subprocess.run(["bash", ROOT / ".ci" / "tests", "-x"], capture_output=True, text=True, env=variables)
    assert ran.returncode == max(codes)
    first, second = (line.split(": ")[1].split() for line in ran.stdout.splitlines()[-2:])
    assert first == ["-x", *(f"--ignore={folder}" for folder in second[1:])]
    assert all((ROOT / folder).is_dir() for folder in second[1:])
    failed = [f"FAILED test of half {half}" for half in range(2) if codes[half]]
    assert ran.stdout.split("--- both\n")[1].splitlines()[:-2] == failed


def test_a_killed_run_resumes_with_the_losses_of_the_uninterrupted_one(tmp_path):
    def start(name: str, *arguments: str) -> subprocess.Popen:
        options = ["--trainer.max_steps", "40", "--trainer.val_check_interval", "3", "--trainer.accelerator", "cpu"]
        options += [
            "--trainer.log_every_n_steps",
            "1",
            "--trainer.accelerator",
            "cpu",
            "--data.init_args.num_workers",
            "1",
        ]
        options += ["--data.init_args.num_train", "56", "--trainer.logger.init_args.name", name]  # epochs of 7 steps
        config = str(ROOT / "configs" / "quickstart.yaml")
        program = [
            sys.executable,
            "-c",
            "from icnn_zoo.cli.programs import lightning_main; lightning_main()",
            "fit",
            "-c",
            config,
        ]
        output = (tmp_path / f"{name}.log").open("w")
        return subprocess.Popen([*program, *options, *arguments], cwd=tmp_path, stdout=output, stderr=output)

    def losses(name: str) -> dict[int, float]:
        path = tmp_path / "runs" / name / "version_0" / "metrics.csv"
        with path.open() as file:
            return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}

    killed = start("killed")
    last = tmp_path / "runs" / "killed" / "version_0" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, (tmp_path / "killed.log").read_text()
    step = torch.load(last, weights_only=True)["global_step"]
    assert start("resumed", "--ckpt_path", str(last)).wait(timeout=240) == 0, (tmp_path / "resumed.log").read_text()
    assert start("whole").wait(timeout=240) == 0, (tmp_path / "whole.log").read_text()
    whole, resumed = losses("whole"), losses("resumed")
    assert set(resumed) == set(range(step, 40))
    assert resumed == {number: loss for number, loss in whole.items() if number >= step}

"""What the command line promises of a run: which options and weights count, where files go, what resumes."""

import csv
import os
import re
import signal
import threading
from pathlib import Path

import pytest
import torch
import yaml

from icnn_zoo.cli.programs import in_a_line, lightning_main
from icnn_zoo.training.loggers import NoLogs
from icnn_zoo.training.run_folder import RunFolder
from icnn_zoo.training.task import SegmentationTask
from icnn_zoo_programs import lightning as lightning_program

CONFIG = Path(__file__).parents[1] / "shapes.yaml"
SMALL = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--pictures.num_samples", "1"]
for option, value in {"num_workers": 0, "num_train": 8, "num_val": 2, "batch_size": 2, "eval_batch_size": 2}.items():
    SMALL += [f"--data.init_args.{option}", str(value)]
RESUME = ["--model.freeze_norm", "true", "--ckpt_path"]  # as `trained` was
SMALL += ["--data.init_args.image_size", "33", "--trainer.num_sanity_val_steps", "0"]

pytestmark = pytest.mark.filterwarnings("ignore")


def lightning(verb: str, *arguments: object, config: Path | None = CONFIG) -> None:
    given = [] if config is None else ["-c", str(config)]
    lightning_main([verb, *given, *SMALL, *map(str, arguments)])


def fit(*arguments: object, steps: int = 4, every: int = 2, **options) -> None:
    length = ["--trainer.max_steps", steps, "--trainer.val_check_interval", every]
    lightning("fit", *length, "--trainer.log_every_n_steps", 1, *arguments, **options)


def versions() -> list[RunFolder]:
    return [RunFolder(path) for path in sorted(Path("runs/shapes").glob("version_*"))]


def step_of(file: Path) -> int:
    return torch.load(file, weights_only=True)["global_step"]


def rates(run: RunFolder) -> list[float]:
    with run.metrics.open() as file:
        return [float(row["lr-AdamW/backbone"]) for row in csv.DictReader(file) if row["lr-AdamW/backbone"]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """last.ckpt of a run of four steps."""
    folder = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(folder)
    try:
        fit("--model.freeze_norm", "true", "--trainer.logger.init_args.name", "before")
    finally:
        os.chdir(before)
    return folder / "runs" / "before" / "version_0" / "checkpoints" / "last.ckpt"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_options_of_the_command_line_win_over_those_of_a_checkpoint(trained, capsys):
    options = ["--model.flip", "true", "--model.scales", "[0.5,1.0]", "--model.evaluation", "sliding"]
    for version, verb in enumerate(("validate", "test", "predict")):
        lightning(verb, "--ckpt_path", trained, *options, "--model.window", 33)
        assert f"Weights: {trained}, step 4" in capsys.readouterr().out
        model = yaml.safe_load(versions()[version].config.read_text())["model"]
        assert (model["flip"], model["scales"], model["evaluation"], model["window"]) == (
            True,
            [0.5, 1.0],
            "sliding",
            33,
        )
        assert model["freeze_norm"] is False  # as the config says, though the checkpoint was trained otherwise


def test_options_that_nobody_gave_are_those_of_the_checkpoint(trained):
    config = yaml.safe_load(CONFIG.read_text())
    config["model"] = {"flip": True}
    Path("data.yaml").write_text(yaml.safe_dump(config))
    lightning("test", "--ckpt_path", trained, config=Path("data.yaml"))
    model = yaml.safe_load(versions()[0].config.read_text())["model"]
    assert (model["backbone"], model["start"], model["freeze_norm"], model["flip"]) == (
        "test_resnet",
        "layer3",
        True,
        True,
    )


def test_configs_and_checkpoints_of_version_0_1_are_read(trained):
    config = yaml.safe_load(CONFIG.read_text())
    del config["model"]["shapes"]
    for name, per_kernel in (("full.yaml", True), ("channel.yaml", False)):
        config["model"]["per_kernel"] = per_kernel
        Path(name).write_text(yaml.safe_dump(config))
    checkpoint = torch.load(trained, weights_only=True)
    options = checkpoint["hyper_parameters"]
    assert (options.pop("shapes"), "per_kernel" in options) == ("channel", False)
    options["per_kernel"] = False
    torch.save(checkpoint, "old.ckpt")
    lightning("test", "--ckpt_path", "old.ckpt", config=Path("channel.yaml"))
    model = yaml.safe_load(versions()[0].config.read_text())["model"]
    assert (model["shapes"], "per_kernel" in model) == ("channel", False)
    assert SegmentationTask.load_from_checkpoint("old.ckpt", weights_only=True).hparams["shapes"] == "channel"
    with pytest.raises(
        ValueError, match=r"`shapes`: the checkpoint is of a network with 'channel', this one .* 'kernel'"
    ):
        lightning("test", "--ckpt_path", "old.ckpt", config=Path("full.yaml"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.start", "layer4"], r"`start`: the checkpoint is of a network with 'layer3', this one has 'layer4'"),
        (
            ["--data.init_args.num_classes", "5"],
            r"`num_classes`: the checkpoint is of a network with 6, this one has 5",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "test"])
def test_a_network_that_disagrees_with_its_checkpoint_is_refused_with_both(trained, verb, options, message):
    with pytest.raises(ValueError, match=message):
        lightning(verb, "--ckpt_path", trained, *options)
    assert not Path("runs").exists()


def test_a_resumed_run_follows_the_new_rates_decay_and_length(trained):
    fit(*RESUME, trained, "--model.lr", 0.1, "--model.weight_decay", 0.25, steps=8)
    expected = [0.1 * (1 - step / 8) ** 0.9 for step in range(4, 8)]
    assert rates(versions()[0]) == pytest.approx(expected)
    groups = torch.load(versions()[0].last, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert {group["name"]: group["weight_decay"] for group in groups}["backbone"] == 0.25


def test_a_run_that_has_nothing_to_train_says_so(trained, capsys):
    fit(*RESUME, trained, steps=4)
    assert "Nothing was trained: step 4 " in capsys.readouterr().out


def test_another_optimizer_than_the_checkpoints_is_refused(trained):
    with pytest.raises(ValueError, match=r"`optimizer`: the checkpoint is of a network with 'adamw', .*'sgd'"):
        fit(*RESUME, trained, "--model.optimizer", "sgd", steps=8)
    with pytest.raises(ValueError, match=r"`freeze_norm`: .* with True, .* False"):
        fit("--ckpt_path", trained, steps=8)


def test_the_config_of_a_resumed_run_does_not_score_the_run_before_it(trained, capsys):
    fit(*RESUME, trained, steps=6)
    text = versions()[0].config.read_text()
    assert str(trained) in text.splitlines()[0]  # said, as a comment
    assert yaml.safe_load(text)["ckpt_path"] is None
    with pytest.raises(ValueError, match=rf"random weights: .*{versions()[0].best}"):
        lightning("test", config=versions()[0].config)
    lightning("test", "--ckpt_path", versions()[0].last, config=versions()[0].config)
    assert f"Weights: {versions()[0].last}, step 6" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize("options", [[], ["--ckpt_path", "last"], ["--ckpt_path", "best"]])
def test_random_weights_are_refused(verb, options):
    with pytest.raises(ValueError, match=f"{verb} would score random weights"):
        lightning(verb, *options)
    assert not Path("runs").exists()


def test_a_checkpoint_that_is_not_there_is_told_before_a_folder_is_made():
    with pytest.raises(FileNotFoundError, match="`ckpt_path`"):
        lightning("test", "--ckpt_path", "none.ckpt")
    assert not Path("runs").exists()


def test_last_is_saved_by_every_validation_also_without_a_better_score():
    fit("--model.lr", 0, "--model.position_lr", 0, "--model.freeze_norm", "true", steps=5)
    run = versions()[0]
    assert step_of(run.best) == 2  # nothing was better since
    assert step_of(run.last) == 5


def test_the_end_of_a_run_by_epochs_is_validated_saved_and_resumed():
    epochs = ["--trainer.max_steps", -1, "--trainer.max_epochs"]
    every = ["--trainer.val_check_interval", 3, "--trainer.log_every_n_steps", 1]  # epochs have four steps
    lightning("fit", *epochs, 2, *every)
    run = versions()[0]
    assert step_of(run.last) == 8
    with run.metrics.open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["val/mIoU"]] == [2, 5, 7]
    lightning("fit", *epochs, 3, *every, "--ckpt_path", run.last)
    lightning("fit", *epochs, 3, *every)
    resumed, whole = (torch.load(run.last, weights_only=True) for run in versions()[1:])
    assert resumed["global_step"] == whole["global_step"] == 12


def test_told_to_end_a_run_saves_its_step_and_exits_with_the_usual_status():
    def tell() -> None:
        while not list(Path("runs").glob("*/*/metrics.csv")):
            done.wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    done = threading.Event()
    threading.Thread(target=tell, daemon=True).start()
    with pytest.raises(SystemExit) as caught:
        fit("--trainer.limit_val_batches", 0, steps=10**6, every=10**6)
    done.set()
    assert caught.value.code == 128 + signal.SIGTERM
    step = step_of(versions()[0].last)
    assert step > 0
    fit("--ckpt_path", versions()[0].last, "--trainer.limit_val_batches", 0, steps=step + 2)
    with versions()[1].metrics.open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]] == [step, step + 1]


def test_numbers_that_are_not_finite_stop_a_run_with_step_place_and_advice():
    with pytest.raises(FloatingPointError, match=r"loss of step \d+ is .*model.lr \(1e\+30\)") as caught:
        fit("--model.optimizer", "sgd", "--model.lr", 1e30, steps=20)
    assert re.search(r"of backbone\..* is (not|the first that is not) finite", str(caught.value))
    assert not list(Path("runs").glob("*/*/checkpoints/best.ckpt"))


def test_weights_that_are_not_finite_are_not_scored(trained):
    checkpoint = torch.load(trained, weights_only=True)
    for value in checkpoint["state_dict"].values():
        if value.is_floating_point():
            value.fill_(torch.nan)
    torch.save(checkpoint, "nan.ckpt")
    with pytest.raises(FloatingPointError, match=r"not finite: .*the weight of backbone.conv1.0 is not finite"):
        lightning("test", "--ckpt_path", "nan.ckpt")


@pytest.mark.parametrize("logger", ["wandb", "both", "none"])
def test_everything_of_a_run_is_in_its_folder_whichever_logger(logger, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb = {"class_path": "icnn_zoo.training.loggers.WandbLogger"}
    table = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "here"}}
    config = yaml.safe_load(CONFIG.read_text())
    config["trainer"]["logger"] = {"wandb": wandb, "both": [wandb, table], "none": False}[logger]
    Path("own.yaml").write_text(yaml.safe_dump(config))
    fit(config=Path("own.yaml"), steps=1, every=1)
    run = RunFolder(Path(capsys.readouterr().out.strip().splitlines()[-1].removeprefix("Run folder: ")))
    assert {"checkpoints", "config.yaml", "pictures"} <= {path.name for path in run.path.iterdir()}
    assert run.metrics.exists() == (logger == "both")
    assert {path.name for path in Path().iterdir()} == {"own.yaml", "runs"}
    assert not [path for path in Path("runs").iterdir() if path.is_file()]
    lightning("test", "--ckpt_path", run.best, config=run.config)


def test_a_trial_run_leaves_nothing(capsys):
    fit("--trainer.fast_dev_run", "true")
    assert "Run folder" not in capsys.readouterr().out
    assert not [path for path in Path().rglob("*") if path.is_file()]


def test_runs_without_logs_have_folders_of_their_own():
    for number in range(2):
        logger = NoLogs("runs")
        assert (logger.name, logger.version) == ("unlogged", number)
        (Path("runs") / logger.name / f"version_{logger.version}").mkdir(parents=True)


def test_a_first_run_says_what_it_does_and_nothing_else(capfd):
    fit(steps=1, every=1)
    out, error = capfd.readouterr()
    assert out.startswith("Network: test_resnet, ")
    out = out.partition("Run folder: ")[0]  # whose path may hold any number
    for word in ("litlogger", "deprecated", "FLOPs", "weights_only", "TPU", "-2", "log_every_n_steps"):
        assert word not in out + error


def test_pictures_are_of_the_network_that_was_validated_an_average_too(monkeypatch):
    seen = {}
    for name in ("validation_step", "predict_step"):
        step = getattr(SegmentationTask, name)

        def watched(self, batch, batch_idx, name=name, step=step):
            seen[name] = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
            return step(self, batch, batch_idx)

        monkeypatch.setattr(SegmentationTask, name, watched)
    fit(
        *("--trainer.callbacks+", "icnn_zoo.training.callbacks.NetworkAverage", "--trainer.callbacks.decay", 0.9),
        steps=3,
        every=3,
    )
    validated, drawn = seen["validation_step"], seen["predict_step"]
    assert all(torch.equal(drawn[key], tensor) for key, tensor in validated.items())


def test_a_run_is_not_resumed_from_a_word(trained):
    with pytest.raises(ValueError, match="`ckpt_path`='last' names no run"):
        fit("--ckpt_path", "last")


def test_a_refused_run_is_a_line_and_leaves_no_folder(trained, monkeypatch, capsys):
    command = ["lightning", "fit", "-c", str(CONFIG), *SMALL, "--trainer.max_steps", "8"]
    command += [*RESUME, str(trained), "--data.init_args.batch_size", "4"]  # which its sampler refuses, late
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="1"):
        lightning_program()
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "lightning fit: " in said
    assert "batch_size" in said
    assert versions() == []


def test_what_nobody_foresaw_keeps_its_traceback(monkeypatch):
    def fails():
        raise ValueError("of another package")

    with pytest.raises(ValueError, match="of another package"):
        in_a_line(fails, "lightning")


def test_another_rule_of_positions_than_the_checkpoints_is_refused(trained):
    with pytest.raises(ValueError, match="`position_rule`: the checkpoint is of"):
        fit(*RESUME, trained, "--model.position_rule", "optimizer", steps=8)


@pytest.mark.parametrize("options", [["--model.epsilonn", "0.1"], ["--model.shapes", "chanel"]])
def test_a_misspelt_option_is_a_few_lines(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        fit(*options)
    said = capsys.readouterr().err
    assert options[0].lstrip("-") in said
    assert len(said.splitlines()) < 12

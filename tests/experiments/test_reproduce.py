"""Reproducing tables: rows run once, go on where they were interrupted, and are summed up rightly."""

import csv
import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
import yaml

import icnn_zoo
from icnn_zoo.cli.programs import zoo_main
from icnn_zoo.experiments import runner as module
from icnn_zoo.experiments.catalog import EXPERIMENTS, find_config
from icnn_zoo.experiments.runner import reproduce
from icnn_zoo.experiments.table import write_table

ROOT = Path(__file__).parents[2]


def test_windows_is_told_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(module.sys, "platform", "win32")
    with pytest.raises(RuntimeError, match="`reproduce` runs on Linux and macOS"):
        reproduce("voc", out=tmp_path)
    assert not list(tmp_path.iterdir())


class Runs:
    """Stands for the subprocesses: notes their arguments and leaves what they would leave."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[tuple[str, dict[str, str]]] = []
        self.fail_at: int | None = None
        self.steps = 4
        monkeypatch.setattr(module.subprocess, "run", self)

    def __call__(self, command, **_):
        import torch

        place = next(place for place, word in enumerate(command) if word in ("fit", "validate", "test"))
        verb, rest = command[place], command[place + 1 :]
        pairs = dict(zip(rest[::2], rest[1::2], strict=True))
        self.calls.append((verb, pairs))
        prefix = "--trainer.logger.init_args."
        folder = Path(pairs[f"{prefix}save_dir"]) / pairs[f"{prefix}name"] / pairs[f"{prefix}version"]
        folder.mkdir(parents=True)
        failed = self.fail_at == len(self.calls)
        if verb == "fit":
            (folder / "checkpoints").mkdir()
            (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": self.steps}}))
            step = self.steps // 2 if failed else self.steps
            torch.save({"global_step": step}, folder / "checkpoints" / "last.ckpt")
        else:
            split = {"validate": "val", "test": "test"}[verb]
            seed = int(pairs["--seed_everything"])
            score = 0.5 + 0.01 * seed + (0 if pairs["--model.start"] == "null" else 0.02 + 0.01 * seed)
            write_metrics(folder, {"step": 4, f"{split}/mIoU": score})

        class Done:
            returncode = int(failed)

        return Done


def write_metrics(folder: Path, *rows: dict[str, float]) -> None:
    with (folder / "metrics.csv").open("w") as file:
        writer = csv.DictWriter(file, sorted(set().union(*rows)))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def runs(monkeypatch):
    return Runs(monkeypatch)


def test_every_row_and_seed_runs_once(runs, tmp_path):
    options = {"rows": ["regular", "layer4"], "seeds": [0, 1], "out": tmp_path}
    reproduce("table1", **options)
    assert [verb for verb, _ in runs.calls] == ["fit", "validate"] * 4
    fits = [(pairs["--model.start"], pairs["--seed_everything"]) for verb, pairs in runs.calls if verb == "fit"]
    assert fits == [("null", "0"), ("layer4", "0"), ("null", "1"), ("layer4", "1")]
    assert all(pairs["--data.init_args.seed"] == pairs["--seed_everything"] for _, pairs in runs.calls)
    number = len(runs.calls)
    reproduce("table1", **options)
    assert len(runs.calls) == number  # all finished: nothing runs again
    reproduce("table1", **{**options, "rows": ["regular", "classifier"]})
    assert [pairs["--model.start"] for _, pairs in runs.calls[number:]] == ["classifier"] * 4


def test_an_interrupted_run_goes_on_from_its_last_checkpoint(runs, tmp_path):
    options = {"rows": ["regular", "layer4"], "out": tmp_path}
    runs.fail_at = 3  # the second row's training
    with pytest.raises(RuntimeError, match=r"fit.* of layer4 with seed 0 failed"):
        reproduce("table1", **options)
    assert (tmp_path / "table1" / "regular" / "seed_0" / "result.json").is_file()
    assert not (tmp_path / "table1" / "layer4" / "seed_0" / "result.json").exists()
    runs.fail_at = None
    reproduce("table1", **options)
    verb, pairs = runs.calls[3]
    first = tmp_path / "table1" / "layer4" / "seed_0" / "attempt_0" / "checkpoints" / "last.ckpt"
    assert (verb, pairs["--ckpt_path"]) == ("fit", str(first))
    assert first.is_file()
    assert [verb for verb, _ in runs.calls[3:]] == ["fit", "validate"]
    assert runs.calls[4][1]["--ckpt_path"] == str(first.parents[2] / "attempt_1" / "checkpoints" / "last.ckpt")


def test_a_trained_run_is_evaluated_without_training_again(runs, tmp_path):
    runs.fail_at = 2
    with pytest.raises(RuntimeError, match="validate"):
        reproduce("table1", rows=["regular"], out=tmp_path)
    (tmp_path / "table1" / "regular" / "seed_0" / "val").rename(tmp_path / "moved")
    runs.fail_at = None
    reproduce("table1", rows=["regular"], out=tmp_path)
    assert [verb for verb, _ in runs.calls] == ["fit", "validate", "validate"]


def test_overrides_reach_every_run_and_another_experiment_is_refused_in_the_same_folder(runs, tmp_path, capsys):
    command = ["reproduce", "table1", "--rows", "regular", "--out", str(tmp_path), "--"]
    zoo_main([*command, "--trainer.max_steps", "4"])
    assert all(pairs["--trainer.max_steps"] == "4" for _, pairs in runs.calls)
    assert "| regular | 50.00 | - | 0 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"its overrides is .*give another `--out`"):
        zoo_main([*command, "--trainer.max_steps", "5"])
    with pytest.raises(SystemExit, match=r"give another `--out`"):  # nor in another row of the same table
        zoo_main(["reproduce", "table1", "--rows", "layer4", "--out", str(tmp_path)])
    assert {pairs["--model.start"] for _, pairs in runs.calls} == {"null"}
    record = json.loads((tmp_path / "table1" / "regular" / "seed_0" / "result.json").read_text())
    assert record["metrics"] == {"val/mIoU": 0.5}
    assert record["overrides"] == ["--trainer.max_steps", "4"]
    assert {"torch", "timm", "icnn-zoo"} <= set(record["versions"])
    assert record["config"]["model"]["backbone"].startswith("resnet101")


def test_the_table_has_mean_deviation_gain_by_seed_and_what_the_paper_says(runs, tmp_path):
    path = reproduce("table1", rows=["regular", "layer3.11"], seeds=[0, 1, 2], out=tmp_path)
    cells = json.loads(path.with_suffix(".json").read_text())["rows"]["layer3.11"]
    assert cells["seeds"] == [0, 1, 2]
    assert cells["val/mIoU"]["values"] == pytest.approx([52.0, 54.0, 56.0])
    assert cells["val/mIoU"]["std"] == pytest.approx(statistics.stdev([52, 54, 56]))
    assert cells["val/gain"]["values"] == pytest.approx([2.0, 3.0, 4.0])
    text = path.read_text()
    assert "| regular | 51.00 ± 1.00 | - | 0, 1, 2 |" in text
    assert "| layer3.11 | 54.00 ± 2.00 | 3.00 [0.52, 5.48] | 0, 1, 2 |" in text
    assert "| layer3 | - | - | not run |" in text
    assert "+2.5 mIoU" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_gains_are_of_shared_seeds_alone(runs, tmp_path):
    reproduce("drawn-voc", rows=["regular"], seeds=[0, 1], out=tmp_path)
    path = reproduce("drawn-voc", rows=["blocks.4"], seeds=[1, 2], out=tmp_path)
    cells = json.loads(path.with_suffix(".json").read_text())["rows"]["blocks.4"]
    assert cells["test/gain"] == cells["val/gain"]
    assert cells["val/gain"]["values"] == pytest.approx([3.0])
    assert cells["val/gain"]["std"] is None


def test_configs_are_found_inside_the_package_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert all(find_config(experiment.config).is_file() for experiment in EXPERIMENTS.values())
    assert find_config("voc2012.yaml").parent.parent == Path(icnn_zoo.__file__).parent
    with pytest.raises(FileNotFoundError, match=r"no config 'voc.yaml' in the package; it has .*voc2012.yaml"):
        find_config("voc.yaml")


def test_a_folder_in_use_is_refused(runs, tmp_path):
    import fcntl

    folder = tmp_path / "table1" / "regular" / "seed_0"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="is in use"):
            reproduce("table1", rows=["regular"], out=tmp_path)
    assert not runs.calls


def test_every_row_of_an_experiment_is_a_start_of_its_network():
    from icnn_zoo import plan
    from icnn_zoo.models import SegmentationModel

    for experiment in EXPERIMENTS.values():
        model = yaml.safe_load((ROOT / "configs" / experiment.config).read_text())["model"]
        network = SegmentationModel(
            model["backbone"],
            21,
            output_stride=model["output_stride"],
            dilation_rule=model.get("dilation_rule", "timm"),
        )
        for row in list(experiment.rows.values())[1:]:
            start = row.peer[1] if row.peer else row.start
            assert start == "null" or re.search(r"\d+ converted", str(plan(network, start)))
            assert row.baseline is None or row.baseline in experiment.rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": ["layer5"]}, r"`rows` must be of regular, classifier"),
        ({"rows": ["layer4", "layer4"]}, "each once"),
        ({"seeds": []}, "`seeds`"),
        ({"seeds": [-1]}, "`seeds`"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(runs, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        reproduce("table1", out=tmp_path, **arguments)
    with pytest.raises(FileNotFoundError, match="`config`"):
        reproduce("table1", out=tmp_path, config=tmp_path / "none.yaml")
    assert not runs.calls


def test_several_processes_are_told_to_call_it_once(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"without torchrun"):
        reproduce("table1", out=tmp_path)


def test_a_table_without_results_is_written_too(tmp_path):
    assert "not run" in write_table("table3", tmp_path).read_text()


@pytest.mark.slow
def test_real_runs_are_interrupted_resumed_and_summed_up(tmp_path, drawn_voc_root):
    """Without stand-ins: the first call trains to step 2 of 4 and is cut off, the second goes on and evaluates."""
    config = yaml.safe_load((ROOT / "configs" / "drawn_voc.yaml").read_text())
    config["data"]["init_args"] |= {"root": str(drawn_voc_root), "num_train": 24, "num_val": 4, "num_test": 4}
    config["data"]["init_args"] |= {"image_size": 33, "batch_size": 4, "eval_batch_size": 2, "num_workers": 0}
    config["model"] |= {"pretrained": False, "backbone": "test_efficientnet"}
    config["trainer"] |= {"max_steps": 4, "val_check_interval": 2, "accelerator": "cpu", "log_every_n_steps": 1}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(config))
    options = {"rows": ["classifier"], "seeds": [3], "out": tmp_path, "config": file}
    folder = tmp_path / "drawn-voc" / "classifier" / "seed_3"
    run = module.subprocess.run

    def cut_off(command, **arguments):
        return run([*command, "--trainer.limit_train_batches", "2", "--trainer.max_epochs", "1"], **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.subprocess, "run", cut_off)
        with pytest.raises(RuntimeError, match="before its last step"):
            reproduce("drawn-voc", **options)
    path = reproduce("drawn-voc", **options)
    rows = csv.DictReader((folder / "attempt_1" / "metrics.csv").read_text().splitlines())
    steps = [int(row["step"]) for row in rows if row["train/loss"]]
    assert steps == [2, 3]
    record = json.loads((folder / "result.json").read_text())
    assert record["attempts"] == 2
    assert {"val/mIoU", "test/mIoU", "test/IoU/cat", "val/pixel_accuracy"} <= set(record["metrics"])
    assert yaml.safe_load(record["resolved_config"])["model"]["start"] == "classifier"
    assert "| 3 |" in path.read_text()


def test_peers_run_by_their_own_program_and_stand_in_the_same_table(runs, tmp_path):
    table = reproduce("drawn-voc", rows=["regular", "dilation"], out=tmp_path)
    fits = [pairs for verb, pairs in runs.calls if verb == "fit"]
    assert "--model.peer" not in fits[0]
    assert (fits[1]["--model.peer"], fits[1]["--model.peer_start"], fits[1]["--model.start"]) == (
        "dilation",
        "blocks.4",
        "null",
    )
    assert re.search(r"\| dilation \| 50.00 \| 0.00 \|", table.read_text())


def test_what_training_found_at_its_last_step_needs_no_second_run(runs, tmp_path, monkeypatch):
    stand_in = runs.__call__

    def train_and_validate(command, **options):
        done = stand_in(command, **options)
        verb, pairs = runs.calls[-1]
        if verb == "fit":
            name = pairs["--trainer.logger.init_args.name"]
            folder = tmp_path / "lines" / name / pairs["--trainer.logger.init_args.version"]
            seed = int(pairs["--seed_everything"])
            early, last = {"step": 1, "val/pixel_accuracy": 0.1}, {"step": 3, "val/pixel_accuracy": 0.9 + 0.01 * seed}
            write_metrics(folder, early, {"step": 4, "displacement/mean": 0.4}, last)
        return done

    monkeypatch.setattr(module.subprocess, "run", train_and_validate)
    table = reproduce("lines", rows=["regular", "learned"], seeds=[0, 1], out=tmp_path)
    assert [verb for verb, _ in runs.calls] == ["fit"] * 4
    record = json.loads((tmp_path / "lines" / "learned" / "seed_1" / "result.json").read_text())
    assert record["metrics"] == {"val/pixel_accuracy": 0.91}
    assert record["displacement"] == {"displacement/mean": 0.4}
    assert "| learned | 90.50 ± 0.71 | 0.00 [0.00, 0.00] | 0, 1 |" in table.read_text()


def test_rows_have_their_own_seeds_arguments_and_baselines(runs, tmp_path, monkeypatch):
    from icnn_zoo.experiments.catalog import Experiment, Row

    turned = ("--data.init_args.rotation", "[-9, 9]")
    rows = {
        "regular": Row(),
        "turned": Row(arguments=turned, seeds=(1,)),
        "learned": Row("layer1", arguments=turned, baseline="turned", seeds=(0, 1)),
    }
    monkeypatch.setitem(EXPERIMENTS, "trial", Experiment("A trial", "quickstart.yaml", rows, seeds=(0, 1, 2)))
    path = reproduce("trial", out=tmp_path)
    fits = [pairs for verb, pairs in runs.calls if verb == "fit"]
    assert [pairs["--seed_everything"] for pairs in fits] == ["0", "0", "1", "1", "1", "2"]
    assert [pairs.get("--data.init_args.rotation") for pairs in fits] == [
        None,
        "[-9, 9]",
        None,
        "[-9, 9]",
        "[-9, 9]",
        None,
    ]
    cells = json.loads(path.with_suffix(".json").read_text())["rows"]["learned"]
    assert cells["baseline"] == "turned"
    assert cells["val/gain"]["values"] == pytest.approx([3.0])  # seed 1 alone, over the turned row


def test_a_variant_is_a_column_of_its_own_from_the_test_split(runs, tmp_path):
    path = reproduce("documents", rows=["regular", "learned"], seeds=[0], out=tmp_path)
    scans = [pairs.get("--data.init_args.scans") for verb, pairs in runs.calls if verb == "test"]
    assert scans == [None, "true"] * 2
    cells = json.loads(path.with_suffix(".json").read_text())["rows"]["learned"]
    assert cells["scans/mIoU"]["mean"] == cells["test/mIoU"]["mean"] == pytest.approx(52)
    assert "scans mIoU" in path.read_text()


def test_a_gain_has_an_interval_of_students_t_and_a_bootstrap_of_many_seeds(runs, tmp_path):
    from scipy import stats

    path = reproduce("table1", rows=["regular", "layer4"], seeds=list(range(6)), out=tmp_path)
    gain = json.loads(path.with_suffix(".json").read_text())["rows"]["layer4"]["val/gain"]
    values = gain["values"]
    assert values == pytest.approx([2, 3, 4, 5, 6, 7])
    interval = stats.t.interval(0.95, 5, loc=statistics.fmean(values), scale=stats.sem(values))
    assert gain["interval"] == pytest.approx(interval)
    assert gain["interval"][0] < gain["bootstrap"][0] < gain["mean"] < gain["bootstrap"][1] < gain["interval"][1]


def test_results_from_elsewhere_are_gone_on_from_if_their_config_is_the_same(runs, tmp_path):
    reproduce("table1", rows=["regular"], out=tmp_path / "theirs")
    place = Path("table1") / "regular" / "seed_0"
    (tmp_path / "ours" / place).mkdir(parents=True)
    result = (tmp_path / "theirs" / place / "result.json").read_text()
    (tmp_path / "ours" / place / "result.json").write_text(result)
    number = len(runs.calls)
    reproduce("table1", rows=["regular"], out=tmp_path / "ours")
    assert len(runs.calls) == number
    (tmp_path / "ours" / place / "result.json").write_text(result.replace('"lr": 0.001', '"lr": 0.002'))
    with pytest.raises(ValueError, match="another experiment: its config is another file"):
        reproduce("table1", rows=["regular"], out=tmp_path / "ours")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", EXPERIMENTS["lines"].rows)
def test_the_command_of_every_row_is_understood(row, monkeypatch, tmp_path):
    """By the row's own program, stopped before it builds anything."""
    from icnn_zoo.experiments.peers import PeerCLI
    from icnn_zoo.training.lightning_cli import ZooCLI

    class Understood(Exception):
        pass

    def stop(self):
        raise Understood(self.config.fit)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ZooCLI, "before_instantiate_classes", stop)
    program = PeerCLI if EXPERIMENTS["lines"].rows[row].peer else ZooCLI
    with pytest.raises(Understood) as understood:
        program.run(["fit", "-c", str(ROOT / "configs" / "quickstart.yaml"), *EXPERIMENTS["lines"].rows[row].command()])
    config = understood.value.args[0]
    assert config.model.start == (None if EXPERIMENTS["lines"].rows[row].start == "null" else "layer1")
    added = [callback.class_path.rpartition(".")[2] for callback in config.trainer.callbacks]
    assert {"walk": "RandomWalk", "frozen": "RandomShapes"}.get(row, "Comparison") in added
    assert "Comparison" in added  # those of the config stay
    turned = float(row.rpartition("-turned-")[2]) if "-turned-" in row else 0.0
    assert tuple(config.data.init_args.rotation) == (-turned, turned)


def test_the_committed_lines_can_be_gone_on_from(runs, tmp_path):
    committed = Path(__file__).parents[2] / "docs/results/lines"
    shutil.copytree(committed / "regular", tmp_path / "lines/regular")
    reproduce("lines", rows=["regular"], seeds=[0, 1], out=tmp_path)
    assert not runs.calls

"""Checkpoints as files: whole or not at all, and never a program."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from icnn_zoo.experiments.runner import _Run
from icnn_zoo.io import files
from icnn_zoo.training import checkpoints
from icnn_zoo.training.checkpoints import WholeCheckpointIO, read_checkpoint
from icnn_zoo.training.network_sources import find_source, load_task
from icnn_zoo.training.task import SegmentationTask

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore")


class Payload:
    """Something that makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder whose last.ckpt is a program."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"global_step": 4, "state_dict": Payload(tmp_path / "ran")}, folder / "checkpoints" / "last.ckpt")
    (folder / "config.yaml").write_text("trainer: {max_steps: 4}\n")
    (folder / "metrics.csv").write_text("step\n1\n")
    return folder


def evaluate(file: Path) -> None:
    from icnn_zoo.cli.programs import lightning_main

    lightning_main(["test", "-c", str(ROOT / "tests" / "shapes.yaml"), "--ckpt_path", str(file)])


READERS = {
    "Lightning": lambda file: WholeCheckpointIO().load_checkpoint(file, weights_only=False),
    "an address": lambda file: WholeCheckpointIO().load_checkpoint(f"memory://{file}", weights_only=False),
    "the command line": evaluate,
    "looking at a network": load_task,
    "curves": lambda file: find_source(file).metrics(),
    "reproduce": lambda file: _Run._is_finished(None, file),
}


@pytest.mark.parametrize("reader", READERS)
def test_nothing_in_a_checkpoint_runs(reader, run, tmp_path):
    file = run / "checkpoints" / "last.ckpt"
    if reader == "an address":
        import fsspec

        with fsspec.open(f"memory://{file}", "wb") as stream:
            stream.write(file.read_bytes())
    with pytest.raises(ValueError, match=r"cannot be read as a checkpoint of tensors and plain values"):
        READERS[reader](file)
    assert not (tmp_path / "ran").exists()


def test_no_file_of_the_project_asks_torch_to_run_what_a_file_holds():
    for file in [*ROOT.glob("icnn_zoo/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"weights_only\s*=\s*False|pickle\.load|allow_pickle\s*=\s*True", text), file


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    file = tmp_path / "checkpoints" / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"global_step": 1}, file)

    def full(_, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        WholeCheckpointIO().save_checkpoint({"global_step": 2}, file)
    assert read_checkpoint(file) == {"global_step": 1}
    assert list(file.parent.iterdir()) == [file]


def test_a_damaged_checkpoint_is_named_with_the_newest_whole_one(tmp_path):
    for name, step in {"a": 3, "b": 9, "c": 6, "last": 12}.items():
        WholeCheckpointIO().save_checkpoint({"global_step": step}, tmp_path / f"{name}.ckpt")
    for name in ("b", "last"):
        file = tmp_path / f"{name}.ckpt"
        file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"last\.ckpt' cannot be read .*whole one beside it is .*c\.ckpt', of step 6"):
        read_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(FileNotFoundError, match="none"):
        read_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 10**9}, "`num_classes` must be 2 to 256"),
        ({"backbone": "regnety_2560"}, "does not hold the network"),
        ({"head_dilation": 10**30}, "is not a checkpoint|does not hold"),
    ],
)
def test_a_small_file_that_describes_a_huge_network_costs_neither_memory_nor_time(tmp_path, options, message):
    hyper = {"backbone": "test_resnet", "num_classes": 4, "start": "layer3", **options}
    torch.save({"hyper_parameters": hyper, "state_dict": {}}, tmp_path / "small.ckpt")
    begin = time.process_time()
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path / "small.ckpt")
    assert time.process_time() - begin < 30


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path):
    task = SegmentationTask("test_resnet", 4)
    state = {name: value.new_zeros(()).expand(value.shape) for name, value in task.state_dict().items()}
    torch.save({"hyper_parameters": dict(task.hparams), "state_dict": state}, tmp_path / "small.ckpt")
    with pytest.raises(ValueError, match="holds less of"):
        load_task(tmp_path / "small.ckpt")


@pytest.mark.parametrize("content", [[1], {"state_dict": {}}, {"hyper_parameters": 5, "state_dict": {}}])
def test_a_file_of_something_else_says_what_is_missing(tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"is not a checkpoint of a run"):
        load_task(tmp_path / "other.ckpt")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("place", ["sync", "replace"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch, place):
    file = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"global_step": 1}, file)
    child = os.fork()
    if child == 0:
        owner, name = (files, "sync") if place == "sync" else (files.os, "replace")
        monkeypatch.setattr(owner, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        WholeCheckpointIO().save_checkpoint({"global_step": 2}, file)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert read_checkpoint(file) == {"global_step": 1}
    WholeCheckpointIO().save_checkpoint({"global_step": 3}, file)  # what the killed one left is not in the way
    assert read_checkpoint(file) == {"global_step": 3}

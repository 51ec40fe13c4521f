"""Each run has a folder of its own."""

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger

from icnn_zoo.training.loggers import NoLogs
from icnn_zoo.training.run_folder import RunFolder


def make_trainer(logger) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False)


@pytest.mark.parametrize("kind", [lambda folder: CSVLogger(folder, "shapes"), NoLogs])
def test_runs_that_are_started_at_once_do_not_share_a_folder(tmp_path, monkeypatch, kind):
    trainers = [make_trainer(kind(tmp_path)) for _ in range(3)]
    monkeypatch.setattr(CSVLogger, "_get_next_version", lambda self: 0)  # each looks before any has made its folder
    claimed = [RunFolder.claim(trainer) for trainer in trainers]
    assert [folder.path.name for folder in claimed] == ["version_0", "version_1", "version_2"]
    assert [RunFolder.of(trainer) for trainer in trainers] == claimed
    assert all(folder.path.is_dir() for folder in claimed)


def test_a_folder_that_a_person_has_chosen_is_theirs(tmp_path):
    trainer = make_trainer(CSVLogger(tmp_path, "shapes", version=3))
    RunFolder.of(trainer).path.mkdir(parents=True)
    assert RunFolder.claim(trainer) is None
    assert RunFolder.of(trainer).path == tmp_path / "shapes" / "version_3"


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError):
        RunFolder.claim(make_trainer(CSVLogger(tmp_path / "runs", "shapes")))

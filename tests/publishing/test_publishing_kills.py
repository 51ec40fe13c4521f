"""A publish that is killed anywhere, or meets a full disk, leaves the registry as it was and the way free."""

import errno
import json
import os

import pytest
from kills import kill_everywhere
from zoo_cases import ABOUT, NAME

import icnn_zoo
from icnn_zoo.publishing import publisher
from icnn_zoo.publishing.publisher import publish
from icnn_zoo.zoo.networks import verify_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
MEASURED = {**ABOUT, "metrics": [{"name": "val/mIoU", "protocol": "none", "value": 0.5}]}


@pytest.fixture
def folder(zoo_run, tmp_path):
    """A registry with one checkpoint."""
    publish(zoo_run, "test_resnet.first", tmp_path / "zoo", MEASURED)
    return tmp_path / "zoo"


def test_a_kill_before_any_change_of_a_file_leaves_a_registry_and_the_way_free(
    zoo_run, folder, tmp_path, monkeypatch, record_property
):
    (tmp_path / "picture.png").write_bytes(b"a picture")
    about = {**MEASURED, "pictures": {str(tmp_path / "picture.png"): "A picture"}}
    # Networks compute nothing in a forked process; what is written and moved is the same.
    monkeypatch.setattr(publisher, "_read_back", lambda *_: None)
    before = json.loads((folder / "index.json").read_text())
    kills = 0
    for number in kill_everywhere(lambda: publish(zoo_run, NAME, folder, about), folder):
        kills = number
        index = json.loads((folder / "index.json").read_text())
        if index == before:
            assert icnn_zoo.list_checkpoints(registry=folder) == ["test_resnet.first"]
        else:  # after the last move: it is published, and what follows only tidies
            assert icnn_zoo.list_checkpoints(registry=folder) == ["test_resnet.first", NAME]
            break
    else:
        assert kills >= 10  # the staging folder, four files and their moves, the folder's move, the index and its move
    record_property("kills", kills)
    if NAME not in icnn_zoo.list_checkpoints(registry=folder):
        publish(zoo_run, NAME, folder, about)
    for name in icnn_zoo.list_checkpoints(registry=folder):
        verify_checkpoint(name, registry=folder)
    assert json.loads((folder / "index.json").read_text())["version"] == before["version"] + 1
    publish(zoo_run, "test_resnet.third", folder, MEASURED)  # tidies what kills left
    names = {path.name for path in folder.iterdir()}
    assert names == {NAME, "test_resnet.first", "test_resnet.third", "index.json", "README.md", ".lock"}


@pytest.mark.parametrize("step", ["write", "fsync", "replace", "rename"])
def test_a_full_disk_leaves_the_registry_as_it_was(zoo_run, folder, monkeypatch, step):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(publisher, "write_whole", full)
        else:
            patch.setattr(os, step, full)
        with pytest.raises(OSError, match="No space left"):
            publish(zoo_run, NAME, folder, MEASURED)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    publish(zoo_run, NAME, folder, MEASURED)

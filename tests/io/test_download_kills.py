"""A download that is killed anywhere, or finds anything in its cache, is had in full by the next."""

import os
import stat

import pytest
from kills import kill_everywhere
from zoo_cases import content, fetch, files, sha256

DATA = content(60_000)

# Python warns of forks beside threads; the children use none of the server's.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def url(zoo_server) -> str:
    zoo_server.files["/file"] = DATA
    return f"{zoo_server.url}/file"


@pytest.mark.parametrize("cut", [False, True])
def test_a_kill_before_any_change_of_a_file_leaves_the_next_its_way(zoo_server, url, tmp_path, cut, record_property):
    kills = 0
    for number in kill_everywhere(lambda: fetch(url, DATA, tmp_path / "cache"), tmp_path):
        kills = number
        if cut:
            zoo_server.manners = ["truncate"]  # the next goes on with a part, and writes its note anew
    record_property("kills", kills)
    assert kills >= 6  # folders, part, note and its move, the file's move, the note's end
    assert fetch(url, DATA, tmp_path / "cache") == DATA
    assert {name for name in files(tmp_path) if not name.startswith(".")} == {sha256(DATA)}


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b'{"address": 3}', b"\xff\xfe", b'{"version": {}}'])
def test_an_unreadable_note_counts_as_none(zoo_server, url, tmp_path, note):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / f"{sha256(DATA)}.json").write_bytes(note)
    (folder / f"{sha256(DATA)}.partial").write_bytes(b"of something else")
    assert fetch(url, DATA, tmp_path) == DATA
    assert files(tmp_path) == {sha256(DATA)}


@pytest.mark.parametrize("suffix", ["", ".partial", ".json"])
def test_links_in_the_cache_are_not_followed(url, tmp_path, suffix):
    folder = tmp_path / "cache" / "files"
    folder.mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.write_text("years")
    (folder / f"{sha256(DATA)}{suffix}").symlink_to(victim)
    with pytest.raises(RuntimeError, match=r"is not a plain file; remove it.*ICNN_ZOO_CACHE"):
        fetch(url, DATA, tmp_path / "cache")
    assert victim.read_text() == "years"


def test_a_linked_folder_of_the_cache_is_not_followed(url, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "files").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="is a symbolic link, which is not followed"):
        fetch(url, DATA, tmp_path / "cache")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_modes_follow_the_users_mask(zoo_server, url, tmp_path, mask):
    before = os.umask(mask)
    try:
        fetch(url, DATA, tmp_path / "cache")
    finally:
        os.umask(before)
    for path in (tmp_path / "cache").rglob("*"):
        whole = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == whole & ~mask, path


def test_a_huge_file_in_the_cache_is_not_read(url, tmp_path):
    copy = tmp_path / "files" / sha256(DATA)
    copy.parent.mkdir()
    with copy.open("wb") as file:
        file.truncate(10**11)  # sparse
    assert fetch(url, DATA, tmp_path) == DATA

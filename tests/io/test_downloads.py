"""Downloads survive what servers, networks, disks and kills do to them, or say what happened and leave nothing."""

import errno
import hashlib
import http.server
import itertools
import json
import os
import resource
import signal
import threading
import time

import fsspec
import pytest
from zoo_cases import content, fetch, files, fork, sha256

from icnn_zoo.io import downloads
from icnn_zoo.io.downloads import Promise, cache_folder, fetch_small
from icnn_zoo.io.transports import DownloadError, Patience

# Python warns of forks beside threads; the children use none of the server's.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

DATA = content()


@pytest.fixture
def url(zoo_server) -> str:
    zoo_server.files["/file"] = DATA
    return f"{zoo_server.url}/file"


def test_content_is_kept_under_its_hash_and_fetched_once(zoo_server, url, tmp_path):
    assert fetch(url, DATA, tmp_path) == DATA
    assert fetch(url, DATA, tmp_path) == DATA
    assert len(zoo_server.requests) == 1
    assert files(tmp_path) == {sha256(DATA)}


@pytest.mark.parametrize("manner", ["truncate", "reset", "stall"])
def test_a_download_that_was_cut_off_goes_on_where_it_stopped(zoo_server, url, tmp_path, manner):
    zoo_server.manners = [manner, manner]
    assert fetch(url, DATA, tmp_path) == DATA
    statuses = [status for _, _, status in zoo_server.requests]
    assert statuses == [200, 206, 206]
    starts = [int(span.removeprefix("bytes=").rstrip("-")) for _, span, _ in zoo_server.requests[1:]]
    assert 0 < starts[0] < starts[1] < len(DATA)
    assert files(tmp_path) == {sha256(DATA)}


@pytest.mark.parametrize("lacking", ["ranges", "tags"])
def test_without_ranges_or_tags_it_begins_again(zoo_server, url, tmp_path, lacking):
    setattr(zoo_server, lacking, False)
    zoo_server.manners = ["truncate"]
    assert fetch(url, DATA, tmp_path) == DATA
    assert [status for _, _, status in zoo_server.requests] == [200, 200]


def test_passing_server_errors_are_retried(zoo_server, url, tmp_path):
    zoo_server.manners = [500, 503, 429]
    assert fetch(url, DATA, tmp_path) == DATA


def test_a_server_that_stays_broken_is_given_up_with_what_was_tried(zoo_server, url, tmp_path):
    zoo_server.manners = [500] * 9
    with pytest.raises(DownloadError, match=r"HTTP 500.*Tried 5 times"):
        fetch(url, DATA, tmp_path)
    assert files(tmp_path) == set()


def test_attempts_that_bring_something_do_not_count(zoo_server, url, tmp_path):
    zoo_server.manners = ["truncate"] * 8
    assert fetch(url, DATA, tmp_path) == DATA


def test_nobody_there_is_said_with_the_address(tmp_path):
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1:9.*cannot be reached.*Tried 5 times"):
        fetch("http://127.0.0.1:9/file", DATA, tmp_path)


@pytest.mark.parametrize(("status", "error"), [(404, FileNotFoundError), (403, DownloadError), (401, DownloadError)])
def test_refusals_are_not_retried(zoo_server, url, tmp_path, status, error):
    zoo_server.manners = [status]
    with pytest.raises(error, match=f"HTTP {status}"):
        fetch(url, DATA, tmp_path)
    assert len(zoo_server.requests) == 1
    assert files(tmp_path) == set()


@pytest.mark.parametrize("manner", ["corrupt", "long", "short"])
def test_a_wrong_file_is_refused_with_both_hashes_and_removed(zoo_server, url, tmp_path, manner):
    zoo_server.manners = [manner] * 3
    with pytest.raises(
        ValueError, match=f"expected 300000 bytes with sha256 {sha256(DATA)}; got .* sha256 [0-9a-f]{{64}}"
    ):
        fetch(url, DATA, tmp_path)
    assert files(tmp_path) == set()


def test_a_file_that_changes_under_way_is_not_joined_of_two(zoo_server, url, tmp_path):
    zoo_server.manners = ["change"]
    with pytest.raises(ValueError, match=f"got 300000 bytes with sha256 {sha256(DATA[::-1])}"):
        fetch(url, DATA, tmp_path)
    assert [status for _, _, status in zoo_server.requests][:2] == [200, 200]  # If-Range made it whole
    assert files(tmp_path) == set()


def test_a_bad_resumed_part_costs_one_fresh_start_and_no_more(zoo_server, url, tmp_path):
    zoo_server.manners = ["truncate", "corrupt"]
    assert fetch(url, DATA, tmp_path) == DATA
    assert [status for _, _, status in zoo_server.requests] == [200, 206, 200]


def test_ten_processes_download_once(zoo_server, url, tmp_path):
    zoo_server.manners = ["slow"]
    processes = [fork(fetch, url, DATA, tmp_path) for _ in range(10)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 10
    assert len(zoo_server.requests) == 1


def test_a_killed_download_is_resumed_by_the_next(zoo_server, url, tmp_path):
    zoo_server.manners = ["slow"]
    process = fork(fetch, url, DATA, tmp_path)
    partial = tmp_path / "files" / f"{sha256(DATA)}.partial"
    deadline = time.monotonic() + 30
    while not (partial.is_file() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "files" / sha256(DATA)).exists()
    assert fetch(url, DATA, tmp_path) == DATA
    assert zoo_server.requests[1][2] == 206
    assert files(tmp_path) == {sha256(DATA)}


def test_a_damaged_copy_is_removed_and_fetched_anew(zoo_server, url, tmp_path):
    fetch(url, DATA, tmp_path)
    copy = tmp_path / "files" / sha256(DATA)
    copy.write_bytes(DATA[:100])
    assert fetch(url, DATA, tmp_path) == DATA
    copy.write_bytes(DATA[:100])
    zoo_server.files.clear()
    with pytest.raises(DownloadError, match="removed: expected 300000 bytes; got 100 bytes"):
        fetch(url, DATA, tmp_path)
    assert not copy.exists()


def test_a_warm_cache_needs_no_network_and_no_write_access(url, tmp_path, monkeypatch):
    fetch(url, DATA, tmp_path)
    monkeypatch.setattr(downloads, "open_url", None)
    monkeypatch.setattr(downloads, "FileLock", None)
    assert fetch("http://127.0.0.1:9/file", DATA, tmp_path) == DATA


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(url, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RuntimeError, match=r"cannot be written \(.*ICNN_ZOO_CACHE"):
        fetch(url, DATA, tmp_path / "file")


def test_a_full_disk_leaves_no_half_file_and_what_there_was(url, tmp_path):
    other = content(1000)

    def limited() -> None:
        # A real failure of the system's write: no file of this process may grow over 100 kB.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            fetch(url, DATA, tmp_path)
        except RuntimeError as error:
            os._exit(7 if "no space left" in str(error) else 8)

    with fsspec.open("memory://other", "wb") as file:
        file.write(other)
    fetch("memory://other", other, tmp_path)
    process = fork(limited)
    process.join()
    assert process.exitcode == 7
    assert files(tmp_path) == {sha256(other)}


def test_a_file_larger_than_the_free_space_is_not_begun(zoo_server, url, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(RuntimeError, match="no space left") as caught:
        fetch(url, DATA, tmp_path)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert not zoo_server.requests


def test_any_file_system_of_fsspec_will_do_and_resumes(tmp_path):
    with fsspec.open("memory://folder/file", "wb") as file:
        file.write(DATA)
    system, path = fsspec.url_to_fs("memory://folder/file")
    target = tmp_path / "files" / sha256(DATA)
    target.parent.mkdir()
    target.with_suffix(".partial").write_bytes(DATA[:1000])
    note = {"address": sha256(b"memory://folder/file"), "version": str(system.ukey(path))}
    target.with_suffix(".json").write_text(json.dumps(note))
    assert fetch("memory://folder/file", DATA, tmp_path) == DATA
    with pytest.raises(FileNotFoundError, match="does not exist"):
        fetch("memory://folder/none", b"1", tmp_path)
    with pytest.raises(DownloadError, match="cannot be opened"):
        fetch("nosuch://folder/file", b"2", tmp_path)


def test_an_endless_index_is_cut_off(zoo_server, url):
    assert fetch_small(url, 300_000) == DATA
    with pytest.raises(ValueError, match="larger than the 1000 bytes"):
        fetch_small(url, 1000)


def test_the_cache_is_the_argument_else_the_variable_else_the_platforms(tmp_path, monkeypatch):
    monkeypatch.delenv("ICNN_ZOO_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder().name == "icnn_zoo"
    monkeypatch.setenv("ICNN_ZOO_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    assert cache_folder(tmp_path) == tmp_path


def test_a_server_that_begins_anew_and_cuts_off_elsewhere_each_time_is_given_up(tmp_path):
    content, asked = bytes(100_000), []
    lengths = itertools.cycle([70_000, 30_000, 50_000])

    class Cut(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # the name that http.server calls
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: next(lengths)])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Cut) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(DownloadError, match="Tried"):
            downloads.fetch(
                f"http://127.0.0.1:{server.server_port}/f",
                Promise(hashlib.sha256(content).hexdigest(), len(content)),
                tmp_path,
                progress=False,
                patience=Patience(first_wait=0.01, longest_wait=0.02),
            )
        server.shutdown()
    assert len(asked) < 12

"""Servers that never end, secrets in addresses, tokens: what a source may cost, and what it may learn and tell."""

import time
import traceback

import pytest
from zoo_cases import HASTY, content, fetch, files, sha256

from icnn_zoo.io.addresses import is_plain_http, join, shown, token_for
from icnn_zoo.io.downloads import Promise, download, fetch_small
from icnn_zoo.io.transports import DownloadError, Patience

DATA = content(50_000)
SHORT = Patience(first_wait=0.01, longest_wait=0.02, read=0.5, total=0.4, slowest=1e6)


@pytest.fixture
def url(zoo_server) -> str:
    zoo_server.files["/file"] = DATA
    return f"{zoo_server.url}/file"


@pytest.mark.parametrize("manner", ["drip", "continue"])
def test_a_server_that_never_ends_is_given_up(zoo_server, url, tmp_path, manner):
    zoo_server.manners = [manner] * 9
    start = time.monotonic()
    with pytest.raises(DownloadError, match="is too slow: it was given up after"):
        fetch(url, DATA, tmp_path, SHORT)
    with pytest.raises(DownloadError, match="is too slow"):
        fetch_small(url, 10**6, patience=SHORT)
    assert time.monotonic() - start < 5


def test_a_server_that_gives_a_byte_an_attempt_is_given_up(zoo_server, url, tmp_path):
    zoo_server.manners = ["truncate"] * 1000
    zoo_server.files["/file"] = long = content(3_000_000)
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"too slow|cannot be reached.*Tried"):
        fetch(url, long, tmp_path, Patience(first_wait=0.3, longest_wait=0.3, read=0.5, total=0.5, slowest=1e9))
    assert time.monotonic() - start < 5


def test_what_comes_fast_enough_may_take_long(zoo_server, url, tmp_path):
    zoo_server.manners, zoo_server.files["/file"] = ["slow"], content(600_000)  # 10 kB every 20 ms
    assert fetch(url, content(600_000), tmp_path, Patience(total=1.0, slowest=50_000)) == content(600_000)


def test_a_file_that_became_shorter_is_fetched_anew_and_not_locked_out(zoo_server, url, tmp_path):
    zoo_server.manners = ["truncate", 416]
    assert fetch(url, DATA, tmp_path) == DATA
    assert [span for _, span, _ in zoo_server.requests][2] is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:pw@example.org/zoo", "https://***@example.org/zoo"),
        ("https://token@example.org/zoo", "https://***@example.org/zoo"),
        ("https://user:p/w@example.org/zoo", "https://***@example.org/zoo"),
        ("https://user:p@w@example.org/zoo", "https://***@example.org/zoo"),
        ("ftp://user:pw@example.org:21/zoo, then", "ftp://***@example.org:21/zoo, then"),
        ("https://example.org/zoo?sig=abc&se=2030", "https://example.org/zoo?sig=***&se=***"),
        ("pool: Max retries exceeded with url: /zoo?sig=abc (Caused by", "exceeded with url: /zoo?sig=*** (Caused by"),
        ("http://example.org:8000/a@b", "http://example.org:8000/a@b"),
        ("hf://datasets/owner/name@main/file", "hf://datasets/owner/name@main/file"),
        ("Why? Because a=b", "Why? Because a=b"),
    ],
)
def test_an_address_is_shown_without_its_secrets(text, expected):
    assert expected in shown(text)


def test_what_follows_a_question_mark_stays_last():
    assert join("https://example.org/zoo/?sig=a/b", "n", "card.json") == "https://example.org/zoo/n/card.json?sig=a/b"
    assert join("/folder/what?", "index.json") == "/folder/what?/index.json"


def test_plain_http_is_what_others_on_the_way_can_read():
    assert is_plain_http("http://example.org/zoo")
    assert not any(map(is_plain_http, ("https://example.org", "http://127.0.0.1:80/", "http://localhost", "s3://b")))


SECRET = "hunter2"


@pytest.mark.parametrize("status", [401, 404, 500, "reset"])
def test_no_message_traceback_or_file_holds_a_password_or_signature(zoo_server, tmp_path, status):
    zoo_server.files["/file"] = DATA
    zoo_server.manners = [status] * 20
    for url in (
        f"{zoo_server.url}/file?sig={SECRET}".replace("http://", f"http://user:{SECRET}@"),
        f"http://user:{SECRET}@127.0.0.1:9/file?sig={SECRET}",
        f"nosuch://user:{SECRET}@host/file",
    ):
        with pytest.raises((DownloadError, FileNotFoundError)) as caught:
            fetch(url, DATA, tmp_path, HASTY)
        assert SECRET not in "".join(traceback.format_exception(caught.value))
    zoo_server.manners = ["truncate"] * 2 + [403]
    with pytest.raises(DownloadError):
        fetch(f"{zoo_server.url}/file?sig={SECRET}", DATA, tmp_path, HASTY)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left  # the part that came, and a note on it
    assert not any(SECRET.encode() in path.read_bytes() or SECRET in path.name for path in left)


def test_a_login_in_the_address_and_one_of_netrc_are_sent(zoo_server, url, tmp_path, monkeypatch):
    fetch_small(url.replace("http://", "http://user:pw@"), 10**6)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login other password word\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fetch_small(url, 10**6)
    sent = [headers["Authorization"] for headers in zoo_server.headers]
    assert sent == ["Basic dXNlcjpwdw==", "Basic b3RoZXI6d29yZA=="]


def test_a_token_goes_to_its_host_alone_and_never_unencrypted(zoo_server, url, monkeypatch):
    monkeypatch.setenv("ICNN_ZOO_TOKENS", f"127.0.0.1={SECRET}, example.org=other")
    fetch_small(url, 10**6)
    assert zoo_server.headers[-1]["Authorization"] == f"Bearer {SECRET}"
    zoo_server.manners, zoo_server.target = ["elsewhere"], url.replace("127.0.0.1", "localhost")
    fetch_small(url, 10**6)
    assert "Authorization" not in zoo_server.headers[-1]  # another host
    assert token_for("https://example.org/zoo") == "other"
    assert token_for("https://sub.example.org/zoo") is None
    with pytest.raises(ValueError, match=r"sent over https only; got http://example\.org/zoo"):
        token_for("http://example.org/zoo")
    monkeypatch.setenv("ICNN_ZOO_TOKENS", SECRET)
    with pytest.raises(ValueError, match="must be host=token") as caught:
        fetch_small(url, 10**6)
    assert SECRET not in str(caught.value)


def test_a_file_whose_size_nobody_says_is_resumed_and_verified_by_md5(zoo_server, url, tmp_path):
    import hashlib

    promise = Promise(hashlib.md5(DATA).hexdigest(), algorithm="md5")
    zoo_server.manners = ["truncate"]
    download(url, tmp_path / "archive.tar", promise, progress=False, patience=HASTY)
    assert (tmp_path / "archive.tar").read_bytes() == DATA
    assert [status for _, _, status in zoo_server.requests] == [200, 206]
    download(url, tmp_path / "archive.tar", promise, progress=False)  # it is there
    assert len(zoo_server.requests) == 2
    zoo_server.files["/file"] = DATA[::-1]
    with pytest.raises(ValueError, match=r"expected md5 [0-9a-f]{32}; got 50000 bytes with md5"):
        download(url, tmp_path / "other.tar", promise, progress=False)
    assert files(tmp_path) == {"archive.tar"}
    assert sha256(DATA) != sha256(DATA[::-1])

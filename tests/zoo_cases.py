"""What the zoo's tests share: a card's missing words, files with a known hash, and a web server with bad manners."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from loopback import Loopback

from icnn_zoo.io import downloads
from icnn_zoo.io.downloads import Promise
from icnn_zoo.io.transports import Patience

HASTY = Patience(first_wait=0.01, longest_wait=0.02, connect=2.0, read=0.5)

NAME = "test_resnet.shapes"
ABOUT: dict[str, Any] = {
    "description": "A network of the tests, not trained.",
    "licence": "Apache-2.0",
    "dataset": {"name": "Shapes", "split": "train", "licence": "CC0-1.0", "attribution": "procedural"},
    "metrics": [{"name": "val/mIoU", "protocol": "4 scenes of 65 px, whole images"}],
}


def content(size: int = 300_000) -> bytes:
    return bytes(place * place % 251 for place in range(size))


def fetch(url: str, data: bytes, cache: Path, patience: Patience = HASTY) -> bytes:
    promise = Promise(sha256(data), len(data))
    return downloads.fetch(url, promise, cache, progress=False, patience=patience)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files(folder: Path) -> set[str]:
    """What is left in a folder, but for locks."""
    return {path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def fork(action: Callable[..., Any], *arguments: Any) -> Any:
    """A process that runs ``action``: forked, as a fresh one would import torch again.

    Only for what computes nothing: OpenMP's threads do not survive a fork, and who waits for them waits for ever.
    """
    process = multiprocessing.get_context("fork").Process(target=action, args=arguments)
    process.start()
    return process


def interpreter(code: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
    """A fresh interpreter that runs ``code`` on ``sys.argv[1:]``."""
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)])


def rewrite(folder: Path, change: Callable[[Any], Any]) -> None:
    """Changes the index of a registry."""
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def rewrite_card(folder: Path, **changes: Any) -> None:
    """Changes the card and, honestly, its hash in the index."""
    file = folder / NAME / "card.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    data = file.read_bytes()

    def change(index: Any) -> None:
        index["checkpoints"][0]["card"] = {"sha256": sha256(data), "size": len(data)}

    rewrite(folder, change)


class Server(Loopback):
    """Serves ``files`` by path. ``manners`` are used up one a request: each is what goes wrong with it.

    Manners: "truncate" (cut off after half), "reset" (the same, rudely), "stall" (silent after half), "corrupt" (one
    byte wrong), "long" (a byte too much), "short" (half, and says so), "change" (cut off, and another file
    from then on), "slow" (in pieces), "drip" (a byte now and then), "continue" (100 Continue for ever), "elsewhere"
    (sent to ``target``), a number (that status). ``ranges`` and ``tags``: whether it knows Range and ETag.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.manners: list[str | int] = []
        self.requests: list[tuple[str, str | None, int]] = []
        """Path, Range and status of every request."""
        self.headers: list[dict[str, str]] = []
        """What every request brought along."""
        self.ranges = self.tags = True
        self.target = ""

    def __enter__(self) -> Server:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.start(Handler)
        return self

    def serve(self, folder: Path) -> str:
        """Serves all files of a folder; returns their URL."""
        self.files = {f"/{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.url

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        manner = self.manners.pop(0) if self.manners else "good"
        data, span = self.files.get(handler.path.partition("?")[0]), handler.headers.get("Range")
        self.headers.append(dict(handler.headers))
        if manner == "continue":
            with contextlib.suppress(OSError):
                while True:
                    handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    time.sleep(0.001)
            return
        if manner == "elsewhere":
            handler.send_response(302)
            handler.send_header("Location", self.target)
            handler.end_headers()
            return
        status = manner if isinstance(manner, int) else 404 if data is None else 200
        if status != 200 or data is None:
            self.requests.append((handler.path, span, status))
            handler.send_error(status)
            return
        tag, start = f'"{sha256(data)[:8]}"', 0
        if span and self.ranges and handler.headers.get("If-Range") in (None, tag):
            status, start = 206, int(span.removeprefix("bytes=").rstrip("-"))
        self.requests.append((handler.path, span, status))
        body = data[start:]
        half = len(body) // 2
        body = {"corrupt": b"?" + body[1:], "long": body + b"+", "short": body[:half]}.get(str(manner), body)
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        if self.tags:
            handler.send_header("ETag", tag)
        if status == 206:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.end_headers()
        if manner == "change":
            self.files[handler.path] = data[::-1]
        if manner == "drip":
            with contextlib.suppress(OSError):
                for place in range(len(body)):
                    handler.wfile.write(body[place : place + 1])
                    time.sleep(0.02)
            return
        if manner == "slow":
            for place in range(0, len(body), 10_000):
                handler.wfile.write(body[place : place + 10_000])
                time.sleep(0.02)
            return
        cut = manner in ("truncate", "reset", "stall", "change")
        handler.wfile.write(body[:half] if cut else body)
        if manner == "stall":
            time.sleep(1.5)
        if manner == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.wfile.flush()
            time.sleep(0.1)  # else the reset would overtake the bytes
            handler.connection.close()

"""A hub of Hugging Face in small, on the loopback: repositories as lists of commits, LFS, tokens that write."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from loopback import Loopback

WRITER = "hf_writer"


class Hub(Loopback):
    """Answers what huggingface_hub asks for when it makes a repository, commits, lists and reads.

    Attributes:
        commits: Of each repository, oldest first: the files after it, by path.
        uploads: SHA-256 of all that was sent as LFS, in order.
        refuse: Paths (regular expression) that are answered with 503.
        messages: Of the commits.
    """

    def __init__(self) -> None:
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.messages: list[str] = []
        self.uploads: list[str] = []
        self.refuse = "^$"
        self._objects: dict[str, bytes] = {}

    def __enter__(self) -> Hub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, content, headers = hub.answer(
                    self.command, unquote(urlsplit(self.path).path), body, self.headers
                )
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *_: Any) -> None:
                pass

        self.start(Handler)
        return self

    def files(self, repository: str) -> dict[str, bytes]:
        """What the newest commit holds."""
        return self.commits[repository][-1]

    def answer(self, method: str, path: str, body: bytes, headers: Any) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers for a request."""
        if re.search(self.refuse, path):
            return 503, b"", {}
        writes = headers.get("Authorization") == f"Bearer {WRITER}"
        if method == "PUT":
            self._objects[hashlib.sha256(body).hexdigest()] = body
            self.uploads.append(path.rpartition("/")[2])
            return 200, b"", {}
        if path in ("/api/whoami-v2", "/api/repos/create", "/api/validate-yaml"):
            return self._of_all(path, body, writes)
        found = re.match(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?(?:/(.*))?$", path)
        assert found is not None, path
        repository, rest = found[1], found[2] or ""
        if repository not in self.commits:
            return _error(404, "RepoNotFound")
        if method == "POST" and rest.partition("/")[0] in ("preupload", "info", "commit") and not writes:
            return _error(403, "")
        return self._of_one(repository, rest, body, headers)

    def _of_all(self, path: str, body: bytes, writes: bool) -> tuple[int, bytes, dict[str, str]]:
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if not writes:
            return _error(401, "")
        if path == "/api/whoami-v2":
            return _json({"name": "user", "type": "user"})
        wanted = json.loads(body)
        repository = f"{wanted['organization']}/{wanted['name']}"
        self.commits.setdefault(repository, [{".gitattributes": b""}])
        return _json({"url": f"{self.url}/{repository}"})

    def _of_one(self, repository: str, rest: str, body: bytes, headers: Any) -> tuple[int, bytes, dict[str, str]]:
        what, _, more = rest.partition("/")
        history = self.commits[repository]
        if what == "info":  # LFS
            objects = json.loads(body)["objects"]
            for item in objects:
                if item["oid"] not in self._objects:
                    item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
            return _json({"transfer": "basic", "objects": objects})
        if what == "preupload":
            files = json.loads(body)["files"]
            for file in files:
                mode = "lfs" if file["path"].endswith("safetensors") else "regular"
                file |= {"uploadMode": mode, "shouldIgnore": False}
            return _json({"files": files})
        if what == "commit":
            return self._commit(history, body)
        revision, _, name = more.partition("/")
        if what in ("", "revision"):
            return _json({"id": repository, "sha": _sha(len(history) - 1), "siblings": []})
        files = history[-1] if revision in ("main", "") else history[int(revision, 16)]
        if what == "tree":
            inside = {path: data for path, data in files.items() if path.rpartition("/")[0] == name}
            folders = {
                path.removeprefix(f"{name}/" if name else "").split("/")[0] for path in files.keys() - inside.keys()
            }
            return _json([_described(path, data) for path, data in inside.items()] if inside or folders else [])
        if what == "paths-info":
            return _json([_described(path, files[path]) for path in json.loads(body)["paths"] if path in files])
        assert what == "resolve", rest
        if name not in files:
            return _error(404, "EntryNotFound")
        span = re.match(r"bytes=(\d+)-(\d+)", headers.get("Range", ""))
        if span:
            first, last = map(int, span.groups())
            return 206, files[name][first : last + 1], {}
        return 200, files[name], {}

    def _commit(self, history: list[dict[str, bytes]], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        files = dict(history[-1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit") not in (None, _sha(len(history) - 1)):
                    return _error(412, "")
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self._objects[value["oid"]]
        history.append(files)
        oid = _sha(len(history) - 1)
        return _json({"commitUrl": f"{self.url}/user/repo/commit/{oid}", "commitOid": oid})


def _sha(number: int) -> str:
    return f"{number:040x}"


def _described(path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    return found


def _json(content: Any) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(content).encode(), {"Content-Type": "application/json"}


def _error(status: int, code: str) -> tuple[int, bytes, dict[str, str]]:
    return status, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"}

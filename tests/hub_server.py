"""A stand-in for the Hugging Face hub on a free loopback port: what huggingface_hub asks for small files."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class Hub:
    """Repositories of the stand-in.

    Attributes:
        commits: repository to its commits, oldest first: (hash, files by name).
        branches: (repository, branch) to the commit; "main" is the newest.
        gated: repositories that are shown to those who were granted access alone.
        private: repository to what was asked for when it was created.
        asked: "METHOD path" of every request.
        files: "repository/file" of every download.
    """

    def __init__(self) -> None:
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.gated: set[str] = set()
        self.private: dict[str, bool | None] = {}
        self.asked: list[str] = []
        self.files: list[str] = []
        self.url = ""

    def add(self, repository: str, folder: Path) -> str:
        """Commit the files of a folder; returns the commit."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return self.commit(repository, files)

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        """Commit files, in place of all earlier ones; returns the commit."""
        history = self.commits.setdefault(repository, [])
        number = f"{repository} {len(history)}".encode()
        commit = hashlib.sha1(number).hexdigest()  # noqa: S324 - the form of a git hash
        history.append((commit, files))
        return commit

    def find(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a revision."""
        history = self.commits[repository]
        revision = history[-1][0] if revision == "main" else self.branches.get((repository, revision), revision)
        return next((one for one in history if one[0] == revision), None)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *words: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.hub.asked.append(f"{self.command} {path}")
        owner, name, what, *rest = path.removeprefix("/api/models").strip("/").split("/") + [""] * 3
        if what not in ("revision", "tree", "resolve"):  # the client also asks which programs are assistants
            return self._fail(404, "", "not part of this stand-in")
        repository, revision = f"{owner}/{name}", rest[0]
        if repository in self.hub.gated:
            return self._fail(403, "GatedRepo", "access is restricted")
        if repository not in self.hub.commits:
            return self._fail(401, "RepoNotFound", "Repository not found")
        found = self.hub.find(repository, revision)
        if found is None:
            return self._fail(404, "RevisionNotFound", "Invalid rev id")
        commit, files = found
        if what == "revision":
            return self._json({"id": repository, "sha": commit, "siblings": [{"rfilename": file} for file in files]})
        if what == "tree":
            rows = [
                {"type": "file", "path": file, "size": len(data), "oid": _oid(data)} for file, data in files.items()
            ]
            return self._json(rows)
        file = "/".join(rest[1:]).strip("/")
        if file not in files:
            return self._fail(404, "EntryNotFound", "Entry not found")
        if self.command == "GET":
            self.hub.files.append(f"{repository}/{file}")
        self._send(200, files[file], {"X-Repo-Commit": commit, "ETag": f'"{_oid(files[file])}"'})

    def do_POST(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.hub.asked.append(f"POST {path}")
        body = self._body()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer a-token":
            return self._fail(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            there = repository in self.hub.commits
            if not there:
                self.hub.commit(repository, {".gitattributes": b""})
            self.hub.private.setdefault(repository, asked.get("visibility", asked.get("private")) in ("private", True))
            return self._json({"url": f"{self.hub.url}/{repository}"}, 409 if there else 200)
        _, _, owner, name, what, _ = path.strip("/").split("/")
        repository = f"{owner}/{name}"
        if what == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._json(
                {"files": [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in names]}
            )
        rows = [json.loads(line) for line in body.splitlines()]
        added = {row["value"]["path"]: row["value"]["content"] for row in rows if row["key"] == "file"}
        gone = {row["value"]["path"] for row in rows if row["key"] == "deletedFile"}
        before = self.hub.commits[repository][-1][1]
        files = {name: data for name, data in before.items() if name not in gone}
        commit = self.hub.commit(repository, files | {n: base64.b64decode(text) for n, text in added.items()})
        self._json({"commitUrl": f"{self.hub.url}/{repository}/commit/{commit}", "commitOid": commit})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _fail(self, status: int, code: str, message: str) -> None:
        self._json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message} if code else {})

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324 - git's


@contextlib.contextmanager
def served() -> Iterator[Hub]:
    """Serve an empty hub until the end."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def reached(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Let huggingface_hub, here and in processes that are started, ask this hub and use a cache of its own."""
    from huggingface_hub import constants

    settings = {"ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {**settings, "HUGGINGFACE_CO_URL_TEMPLATE": template}.items():
        monkeypatch.setattr(constants, name, value)
    for name, text in {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_TOKEN", "a-token")
    yield hub

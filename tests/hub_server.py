"""A Hugging Face hub on loopback: as much of its HTTP interface as downloads use, and its misfortunes.

Repositories live in memory. Large files (LFS) are answered with a redirect to a second port, as the real hub
sends one to its storage, so that a token that leaves for another host is seen.

    with HubServer() as hub:
        commit = hub.add("tester/tiny", {"config.json": b"{}", "model.safetensors": b"..."})
        environ = {**os.environ, **hub.environ(cache)}
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")
_CHUNK_BYTES = 64 * 1024
_API = re.compile(r"/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)/(revision|tree)/([^/?]+)")
_FILE = re.compile(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True)
class Request:
    """What was asked for. `file`: path in the repository; None for the interface itself."""

    method: str
    path: str
    file: str | None
    range: str | None
    authorization: str | None
    storage: bool
    """Whether the second port was asked, where contents are."""


@dataclass
class Repository:
    """The commits of one model or dataset, oldest first, and who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    access: Literal["public", "gated", "private"] = "public"

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) of a branch or commit."""
        commit = list(self.commits)[-1] if revision == "main" else revision
        return (commit, self.commits[commit]) if commit in self.commits else None


class HubServer:
    """Serves until the end of its `with` block. Attributes may be changed while it runs.

    token: opens gated and private repositories.
    cut_after: path -> bytes after which the connection of the next transfer of that file is cut.
    bytes_per_s: speed of each transfer of a large file; None as fast as it goes.
    status: answer every request with this.
    refusals: path -> how many transfers of that file are answered with "service unavailable" first.
    ranges: whether a part of a file is sent where one is asked for.
    """

    def __init__(self, token: str = "hf_right") -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.cut_after: dict[str, int] = {}
        self.bytes_per_s: float | None = None
        self.status: int | None = None
        self.refusals: dict[str, int] = {}
        self.ranges = True
        self._servers = [self._server(storage) for storage in (False, True)]

    def _server(self, storage: bool) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "storage": storage})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        return server

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def url(self, storage: bool = False) -> str:
        return f"http://127.0.0.1:{self._servers[storage].server_port}"

    def environ(self, home: Path) -> dict[str, str]:
        """Variables of a process that is to use this hub, and keep its cache in `home`."""
        return {"HF_ENDPOINT": self.url(), "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}

    def add(
        self,
        name: str,
        files: Mapping[str, bytes],
        access: Literal["public", "gated", "private"] = "public",
    ) -> str:
        """Commit `files`, as all that the repository holds, to its main branch; returns the commit.

        A dataset's name begins with `datasets/`.
        """
        repository = self.repositories.setdefault(name, Repository())
        repository.access = access
        digest = hashlib.sha1(f"{name} {len(repository.commits)}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + hashlib.sha1(content).digest())
        repository.commits[digest.hexdigest()] = dict(files)
        return digest.hexdigest()

    def add_folder(self, name: str, folder: Path, **options: Any) -> str:
        """Commit the files of a model's folder."""
        files = {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        return self.add(name, files, **options)

    def transfers(self, file: str) -> list[Request]:
        """The requests for the content of a file (not those for its headers)."""
        return [
            request
            for request in self.requests
            if request.method == "GET"
            and request.file == file
            and (request.storage or not file.endswith(LFS_SUFFIXES))
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    storage: bool

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        file = _FILE.fullmatch(path)
        self.hub.requests.append(
            Request(
                self.command,
                path,
                file[3] if file else None,
                self.headers["Range"],
                self.headers["Authorization"],
                self.storage,
            )
        )
        api = _API.fullmatch(path)
        if self.hub.status is not None:
            self._send(self.hub.status, b"", {})
        elif file:
            self._file(*file.groups())
        elif api:
            self._api(*api.groups())
        else:
            self._error(404, "EntryNotFound")

    def _find(self, name: str, revision: str, content: bool) -> tuple[str, dict[str, bytes]] | None:
        """The commit and its files; answers with an error itself where they are not to be had."""
        repository = self.hub.repositories.get(name)
        known = self.storage or self.headers["Authorization"] == f"Bearer {self.hub.token}"
        if repository is None or (repository.access == "private" and not known):
            self._error(401, "RepoNotFound")
        elif repository.access == "gated" and content and not known:
            self._error(403 if self.headers["Authorization"] else 401, "GatedRepo")
        elif repository.files(revision) is None:
            self._error(404, "RevisionNotFound")
        else:
            return repository.files(revision)
        return None

    def _api(self, name: str, kind: str, revision: str) -> None:
        found = self._find(name, revision, content=False)
        if found is None:
            return
        commit, files = found
        if kind == "revision":
            siblings = [{"rfilename": path} for path in files]
            name = name.removeprefix("datasets/")
            answer: Any = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}
        else:
            answer = [_entry(path, content) for path, content in files.items()]
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, path: str) -> None:
        found = self._find(name, revision, content=True)
        if found is None:
            return
        commit, files = found
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path not in files:
            self._error(404, "EntryNotFound", headers)
            return
        content, large = files[path], path.endswith(LFS_SUFFIXES)
        if large and not self.storage:
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha256(content)}"'}
            self._send(302, b"", {**headers, **linked, "Location": self.hub.url(True) + self.path})
            return
        if self.command == "GET" and self.hub.refusals.get(path, 0) > 0:
            self.hub.refusals[path] -= 1
            self._send(503, b"", {})
            return
        headers["ETag"] = f'"{sha256(content) if large else _git_sha1(content)}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if asked is None or not self.hub.ranges:
            self._send(200, content, headers, path)
            return
        first, last = int(asked[1]), int(asked[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], headers, path)

    def _error(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, b"", {**(headers or {}), "X-Error-Code": code, "X-Error-Message": f"{code} here"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], path: str | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cut_after.pop(path, None) if path is not None else None
        for start in range(0, len(body), _CHUNK_BYTES):
            chunk = body[start : start + _CHUNK_BYTES]
            if cut is not None and start + len(chunk) > cut:
                self.close_connection = True
                return
            try:
                self.wfile.write(chunk)
            except OSError:  # the other side is gone
                self.close_connection = True
                return
            if self.hub.bytes_per_s is not None and self.storage:
                time.sleep(len(chunk) / self.hub.bytes_per_s)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_sha1(content)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

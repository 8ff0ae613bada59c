"""A small Hub on 127.0.0.1: its download routes, with faults to order and a record of the files it sent."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

LFS = (".safetensors", ".parquet")
ROUTE = re.compile(
    r"/api/(?P<kind>model|dataset)s/(?P<listed>[^/]+/[^/]+)(/revision/(?P<listed_revision>\w+))?"
    r"|/(?P<is_dataset>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>\w+)/(?P<name>.+)"
    r"|/cdn/(?P<sha256>\w+)/(?P<cdn_name>.+)"
)


@dataclass
class FakeRepo:
    revision: str
    files: dict[str, bytes]
    is_gated: bool
    claimed_sizes: dict[str, int]


@dataclass(frozen=True)
class Answer:
    """status, and how many bytes of a file were sent, from which on."""

    name: str
    status: int
    start: int
    num_bytes: int


@dataclass
class FakeHub:
    """Faults: `cuts` the bytes that the next connections for a file carry before they break (then whole again),
    `damages` how many of a file's next answers arrive with their first byte changed, `busy` how many of its next
    answers are 503; `token` what must be shown, if anything; `ignores_ranges` as some proxies do."""

    url: str = ""
    repos: dict[tuple[str, str], FakeRepo] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    damages: dict[str, int] = field(default_factory=dict)
    busy: dict[str, int] = field(default_factory=dict)
    token: str | None = None
    ignores_ranges: bool = False
    answers: list[Answer] = field(default_factory=list)

    def add(
        self,
        repo: str,
        files: Mapping[str, bytes],
        *,
        kind: str = "model",
        is_gated: bool = False,
        claimed_sizes: Mapping[str, int] | None = None,
    ) -> str:
        """Publish a repository; returns its one revision, 40 hex digits."""
        revision = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repos[kind, repo] = FakeRepo(revision, dict(files), is_gated, dict(claimed_sizes or {}))
        return revision

    def num_bytes_sent(self, name: str) -> int:
        return sum(answer.num_bytes for answer in self.answers if answer.name == name)


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        route = ROUTE.fullmatch(unquote(urlsplit(self.path).path))
        if route is None:
            return self.refuse(404)
        if route["sha256"]:  # where large files really lie; it knows no repositories
            contents = [content for repo in self.hub.repos.values() for content in repo.files.values()]
            found = {hashlib.sha256(content).hexdigest(): content for content in contents}
            return self.send_file(route["cdn_name"], found[route["sha256"]])
        shown = self.headers.get("authorization")
        if self.hub.token is not None and shown is not None and shown != f"Bearer {self.hub.token}":
            return self.refuse(401, message="Invalid credentials in Authorization header")
        kind = route["kind"] or ("dataset" if route["is_dataset"] else "model")
        repo = self.hub.repos.get((kind, route["listed"] or route["repo"]))
        if repo is None:
            return self.refuse(404 if shown else 401, "RepoNotFound")
        if repo.revision != (route["listed_revision"] or route["revision"] or repo.revision):
            return self.refuse(404, "RevisionNotFound")
        if route["listed"]:
            return self.send_listing(kind, route["listed"], repo)
        name = route["name"]
        if repo.is_gated:
            return self.refuse(403 if shown else 401, "GatedRepo")
        if name not in repo.files:
            return self.refuse(404, "EntryNotFound")
        if name.endswith(LFS):
            self.send_response(302)
            self.send_header("Location", f"/cdn/{hashlib.sha256(repo.files[name]).hexdigest()}/{name}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        return self.send_file(name, repo.files[name])

    def send_listing(self, kind: str, repo_id: str, repo: FakeRepo) -> None:
        siblings = []
        for name, content in repo.files.items():
            size = repo.claimed_sizes.get(name, len(content))
            entry = {"rfilename": name, "size": size, "blobId": hashlib.sha1(b"blob %d\0" % size + content).hexdigest()}
            if name.endswith(LFS):
                entry["lfs"] = {"size": size, "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
            siblings.append(entry)
        body = json.dumps({"id": repo_id, "sha": repo.revision, "tags": [], "siblings": siblings}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, name: str, content: bytes) -> None:
        if self.hub.busy.get(name, 0):
            self.hub.busy[name] -= 1
            self.refuse(503)
            return
        wanted = None if self.hub.ignores_ranges else re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = 0, len(content)
        if wanted:
            start, stop = int(wanted[1]), min(stop, int(wanted[2]) + 1 if wanted[2] else stop)
        if self.hub.damages.get(name, 0):
            self.hub.damages[name] -= 1
            content = bytes([content[0] ^ 1]) + content[1:]
        body = content[start:stop]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cuts = self.hub.cuts.get(name)
        body = body[: cuts.pop(0)] if cuts else body
        self.hub.answers.append(Answer(name, 206 if wanted else 200, start, len(body)))
        with suppress(ConnectionError):  # the client has heard enough
            self.wfile.write(body)


@contextmanager
def serve_fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A running Hub that HF_ENDPOINT points at, with an empty cache in `tmp_path` and nobody logged in.

    Most of huggingface_hub's settings are read when it is imported, so its constants are set, not the environment.
    """
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_TELEMETRY", True)  # else a list is asked of the real Hub
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""datasets/fetch.py, loaded by path since its folder is no package, and a real server to download from."""

from __future__ import annotations

import importlib.util
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "datasets"


@pytest.fixture(scope="session")
def fetch() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("moecore_datasets_fetch", FOLDER / "fetch.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))  # as for a script: fetch.py imports its neighbours
    spec.loader.exec_module(module)
    sys.path.remove(str(FOLDER))
    return module


@dataclass
class Resource:
    """A file on the server and how the server behaves."""

    content: bytes
    ranges: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    drops: list[int] = field(default_factory=list)
    """Bytes after which the connection breaks, for one request after the other; then it holds."""
    stall: int | None = None
    """Bytes after which nothing more comes until the server is closed."""
    announce: bool = True
    """Send Content-Length."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        resource = self.server.files.get(self.path)
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        if resource is None or resource.status != 200:
            self.send_error(resource.status if resource else 404)
            return
        content, start = resource.content, 0
        current = self.headers.get("If-Range") in (None, resource.headers.get("ETag"))
        if asked and resource.ranges and current:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        for name, value in resource.headers.items():
            self.send_header(name, value)
        if resource.announce:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if resource.stall is not None:
            self.wfile.write(body[: resource.stall])
            self.server.closing.wait(30)
        else:
            self.wfile.write(body[: resource.drops.pop(0)] if resource.drops else body)

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, Resource] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.closing = threading.Event()

    def add(self, path: str, content: bytes, **behaviour: Any) -> str:
        """Serve a file; returns its URL."""
        self.files[f"/{path}"] = Resource(content, **behaviour)
        return self.url(path)

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may leave early
            super().handle_error(request, client_address)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


@dataclass
class Result:
    code: int
    out: str
    err: str


@dataclass
class Tool:
    """The command line, with a catalogue and a root of the test's own."""

    main: Callable[[list[str]], int]
    folder: Path
    capsys: pytest.CaptureFixture[str]
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.folder / "data"

    @property
    def catalog(self) -> Path:
        return self.folder / "catalog.yaml"

    def add(self, name: str, *urls: str, **fields: Any) -> None:
        self.entries[name] = {
            "app": "vision",
            "title": f"Data called {name}",
            "urls": list(urls),
            "file": f"{name}.bin",
            "licence": "CC0",
            "citation": "Nobody, 2020",
            "homepage": "https://example.org",
            **fields,
        }
        self.catalog.write_text(yaml.safe_dump(self.entries))

    def __call__(self, *names: str) -> Result:
        code = self.main([*names, "--root", str(self.root), "--catalog", str(self.catalog)])
        captured = self.capsys.readouterr()
        return Result(code, captured.out, captured.err)

    def files(self) -> dict[str, bytes]:
        """What is under the root, by relative path."""
        found = sorted(path for path in self.root.rglob("*") if path.is_file())
        return {path.relative_to(self.root).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def tool(
    fetch: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Tool:
    monkeypatch.setattr(sys.modules["transfer"], "PAUSE", 0.0)
    return Tool(fetch.main, tmp_path, capsys)

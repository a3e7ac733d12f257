"""Byte ranges from a folder, from memory:// and from a real server."""

from __future__ import annotations

import http.server
import multiprocessing
import os
import pickle
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest

from sana.data.storage import CachedFolder, RemoteFolder, open_storage, scheme

DATA = np.random.default_rng(0).integers(0, 256, 100_003, dtype=np.uint8).tobytes()


class Ranges(http.server.SimpleHTTPRequestHandler):
    """The standard library's server, with byte ranges if `ranged`."""

    ranged = True

    def do_GET(self) -> None:
        found = re.match(r"bytes=(\d+)-(\d+)?$", self.headers.get("Range") or "")
        path = Path(self.translate_path(self.path))
        if not (self.ranged and found and path.is_file()):
            return super().do_GET()
        data = path.read_bytes()
        first, last = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=[True, False], ids=["ranges", "no-ranges"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.tar").write_bytes(DATA)
    (tmp_path / "web" / "b.tar").write_bytes(DATA[::-1])
    handler = type("Handler", (Ranges,), {"ranged": request.param})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path / "web"))) as web:
        thread = threading.Thread(target=web.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{web.server_address[1]}"
        web.shutdown()


def check(storage: object, names: list[str]) -> None:
    for offset, size in ((0, 10), (5, 1), (99_999, 4), (500, 70_000), (7, 0)):
        assert storage.read("a.tar", offset, size) == DATA[offset : offset + size]  # type: ignore[attr-defined]
    assert storage.read("a.tar") == DATA  # type: ignore[attr-defined]
    assert storage.stat("a.tar").size == len(DATA)  # type: ignore[attr-defined]
    assert storage.names() == names  # type: ignore[attr-defined]
    with pytest.raises(FileNotFoundError):
        storage.read("nothing.tar", 0, 5)  # type: ignore[attr-defined]


def in_a_child(storage: object, queue: object) -> None:
    queue.put(storage.read("a.tar", 11, 13))  # type: ignore[attr-defined]


def from_processes(storage: object) -> None:
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        child = context.Process(target=in_a_child, args=(storage, queue))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert queue.get() == DATA[11:24]
    assert storage.read("a.tar", 1, 2) == DATA[1:3]  # type: ignore[attr-defined]


def test_local(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    (tmp_path / "sub").mkdir()
    storage = open_storage(tmp_path)
    check(storage, ["a.tar"])
    check(open_storage(f"file://{tmp_path}"), ["a.tar"])
    assert storage.read("a.tar", 100_000, 50) == DATA[100_000:]
    assert storage.read(str(tmp_path / "a.tar"), 3, 3) == DATA[3:6]
    from_processes(storage)
    same = pickle.loads(pickle.dumps(storage))  # noqa: S301
    assert same.read("a.tar", 3, 3) == DATA[3:6]


def test_local_files_stay_few(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{i}").write_bytes(b"%d" % i)
    storage = open_storage(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for i in (*range(300), *range(300)):
        assert storage.read(str(i)) == b"%d" % i
    assert len(os.listdir("/proc/self/fd")) - before <= 130


def test_memory() -> None:
    fsspec.filesystem("memory").pipe_file("/box/a.tar", DATA)
    check(open_storage("memory://box"), ["a.tar"])


def test_server(server: str) -> None:
    storage = open_storage(server)
    check(storage, ["a.tar", "b.tar"])
    assert storage.read(f"{server}/b.tar", 0, 5) == DATA[::-1][:5]
    from_processes(storage)


def test_cache_copies_once_and_keeps_within_its_limit(server: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    storage = open_storage(server, cache, 150_000)
    assert isinstance(storage, CachedFolder)
    assert storage.read("a.tar", 5, 6) == DATA[5:11]
    (tmp_path / "web" / "a.tar").rename(tmp_path / "gone")
    assert storage.read("a.tar", 90_000, 60) == DATA[90_000:90_060]  # no longer from the server
    assert open_storage(server, cache, 150_000).read("a.tar", 0, 4) == DATA[:4]
    assert storage.read("b.tar", 0, 6) == DATA[::-1][:6]
    kept = [path for path in cache.iterdir() if not path.name.startswith(".")]
    assert [path.name.endswith("b.tar") for path in kept] == [True]
    (tmp_path / "gone").rename(tmp_path / "web" / "a.tar")
    check(open_storage(server, tmp_path / "other"), ["a.tar", "b.tar"])
    from_processes(open_storage(server, tmp_path / "third"))


def test_a_dead_server_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(OSError):
        RemoteFolder("http://127.0.0.1:9").read("a.tar", 0, 5)


@pytest.mark.parametrize(
    "url", ["pipe:cat /etc/passwd", "pipe://x", "PIPE:rm x", "ssh://host/x", "github://x", "exec:ls"]
)
def test_no_other_schemes(url: str) -> None:
    with pytest.raises(ValueError, match="unsafe url"):
        open_storage(url)


def test_scheme() -> None:
    assert [scheme(url) for url in ("s3://b/k", "a/b", "/a:b/c", "hf://datasets/x", "C")] == ["s3", "", "", "hf", ""]

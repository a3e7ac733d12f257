"""``hf://``: huggingface_hub against a small server that speaks the hub's protocol; only what is needed is fetched."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.hub import choose, fetch, parse
from sana.run.recipe import PROJECT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIPELINE = [
    "README.md", "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
    "text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json", "text_encoder/model.bf16-00001-of-00001.safetensors",
    "text_encoder/model.safetensors.index.bf16.json", "tokenizer/tokenizer.json", "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.bin", "vae/config.json", "vae/diffusion_pytorch_model.bf16.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors", "assets/picture.png",
]  # fmt: skip
REPOSITORIES = {  # a file's content is its name
    "org/pipe": PIPELINE,
    "org/Sana_1600M_2Kpx_BF16": ["checkpoints/Sana_1600M_2Kpx_BF16.pth", "checkpoints/old.pth", "a.png"],
    "org/ours": ["model.safetensors", "README.md", "samples/a.png"],
    "org/many": ["a.pth", "b.pth"],
    "org/empty": ["README.md"],
}


def digest(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub: the list of a repository's files, their properties, and the files."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        if name == "org/gated":
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        elif name not in REPOSITORIES:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        elif api:
            files = REPOSITORIES[name]
            tree = [{"type": "file", "path": f, "size": len(f), "oid": digest(f)} for f in files]
            info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
            content = json.dumps(tree if "tree" in parts else info).encode()
            self._send(200, content, {"Content-Type": "application/json"}, body)
        else:
            file = "/".join(parts[4:])
            if file not in REPOSITORIES[name]:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
                return
            if body:
                self.asked.append(file)
            self._send(200, file.encode(), {"ETag": f'"{digest(file)}"', "X-Repo-Commit": COMMIT}, body)

    def _send(self, code: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """Address of a hub, and the files that were fetched from it."""
    handler = type("Handler", (Hub,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


PROGRAM = """
import json, sys
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.hub import fetch
found = []
for uri in sys.argv[1:]:
    try:
        found.append(str(fetch(uri)))
    except CheckpointError as error:
        found.append("refused: " + str(error))
print(json.dumps(found))
"""


def run(folder: Path, address: str, *uris: str, **environment: str) -> list[str]:
    """What `fetch` gives in a process of its own: the hub's client reads its environment when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *uris],
        cwd=folder,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()},
            "PYTHONPATH": str(PROJECT),
            "HF_HOME": str(folder / "home"),
            "HF_ENDPOINT": address,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_only_what_is_needed_is_fetched_once_and_then_found_offline(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    address, asked = hub
    uris = ["hf://org/pipe", "hf://org/Sana_1600M_2Kpx_BF16", "hf://org/ours"]
    pipe, native, ours = (Path(p) for p in run(tmp_path, address, *uris))
    wanted = {
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "tokenizer/tokenizer.json",
        "text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json", "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.bf16.safetensors", "checkpoints/Sana_1600M_2Kpx_BF16.pth", "model.safetensors",
    }  # fmt: skip
    assert set(asked) == wanted
    assert {p.relative_to(pipe).as_posix() for p in pipe.rglob("*") if p.is_file()} == {
        f for f in wanted if f in PIPELINE
    }
    assert native.read_text() == "checkpoints/Sana_1600M_2Kpx_BF16.pth"
    assert ours.read_text() == "model.safetensors"

    asked.clear()
    again = run(tmp_path, address, *uris, HF_HUB_OFFLINE="1")
    assert again == [str(pipe), str(native), str(ours)]
    assert run(tmp_path, "http://127.0.0.1:9", *uris) == again, "the hub cannot be reached: the cache will do"
    assert not asked


def test_refusals_say_what_to_do(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    address, _ = hub
    gated, none, file, many, empty, named = run(
        tmp_path, address, "hf://org/gated", "hf://org/none", "hf://org/pipe/none.pth", "hf://org/many",
        "hf://org/empty", "hf://org/many/b.pth",
    )  # fmt: skip
    assert "open" in gated
    assert f"{address}/org/gated and accept the terms" in gated
    assert "hf auth login" in gated
    assert "no such repository" in none
    assert "has no file none.pth" in file
    assert "hf://org/many/a.pth, hf://org/many/b.pth" in many
    assert "has no diffusers folder" in empty
    assert Path(named).read_text() == "b.pth"
    (offline,) = run(tmp_path, address, "hf://org/new", HF_HUB_OFFLINE="1")
    assert "is not on this machine and HF_HUB_OFFLINE is set" in offline
    assert "hf download org/new --local-dir models/new" in offline
    (away,) = run(tmp_path, "http://127.0.0.1:9", "hf://org/new")
    assert "is not on this machine and the hub cannot be reached" in away


def test_local_folders_go_first(tmp_path: Path) -> None:
    """No server: a request would fail."""
    for place, file in (
        ("pipe", "model_index.json"),
        ("org/native", "checkpoints/a.pth"),
        ("ours", "model.safetensors"),
    ):
        (tmp_path / place / file).parent.mkdir(parents=True)
        (tmp_path / place / file).write_text("x")
    assert fetch("hf://org/pipe", [tmp_path]) == tmp_path / "pipe"
    assert fetch("hf://org/native", [tmp_path]) == tmp_path / "org/native/checkpoints/a.pth"
    assert fetch("hf://org/ours", [tmp_path / "no", tmp_path]) == tmp_path / "ours/model.safetensors"
    assert fetch("hf://org/pipe/model_index.json", [tmp_path]) == tmp_path / "pipe/model_index.json"


def test_addresses() -> None:
    assert parse("hf://org/name") == ("org/name", None)
    assert parse("hf://org/name/checkpoints/a.pth") == ("org/name", "checkpoints/a.pth")
    for wrong in ("hf://name", "hf://", "hf://org/../../etc", "org/name", "hf://org//a"):
        with pytest.raises(CheckpointError, match="write hf://organisation/repository"):
            parse(wrong)


def test_a_precision_is_chosen_for_every_part() -> None:
    unnamed = ("text_encoder/model-", "text_encoder/model.safetensors.index.json")
    _, needed = choose([f for f in PIPELINE if not f.startswith(unnamed)], "a/b")
    assert "text_encoder/model.bf16-00001-of-00001.safetensors" in needed
    assert "text_encoder/model.safetensors.index.bf16.json" in needed
    assert "transformer/diffusion_pytorch_model.fp16.safetensors" not in needed
    files = [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
    ]
    assert choose(files, "a/autoencoder") == (None, ["config.json", "diffusion_pytorch_model.safetensors"])

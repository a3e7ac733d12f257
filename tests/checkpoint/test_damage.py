"""Files that are damaged or hostile: one clear line each, nothing run, nothing half written."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from weights import equal, native_state, script

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.header import read_header
from sana.checkpoint.pickled import read_pickle
from sana.checkpoint.record import Record
from sana.checkpoint.source import open_source, read_folder
from sana.checkpoint.tensors import check_finite, read_safetensors
from sana.checkpoint.write import in_place, write_consolidated, write_folder, write_safetensors


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("archive", [True, False])
def test_a_malicious_pickle_is_not_run(tmp_path: Path, archive: bool) -> None:
    target, trace = tmp_path / "evil.pth", tmp_path / "ran"
    content = {"state_dict": {"x_embedder.proj.weight": torch.ones(2)}, "more": Hostile(trace)}
    if archive:
        torch.save(content, target)
    else:
        target.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        open_source(target)
    message = str(caught.value)
    assert str(target) in message
    assert "\n" not in message
    assert "posix.system" in message or "Python objects" in message
    assert not trace.exists()


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99, -1])
def test_a_truncated_pickle(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "cut.pth"
    torch.save({"state_dict": native_state("sana")}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(
        CheckpointError, match=r"cut\.pth: is (truncated or damaged|no file of plain tensors)"
    ) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


def test_a_pickle_of_something_else(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        read_pickle(tmp_path / "list.pth")
    torch.save({"state_dict": {"blocks.0.x": 3}}, tmp_path / "number.pth")
    with pytest.raises(CheckpointError, match=r"state_dict\['blocks.0.x'\] is no tensor"):
        open_source(tmp_path / "number.pth")
    torch.save({"weights": {}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"has no 'state_dict' \(it has weights\)"):
        open_source(tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        open_source(tmp_path / "none.pth")


def raw(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no safetensors file"),
        (b"PK\x03\x04 a zip archive", "is no safetensors file"),
        (raw({}, length=10**15), "its header claims 1,000,000,000,000,000 bytes, but the file has"),
        (raw(b"{not json"), "its header is no JSON"),
        (raw(b"[1]"), "is no JSON object"),
        (raw(b"[" * 50_000), "its header is no JSON"),
        (raw({"a": entry([2], 0, 8)}, b"1234"), "truncated or damaged"),
        (raw({"a": entry([2], 0, 8)}, b"123456789"), "but the file has"),
        (raw({"a": entry([2**40], 0, 8)}, b"12345678"), "does not take 8 bytes"),
        (raw({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"0" * 12), "begins at byte 4, not 8"),
        (raw({"a": entry([2], 0, 8), "b": entry([2], 16, 24)}, b"0" * 24), "begins at byte 16, not 8"),
        (raw({"a": entry([2], 8, 0)}, b"0" * 8), "header lies"),
        (raw({"a": entry([-2], 0, 8)}, b"0" * 8), "does not describe 'a'"),
        (raw({"a": entry([2], 0, 8, "F33")}, b"0" * 8), "has the type 'F33'"),
        (raw({"a": 3}, b""), "does not describe 'a'"),
        (raw({"__metadata__": {"recipe": 3}}), "must map text to text"),
    ],
)
def test_safetensors_headers_that_lie(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_headers_agree_with_the_reference_library(tmp_path: Path) -> None:
    """Both ways: its files are read here, ours there; odd shapes, empty tensors, all types."""
    state = {
        "half": torch.randn(3, 5).half(), "brain": torch.randn(7).bfloat16(), "double": torch.randn(1, 2, 3).double(),
        "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "bytes": torch.arange(3, dtype=torch.uint8),
        "flags": torch.tensor([True, False]), "long": torch.tensor([-(2**40)]),
        "tiny": torch.ones(2).to(torch.float8_e4m3fn),
    }  # fmt: skip
    save_file(state, tmp_path / "theirs.safetensors", metadata={"a": "ü"})
    tensors, metadata = read_safetensors(tmp_path / "theirs.safetensors")
    assert metadata == {"a": "ü"}

    def bits(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for name, t in tensors.items()}

    assert equal(bits(dict(tensors)), bits(state))
    write_safetensors(tmp_path / "ours.safetensors", state, {"b": "c"})
    assert equal(bits(load_file(tmp_path / "ours.safetensors")), bits(state))
    assert read_header(tmp_path / "ours.safetensors").metadata == {"b": "c"}


def test_an_odd_header_length_is_read(tmp_path: Path) -> None:
    path, value = tmp_path / "odd.safetensors", torch.randn(3)
    text = json.dumps({"a": entry([3], 0, 12)}).encode()
    text += b" " * ((1 - len(text)) % 4)
    assert (8 + len(text)) % 4
    path.write_bytes(raw(text, value.numpy().tobytes()))
    assert torch.equal(read_safetensors(path)[0]["a"], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(dtype: torch.dtype, bad: float) -> None:
    value = torch.randn(5, 7).to(dtype)
    assert check_finite("w", value, "f") is value
    value[3, 2] = bad
    with pytest.raises(CheckpointError, match="f: w has 1 of 35 numbers that are not finite"):
        check_finite("w", value, "f")
    with pytest.raises(CheckpointError, match="w has 35 of 35"):
        check_finite("w", torch.full_like(value, bad), "f")


def test_a_file_full_of_nan_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = native_state("sana")
    state["blocks.1.attn.qkv.weight"].fill_(float("nan"))
    path = tmp_path / "nan.pth"
    torch.save({"state_dict": state}, path)
    (tmp_path / "nan.pth.json").write_text(json.dumps({"heads": 4, "size": 256, "flow_shift": 3.0, "position": False}))
    for layout, name in (("sana", "a.safetensors"), ("diffusers", "b"), ("native", "c.pth")):
        assert script("convert_checkpoint").main([str(path), str(tmp_path / name), "--to", layout]) == 2
        error = capsys.readouterr().err
        assert "not finite" in error
        assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nan.pth", "nan.pth.json"]


def test_sharded_folders(tmp_path: Path) -> None:
    state = {name: t for name, t in native_state("sana").items() if "block" in name}
    write_folder(tmp_path, "diffusion_pytorch_model", state, shard=100_000)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert equal(dict(read_folder(tmp_path)), state)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    assert content["metadata"]["total_size"] == sum(t.nbytes for t in state.values())

    first = next(iter(state))
    index.write_text(
        json.dumps({**content, "weight_map": {k: v for k, v in content["weight_map"].items() if k != first}})
    )
    with pytest.raises(CheckpointError, match=rf"does not name {first}"):
        read_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {first: "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="is no index"):
        read_folder(tmp_path)
    index.write_text(json.dumps(content))
    (tmp_path / files[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"{files[1]}: is named in .* but missing"):
        read_folder(tmp_path)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def folder() -> None:
        with in_place(tmp_path / "a") as temporary:
            temporary.mkdir()
            (temporary / "part").write_text("x")
            raise RuntimeError

    def file() -> None:
        with in_place(tmp_path / "b") as temporary:
            temporary.write_text("x")
            raise RuntimeError

    for write in (folder, file):
        with pytest.raises(RuntimeError):
            write()
    assert not list(tmp_path.iterdir())
    (tmp_path / "c").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"), in_place(tmp_path / "c"):
        pass
    assert (tmp_path / "c").read_text() == "mine"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float8_e4m3fn])
def test_checksums_are_those_of_the_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", {"a": torch.arange(35).view(5, 7).to(dtype), "ü.b": torch.ones(0, 3)}
    write_consolidated(path, tensors, Record(updates=3))
    header, data = read_header(path), path.read_bytes()
    digests = json.loads(header.metadata["xxh3_128"])
    for name, entry in header.entries.items():
        assert digests[name] == xxhash.xxh3_128(data[entry.begin : entry.end]).hexdigest()
    found, metadata = read_safetensors(path)
    assert "xxh3_128" not in metadata, "they are of this file only"
    assert all(torch.equal(found[name].float(), tensors[name].float()) for name in tensors)
    assert load_file(path).keys() == tensors.keys(), "others read the file"
    for byte in range(header.entries["a"].begin, header.entries["a"].end):
        path.write_bytes(data[:byte] + bytes([data[byte] ^ 0x10]) + data[byte + 1 :])
        with pytest.raises(CheckpointError, match=r"^\S*a\.safetensors: the checksum of a does not fit: .*again$"):
            read_safetensors(path)[0]["a"]
    write_safetensors(path, {"a": torch.ones(2)}, {"xxh3_128": json.dumps({"b": "00"})})
    with pytest.raises(CheckpointError, match="the checksums in its header are not those of its tensors"):
        read_safetensors(path)

"""Checkpoints of runs as folders: whole or refused by name, newest by what is inside, leftovers gone."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.run_folder import (
    MANIFEST,
    STATE,
    commit,
    list_checkpoints,
    newest_valid,
    place_of,
    read_manifest,
    remove,
    remove_leftovers,
    verify,
)
from sana.checkpoint.sharded import Staging, open_pieces, write_pieces


def write(parent: Path, step: int, value: float = 0.0) -> Path:
    """A small checkpoint of several parts, types and shapes."""
    generator = torch.Generator().manual_seed(step)
    state = {
        "model.weight": torch.randn(5, 3, generator=generator) + value,
        "model.half": torch.randn(7, generator=generator).bfloat16(),
        "ema.weight": torch.randn(5, 3, generator=generator),
        "optimizer.weight/step": torch.tensor(float(step)),
        "optimizer.weight/codes": torch.arange(11, dtype=torch.uint8),
    }
    place = place_of(parent, step)
    small = {STATE: json.dumps({"updates": {"network": step}}).encode()}
    write_pieces(place.with_name(f"{place.name}.abc.tmp"), place, step, Staging()(state), small)
    return place


def test_what_is_written_is_read(tmp_path: Path) -> None:
    place = write(tmp_path, 3)
    verify(place)
    stored = open_pieces(place, ("model", "optimizer"))
    assert set(stored.shapes) == {
        "model.weight", "model.half", "optimizer.weight/step", "optimizer.weight/codes"
    }  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    weight, half = torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator).bfloat16()
    tensors = stored.tensors()
    assert torch.equal(tensors["model.weight"], weight)
    assert torch.equal(tensors["model.half"], half)
    assert tensors["optimizer.weight/step"].shape == ()
    targets = {"model.weight": torch.empty(5, 3), "optimizer.weight/step": torch.tensor(0.0)}
    stored.load(targets)
    assert torch.equal(targets["model.weight"], weight)
    assert targets["optimizer.weight/step"] == 3


def test_two_hundred_flipped_bits_are_refused_by_name(tmp_path: Path) -> None:
    older, place = write(tmp_path, 5), write(tmp_path, 10)
    files = sorted(p for p in place.iterdir())
    sizes = [p.stat().st_size for p in files]
    draw = random.Random(0)
    for k in range(200):
        # Half of them anywhere by size, half in a file drawn evenly: small files are hit too.
        path = draw.choices(files, sizes)[0] if k % 2 else draw.choice(files)
        content = path.read_bytes()
        at, bit = draw.randrange(len(content)), draw.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        told: list[str] = []
        assert newest_valid(tmp_path, told.append) == older
        assert len(told) == 1
        assert str(path) in told[0]
        path.write_bytes(content)
    assert newest_valid(tmp_path, pytest.fail) == place


def test_missing_left_over_and_cut_files_are_refused_by_name(tmp_path: Path) -> None:
    place = write(tmp_path, 1)
    model = place / "model.00000.safetensors"
    content = model.read_bytes()
    model.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"model\.00000\.safetensors: has \d+ bytes, not"):
        verify(place)
    model.unlink()
    with pytest.raises(CheckpointError, match=r"model\.00000\.safetensors: is missing"):
        verify(place)
    verify(place, ("ema",))  # what is not read need not be there
    model.write_bytes(content)
    (place / "extra").write_bytes(b"")
    with pytest.raises(CheckpointError, match="extra: does not belong"):
        verify(place)
    (place / "extra").unlink()
    (place / MANIFEST).write_text("")
    with pytest.raises(CheckpointError, match=r"manifest\.json: missing or cut off"):
        verify(place)


def test_the_newest_goes_by_what_is_inside(tmp_path: Path) -> None:
    for step in (15, 5):
        write(tmp_path, step)
    os.replace(place_of(tmp_path, 15), tmp_path / "last.ckpt")  # written first, and under a name without number
    os.utime(tmp_path / "last.ckpt", (1, 1))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [15, 5]
    assert newest_valid(tmp_path, pytest.fail) == tmp_path / "last.ckpt"
    old = tmp_path / "step_00000020.ckpt"  # one file, as older versions wrote
    torch.save({"updates": {"network": 20}}, old)
    assert newest_valid(tmp_path, pytest.fail) == old
    content = old.read_bytes()
    old.write_bytes(content[: len(content) // 2])
    told: list[str] = []
    assert newest_valid(tmp_path, told.append) == tmp_path / "last.ckpt"
    assert str(old) in told[0]
    assert newest_valid(tmp_path / "nothing", pytest.fail) is None


def test_leftovers_go_and_a_checkpoint_is_replaced_in_one_step(tmp_path: Path) -> None:
    place = write(tmp_path, 5)
    half = tmp_path / "step_00000010.ckpt.xyz.tmp"
    half.mkdir()
    (half / "model.00000.safetensors").write_bytes(b"half")
    (tmp_path / "step_00000011.ckpt.tmp").write_bytes(b"of an older version")
    assert [at for _, at in list_checkpoints(tmp_path)] == [place]
    assert remove_leftovers(tmp_path) == 2
    assert list(tmp_path.iterdir()) == [place]
    write(tmp_path, 5, value=1.0)
    assert open_pieces(place, ("model",)).tensors()["model.weight"].mean() > 0.5
    remove(place)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_at_any_byte_leaves_the_one_before(tmp_path: Path) -> None:
    """Whatever prefix of the files of the second is there without the rename, the first is what is found."""
    first = write(tmp_path, 5)
    (tmp_path / "other").mkdir()
    whole = write(tmp_path / "other", 10)
    names = sorted(p.name for p in whole.iterdir())
    temporary = tmp_path / "step_00000010.ckpt.abc.tmp"
    draw = random.Random(1)
    for k in range(len(names) + 1):
        temporary.mkdir(exist_ok=True)
        for name in names[:k]:
            (temporary / name).write_bytes((whole / name).read_bytes())
        if k < len(names):
            content = (whole / names[k]).read_bytes()
            (temporary / names[k]).write_bytes(content[: draw.randrange(len(content))])
        assert newest_valid(tmp_path, pytest.fail) == first
    commit(temporary, place_of(tmp_path, 10))
    assert newest_valid(tmp_path, pytest.fail) == place_of(tmp_path, 10)
    assert read_manifest(place_of(tmp_path, 10)).step == 10


def test_a_disk_that_is_full_is_named_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from collections import namedtuple

    first = write(tmp_path, 5)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    with pytest.raises(CheckpointError, match=r"step_00000006\.ckpt: cannot be written: needs [\d,]+ bytes, 10 are"):
        write(tmp_path, 6)
    assert list(tmp_path.iterdir()) == [first]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        write(tmp_path / "file", 6)

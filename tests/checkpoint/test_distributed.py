"""Directories of torch.distributed.checkpoint, as FSDP writes them: every bit of what two processes saved, no code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from weights import equal, native_state, script, words

from sana.checkpoint.distributed import read_distributed
from sana.checkpoint.distributed_index import is_distributed
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.source import open_source
from sana.checkpoint.transformer import sana_from_native
from sana.run.error import ConfigError
from sana.run.saved import prepare


def ours() -> dict[str, torch.Tensor]:
    """Odd shapes besides those of a network: one row, more rows than fit evenly, no dimension, two bytes."""
    generator = torch.Generator().manual_seed(3)
    network = {f"network.{name}": value for name, value in sana_from_native(native_state("sana15", 3)).items()}
    return network | {
        "odd.row": torch.randn(1, 5, generator=generator),
        "odd.rows": torch.randn(7, 2, 3, generator=generator).bfloat16(),
        "odd.number": torch.tensor(2.5, dtype=torch.float64),
        "odd.empty": torch.zeros(0, 3),
    }


def shards(state: dict[str, torch.Tensor], mesh: Any) -> dict[str, Any]:
    return {n: distribute_tensor(t, mesh, [Shard(0)]) if t.ndim and len(t) else t for n, t in state.items()}


def worker(rank: int, folder: str) -> None:
    """Saves as FSDP2 does: shards of each rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    content: dict[str, Any] = {"state_dict": shards(ours(), init_device_mesh("cpu", (2,)))}
    content["optimizer_0"] = {"state": {"a": {"momentum": torch.ones(3)}}, "param_groups": [{"lr": 0.5}]}
    dcp.save(content, checkpoint_id=f"{folder}/plain.ckpt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    mp.spawn(worker, (str(folder),), nprocs=2)  # type: ignore[attr-defined]
    return folder


def test_every_tensor_of_two_processes_comes_back(saved: Path) -> None:
    found = read_distributed(saved / "plain.ckpt")
    weights = {n.removeprefix("state_dict."): t for n, t in found.items() if n.startswith("state_dict.")}
    assert equal(weights, ours())
    assert {n: (t.dtype, t.shape) for n, t in found.like.items()} == {n: (t.dtype, t.shape) for n, t in found.items()}
    assert len(list((saved / "plain.ckpt").glob("*.distcp"))) == 2
    assert torch.equal(found["optimizer_0.state.a.momentum"], torch.ones(3))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that another trainer wrote, under the original names, and a sidecar."""
    folder = tmp_path_factory.mktemp("foreign") / "pytorch_model_fsdp_0"
    dcp.save({"model": native_state("sana15", 4)}, checkpoint_id=folder, no_dist=True)
    (folder / "sana.json").write_text(json.dumps(words("sana15")))
    return folder


@pytest.fixture
def foreign(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(written, tmp_path / written.name))


def test_shards_of_another_trainer_are_recognised(foreign: Path, tmp_path: Path) -> None:
    assert is_distributed(foreign)
    assert equal(dict(open_source(foreign).tensors), sana_from_native(native_state("sana15", 4)))
    assert script("convert_checkpoint").main([str(foreign), str(tmp_path / "a.pth"), "--to", "native"]) == 0
    assert equal(torch.load(tmp_path / "a.pth", weights_only=True)["state_dict"], native_state("sana15", 4))
    composed = prepare("sample", [f"ckpt={foreign}", "prompt=x"])
    assert (composed.config.size, composed.config.timestep.shift) == (256, 3.0)
    (foreign / "sana.json").unlink()
    with pytest.raises(ConfigError, match="ckpt: "):
        prepare("sample", [f"ckpt={foreign}", "prompt=x"])


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        dict(read_distributed(folder))
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def test_code_in_the_index_is_not_run(foreign: Path, tmp_path: Path) -> None:
    index, trace = foreign / ".metadata", tmp_path / "ran"
    metadata: Metadata = pickle.loads(index.read_bytes())  # noqa: S301 (written by this test)
    metadata.planner_data["state"] = Hostile(trace)
    index.write_bytes(pickle.dumps(metadata))
    assert "posix.system" in refusal(foreign) or "nt.system" in refusal(foreign)
    for name in ("builtins\ngetattr", "torch\nload", "torch.serialization\nload", "builtins\neval"):
        index.write_bytes(b"c" + name.encode() + b"\n(S'" + b"x" * 3 + b"'\ntR.")
        assert name.replace("\n", ".") in refusal(foreign)
    assert not trace.exists()


@pytest.mark.parametrize("kept", [0, 1, 2, 100, 0.3, 0.7, -1])
def test_a_truncated_index(foreign: Path, kept: float) -> None:
    index = foreign / ".metadata"
    data = index.read_bytes()
    index.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    assert "is damaged, or no index" in refusal(foreign)


def change(folder: Path, edit: Any) -> str:
    """The refusal of an index after an edit."""
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 (written by this test)
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return refusal(folder)


def set_all(metadata: Metadata, **values: Any) -> None:
    for info in metadata.storage_data.values():
        for name, value in values.items():
            setattr(info, name, value)


def chunk(metadata: Metadata, **values: Any) -> None:
    for name, value in values.items():
        setattr(metadata.state_dict_metadata["model.blocks.0.attn.proj.bias"].chunks[0], name, torch.Size(value))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda m: set_all(m, relative_path="../pytorch_model_fsdp_0/__0_0.distcp"), "outside its folder"),
        (lambda m: set_all(m, relative_path="__1_0.distcp"), "is named in .metadata but missing"),
        (lambda m: set_all(m, offset=10**9), "is truncated: it has"),
        (lambda m: set_all(m, transform_descriptors=["zstd"]), "stored compressed (zstd)"),
        (lambda m: set_all(m, length=50), "cannot be read, the file is damaged"),
        (lambda m: set_all(m, length=-1), "is damaged, or no index"),
        (lambda m: chunk(m, sizes=(99,)), "lies outside it"),
        (lambda m: chunk(m, sizes=(63,)), "do not make up its shape (64,)"),
        (lambda m: m.storage_data.clear(), "is damaged, or no index"),
    ],
)
def test_an_index_that_lies(foreign: Path, edit: Any, says: str) -> None:
    assert says in change(foreign, edit)


def test_shards_that_are_damaged_or_unfinished(foreign: Path) -> None:
    data = foreign / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1000])
    assert "__0_0.distcp: is truncated" in refusal(foreign)
    data.write_bytes(b"\0" * len(whole))
    assert "the file is damaged" in refusal(foreign)
    (foreign / ".metadata").unlink()
    assert "has no .metadata, which is written last: saving it was not finished" in refusal(foreign)
    data.unlink()
    assert not is_distributed(foreign)


def test_a_hostile_shard_is_not_run(tmp_path: Path) -> None:
    folder, trace = tmp_path / "a", tmp_path / "ran"
    dcp.save({"model": {"x": torch.zeros(100)}}, checkpoint_id=folder, no_dist=True)
    torch.save({"x": Hostile(trace)}, tmp_path / "evil.pt")
    evil = (tmp_path / "evil.pt").read_bytes()
    (folder / "__0_0.distcp").write_bytes(evil)
    assert "the file is damaged" in change(folder, lambda m: set_all(m, offset=0, length=len(evil)))
    assert not trace.exists()

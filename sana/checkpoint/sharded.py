"""Tensors of a run in torch.distributed.checkpoint, stored as safetensors instead of pickles.

Each rank writes the pieces that it holds, one file per part of the state; a file's header says where its pieces lie in
the whole tensors. torch's planners decide who writes and reads what, so any number of ranks reads what any other
number wrote.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.futures import Future

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.header import write_header
from sana.checkpoint.run_folder import MANIFEST, Manifest, commit, read_manifest, write_manifest, write_synced
from sana.checkpoint.tensors import NAMES, Tensors, read_safetensors

PIECES = "pieces"  # key of the header's metadata: name -> [offset, shape of the whole tensor]

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that is in this process.

    Attributes:
        tensor: on the CPU.
        offset: of its first element in the whole.
        shape: of the whole.
    """

    tensor: Tensor
    offset: torch.Size
    shape: torch.Size

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        """What DCP plans with."""
        if not self.tensor.numel():
            return []
        chunk = ChunkStorageMetadata(self.offset, self.tensor.shape)
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.tensor), self.shape)
        return [WriteItem(MetadataIndex(name, self.offset), WriteItemType.SHARD, tensor_data=data)]


def box_of(tensor: Tensor) -> tuple[Tensor, torch.Size, torch.Size] | None:
    """What this process has to save of a tensor: its part, the part's offset, and the shape of the whole.

    None where another process saves the same: of replicated tensors the first rank does, of a hybrid mesh the first
    replica.
    """
    if not isinstance(tensor, DTensor):
        first = not dist.is_initialized() or dist.get_rank() == 0
        return (tensor.detach(), torch.Size([0] * tensor.ndim), tensor.shape) if first else None
    place = tensor.device_mesh.get_coordinate()
    if place is None or any(p.is_replicate() and at for p, at in zip(tensor.placements, place, strict=True)):
        return None
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local().detach(), torch.Size(offset), tensor.shape


class Staging:
    """Copies on the CPU of what is saved, so that training goes on while they are written.

    Their memory is kept for the next save: that of one copy of the state, pinned where the state is on a GPU.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __call__(self, state: Mapping[str, Tensor], own: Mapping[str, Tensor] | None = None) -> dict[str, Piece]:
        """Pieces that this process saves, by name; whole once this returns.

        Args:
            state: of all processes together.
            own: of this process alone, under names that no other process has.
        """
        boxes = {name: box for name, tensor in state.items() if (box := box_of(tensor)) is not None}
        boxes |= {name: (t, torch.Size([0] * t.ndim), t.shape) for name, t in (own or {}).items()}
        pieces, waiting = {}, False
        for name, (box, offset, shape) in boxes.items():
            kept = self._kept.get(name)
            if kept is None or kept.shape != box.shape or kept.dtype != box.dtype:
                kept = torch.empty(box.shape, dtype=box.dtype, pin_memory=box.is_cuda)
            self._kept[name] = kept
            kept.copy_(box, non_blocking=box.is_cuda)
            waiting |= box.is_cuda
            pieces[name] = Piece(kept, offset, shape)
        if waiting:
            torch.cuda.current_stream().synchronize()
        return pieces


def write_pieces(
    temporary: Path,
    place: Path,
    step: int,
    pieces: Mapping[str, Piece],
    small: Mapping[str, bytes],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint from the pieces of all ranks, whole or not at all.

    Every rank calls it, and every rank learns of an error on one.

    Args:
        temporary: folder to write into, new and the same on all ranks; on a file system that all of them see.
        place: what it becomes when all is on the disk.
        step: for the manifest.
        pieces: of this rank, by name; the part of a name before its first dot tells the file.
        small: further files of the first rank, by name.
        group: of the ranks, for tensors on the CPU; None: this process alone.

    Raises:
        CheckpointError: a rank could not write; with the path and the reason. Nothing is left but what was there.
    """
    writer = _Writer(temporary, place, step, small, 0 if group is None else dist.get_rank(group))
    try:
        dcp.save(dict(pieces), storage_writer=writer, planner=_Planner(), process_group=group, no_dist=group is None)
    except dcp.CheckpointException as problem:
        if writer.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        rank, (error, _) = next(iter(sorted(problem.failures.items())))
        who = f"rank {rank}: " if group is not None else ""
        detail = f"{error.strerror} ({error.filename or temporary})" if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{place}: cannot be written: {who}{detail}") from error


class _Planner(dcp.DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].tensor


class _Writer(dcp.StorageWriter):
    # What one rank raises in these, torch's collectives carry to all of them.
    def __init__(self, temporary: Path, place: Path, step: int, small: Mapping[str, bytes], rank: int) -> None:
        self.temporary, self.place, self.step, self.small, self.rank = temporary, place, step, small, rank
        self.written: dict[str, tuple[int, str]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self.temporary.mkdir()  # without parents: a directory that vanished is an error, not to be made anew
            self.written = {name: write_synced(self.temporary / name, data) for name, data in self.small.items()}

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        items = [item.tensor_data for plan in plans for item in plan.items if item.tensor_data is not None]
        needed = sum(math.prod(data.chunk.sizes) * data.properties.dtype.itemsize for data in items)
        free = shutil.disk_usage(self.temporary).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"needs {needed:,} bytes, {free:,} are free", str(self.temporary.parent))
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        parts: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            parts.setdefault(item.index.fqn.split(".", 1)[0], []).append(item)
        results = []
        for part, items in sorted(parts.items()):
            name = f"{part}.{self.rank:05d}.safetensors"
            size, digest = _write_file(self.temporary / name, items, planner.resolve_data)
            results.append(WriteResult(items[0].index, size, (name, size, digest)))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = {r.storage_data[0]: r.storage_data[1:] for of_rank in results for r in of_rank}
        write_manifest(self.temporary, Manifest(self.step, {**self.written, **written}))
        commit(self.temporary, self.place)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _write_file(path: Path, items: Iterable[WriteItem], read: Callable[[WriteItem], Any]) -> tuple[int, str]:
    """Write one safetensors file through to the disk; its size and checksum."""
    tensors = [(item, read(item).contiguous()) for item in items]
    entries = {item.index.fqn: (NAMES[t.dtype], tuple(t.shape)) for item, t in tensors}
    where = {}
    for item, _ in tensors:
        assert item.tensor_data is not None
        where[item.index.fqn] = [list(item.tensor_data.chunk.offsets), list(item.tensor_data.size)]
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "wb") as file:
        blocks = (t.reshape(-1).view(torch.uint8).numpy().data for _, t in tensors)
        for block in (write_header(entries, {PIECES: json.dumps(where)}), *blocks):
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds: the boxes of each tensor, as memory of the files.

    Attributes:
        boxes: name -> [(offset, shape of the box, type, read)].
        shapes: name -> shape of the whole.
    """

    boxes: Mapping[str, list[tuple[torch.Size, torch.Size, torch.dtype, Callable[[], Tensor]]]]
    shapes: Mapping[str, torch.Size]

    @staticmethod
    def whole(tensors: Tensors) -> Stored:
        """Tensors that are stored in one piece each."""
        boxes = {}
        for name, like in tensors.like.items():
            zero = torch.Size([0] * like.ndim)
            boxes[name] = [(zero, like.shape, like.dtype, lambda name=name: tensors[name])]
        return Stored(boxes, {name: like.shape for name, like in tensors.like.items()})

    def tensors(self) -> Tensors:
        """The whole tensors; those in several pieces are put together when asked for."""

        def read(name: str) -> Tensor:
            boxes = self.boxes[name]
            if len(boxes) == 1:
                return boxes[0][3]()
            whole = torch.empty(self.shapes[name], dtype=boxes[0][2])
            for offset, shape, _, piece in boxes:
                whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))] = piece()
            return whole

        like = {
            name: torch.empty(shape, dtype=self.boxes[name][0][2], device="meta") for name, shape in self.shapes.items()
        }
        return Tensors(like, read)

    def load(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors of this process, sharded ones with their part. Names and shapes must fit."""
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with torch.no_grad():
            dcp.load(dict(targets), storage_reader=_Reader(self), planner=planner, no_dist=True)


def open_pieces(folder: Path, parts: Iterable[str]) -> Stored:
    """What a checkpoint holds of some parts.

    Args:
        folder: of a checkpoint; its files are taken to be whole (`sana.checkpoint.run_folder.verify`).
        parts: "model", "ema", "optimizer", "rng".

    Raises:
        CheckpointError: a file is damaged, or pieces of a tensor are missing.
    """
    wanted = tuple(f"{part}." for part in parts)
    boxes: dict[str, list[Any]] = {}
    shapes: dict[str, torch.Size] = {}
    for name in sorted(name for name in read_manifest(folder).files if name.startswith(wanted)):
        tensors, metadata = read_safetensors(folder / name)
        try:
            where = json.loads(metadata[PIECES])
            for key, like in tensors.like.items():
                offset, shape = (torch.Size(numbers) for numbers in where[key])
                boxes.setdefault(key, []).append((offset, like.shape, like.dtype, _reader_of(tensors, key)))
                shapes[key] = shape
        except (KeyError, ValueError, TypeError):
            raise CheckpointError(f"{folder / name}: does not say where its pieces belong") from None
    for key, found in boxes.items():
        if sum(math.prod(shape) for _, shape, _, _ in found) != math.prod(shapes[key]):
            raise CheckpointError(f"{folder}: pieces of {key} are missing (see {MANIFEST})")
    return Stored(boxes, shapes)


def _reader_of(tensors: Tensors, name: str) -> Callable[[], Tensor]:
    return lambda: tensors[name]


class _Reader(dcp.StorageReader):
    def __init__(self, stored: Stored) -> None:
        self.stored = stored

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=boxes[0][2]),
                    self.stored.shapes[name],
                    [ChunkStorageMetadata(offset, shape) for offset, shape, _, _ in boxes],
                )
                for name, boxes in self.stored.boxes.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return [replace(plan) for plan in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            at = item.storage_index
            piece = next(read for offset, _, _, read in self.stored.boxes[at.fqn] if offset == at.offset)()
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                piece = piece.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(piece)
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

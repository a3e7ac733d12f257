"""Tensors of a ``torch.distributed.checkpoint`` directory that another trainer wrote; no process group is needed."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import torch
from torch import Tensor

from sana.checkpoint.distributed_index import Chunk, Stored, read_index
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.tensors import Tensors

PREFIXES = ("state_dict.network.", "state_dict.", "model.module.", "model.", "module.", "")
"""What precedes the network's own names: in older runs of this project, in those of Lightning and accelerate, in a
plain state dict."""


def read_distributed(folder: str | Path) -> Tensors:
    """Every tensor of the directory, optimizer state included, under its saved name; read when it is asked for.

    Raises:
        CheckpointError: see `sana.checkpoint.distributed_index.read_index`; on reading, a part that is damaged.
    """
    folder = Path(folder)
    index = read_index(folder)
    like = {
        name: torch.empty(stored.shape, dtype=getattr(torch, stored.dtype), device="meta")
        for name, stored in index.items()
    }
    return Tensors(like, lambda name: _assemble(folder, name, index[name]))


def weights_in(tensors: Tensors) -> Tensors:
    """The state dict among the tensors of a directory, under the names that its network has."""
    for prefix in PREFIXES:
        found = tensors.renamed(
            lambda name, prefix=prefix: name.removeprefix(prefix) if name.startswith(prefix) else None
        )
        if found:
            break
    return found


def _assemble(folder: Path, name: str, stored: Stored) -> Tensor:
    dtype = getattr(torch, stored.dtype)
    parts = ((chunk, _read(folder, name, chunk, dtype)) for chunk in stored.chunks)
    if len(stored.chunks) == 1:
        return next(parts)[1]
    whole = torch.empty(stored.shape, dtype=dtype)
    for chunk, part in parts:
        whole[tuple(slice(begin, begin + size) for begin, size in zip(chunk.offset, chunk.shape, strict=True))] = part
    return whole


def _read(folder: Path, name: str, chunk: Chunk, dtype: torch.dtype) -> Tensor:
    """One part: a file of ``torch.save`` within the file."""
    path = folder / chunk.file
    try:
        with open(path, "rb") as file:
            file.seek(chunk.begin)
            data = io.BytesIO(file.read(chunk.length))
        value = torch.load(data, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path}: {name} cannot be read, the file is damaged ({said[0][:120]})") from None
    if not isinstance(value, Tensor) or value.dtype != dtype or tuple(value.shape) != chunk.shape:
        raise CheckpointError(f"{path}: {name} is not what the index says, {chunk.shape} of {dtype}")
    return value

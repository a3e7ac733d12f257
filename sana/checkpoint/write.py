"""Files of weights, written tensor by tensor and put in place in one step."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.header import DIGESTS, write_header
from sana.checkpoint.record import Record
from sana.checkpoint.tensors import NAMES, Tensors, check_finite, from_dict

Progress = Callable[[int], None]
"""Called with the bytes of every tensor written."""
SHARD = 10 * 10**9  # bytes per file of a sharded folder, as diffusers has it


@contextmanager
def in_place(path: str | Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block ends well, and vanishes when it does not.

    Raises:
        CheckpointError: `path` exists, or its folder cannot be made.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path}: exists already; give a new name, or remove it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_dir() and path.is_dir():
            path.rmdir()
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file in one step, over an older one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    digests: bool = False,
) -> None:
    """Write tensors, one in memory at a time, and their checksums if wanted (`sana.checkpoint.header.DIGESTS`). Not
    atomic by itself: see `in_place`.

    Raises:
        CheckpointError: a tensor has NaN or infinities, or a type that the format has no name for.
    """
    source = from_dict(tensors)
    unnamed = [name for name, t in source.like.items() if t.dtype not in NAMES]
    if unnamed:
        raise CheckpointError(f"{path}: safetensors has no type for {unnamed[0]} ({source.like[unnamed[0]].dtype})")
    entries = {name: (NAMES[t.dtype], tuple(t.shape)) for name, t in source.like.items()}
    found = dict.fromkeys(entries, xxhash.xxh3_128_hexdigest(b""))

    def header() -> bytes:
        own = {DIGESTS: json.dumps(found)} if digests else {}
        return write_header(entries, {**(metadata or {}), **own})

    with open(path, "wb") as file:
        file.write(header())
        for name in source:
            tensor = check_finite(name, source[name].detach().cpu().contiguous(), path)
            if tensor.numel():
                data = tensor.reshape(-1).view(torch.uint8).numpy().data
                file.write(data)
                if digests:
                    found[name] = xxhash.xxh3_128_hexdigest(data)
            if progress is not None:
                progress(tensor.nbytes)
        file.seek(0)
        file.write(header())  # of the same length, with the checksums now known
        file.flush()
        os.fsync(file.fileno())


def write_folder(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    progress: Progress | None = None,
    shard: int = SHARD,
) -> None:
    """Write ``stem.safetensors`` into a folder, or, where the tensors exceed `shard` bytes, numbered files and their
    index, as diffusers reads them."""
    source = from_dict(tensors)
    groups: list[list[str]] = [[]]
    filled = 0
    for name, like in source.like.items():
        size = math.prod(like.shape) * like.dtype.itemsize
        if filled and filled + size > shard:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    metadata = {"format": "pt"}
    if len(groups) == 1:
        write_safetensors(folder / f"{stem}.safetensors", source, metadata, progress)
        return
    places = {}
    for i, names in enumerate(groups, 1):
        file = f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors"
        part = Tensors({name: source.like[name] for name in names}, source.__getitem__)
        write_safetensors(folder / file, part, metadata, progress)
        places |= dict.fromkeys(names, file)
    total = sum(math.prod(t.shape) * t.dtype.itemsize for t in source.like.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_consolidated(
    path: str | Path, tensors: Mapping[str, Tensor], record: Record, progress: Progress | None = None
) -> None:
    """Write a consolidated file, whole or not at all, with the checksums of its tensors.

    Args:
        path: new file.
        tensors: the network's under our names, others under ``extra.``.
        record: goes into the header.

    Raises:
        CheckpointError: the file exists or cannot be written, or a tensor is not finite.
    """
    with in_place(path) as temporary:
        write_safetensors(temporary, tensors, record.metadata(), progress, digests=True)

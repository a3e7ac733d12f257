"""The header of a safetensors file, read and checked without torch.

A file is: 8 bytes, the length n of the header (little endian); n bytes of JSON, {name: {dtype, shape, data_offsets}}
and optionally "__metadata__" {text: text}; then the tensors' bytes, without gaps. Everything that a file claims is
compared with its size before a byte of a tensor is read.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana.checkpoint.error import CheckpointError

LIMIT = 100_000_000  # bytes of a header; that of a 60-block network has some 100,000
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


DIGESTS = "xxh3_128"
"""In the metadata of files of this project: JSON, name of a tensor -> that checksum of its bytes, hexadecimal."""


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor: its type ("F32", "BF16", ...), its shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """Tensors by name in the order of their bytes, and the metadata."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """The checked header of a safetensors file.

    Raises:
        CheckpointError: no such file, no safetensors file, a truncated one, or a header whose claims contradict the
            file or each other.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or start[:2] == b"PK":
                raise CheckpointError(f"{path}: is no safetensors file")
            if length > size - 8:
                raise CheckpointError(
                    f"{path}: its header claims {length:,} bytes, but the file has {size:,}: it is truncated, or no "
                    "safetensors file"
                )
            if length > LIMIT:
                raise CheckpointError(f"{path}: a header of {length:,} bytes is not credible; at most {LIMIT:,}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: its header is no JSON: damaged, or no safetensors file") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: its header is no JSON object")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ in its header must map text to text")
    entries = sorted(((name, _entry(path, name, item)) for name, item in content.items()), key=_place)
    offset = 0
    for name, entry in entries:
        if entry.begin != offset:
            raise CheckpointError(f"{path}: its header lies: {name} begins at byte {entry.begin:,}, not {offset:,}")
        offset = entry.end
    if 8 + length + offset != size:
        raise CheckpointError(
            f"{path}: its header claims {8 + length + offset:,} bytes in all, but the file has {size:,}: it is "
            "truncated or damaged; fetch it again"
        )
    base = 8 + length
    return Header({n: Entry(e.dtype, e.shape, base + e.begin, base + e.end) for n, e in entries}, metadata)


def read_digests(header: Header, path: str | Path) -> dict[str, str] | None:
    """The checksums of a file's tensors, None where it has none.

    Raises:
        CheckpointError: they are no JSON, or not those of the tensors that are there.
    """
    text = header.metadata.get(DIGESTS)
    if text is None:
        return None
    try:
        digests = json.loads(text)
        if digests.keys() != header.entries.keys():
            raise ValueError
    except (ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: the checksums in its header are not those of its tensors: damaged") from None
    return digests


def write_header(entries: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The first bytes of a safetensors file whose tensors (dtype, shape) follow in this order.

    Raises:
        ValueError: a dtype that the format has no name for.
    """
    content: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, (dtype, shape) in entries.items():
        end = offset + math.prod(shape) * BITS[dtype] // 8
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text


def is_safetensors(path: Path) -> bool:
    """Whether a file bears the suffix of the format."""
    return path.suffix == ".safetensors" and not os.path.isdir(path)


def _entry(path: Path, name: str, item: Any) -> Entry:
    try:
        dtype, shape, (begin, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        numbers = [*shape, begin, end]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise TypeError
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: its header does not describe {name!r} as dtype, shape and offsets") from None
    if dtype not in BITS:
        raise CheckpointError(f"{path}: {name} has the type {dtype!r}; known are {', '.join(BITS)}")
    if end - begin != math.prod(shape) * BITS[dtype] // 8:
        raise CheckpointError(f"{path}: its header lies: {name} {shape} of {dtype} does not take {end - begin:,} bytes")
    return Entry(dtype, shape, begin, end)


def _place(item: tuple[str, Entry]) -> tuple[int, int]:
    return item[1].begin, item[1].end

"""Tensors of files, read one at a time: a mapping from names to tensors that knows all shapes beforehand."""

from __future__ import annotations

import json
import math
import mmap
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.header import DIGESTS, Entry, read_digests, read_header

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Tensors(Mapping[str, Tensor]):
    """Tensors by name, made when asked for.

    Args:
        like: shape and type of each, as a tensor on the meta device.
        read: gives the tensor of a name; it may be memory of the file, so it is not to be written to.
    """

    def __init__(self, like: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        self.like, self._read = dict(like), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.like:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.like

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)

    def renamed(self, rename: Callable[[str], str | None]) -> Tensors:
        """The same tensors under other names; those renamed to None are left out."""
        pairs = {new: name for name in self.like if (new := rename(name)) is not None}
        return Tensors({new: self.like[name] for new, name in pairs.items()}, lambda new: self[pairs[new]])

    def cast(self, dtype: torch.dtype | None) -> Tensors:
        """The same with floating-point tensors in another type; None leaves all as they are."""
        if dtype is None:
            return self
        like = {n: t.to(dtype) if t.is_floating_point() else t for n, t in self.like.items()}
        return Tensors(like, lambda name: self[name].to(like[name].dtype))


def from_dict(state: Mapping[str, Tensor]) -> Tensors:
    """Tensors in memory, seen as `Tensors`."""
    if isinstance(state, Tensors):
        return state
    return Tensors({name: torch.empty_like(t, device="meta") for name, t in state.items()}, state.__getitem__)


def join(*parts: Tensors) -> Tensors:
    """Several sets of tensors in one; of equal names the last one counts."""
    home = {name: part for part in parts for name in part}
    return Tensors({name: part.like[name] for name, part in home.items()}, lambda name: home[name][name])


def read_safetensors(path: str | Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors (memory of the file) and metadata of a safetensors file.

    Where the file has checksums, which are not given among the metadata, each tensor is compared with its own when it
    is read.

    Raises:
        CheckpointError: see `sana.checkpoint.header.read_header`; when a tensor is read, that its bytes were changed.
    """
    header = read_header(path)
    digests = read_digests(header, path)
    metadata = {key: value for key, value in header.metadata.items() if key != DIGESTS}
    with open(path, "rb") as file:
        # Read-only: a writable private mapping counts against memory, and a file may be larger than that.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(name: str) -> Tensor:
        entry = header.entries[name]
        if digests is not None:
            with memoryview(content) as whole, whole[entry.begin : entry.end] as part:
                if xxhash.xxh3_128_hexdigest(part) != digests[name]:
                    raise CheckpointError(
                        f"{path}: the checksum of {name} does not fit: it was damaged or changed after it was "
                        "written; fetch or make it again"
                    )
        dtype, count = DTYPES[entry.dtype], math.prod(entry.shape)
        if not count:
            return torch.empty(entry.shape, dtype=dtype)
        if entry.begin % dtype.itemsize:  # a header of odd length: views need alignment
            data = torch.frombuffer(bytearray(content[entry.begin : entry.end]), dtype=dtype)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is not writable
                data = torch.frombuffer(content, dtype=dtype, count=count, offset=entry.begin)
        return data.reshape(entry.shape)

    return Tensors({name: _like(entry) for name, entry in header.entries.items()}, read), metadata


def read_sharded(index: str | Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors of the files that a ``*.safetensors.index.json`` names; metadata of the first file.

    Raises:
        CheckpointError: the index is damaged, a file is missing, or tensors are not where the index says.
    """
    index = Path(index)
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
        if any(Path(name).name != name for name in files):  # no way out of the folder
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index}: is no index of safetensors files") from None
    parts: dict[str, Tensors] = {}
    metadata: dict[str, str] = {}
    for name in files:
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name}: is named in {index.name} but missing; fetch it too")
        parts[name], own = read_safetensors(index.parent / name)
        metadata = metadata or own
    for tensor, name in places.items():
        if tensor not in parts[name]:
            raise CheckpointError(f"{index}: {tensor} is not in {name}")
    extra = sorted({tensor for part in parts.values() for tensor in part} - places.keys())
    if extra:
        raise CheckpointError(f"{index}: does not name {extra[0]}, which its files hold ({len(extra)} such tensors)")
    return join(*(part.renamed(lambda n, file=file: n if places[n] == file else None)
                  for file, part in parts.items())), metadata  # fmt: skip


def check_finite(name: str, tensor: Tensor, source: str | Path) -> Tensor:
    """The tensor itself.

    Raises:
        CheckpointError: numbers in it are not finite.
    """
    if tensor.is_floating_point() and not tensor.is_meta:
        # min and max carry NaN and infinity: two numbers instead of a mask as large as the tensor
        wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
        low, high = torch.aminmax(wide) if wide.numel() else (torch.zeros(()),) * 2
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            bad = int((~torch.isfinite(wide)).sum())
            raise CheckpointError(
                f"{source}: {name} has {bad:,} of {tensor.numel():,} numbers that are not finite; the file was saved "
                "from a run that had diverged, or is damaged"
            )
    return tensor


def _like(entry: Entry) -> Tensor:
    return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")

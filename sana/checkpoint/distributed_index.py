"""The index of a ``torch.distributed.checkpoint`` directory, read without torch and without running anything in it.

Such a directory holds ``.metadata``, a pickle that says which part of which tensor lies where, and the data in
``*.distcp`` files. ``.metadata`` is written last. As a pickle it could run any code, so it is read by an unpickler
that knows the few classes that torch puts there, and makes inert records of them.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sana.checkpoint.error import CheckpointError

INDEX = ".metadata"
LIMIT = 1 << 29  # bytes of an index; that of 60 blocks on 1000 devices has some 200 MB
MODULE = "torch.distributed.checkpoint."
RECORDS = {
    (MODULE + "metadata", name)
    for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
                 "TensorProperties", "_MEM_FORMAT_ENCODING", "MetadataIndex", "StorageMeta")
} | {(MODULE + "filesystem", "_StorageInfo")}  # fmt: skip
DTYPES = {
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "bool", "uint8",
    "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
}  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor: where it begins in the tensor and its shape, and the bytes of a file that hold it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    begin: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor: its type ("float32"), its shape, and the parts that make it up."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def is_distributed(path: str | Path) -> bool:
    """Whether a path is a directory that ``torch.distributed.checkpoint`` wrote, or began to."""
    path = Path(path)
    return path.is_dir() and ((path / INDEX).is_file() or any(path.glob("*.distcp")))


def read_index(folder: str | Path) -> dict[str, Stored]:
    """The tensors of a directory by their names; what is not a tensor is left out.

    Names are those of the nested dictionary that was saved, joined by dots: "state_dict.network.final.table".

    Raises:
        CheckpointError: no index, one that names anything but torch's own records, one that contradicts itself, or a
            file that is missing or too short.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {INDEX}, which is written last: saving it was not finished")
    if path.stat().st_size > LIMIT:
        raise CheckpointError(f"{path}: an index of {path.stat().st_size:,} bytes is not credible; at most {LIMIT:,}")
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file, path).load()
        found = _tensors(content, path)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path}: is damaged, or no index of torch.distributed.checkpoint ({type(error).__name__})"
        ) from None
    sizes: dict[str, int] = {}
    for name, stored in found.items():
        _check(path, name, stored, sizes)
    return found


class _Record:
    """What stands for an object of the pickle: the state that it had."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _record(name: str) -> type[_Record]:
    return type(name, (_Record,), {})


CLASSES: dict[tuple[str, str], Any] = {
    **{place: _record(place[1]) for place in RECORDS},
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    ("collections", "OrderedDict"): OrderedDict,
    **{("pathlib", name): _record(name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")},
    **{("pathlib._local", name): _record(name) for name in ("PosixPath", "WindowsPath")},  # Python 3.13
    **{("torch", name): name for name in DTYPES},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Only what torch itself writes; never anything that is imported."""
        found = CLASSES.get((module_name, global_name))
        if found is None:
            raise CheckpointError(
                f"{self.path}: names Python code to run on loading ({module_name}.{global_name}); only the records of "
                "torch.distributed.checkpoint are read, so it is refused"
            )
        return found


def _tensors(content: Any, path: Path) -> dict[str, Stored]:
    """Joins what the index says of the tensors' parts and of their places."""
    fields: dict[str, Any] = content.state
    places: dict[str, dict[tuple[int, ...], Any]] = defaultdict(dict)
    for index, info in fields["storage_data"].items():
        key = index.state
        places[key["fqn"]][tuple(key.get("offset") or ())] = info.state
    found = {}
    for name, stored in fields["state_dict_metadata"].items():
        if type(stored).__name__ != "TensorStorageMetadata":
            continue
        properties, shape, chunks = (stored.state[part] for part in ("properties", "size", "chunks"))
        parts = []
        for chunk in chunks:
            offset, size = (_numbers(chunk.state[part]) for part in ("offsets", "sizes"))
            info = places[name][offset]
            if info.get("transform_descriptors"):
                kind = info["transform_descriptors"][0]
                raise CheckpointError(
                    f"{path}: {name} is stored compressed ({kind}), which is not read; save it without extensions"
                )
            parts.append(Chunk(offset, size, str(info["relative_path"]), *_numbers((info["offset"], info["length"]))))
        found[str(name)] = Stored(str(properties.state[0]), _numbers(shape), tuple(parts))
    return found


def _numbers(values: Any) -> tuple[int, ...]:
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in values):
        raise TypeError
    return tuple(values)


def _check(path: Path, name: str, stored: Stored, sizes: dict[str, int]) -> None:
    """The parts make up the tensor, and their files hold them."""
    if stored.dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} has the type {stored.dtype!r}; known are {', '.join(sorted(DTYPES))}")
    for chunk in stored.chunks:
        if len(chunk.offset) != len(stored.shape) or len(chunk.shape) != len(stored.shape) or any(
            begin + size > whole for begin, size, whole in zip(chunk.offset, chunk.shape, stored.shape, strict=True)
        ):  # fmt: skip
            raise CheckpointError(f"{path}: a part of {name} {stored.shape} lies outside it")
        if Path(chunk.file).name != chunk.file:  # no way out of the folder
            raise CheckpointError(f"{path}: {name} lies in {chunk.file!r}, outside its folder")
        if chunk.file not in sizes:
            file = path.with_name(chunk.file)
            if not file.is_file():
                raise CheckpointError(f"{file}: is named in {INDEX} but missing; copy the whole directory")
            sizes[chunk.file] = file.stat().st_size
        if chunk.begin + chunk.length > sizes[chunk.file]:
            raise CheckpointError(f"{path.with_name(chunk.file)}: is truncated: it has {sizes[chunk.file]:,} bytes, "
                                  f"and {name} lies beyond them")  # fmt: skip
    if sum(prod(chunk.shape) for chunk in stored.chunks) != prod(stored.shape):
        raise CheckpointError(f"{path}: the parts of {name} do not make up its shape {stored.shape}")

"""A checkpoint of a run as a folder: what is in it, whether it is whole, and which of several is the newest. No torch.

    step_00000500.ckpt/
        model.00000.safetensors      what rank 0 held of the parameters and buffers; 00001 is rank 1, ...
        ema.00000.safetensors        of the moving averages
        optimizer.00000.safetensors  of the optimizers' states
        rng.00000.safetensors        random states of that rank
        state.json                   counters, position in the data, precision, strategy
        config.yaml                  of the run
        manifest.json                a line with the update and every file's size and checksum; then that line's own

A folder without suffix ``.tmp`` is complete: it is written beside its name, synced, and renamed last. Older runs wrote
one ``step_NNNNNNNN.ckpt`` file of ``torch.save``, which is still read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from sana.checkpoint.error import CheckpointError

SUFFIX, TEMPORARY = ".ckpt", ".tmp"
STATE, MANIFEST, CONFIG = "state.json", "manifest.json", "config.yaml"
FORMAT = "sana/run/1"
BLOCK = 1 << 22  # bytes read at a time
NAME = re.compile(r"step_(\d+)\.ckpt")


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says about itself.

    Attributes:
        step: updates of the primary module.
        files: name -> (bytes, checksum).
    """

    step: int
    files: Mapping[str, tuple[int, str]]


def place_of(parent: Path, step: int) -> Path:
    """Where the checkpoint of an update lies."""
    return parent / f"step_{step:08d}{SUFFIX}"


def digest_of(path: Path) -> str:
    """xxh3-128 of a file, hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_synced(path: Path, data: bytes) -> tuple[int, str]:
    """Write a file through to the disk; its size and checksum."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return len(data), xxhash.xxh3_128(data).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write what completes a checkpoint."""
    files = {name: list(manifest.files[name]) for name in sorted(manifest.files)}
    line = json.dumps({"format": FORMAT, "step": manifest.step, "files": files}).encode()
    write_synced(folder / MANIFEST, line + b"\n" + xxhash.xxh3_128(line).hexdigest().encode() + b"\n")


def commit(temporary: Path, place: Path) -> None:
    """Put a complete folder in place in one step; one that was there goes."""
    _sync(temporary)
    if place.exists():
        remove(place)
    os.replace(temporary, place)
    _sync(place.parent)


def remove(place: Path) -> None:
    """Remove a checkpoint. A crash in between leaves a temporary folder, never half a checkpoint."""
    if place.is_file():
        place.unlink()
        return
    away = place.with_name(f"{place.name}.removed{TEMPORARY}")
    shutil.rmtree(away, ignore_errors=True)
    os.replace(place, away)
    shutil.rmtree(away, ignore_errors=True)


def remove_leftovers(parent: Path) -> int:
    """Remove what a crash left half-written; their number."""
    found = list(parent.glob(f"*{TEMPORARY}"))
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(found)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: missing or damaged.
    """
    path = folder / MANIFEST
    try:
        line, own, rest = path.read_bytes().split(b"\n", 2)
    except (OSError, ValueError):
        raise CheckpointError(f"{path}: missing or cut off, so the checkpoint is not complete") from None
    if rest or xxhash.xxh3_128(line).hexdigest().encode() != own:
        raise CheckpointError(f"{path}: its checksum does not fit: it was damaged after it was written")
    content = json.loads(line)
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {content['format']!r}; this version reads {FORMAT!r}")
    return Manifest(content["step"], {name: (size, digest) for name, (size, digest) in content["files"].items()})


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        CheckpointError: missing or no object.
    """
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE}: cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / STATE}: is no object")
    return content


def verify(place: Path, parts: Collection[str] | None = None) -> None:
    """Compare every file of a checkpoint with its checksum.

    Args:
        place: the folder; or a file of an older run, whose members have checksums of their own.
        parts: only those of these parts, such as {"model", "ema"}.

    Raises:
        CheckpointError: naming the first file that is missing, over, or not as it was written.
    """
    if place.is_file():
        _verify_file(place)
        return
    manifest = read_manifest(place)
    there = {path.name for path in place.iterdir()} - {MANIFEST}
    for name in sorted(there - manifest.files.keys()):
        raise CheckpointError(f"{place / name}: does not belong to the checkpoint (not in {MANIFEST})")
    for name, (size, digest) in manifest.files.items():
        if parts is not None and name.split(".")[0] not in parts:
            continue
        path = place / name
        if name not in there:
            raise CheckpointError(f"{path}: is missing")
        try:
            if path.stat().st_size != size:
                raise CheckpointError(f"{path}: has {path.stat().st_size:,} bytes, not the {size:,} that were written")
            if digest_of(path) != digest:
                raise CheckpointError(f"{path}: its checksum does not fit: it was damaged after it was written")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def list_checkpoints(parent: Path) -> list[tuple[int, Path]]:
    """(update, place) of the checkpoints in a folder, newest first; by the update that is recorded inside, by the name
    where it cannot be read there."""
    found = []
    for place in parent.glob(f"*{SUFFIX}") if parent.is_dir() else ():
        named = NAME.fullmatch(place.name)
        step = int(named[1]) if named else -1
        if place.is_dir():
            with suppress(CheckpointError, KeyError, ValueError):
                step = read_manifest(place).step
        found.append((step, place))
    return sorted(found, key=lambda item: (item[0], item[1].name), reverse=True)


def newest_valid(parent: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint in a folder that is whole; None where there is none.

    Args:
        parent: a run's ``checkpoints``.
        warn: told about each newer one that is damaged.
    """
    for _, place in list_checkpoints(parent):
        try:
            verify(place)
        except CheckpointError as error:
            warn(f"{error}; the checkpoint before it is used")
            continue
        return place
    return None


def _verify_file(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: is truncated or damaged ({error})") from None
    if bad is not None:
        raise CheckpointError(f"{path}: {bad} in it is damaged")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

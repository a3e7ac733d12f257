"""Tars as lists of byte ranges: read by their headers alone, nothing is ever extracted, linked or followed.

The standard library's reader ends without a word where a header in the middle is damaged; this one says so and goes on
at the next header. Formats: POSIX ustar and pax (IEEE 1003.1-2008, pax), and GNU long names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sana.data.record import storable
from sana.data.storage import Storage

BLOCK = 512

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "avif")
_DATA = {"npy": "latent", "npz": "text", "mp4": "clip"}
_PICKLES = ("pkl", "pickle", "pyd", "pth", "pt", "ckpt", "joblib", "dill")
_FILES = (b"0", b"\0", b"7")
_ABOUT_NEXT = (b"L", b"K", b"x", b"g")
_KINDS = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "pipe", b"S": "sparse file"}


@dataclass(frozen=True)
class Member:
    """A file in a tar: where its bytes lie. With a fault, why it is not used."""

    name: str
    offset: int = 0
    size: int = 0
    fault: str = ""


@dataclass
class Sample:
    """Members of one key, by suffix in lower case ("jpg", "json", "poses.npy"); with a fault, why it is not used."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    fault: str = ""


class Window:
    """The bytes of one file by (offset, size), fetched in pieces of at least `step` bytes."""

    def __init__(self, storage: Storage, name: str, step: int) -> None:
        self.storage, self.name, self.step = storage, name, step
        self._start, self._data = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """Fewer bytes than `size` only at the end of the file."""
        if not self._start <= offset <= offset + size <= self._start + len(self._data):
            self._start, self._data = offset, self.storage.read(self.name, offset, max(size, self.step))
        first = offset - self._start
        return self._data[first : first + size]


def members(read: Callable[[int, int], bytes], size: int) -> Iterator[Member]:
    """The regular files of a tar in their order; what is anything else, or damaged, comes with a fault.

    Args:
        read: (offset, size) -> bytes of the tar.
        size: bytes of the whole tar.
    """
    offset, renamed = 0, {}
    if read(0, 2) == b"\x1f\x8b":
        yield Member("", fault="corrupt tar: it is compressed; unpack it with gunzip, shards are read at any place")
        return
    while offset < size:
        header = read(offset, BLOCK)
        if len(header) < BLOCK:
            yield Member("", fault=f"truncated: the tar ends within a header at byte {offset}")
            return
        if not any(header):
            if size - offset > 40 * BLOCK:  # twice the usual padding
                yield Member("", fault=f"corrupt tar: {size - offset} bytes follow its end at byte {offset}")
            return
        length = _length(header)
        if length is None:
            found = _next_header(read, offset + BLOCK, size)
            yield Member("", fault=f"corrupt tar: no header at byte {offset}, {found - offset} bytes passed over")
            offset, renamed = found, {}
            continue
        kind, start = header[156:157], offset + BLOCK
        if kind not in _ABOUT_NEXT:
            name, length = renamed.get("path") or _name(header), renamed.get("size", length)
        else:
            name = ""
        offset = start + -(-length // BLOCK) * BLOCK
        if start + length > size:
            yield Member(name, fault=f"truncated: the tar ends {start + length - size} bytes early")
            return
        if kind in _ABOUT_NEXT:
            renamed |= _renamed(kind, read(start, min(length, 1 << 20)))
            continue
        renamed = {}
        if kind in _FILES:
            yield Member(name, start, length, _fault(name))
        elif kind in _KINDS:
            yield Member(name, fault=f"link: the member is a {_KINDS[kind]}")
    yield Member("", fault="truncated: the tar has no end")


def samples(found: Iterator[Member], *, last_dot: bool = False, max_members: int = 64) -> list[Sample]:
    """Members grouped by key, in the order of first appearance; faults of no key have key "".

    Args:
        found: from `members`.
        last_dot: the suffix begins at the last dot of the name, as in the published SANA shards; else at the first dot
            of its last part, as in WebDataset.
        max_members: of one sample.
    """
    by_key: dict[str, Sample] = {}
    alone: list[Sample] = []
    repeated: set[str] = set()
    for member in found:
        key, suffix = split_name(member.name, last_dot)
        if member.fault and not key:
            alone.append(Sample(member.name, fault=member.fault))
            continue
        if not suffix and not member.fault:
            continue  # a file without suffix, or a hidden one, is no part of a sample
        sample = by_key.setdefault(key, Sample(key))
        if member.fault:
            sample.fault = sample.fault or member.fault
        elif suffix in sample.members:
            if key not in repeated:
                repeated.add(key)
                alone.append(Sample(key, fault=f"duplicate key: a second {suffix}; the first is used"))
        elif len(sample.members) >= max_members:
            sample.fault = sample.fault or f"too many members: more than {max_members}"
        else:
            sample.members[suffix] = (member.offset, member.size)
    return [*by_key.values(), *alone]


def split_name(name: str, last_dot: bool = False) -> tuple[str, str]:
    """(key, suffix in lower case) of a member's name; the suffix is "" where there is none."""
    while name.startswith("./"):
        name = name[2:]
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.rpartition(".") if last_dot else base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem else ("", "")


def member_name(suffix: str) -> str | None:
    """Name in the index of a member of this suffix: "image", "meta", "latent", "clip", ...; None if it has none.

    ``npy``, ``npz`` and ``mp4`` are "latent", "text" and "clip"; ``NAME.npy`` and the like are NAME.
    """
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix == "json":
        return "meta"
    stem, _, kind = suffix.rpartition(".")
    if kind not in _DATA:
        return None
    if not stem:
        return _DATA[kind]
    return stem if re.fullmatch(r"[a-z][a-z0-9_]*", stem) and stem not in ("image", "meta") else None


def _fault(name: str) -> str:
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or re.match(r"[A-Za-z]:", name):
        return "unsafe name: it leads out of the folder"
    if not storable(name):
        return "unsafe name: it is not plain UTF-8"
    if name.rpartition(".")[2].lower() in _PICKLES:
        return "pickle: such a member could run code when it is read"
    return ""


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:262] == b"ustar" and header[262] == 0 and header[345]:  # GNU puts other things there
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "replace")


def _number(digits: bytes) -> int | None:
    if digits[0] & 0x80:  # GNU: base 256
        return int.from_bytes(bytes([digits[0] & 0x7F]) + digits[1:], "big") if digits[0] == 0x80 else None
    text = digits.split(b"\0", 1)[0].strip()
    return int(text or b"0", 8) if re.fullmatch(rb"[0-7]*", text) else None


def _length(header: bytes) -> int | None:
    """Size of the member; None if this is no header."""
    told = _number(header[148:156])
    if told is None or told != 256 + sum(header[:148]) + sum(header[156:]):
        return None
    return _number(header[124:136])


def _next_header(read: Callable[[int, int], bytes], offset: int, size: int) -> int:
    while offset + BLOCK <= size:
        header = read(offset, BLOCK)
        if header[257:262] == b"ustar" and _length(header) is not None:
            return offset
        offset += BLOCK
    return size


def _renamed(kind: bytes, body: bytes) -> dict:
    """What a long name or a pax header says about the member that follows; a global one says nothing we use."""
    if kind == b"L":
        return {"path": body.split(b"\0", 1)[0].decode("utf-8", "replace")}
    found: dict = {}
    while kind == b"x" and (told := re.match(rb"(\d{1,9}) ([^=]+)=", body)):
        value = body[told.end() : int(told[1]) - 1]
        if told[2] == b"path":
            found["path"] = value.decode("utf-8", "replace")
        elif told[2] == b"size" and value.isdigit():
            found["size"] = int(value)
        if int(told[1]) <= told.end():
            break
        body = body[int(told[1]) :]
    return found

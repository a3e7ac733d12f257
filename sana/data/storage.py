"""Byte ranges of named files: in a local folder, or behind any URL that fsspec knows (s3, gs, https, hf, memory).

Whoever reads asks for (name, offset, size). Local files are read with `pread`, so that forked workers can share
descriptors; remote ones with ranged requests, or from a local copy of the whole file when a cache folder is given.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec

T = TypeVar("T")

SCHEMES = ("s3", "gs", "gcs", "http", "https", "hf", "memory", "file")
"""What may stand before "://". Others, "pipe:" above all, are refused: opening data never starts a program."""

_OPEN_FILES = 128
_TRIES = 3


@dataclass(frozen=True)
class Stat:
    """Size in bytes, and a stamp that changes with the contents: time of change, or the server's own version."""

    size: int
    stamp: str


class Storage(Protocol):
    """Files of one folder by their names relative to it."""

    root: str

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """The bytes from `offset`, fewer than `size` only where the file ends; None: to the end.

        Raises:
            FileNotFoundError: no such file.
            OSError: it cannot be read.
        """
        ...

    def stat(self, name: str) -> Stat:
        """Size and stamp of a file; errors as in `read`."""
        ...

    def names(self) -> list[str]:
        """Names of the files directly in the folder, sorted; [] when there is no way to list them."""
        ...

    def walk(self) -> dict[str, Stat]:
        """The files in the folder and below it, sorted, but for hidden ones; {} when there is no way to list them."""
        ...


def scheme(url: str) -> str:
    """The part before "://" or, for "pipe:", before ":"; "" for a path.

    Raises:
        ValueError: it is none of `SCHEMES`.
    """
    found = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):(?=//)|(pipe|exec|cmd):", url, re.I)
    if not found:
        return ""
    name = (found[1] or found[2]).lower()
    if name not in SCHEMES:
        raise ValueError(f"unsafe url: {url[:80]!r}: {name}: is not read; expected a path or {', '.join(SCHEMES[:6])}")
    return name


def open_storage(root: str | Path, cache: str | Path | None = None, cache_bytes: int | None = None) -> Storage:
    """The files of a folder or of a URL.

    Args:
        root: a folder, or "scheme://...".
        cache: for URLs, a local folder that keeps whole files once any byte of them was asked for.
        cache_bytes: greatest total size of `cache`; the files used longest ago go first. None: no limit.

    Raises:
        ValueError: a scheme that is not read.
    """
    name = scheme(str(root))
    if name in ("", "file"):
        return LocalFolder(str(root).removeprefix("file://"))
    remote = RemoteFolder(str(root))
    return CachedFolder(remote, Path(cache), cache_bytes) if cache else remote


class LocalFolder:
    """Files below a folder of this machine; absolute names are taken as they are."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self._files: OrderedDict[str, int] = OrderedDict()
        self._pid = os.getpid()

    def _open(self, name: str) -> int:
        if self._pid != os.getpid():
            # A forked child shares the parent's open files, which is sound (pread has no position), but must not
            # close numbers that its parent's list says, so it begins its own list.
            self._files, self._pid = OrderedDict(), os.getpid()
        handle = self._files.get(name)
        if handle is None:
            handle = os.open(os.path.join(self.root, name), os.O_RDONLY | os.O_CLOEXEC)
            self._files[name] = handle
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(name)
        return handle

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        handle = self._open(name)
        if size is None:
            size = max(0, os.fstat(handle).st_size - offset)
        data = os.pread(handle, size, offset)
        if len(data) < size:  # the end of the file, or more than one call gives (2 GiB)
            parts = [data]
            while data and (got := sum(map(len, parts))) < size:
                data = os.pread(handle, size - got, offset + got)
                parts.append(data)
            return b"".join(parts)
        return data

    def stat(self, name: str) -> Stat:
        facts = os.stat(os.path.join(self.root, name))
        return Stat(facts.st_size, str(facts.st_mtime_ns))

    def names(self) -> list[str]:
        with os.scandir(self.root) as found:
            return sorted(item.name for item in found if item.is_file())

    def walk(self) -> dict[str, Stat]:
        found: dict[str, Stat] = {}
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            with os.scandir(os.path.join(self.root, folder)) as items:
                for item in items:
                    path = f"{folder}/{item.name}" if folder else item.name
                    if item.name.startswith("."):
                        continue
                    if item.is_dir(follow_symlinks=False):
                        waiting.append(path)
                    elif item.is_file():
                        facts = item.stat()
                        found[path] = Stat(facts.st_size, str(facts.st_mtime_ns))
        return dict(sorted(found.items()))

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["root"])

    def __del__(self) -> None:
        if getattr(self, "_pid", None) == os.getpid():
            for handle in self._files.values():
                os.close(handle)


class RemoteFolder:
    """Files below a URL; absolute URLs are taken as they are. Failing requests are tried three times."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._filesystems: dict[str, Any] = {}
        self._pid = os.getpid()

    def _at(self, name: str) -> tuple[Any, str]:
        url = name if scheme(name) else f"{self.root}/{name}"
        if self._pid != os.getpid():  # connections and event loops do not survive a fork
            self._filesystems, self._pid = {}, os.getpid()
        kind = scheme(url)
        if kind == "file":
            raise ValueError(f"unsafe url: {url[:80]!r} is a file of this machine, named by data from elsewhere")
        if kind not in self._filesystems:
            try:
                self._filesystems[kind] = fsspec.filesystem(kind)
            except ImportError as error:
                raise ValueError(f"{url}: {error}") from error
        filesystem = self._filesystems[kind]
        return filesystem, filesystem._strip_protocol(url)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        filesystem, path = self._at(name)
        if size == 0:
            return b""
        if size is None:
            return _retried(lambda: filesystem.cat_file(path, start=offset or None))
        data = _retried(lambda: filesystem.cat_file(path, start=offset, end=offset + size))
        if len(data) > size:  # a server that knows no ranges sends the whole file
            data = data[offset : offset + size]
        return data

    def stat(self, name: str) -> Stat:
        filesystem, path = self._at(name)
        facts = _retried(lambda: filesystem.info(path))
        if facts.get("size") is None:
            raise OSError(f"{name}: the server does not tell its size")
        return _stat(facts)

    def names(self) -> list[str]:
        filesystem, path = self._at("")
        try:
            found = filesystem.ls(path, detail=True)
        except (OSError, NotImplementedError):
            return []
        kinds = ("directory",)
        names = {str(item["name"]).rstrip("/").rsplit("/", 1)[-1] for item in found if item["type"] not in kinds}
        return sorted(name.split("?")[0] for name in names)

    def walk(self) -> dict[str, Stat]:
        filesystem, path = self._at("")
        try:
            found = _retried(lambda: filesystem.find(path, detail=True))
        except (OSError, NotImplementedError):
            return {}
        start = path.rstrip("/") + "/"
        names = {str(name).removeprefix(start): _stat(facts) for name, facts in found.items()}
        return {name: names[name] for name in sorted(names) if not any(p.startswith(".") for p in name.split("/"))}

    def download(self, name: str, target: Path, size: int) -> None:
        """The whole file of `size` bytes, written beside `target` and then renamed."""
        filesystem, path = self._at(name)
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        try:
            _retried(lambda: filesystem.get_file(path, str(partial)))
            if partial.stat().st_size != size:
                raise OSError(f"{name}: {partial.stat().st_size} bytes came, {size} were announced")
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["root"])


class CachedFolder:
    """A remote folder whose files are copied to a local one as a whole when first read.

    Processes share the folder: one copies a file while the others wait for it. A copy is known by its URL and is not
    compared with the original again: empty the folder when that changes.
    """

    def __init__(self, remote: RemoteFolder, folder: Path, limit: int | None = None) -> None:
        self.remote, self.folder, self.limit = remote, folder, limit
        self.root = remote.root
        folder.mkdir(parents=True, exist_ok=True)
        self._local = LocalFolder(folder)
        self._places: dict[str, str] = {}

    def _place(self, name: str) -> str:
        url = name if scheme(name) else f"{self.root}/{name}"
        return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{re.sub(r'[^A-Za-z0-9._-]', '_', name)[-80:]}"

    def _fetch(self, name: str, place: str) -> None:
        path = self.folder / place
        with open(self.folder / f".{place}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                os.utime(path)  # it is wanted: others go before it
            else:
                size = self.remote.stat(name).size
                self._make_room(size)
                self.remote.download(name, path, size)

    def _make_room(self, size: int) -> None:
        if self.limit is None:
            return
        kept = [(item.stat().st_mtime_ns, item) for item in self.folder.iterdir() if not item.name.startswith(".")]
        total = sum(item.stat().st_size for _, item in kept)
        for _, item in sorted(kept):
            if total + size <= self.limit:
                return
            total -= item.stat().st_size
            item.unlink(missing_ok=True)  # who has it open reads on

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        place = self._places.get(name)
        if place is None:
            place = self._place(name)
            self._fetch(name, place)
            self._places[name] = place
        try:
            return self._local.read(place, offset, size)
        except FileNotFoundError:  # another process made room
            self._fetch(name, place)
            return self._local.read(place, offset, size)

    def stat(self, name: str) -> Stat:
        return self.remote.stat(name)

    def names(self) -> list[str]:
        return self.remote.names()

    def walk(self) -> dict[str, Stat]:
        return self.remote.walk()


def _stat(facts: dict[str, Any]) -> Stat:
    stamps = ("ETag", "etag", "mtime", "LastModified", "updated", "created", "Last-Modified")
    return Stat(int(facts.get("size") or 0), next((str(facts[s]) for s in stamps if facts.get(s)), ""))


def _retried(call: Callable[[], T]) -> T:
    for attempt in range(_TRIES):
        try:
            return call()
        except (FileNotFoundError, PermissionError, ValueError):
            raise
        except Exception as error:  # clients raise their own kinds (aiohttp, botocore) for a lost connection
            if attempt == _TRIES - 1:
                raise error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}") from error
            time.sleep(0.2 * 4**attempt)
    raise AssertionError

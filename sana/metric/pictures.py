"""Sets of real images: a folder or WebDataset shards, read one by one, with a fingerprint to cache by."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class Pictures(Sequence[NDArray[np.uint8]]):
    """The images under a place, ordered by name; a slice is a list.

    Args:
        place: a folder of images at any depth, a folder of ``.tar`` shards, or one shard.

    Raises:
        ValueError: there is no such place, or no image in it.
    """

    def __init__(self, place: str | Path) -> None:
        self.place = Path(place)
        if not self.place.exists():
            raise ValueError(f"reference: {place} does not exist; give a folder of images or shards, or a .npz file")
        tars = [self.place] if self.place.suffix == ".tar" else sorted(self.place.glob("*.tar"))
        self.items: list[tuple[Path, int, int]] = []  # file, offset, bytes (0 for all of a plain file)
        digest = hashlib.sha256()
        if tars:
            for path in tars:
                with tarfile.open(path) as shard:
                    for member in shard:
                        if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                            self.items.append((path, member.offset_data, member.size))
        else:
            found = (p for p in self.place.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
            self.items = [(p, 0, 0) for p in sorted(found) if p.name != "grid.png" and p.is_file()]
        if not self.items:
            raise ValueError(
                f"reference: no images in {place}; expected {', '.join(SUFFIXES)} or .tar shards with such"
            )
        for path in dict.fromkeys(p for p, _, _ in self.items):
            about = path.stat()
            digest.update(f"{path.name} {path.parent} {about.st_size} {about.st_mtime_ns}\n".encode())
        digest.update(str(len(self.items)).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: Any) -> Any:
        """Image i as uint8 (h, w, 3), upright; or the list of those of a slice."""
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        path, offset, size = self.items[i]
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size or -1)
        try:
            with Image.open(io.BytesIO(data)) as picture:
                return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
        except (OSError, SyntaxError) as error:
            where = f"{path} at byte {offset}" if size else str(path)
            raise ValueError(f"{where}: cannot be read as an image ({error})") from None

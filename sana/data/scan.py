"""One pass over a tar that somebody else wrote: headers, first bytes of images, and the JSON and text members."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import xxhash

from sana.data.decode import Incomplete, image_size
from sana.data.index import Entry
from sana.data.metadata import Facts, facts, parse_json, parse_text
from sana.data.record import BadSample, Limits
from sana.data.storage import LocalFolder, Storage
from sana.data.tar import IMAGE_SUFFIXES, Sample, Window, member_name, members, samples

Describe = Callable[[str, Mapping[str, Any], str | None], Facts]
"""(key, JSON, text) -> what they say; raises ValueError(reason)."""

_STEP_LOCAL, _STEP_REMOTE = 1 << 13, 1 << 23  # a disk is asked for what is needed, a server for what may be
_HEAD = 4096  # holds the size of nearly every image


def scan_tar(
    storage: Storage,
    name: str,
    shard: int,
    limits: Limits,
    *,
    describe: Describe | None = None,
    last_dot: bool = False,
    checksums: bool = False,
) -> tuple[list[Entry], list[BadSample]]:
    """The samples of one tar, in its order, and those that cannot be used.

    Args:
        storage, name: where it lies.
        shard: its number.
        limits: what a sample may have at most.
        describe: captions and scores of a sample; by default those of its JSON and text.
        last_dot: see `sana.data.tar.samples`.
        checksums: read the images whole and note their checksums.

    Raises:
        OSError: the tar cannot be read at all.
    """
    window = Window(storage, name, _STEP_LOCAL if isinstance(storage, LocalFolder) else _STEP_REMOTE)
    found = members(window.read, storage.stat(name).size)
    if describe is None:
        describe = lambda _, meta, text: facts(meta, text, fields=limits.caption_fields)  # noqa: E731
    entries, bad = [], []
    for sample in samples(found, last_dot=last_dot, max_members=limits.max_members):
        try:
            entries.append(_entry(window, sample, shard, limits, describe, checksums))
        except ValueError as error:
            bad.append(BadSample(name, sample.key, str(error)))
    return entries, bad


def _entry(window: Window, sample: Sample, shard: int, limits: Limits, describe: Describe, checksums: bool) -> Entry:
    if sample.fault:
        raise ValueError(sample.fault)
    places: dict[str, tuple[int, int]] = {}
    for suffix, place in sample.members.items():
        kind = member_name(suffix)
        if (kind or suffix == "txt") and place[1] > limits.max_bytes:
            raise ValueError(f"too many bytes: {place[1]} of {suffix}, more than {limits.max_bytes}")
        if kind and kind not in places:
            places[kind] = place
    if not places.keys() - {"meta"}:
        raise ValueError("no image" if not sample.members.keys() & set(IMAGE_SUFFIXES) else "no image: it is empty")
    meta: dict[str, Any] = {}
    sums = {}
    if "meta" in places:
        body = window.read(*places["meta"])
        meta = parse_json(body)
        sums["meta"] = xxhash.xxh3_64_intdigest(body)
    text = parse_text(window.read(*sample.members["txt"])) if "txt" in sample.members else None
    said = describe(sample.key, meta, text)
    width, height = _stated(meta)
    if "image" in places:
        width, height = head_size(window.read, *places["image"], limits.max_pixels)
        if checksums:
            sums["image"] = xxhash.xxh3_64_intdigest(window.read(*places["image"]))
    return Entry(sample.key, shard, said.captions, width, height, said.scores, said.hq, members=places, checksums=sums)


def head_size(read: Callable[[int, int], bytes], offset: int, size: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) of the image at a place, from as few of its bytes as tell.

    Raises:
        ValueError: it is none, it is damaged, or it is too large; or the place is empty.
    """
    if not size:
        raise ValueError("not an image: it is empty")
    for part in (_HEAD, 1 << 17, size):
        try:
            width, height = image_size(read(offset, min(part, size)))
            break
        except Incomplete as error:
            if part >= size:
                raise ValueError(str(error)) from None
    else:
        raise AssertionError
    if width * height > max_pixels:
        raise ValueError(f"too many pixels: {width}x{height}, more than {max_pixels}")
    return width, height


def _stated(meta: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height as the JSON has them, for samples of latents or clips alone; 0 where it has none."""
    sides = [meta.get(name) for name in ("width", "height")]
    width, height = (side if isinstance(side, int) and 0 < side < 2**31 else 0 for side in sides)
    return width, height

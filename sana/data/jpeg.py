"""JPEGs straight into numpy, in two thirds of the time that Pillow takes with its detour over 32 bits per pixel.

Only plain files are taken: 8 bits, grey or three colours, without a single complaint of the decoder. Their pixels
equal Pillow's bit for bit, for both use libjpeg-turbo; every other file is left to the caller, who asks Pillow.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import simplejpeg

_FRAMES = (0xC0, 0xC1, 0xC2)
"""Start of frame: baseline, extended and progressive, with Huffman codes (ITU-T T.81, table B.1)."""

_BARE = (0x01, *range(0xD0, 0xD9))
"""Markers without a length: TEM, RSTm, SOI."""

_MOST_SEGMENTS = 1000
_SMALLEST = 16
"""A smaller side is never scaled: the eighths of the decoder are then less than two pixels apart."""


class Plain(NamedTuple):
    """Width and height of a plain JPEG in pixels, and its EXIF ("" without any)."""

    width: int
    height: int
    exif: bytes


def plain(data: bytes) -> Plain | None:
    """What the markers before the first scan say; None unless the file is plain."""
    at, size, exif = 2, None, b""
    for _ in range(_MOST_SEGMENTS):
        if data[at : at + 1] != b"\xff":
            return None
        marker, at = data[at + 1] if at + 1 < len(data) else 0, at + 2
        if marker == 0xFF:  # fill byte
            at -= 1
            continue
        if marker in _BARE:
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        if length < 2 or at + length > len(data):
            return None
        if marker in _FRAMES:
            if size is not None or length < 8 or data[at + 2] != 8 or data[at + 7] not in (1, 3):
                return None
            size = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 3 : at + 5], "big")
        elif marker == 0xE1 and data[at + 2 : at + 8] == b"Exif\0\0":
            if exif:  # in several pieces
                return None
            exif = data[at + 2 : at + length]
        elif marker == 0xDA:
            return None if size is None or 0 in size else Plain(*size, exif)
        at += length
    return None


def decode(data: bytes, facts: Plain, need: tuple[int, int] | None = None) -> np.ndarray | None:
    """Pixels as they are stored, uint8 (H, W, 3), or None where the decoder complains of anything.

    Args:
        data: the whole file.
        facts: what `plain` says of it.
        need: least height and width. The image is decoded at 1/2, 1/4 or 1/8 of its sides where that leaves as much,
            rounded up, as libjpeg does.
    """
    smaller = 1
    if need is not None and min(facts.width, facts.height) >= _SMALLEST:
        most = min(facts.height // need[0], facts.width // need[1])
        smaller = next((factor for factor in (8, 4, 2) if most >= factor), 1)
    try:
        # The library's own choice among the eighths is the smallest that is large enough: ask for exactly ours.
        pixels = simplejpeg.decode_jpeg(
            data, min_height=-(-facts.height // smaller), min_width=-(-facts.width // smaller)
        )
    except ValueError:
        return None
    return pixels if pixels.shape == (-(-facts.height // smaller), -(-facts.width // smaller), 3) else None

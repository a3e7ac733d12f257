"""Image bytes of any origin -> upright RGB pixels; what is no sound image is refused with a short reason.

The format is told by the content, never by a name. The number of pixels is checked before anything is decoded.
Only formats with small, well-tested parsers are accepted: JPEG, PNG, WebP, GIF, BMP and AVIF.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
from PIL import AvifImagePlugin, BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from sana.data import jpeg

MAX_PIXELS = 64_000_000
"""Default limit, 8000 x 8000: above any training resolution, far below what fills the memory."""

Image.preinit()  # registers what the plugins' own loaders look up

_ORIENTATION = 0x0112
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright (EXIF 2.32, table 4, tag 0x0112)."""

_NAMES = {
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<?xm": "XML",
    b"<!DO": "HTML",
    b"<htm": "HTML",
    b"<HTM": "HTML",
    b"PK\x03\x04": "ZIP",
    b"\x1f\x8b": "gzip",
}
"""Beginnings of files that often bear the name of an image."""


class Incomplete(ValueError):
    """The bytes given to `image_size` end before the size is known."""


def image_format(data: bytes) -> str | None:
    """ "jpg", "png", "webp", "gif", "bmp" or "avif" by the first 32 bytes; None for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[4:8] == b"ftyp" and (b"avif" in data[8:32] or b"avis" in data[8:32]):
        return "avif"
    if data[:2] == b"BM":
        return "bmp"
    return None


_OPEN: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "jpg": JpegImagePlugin.JpegImageFile,  # also the first picture of the two-lens and depth files of phones
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "avif": AvifImagePlugin.AvifImageFile,
}


def decode_image(data: bytes, *, size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Pixels of an image, upright, the first frame if it is animated.

    Args:
        data: the whole file.
        size: least height and width that the caller needs. A JPEG at least twice as large is then decoded at 1/2,
            1/4 or 1/8 of its size, which saves most of the work; never below `size` unless the image is.
        max_pixels: greatest width x height of the stored image.

    Returns:
        uint8 (H, W, 3), RGB; perhaps read-only. Transparency is over white, 16 bits are rounded to 8, CMYK is
        converted as (1 - C)(1 - K).

    Raises:
        ValueError: "not an image", "too many pixels" or "corrupt image", each with a detail.
    """
    kind = _known(data)
    try:
        pixels = _plain_jpeg(data, size, max_pixels) if kind == "jpg" else None
        if pixels is None:
            with warnings.catch_warnings():
                # Pillow warns about large but allowed images, which does not concern the pixels.
                warnings.simplefilter("ignore")
                pixels = np.asarray(_picture(data, kind, size, max_pixels))
        return pixels
    except _TooLarge as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # a parser of untrusted bytes: whatever it raises means that they are unfit
        raise ValueError(f"corrupt image: {_said(error)}") from error


def _plain_jpeg(data: bytes, size: tuple[int, int] | None, max_pixels: int) -> np.ndarray | None:
    """The pixels of a plain JPEG, None for any other."""
    facts = jpeg.plain(data)
    if facts is None:
        return None
    _check((facts.width, facts.height), max_pixels)
    turn = _turn(facts.exif)
    need = (size[1], size[0]) if size is not None and turn > 4 else size
    pixels = jpeg.decode(data, facts, need)
    if pixels is None or turn == 1:
        return pixels
    return np.asarray(Image.fromarray(pixels).transpose(_TURN[turn]))


def _picture(data: bytes, kind: str, size: tuple[int, int] | None, max_pixels: int) -> Image.Image:
    """What Pillow makes of an image, of mode RGB and upright."""
    picture = _open(data, kind, max_pixels)
    turn = _turn(picture.info.get("exif"))
    if size is not None and kind == "jpg":
        height, width = size if turn < 5 else size[::-1]
        picture.draft("RGB", (width, height))
    picture.load()
    picture = _rgb(picture)
    return picture.transpose(_TURN[turn]) if turn > 1 else picture


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the upright image, from the beginning of its file, without decoding.

    Args:
        data: the first bytes of the file, or all of it.

    Raises:
        Incomplete: when `data` ends before the size is known; the whole file then tells, or is damaged.
        ValueError: as `decode_image`.
    """
    if len(data) < 16:
        raise Incomplete("corrupt image: ends within its header")
    kind = _known(data)
    if kind == "webp":
        size, exif = _webp_header(data)
        if not exif:  # the orientation stands at the end of the file; the decoder reads it from all of it
            return size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = _open(data, kind, None)
            width, height = picture.size
            return (width, height) if _turn(picture.info.get("exif")) < 5 else (height, width)
    except Exception as error:
        raise Incomplete(f"corrupt image: {_said(error)}") from error


class _TooLarge(Exception):
    pass


def _known(data: bytes) -> str:
    kind = image_format(data)
    if kind is None:
        name = next((n for start, n in _NAMES.items() if data[:64].lstrip()[: len(start)] == start), None)
        what = "it is empty" if not data else f"it is {name}" if name else f"it begins with {data[:4].hex(' ')}"
        raise ValueError(f"not an image: {what}")
    return kind


def _open(data: bytes, kind: str, max_pixels: int | None) -> Image.Image:
    if max_pixels is not None and kind == "webp":  # whose opener already allocates the canvas
        _check(_webp_header(data)[0], max_pixels)
    picture = _OPEN[kind](io.BytesIO(data))
    if max_pixels is not None:
        _check(picture.size, max_pixels)
    return picture


def _check(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise _TooLarge(f"too many pixels: {width}x{height}, more than {max_pixels}")


def _webp_header(data: bytes) -> tuple[tuple[int, int], bool]:
    """(width, height) and whether there is EXIF (RFC 9649, sections 2.5 to 2.7)."""
    if len(data) < 30:
        raise Incomplete("corrupt image: ends within its header")
    kind = data[12:16]
    if kind == b"VP8X":
        flags, size = data[20], (1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little"))
        return size, bool(flags & 0x08)
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1), False
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = int.from_bytes(data[26:28], "little"), int.from_bytes(data[28:30], "little")
        return (width & 0x3FFF, height & 0x3FFF), False
    raise ValueError("corrupt image: no WebP bitstream")


def _turn(exif: bytes | None) -> int:
    """The orientation that EXIF says, 1 to 8; 1 when it is absent or cannot be read.

    It is asked before the pixels are loaded, so that `image_size` and `decode_image` agree about PNGs.
    """
    if not exif:
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            facts = Image.Exif()
            facts.load(exif)
            turn = facts.get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF is common and leaves the pixels sound
        return 1
    return turn if turn in _TURN else 1


def _rgb(picture: Image.Image) -> Image.Image:
    mode = picture.mode
    if mode == "RGB" and "transparency" not in picture.info:
        return picture
    if mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip at 255
        grey = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _said(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

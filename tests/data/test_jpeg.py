"""The fast way of reading JPEGs against Pillow, bit for bit, at whole size and at parts of it."""

from __future__ import annotations

import io
from itertools import product

import numpy as np
import pytest
from PIL import Image

from sana.data import jpeg
from sana.data.decode import decode_image


def encoded(height: int, width: int, mode: str = "RGB", **options: object) -> bytes:
    rng = np.random.default_rng(height * width)
    coarse = Image.fromarray(rng.integers(0, 256, (max(2, height // 5), max(2, width // 7), 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height)).convert(mode).save(buffer, "JPEG", **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def by_pillow(data: bytes, factor: int = 1) -> np.ndarray:
    picture = Image.open(io.BytesIO(data))
    if factor > 1:
        picture.draft("RGB", (picture.width // factor, picture.height // factor))
    return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(1, 1), (37, 53), (64, 64), (255, 131), (17, 200), (515, 300)])
def test_pixels_equal_pillow(size: tuple[int, int], mode: str) -> None:
    for quality, subsampling, progressive in product((50, 100), (0, 1, 2), (False, True)):
        data = encoded(*size, mode, quality=quality, subsampling=subsampling, progressive=progressive)
        facts = jpeg.plain(data)
        assert facts is not None
        assert (facts.height, facts.width) == size
        assert facts.exif == b""
        for factor in (1, 2, 4, 8):
            if min(size) // factor:
                got = jpeg.decode(data, facts, (size[0] // factor, size[1] // factor) if factor > 1 else None)
                assert got is not None
                assert np.array_equal(got, by_pillow(data, factor if min(size) >= 16 else 1))


def test_colours_that_are_not_transformed() -> None:
    data = encoded(40, 50, quality=95, keep_rgb=True)
    assert jpeg.plain(data) is not None
    assert np.array_equal(decode_image(data), by_pillow(data))


def test_what_is_not_plain_is_left_to_pillow() -> None:
    cmyk = encoded(40, 50, "CMYK")
    assert jpeg.plain(cmyk) is None
    whole = encoded(40, 50)
    for cut in range(2, len(whole) - 2, 7):
        facts = jpeg.plain(whole[:cut])
        assert facts is None or jpeg.decode(whole[:cut], facts) is None
    assert jpeg.plain(b"\xff\xd8" + b"\xff" * 5000) is None
    assert jpeg.plain(b"\xff\xd8") is None
    twice = whole[:2] + 2 * (b"\xff\xe1\x00\x0aExif\0\0ab"[:12]) + whole[2:]
    assert jpeg.plain(twice) is None
    # What Pillow forgives, such as bytes before a marker, is still read, by Pillow.
    at = whole.index(b"\xff\xda")
    odd = whole[:at] + b"\0\0\0" + whole[at:]
    assert jpeg.plain(odd) is None
    assert decode_image(odd).shape == (40, 50, 3)


def test_random_damage_never_gives_other_pixels_than_pillow() -> None:
    whole, rng = encoded(48, 64, quality=90), np.random.default_rng(0)
    agreed = 0
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(2, len(data), 3).tolist():
            data[place] ^= 1 << int(rng.integers(8))
        try:
            expected = by_pillow(bytes(data))
        except Exception:  # whatever Pillow raises, we refuse
            with pytest.raises(ValueError):
                decode_image(bytes(data))
            continue
        got = decode_image(bytes(data))
        if got.shape == expected.shape:  # EXIF that arose by chance may turn it
            agreed += 1
            assert np.array_equal(got, expected)
    assert agreed > 50

"""Images as they come: every kind that is sound gives the pixels it shows, every other one a reason."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from sana.data.decode import Incomplete, decode_image, image_format, image_size
from sana.data.record import REASONS, BadSample


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Waves of low frequency, which JPEG keeps within a few grey levels."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / width * a + y / height * b) for a, b in ((3, 1), (1, 4), (2, 2))]
    return np.stack([127.5 + 100 * w for w in waves], -1).round().astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (33, 2)])
def test_lossless_formats_exactly(kind: str, shape: tuple[int, int]) -> None:
    pixels = noise(*shape)
    data = encode(Image.fromarray(pixels), kind, **({"lossless": True} if kind == "WEBP" else {}))
    got = decode_image(data)
    assert got.dtype == np.uint8
    assert np.array_equal(got, pixels)
    assert image_size(data) == shape[::-1]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF"])
def test_lossy_formats_nearly(kind: str) -> None:
    pixels = smooth(67, 45)
    data = encode(Image.fromarray(pixels), kind, quality=95)
    assert np.abs(decode_image(data).astype(int) - pixels).mean() < 2
    assert image_size(data) == (45, 67)


def test_grey_and_one_bit() -> None:
    grey = noise(9, 5, 1)
    assert np.array_equal(decode_image(encode(Image.fromarray(grey), "PNG")), np.stack([grey] * 3, -1))
    bits = grey > 127
    assert np.array_equal(decode_image(encode(Image.fromarray(bits), "PNG")), np.stack([bits * 255] * 3, -1))
    assert decode_image(encode(Image.fromarray(smooth(16, 16)[..., 0]), "JPEG")).shape == (16, 16, 3)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_file(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes, late: bytes = b"") -> bytes:
    """A PNG written from its specification alone."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [
        png_chunk(b"IHDR", header),
        *extra,
        png_chunk(b"IDAT", zlib.compress(rows)),
        late,
        png_chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_not_clipped(channels: int) -> None:
    values = np.random.default_rng(3).integers(0, 65536, (4, 6, channels), dtype=np.uint16)
    values[0, 0] = 65535
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)
    got = decode_image(png_file(6, 4, 16, 0 if channels == 1 else 2, rows))
    assert np.abs(got.astype(float) - values / 257.0).max() <= 1  # Pillow truncates where we round
    assert got[0, 0].tolist() == [255, 255, 255]


def test_palette_and_its_transparency() -> None:
    palette = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255])
    rows = b"\x00" + bytes([0, 1, 2])
    plain = decode_image(png_file(3, 1, 8, 3, rows, png_chunk(b"PLTE", palette)))
    assert plain[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    clear = decode_image(
        png_file(3, 1, 8, 3, rows, png_chunk(b"PLTE", palette), png_chunk(b"tRNS", bytes([255, 0, 128])))
    )
    assert clear[0].tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 255]]


def test_colour_key_is_transparent() -> None:
    rows = b"\x00" + bytes([9, 8, 7, 1, 2, 3])
    key = png_chunk(b"tRNS", struct.pack(">HHH", 9, 8, 7))
    assert decode_image(png_file(2, 1, 8, 2, rows, key))[0].tolist() == [[255, 255, 255], [1, 2, 3]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_over_white(kind: str) -> None:
    rgba = noise(8, 9, 4)
    data = encode(Image.fromarray(rgba), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    alpha = rgba[..., 3:] / 255.0
    assert np.abs(decode_image(data) - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1


def test_grey_with_alpha_is_over_white() -> None:
    la = noise(4, 5, 2)
    alpha = la[..., 1] / 255.0
    expected = la[..., 0] * alpha + 255 * (1 - alpha)
    got = decode_image(encode(Image.fromarray(la, "LA"), "PNG"))
    assert np.abs(got - expected[..., None]).max() <= 1


def test_cmyk() -> None:
    ink = np.concatenate([smooth(32, 32), np.full((32, 32, 1), 40, np.uint8)], -1)
    data = encode(Image.fromarray(ink, "CMYK"), "JPEG", quality=98)
    expected = 255 * (1 - ink[..., :3] / 255.0) * (1 - ink[..., 3:] / 255.0)
    assert np.abs(decode_image(data) - expected).mean() < 2


UPRIGHT = {  # what EXIF 2.32 says the stored rows and columns are, undone with numpy
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("turn", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_exif_orientation(turn: int, kind: str) -> None:
    pixels = smooth(24, 40)
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 98}}[kind]
    data = encode(Image.fromarray(pixels), kind, exif=exif, **options)
    expected = UPRIGHT[turn](pixels)
    got = decode_image(data)
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).mean() < (0.01 if kind != "JPEG" else 2)
    assert image_size(data) == (expected.shape[1], expected.shape[0])


def test_damaged_exif_leaves_the_picture() -> None:
    pixels = smooth(16, 24)
    for exif in (
        b"Exif\x00\x00garbage",
        b"Exif\x00\x00MM\x00*\xff\xff\xff\xff",
        b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff",
    ):
        data = encode(Image.fromarray(pixels), "JPEG", exif=exif)
        assert decode_image(data).shape == (16, 24, 3)
        assert image_size(data) == (24, 16)


def test_late_exif_of_png_is_ignored_by_both() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png_file(3, 1, 8, 0, b"\x00\x01\x02\x03", late=png_chunk(b"eXIf", exif.tobytes()[6:]))
    assert decode_image(data).shape == (1, 3, 3)
    assert image_size(data) == (3, 1)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind: str) -> None:
    first, second = np.zeros((8, 6, 3), np.uint8), np.full((8, 6, 3), 255, np.uint8)
    first[:, :3] = (255, 0, 0)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(first), kind, save_all=True, append_images=[Image.fromarray(second)], **options)
    assert np.array_equal(decode_image(data), first)


def test_content_tells_the_format() -> None:
    for kind, name in (
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("WEBP", "webp"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("AVIF", "avif"),
    ):
        assert image_format(encode(Image.fromarray(smooth(16, 16)), kind)) == name


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image: it is empty"),
        (b"<!DOCTYPE html><title>404</title>" * 3, "not an image: it is HTML"),
        (encode(Image.fromarray(noise(4, 4)), "TIFF"), "not an image: it is TIFF"),
        (b"\x00\x01\x02\x03" * 9, "not an image: it begins with 00 01 02 03"),
        (b"\xff\xd8\xff" + bytes(60), "corrupt image: "),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 " + bytes(40), "corrupt image: "),
        (b"GIF89a" + bytes(4), "corrupt image: "),
    ],
)
def test_refusals(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}"):
        decode_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(kind: str, part: float) -> None:
    data = encode(Image.fromarray(noise(64, 48)), kind)
    with pytest.raises(ValueError, match=r"^(corrupt image|not an image)"):
        decode_image(data[: int(len(data) * part)])


@pytest.mark.parametrize("seed", range(3))
def test_corrupt_bytes_raise_nothing_else(seed: int) -> None:
    rng = np.random.default_rng(seed)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF"):
        data = encode(Image.fromarray(smooth(40, 40)), kind, **({"exif": exif} if kind not in ("GIF", "BMP") else {}))
        for _ in range(60):
            broken = bytearray(data)
            for place in rng.integers(0, len(data), rng.integers(1, 12)):
                broken[place] = rng.integers(0, 256)
            for read in (lambda b: decode_image(b, max_pixels=10**6), image_size):
                said = ""
                try:
                    read(bytes(broken))
                except ValueError as error:
                    said = str(error)
                assert said.split(":")[0] in ("", *REASONS)


def test_bombs_are_refused_before_decoding() -> None:
    # 30000 x 30000 grey pixels, 900 MB decoded, in less than a megabyte.
    rows = zlib.compress(bytes(10))
    png = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0))
    png += png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    gif = (
        b"GIF89a"
        + struct.pack("<HH", 65535, 65535)
        + b"\x00\x00\x00"
        + b"\x2c"
        + struct.pack("<HHHH", 0, 0, 65535, 65535)
    )
    webp = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x00" * 4
    webp += (16382).to_bytes(3, "little") + (16382).to_bytes(3, "little")
    for data, size in ((png, "30000x30000"), (webp, "16383x16383"), (gif + b"\x00" * 8, "65535x65535")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match=f"^too many pixels: {size}, more than 64000000"):
                decode_image(data)
    fine = encode(Image.fromarray(noise(10, 10)), "PNG")
    assert decode_image(fine, max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(ValueError, match=r"^too many pixels: 10x10, more than 99"):
        decode_image(fine, max_pixels=99)


def test_size_from_the_beginning_of_a_file() -> None:
    data = encode(Image.fromarray(noise(300, 200)), "JPEG", quality=95, icc_profile=bytes(30_000))
    with pytest.raises(Incomplete):
        image_size(data[:4096])
    assert image_size(data[:40_000]) == (200, 300)
    for kind in ("PNG", "WEBP", "BMP"):
        assert image_size(encode(Image.fromarray(noise(300, 200)), kind)[:4096]) == (200, 300)


@pytest.mark.parametrize("turn", [1, 6])
def test_draft_is_large_enough_and_the_same_picture(turn: int) -> None:
    pixels = smooth(517, 1031)
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encode(Image.fromarray(pixels), "JPEG", quality=95, exif=exif)
    upright = UPRIGHT[turn](pixels)
    height, width = upright.shape[:2]
    for factor, need in ((1, (height // 2 + 1, width // 2 + 1)), (2, (height // 2, width // 2)), (4, (height // 5, 3))):
        if factor == 4:
            need = (height // 5, width // 4)
        got = decode_image(data, size=need)
        assert got.shape[:2] == (-(-height // factor), -(-width // factor))
        assert got.shape[0] >= need[0]
        assert got.shape[1] >= need[1]
        rows, columns = height // factor, width // factor
        boxes = upright[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor, 3).mean((1, 3))
        assert np.abs(got[:rows, :columns] - boxes).mean() < 1.5
    assert decode_image(data, size=(height * 2, width)).shape == upright.shape


def test_bad_sample_is_one_line_and_crosses_processes() -> None:
    import pickle

    bad = BadSample("a.tar", "k\n\x1b[2J", "corrupt image: " + "x" * 999)
    same = pickle.loads(pickle.dumps(bad))  # noqa: S301
    assert same.entry() == bad.entry()
    assert bad.kind == "corrupt image"
    assert len(bad.reason) == 200
    assert "\n" not in str(bad)
    assert "\x1b" not in str(bad)

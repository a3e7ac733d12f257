"""Video reading: exact times, uniform rates, true colours; against the frames that were written and closed forms."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from sana.data.video import count_at, covering_box, encode_mp4, longest, pick, probe, read_clip


def gradient(frames: int, height: int, width: int) -> np.ndarray:
    """Frame k has the brightness 40 + 4 k, with a mark in its upper left quarter."""
    pictures = np.empty((frames, height, width, 3), np.uint8)
    pictures[:] = (40 + 4 * np.arange(frames, dtype=np.uint8))[:, None, None, None]
    pictures[:, : height // 2, : width // 2] = 230
    return pictures


def number(frames: np.ndarray) -> np.ndarray:
    """Which frame of `gradient` each is, from the brightness of its lower right quarter."""
    h, w = frames.shape[1:3]
    return np.round((frames[:, h // 2 + 4 :, w // 2 + 4 :].mean(axis=(1, 2, 3)) - 40) / 4).astype(int)


def at_times(pictures: np.ndarray, milliseconds: list[int], **options: object) -> bytes:
    """An mp4 (or another container) whose frames come at given times."""
    buffer = io.BytesIO()
    kind = str(options.get("format", "mp4"))
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream("libx264", rate=1000, options={"crf": "10", "x264-params": "asm=0"})
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
        stream.codec_context.time_base = Fraction(1, 1000)
        for picture, when in zip(pictures, milliseconds, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = when, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(("fps", "count"), [(24.0, 25), (Fraction(30000, 1001), 31), (10.0, 9)])
def test_times_are_those_of_the_file(fps: float, count: int) -> None:
    data = encode_mp4(gradient(count, 32, 48), fps)
    info = probe(data)
    assert (info.width, info.height, info.frames) == (48, 32, count)
    np.testing.assert_allclose(info.times, np.arange(count) / float(fps), atol=1e-4)  # a tick of the container
    assert info.fps == pytest.approx(float(fps), rel=1e-3)
    video = read_clip(data, count)
    np.testing.assert_array_equal(number(video.frames), np.arange(count))
    np.testing.assert_array_equal(video.index, np.arange(count))


@pytest.mark.parametrize(("source", "fps"), [(30.0, 16.0), (24.0, 8.0), (25.0, 24.0), (60.0, 7.0)])
def test_uniform_rate_takes_the_nearest_frame(source: float, fps: float) -> None:
    count = 41
    data = encode_mp4(gradient(count, 32, 32), source)
    available = int((count - 1) / source * fps + 1e-9) + 1
    assert count_at(probe(data), fps) == available
    for u in (0.0, 0.5, 0.999):
        frames = min(5, available)
        video = read_clip(data, frames, fps, u=u)
        start = int(u * (available - frames + 1))
        targets = (start + np.arange(frames)) / fps
        # Independently: the distance to every frame of the source.
        distance = np.abs(targets[:, None] - np.arange(count)[None] / source)
        assert (distance[np.arange(frames), video.index] <= distance.min(axis=1) + 1e-4).all()
        assert np.abs(video.times - targets).max() <= 0.5 / source + 1e-4
        np.testing.assert_array_equal(number(video.frames), video.index)
        assert video.fps == fps


def test_any_start_of_a_long_video_with_b_frames() -> None:
    """Seeking to key frames gives the frames that decoding from the beginning gives."""
    data = encode_mp4(gradient(47, 32, 32), 24.0, key_every=7)
    whole = read_clip(data, 47).frames
    for start in range(0, 43, 3):
        video = read_clip(data, 5, u=(start + 0.5) / 43)
        assert video.index[0] == start
        np.testing.assert_array_equal(video.frames, whole[start : start + 5])


def test_variable_rate() -> None:
    milliseconds = [0, 40, 60, 130, 160, 210, 240, 290, 500, 540]
    for kind in ("mp4", "matroska"):
        data = at_times(gradient(10, 32, 32), milliseconds, format=kind)
        np.testing.assert_allclose(probe(data).times, np.array(milliseconds) / 1000, atol=1e-6)
        video = read_clip(data, 3, 10.0)
        assert video.index.tolist() == [0, 3, 5]  # 0, 100 (130 is nearer than 60), 200 ms
        np.testing.assert_array_equal(number(video.frames), [0, 3, 5])
        with pytest.raises(ValueError, match=r"no new frame near 0\.\d+ s for 10 per second"):
            read_clip(data, 6, 10.0)  # nothing comes between 290 and 500 ms


def test_refused_rates_and_lengths() -> None:
    info = probe(encode_mp4(gradient(10, 32, 32), 12.0))
    with pytest.raises(ValueError, match=r"12\.000 frames per second, 24 asked: frames would repeat"):
        pick(info, 5, 24.0)
    with pytest.raises(ValueError, match="10 frames, 11 asked"):
        pick(info, 11)
    assert pick(info, 10, 12.05).tolist() == list(range(10))  # the same rate but for rounding
    assert [longest(n, 4) for n in (0, 1, 4, 5, 81, 84)] == [0, 1, 1, 5, 81, 81]


@pytest.mark.parametrize("matrix", [1, 5])
def test_colours(matrix: int) -> None:
    """Flat colours come back within rounding, whichever matrix the file says: against BT.709 and BT.601 by hand."""
    red, blue = {1: (0.2126, 0.0722), 5: (0.299, 0.114)}[matrix]
    for rgb in ((200, 30, 60), (20, 140, 90), (240, 240, 20)):
        r, g, b = (c / 255 for c in rgb)
        luma = red * r + (1 - red - blue) * g + blue * b
        y = round(16 + 219 * luma)
        u, v = (round(128 + 224 * d) for d in ((b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)))
        planes = np.concatenate([np.full(32 * 32, y), np.full(16 * 16, u), np.full(16 * 16, v)]).astype(np.uint8)
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=10, options={"qp": "1"})
            stream.width = stream.height = 32
            stream.pix_fmt, stream.codec_context.colorspace = "yuv420p", matrix
            frame = av.VideoFrame.from_ndarray(planes.reshape(48, 32), format="yuv420p")
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        shown = read_clip(buffer.getvalue(), 1).frames[0].reshape(-1, 3)
        assert np.abs(shown.astype(int) - rgb).max() <= 3
        # Our writer says its matrix, so its colours come back too.
        ours = read_clip(encode_mp4(np.full((2, 32, 32, 3), rgb, np.uint8), 10.0), 2).frames
        assert np.abs(ours.astype(int) - rgb).max() <= 4


def test_resize_and_crop_centre() -> None:
    assert covering_box(64, 36, 32, 32) == (14.0, 0.0, 50.0, 36.0)
    assert covering_box(10, 30, 20, 10) == (0.0, 12.5, 10.0, 17.5)
    pictures = np.full((3, 36, 64, 3), 100, np.uint8)
    pictures[:, :, :14] = 250  # what the crop leaves out
    video = read_clip(encode_mp4(pictures, 10.0), 3, size=(32, 32))
    assert video.frames.shape == (3, 32, 32, 3)
    assert video.size == (64, 36)
    assert np.abs(video.frames[:, :, 1:].astype(int) - 100).max() < 16  # chroma and codec blur one column


def test_the_same_bytes_each_time() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    assert len({encode_mp4(noise, 16.0) for _ in range(8)}) == 1


def test_what_is_no_video_is_refused_in_one_line() -> None:
    good = encode_mp4(gradient(12, 32, 32), 12.0)
    cases = {
        b"": "not an mp4",
        b"\x89PNG\r\n\x1a\n" + bytes(100): "not an mp4",
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n": "not an mp4",  # a playlist would make FFmpeg open other files
        b"ffconcat version 1.0\nfile /etc/passwd\n": "not an mp4",
        good[:200]: "cannot be decoded",
        good[:12] + bytes(len(good) - 12): ".",
    }
    for data, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            read_clip(data, 2)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="32x32 pixels, more than 1000"):
        read_clip(good, 2, max_pixels=1000)
    with pytest.raises(ValueError, match="even sides, got 32x31"):
        encode_mp4(gradient(2, 31, 32), 10.0)


def test_damaged_bytes_never_leave_as_another_error() -> None:
    good = encode_mp4(gradient(12, 32, 32), 12.0)
    rng, refused = np.random.default_rng(1), 0
    for _ in range(60):
        data = bytearray(good)
        for at in rng.integers(0, len(data), 3):
            data[at] ^= 1 << int(rng.integers(8))
        try:
            assert read_clip(bytes(data), 12).frames.shape[0] == 12
        except ValueError:
            refused += 1
    assert refused > 0

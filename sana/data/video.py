"""Video clips: from the bytes of an mp4 to uniformly spaced frames with their exact times.

Times come from the file's presentation timestamps, not from a nominal rate, and every returned frame says which frame
of the source it is, so that what belongs to frames (cameras) is taken along without interpolation. Only the frames from
the last key frame before the clip up to its end are decoded.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

MAX_PIXELS = 36_000_000  # 8K; refuse bombs before a frame is decoded
MAX_FRAMES = 100_000  # of a source video; an hour at 24 fps
SAME_RATE = 0.01  # rates closer than this are the same: every frame is taken, none twice

# FFmpeg guesses among its demuxers, and some of them (HLS, concat) open other files that the data name. So the kind is
# told from the first bytes, and only these two are ever opened.
_DEMUXERS = ((4, b"ftyp", "mov"), (0, b"\x1aE\xdf\xa3", "matroska"))
# Matrix from YUV to RGB: FFmpeg's number in a frame -> its scaler's. Those that do not say: by height.
_MATRICES = {1: 1, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
_UNSAID = 2


@dataclass(frozen=True)
class VideoInfo:
    """What a video's container says, without decoding it.

    Attributes:
        width, height: pixels as coded, before rotation.
        times: (F,) float64, seconds of each frame after the first, increasing.
        fps: mean rate, (F - 1) / times[-1]; the container's for a single frame.
    """

    width: int
    height: int
    times: np.ndarray
    fps: float

    @property
    def frames(self) -> int:
        """F, the number of frames."""
        return len(self.times)


@dataclass(frozen=True)
class Video:
    """Frames of one clip.

    Attributes:
        frames: (f, H, W, 3) uint8 RGB.
        index: (f,) int64, which frame of the source each is.
        times: (f,) float64, seconds of each after the source's first frame, as its timestamps say.
        fps: rate at which the clip is to be played.
        size: (width, height) of the source as it is shown, after rotation.
        box: (left, top, right, bottom) of the part of the source that the frames show, in its pixels.
    """

    frames: np.ndarray
    index: np.ndarray
    times: np.ndarray
    fps: float
    size: tuple[int, int]
    box: tuple[float, float, float, float]


def probe(data: bytes) -> VideoInfo:
    """Size, rate and frame times of a video, from its packets.

    Raises:
        ValueError: not an mp4, mov, webm or mkv; no video in it; too large; or frames without or with equal times.
    """
    with _open(data) as (container, stream):
        pts = np.array([packet.pts for packet in _packets(container, stream)])
        return _info(stream, np.sort(pts))


def count_at(info: VideoInfo, fps: float | None) -> int:
    """How many frames a video gives at a rate, None for its own.

    Raises:
        ValueError: the rate is not positive, or higher than the video's (frames would repeat).
    """
    if fps is None or _same(fps, info.fps):
        return info.frames
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    if fps > info.fps:
        raise ValueError(f"{info.fps:.3f} frames per second, {fps:g} asked: frames would repeat")
    return math.floor(float(info.times[-1]) * fps + 1e-6) + 1


def longest(count: int, stride: int) -> int:
    """The greatest f = 1 + k stride within `count` frames, for autoencoders with that stride in time; 0 for none."""
    return 0 if count < 1 else 1 + (count - 1) // stride * stride


def pick(info: VideoInfo, frames: int, fps: float | None = None, u: float = 0.0) -> np.ndarray:
    """Which frames of a video make a clip: (frames,) int64, increasing.

    Targets are evenly spaced in time and each takes the nearest frame, so no time is off by more than half a frame of
    the source.

    Args:
        frames: length of the clip.
        fps: its rate; None, or within 1 % of the source's: every frame of the source.
        u: in [0, 1), where the clip begins: 0 the first frame, evenly over all starts that leave room.

    Raises:
        ValueError: too few frames, a rate above the source's, or a gap in the source in which no new frame comes.
    """
    available = count_at(info, fps)
    if not 1 <= frames <= available:
        rate = "" if fps is None else f" at {fps:g} per second"
        raise ValueError(f"{available} frames{rate}, {frames} asked")
    start = int(u * (available - frames + 1))
    if fps is None or _same(fps, info.fps):
        return np.arange(start, start + frames, dtype=np.int64)
    if info.frames == 1:
        return np.zeros(1, np.int64)
    targets = (start + np.arange(frames)) / fps
    right = np.clip(np.searchsorted(info.times, targets), 1, info.frames - 1)
    nearer_left = targets - info.times[right - 1] <= info.times[right] - targets
    index = right - nearer_left
    repeated = np.flatnonzero(np.diff(index) == 0)
    if len(repeated):
        raise ValueError(f"no new frame near {targets[repeated[0] + 1]:.3f} s for {fps:g} per second")
    return index.astype(np.int64)


def read_clip(
    data: bytes,
    frames: int,
    fps: float | None = None,
    *,
    size: tuple[int, int] | None = None,
    u: float = 0.0,
    max_pixels: int = MAX_PIXELS,
) -> Video:
    """Decode a clip of a video.

    Args:
        data: the whole file.
        frames, fps, u: see `pick`.
        size: (height, width) to scale and centre-crop every frame to, bicubic; None: as they are.
        max_pixels: greatest frame that is decoded.

    Raises:
        ValueError: what `probe` and `pick` refuse, or frames that cannot be decoded.
    """
    with _open(data, max_pixels) as (container, stream):
        packets = list(_packets(container, stream))
        pts = np.sort(np.array([packet.pts for packet in packets]))
        info = _info(stream, pts)
        index = pick(info, frames, fps, u)
        wanted = pts[index]
        begin = [p for p in packets if p.is_keyframe and p.pts <= wanted[0]]
        if not begin:
            raise ValueError("no key frame before the clip")
        seek = max(begin, key=lambda packet: packet.pts)
        decoded = _decode(container, stream, seek, wanted)
    height, width = decoded[0].shape[:2]
    box = (0.0, 0.0, float(width), float(height)) if size is None else covering_box(width, height, size[1], size[0])
    if size is not None:
        decoded = [_resized(frame, size, box) for frame in decoded]
    rate = info.fps if fps is None or _same(fps, info.fps) else float(fps)
    return Video(np.stack(decoded), index, info.times[index], rate, (width, height), box)


def covering_box(width: int, height: int, to_width: int, to_height: int) -> tuple[float, float, float, float]:
    """The largest centred part of a picture that has the shape of another: (left, top, right, bottom) in its pixels."""
    scale = min(width / to_width, height / to_height)
    left, top = (width - scale * to_width) / 2, (height - scale * to_height) / 2
    return left, top, width - left, height - top


def encode_mp4(frames: np.ndarray, fps: float | Fraction, *, crf: int = 10, key_every: int = 12) -> bytes:
    """An H.264 mp4 of frames, the same bytes each time on one version of the encoder.

    Args:
        frames: (f, H, W, 3) uint8 RGB, H and W even (chroma is stored at half the size).
        fps: frames per second.
        crf: 0 (nearly exact) to 51.
        key_every: frames from one key frame to the next.

    Raises:
        ValueError: no frames, or an odd side.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or not len(frames) or frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 (f, H, W, 3), got {frames.dtype} {frames.shape}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"an mp4 has even sides, got {width}x{height}")
    rate = Fraction(fps).limit_denominator(1001)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "bitexact"}) as container:
        # Without SIMD: with it x264's bytes vary from call to call (seen at 64x64) and would from CPU to CPU.
        options = {"crf": str(crf), "preset": "veryfast", "x264-params": "asm=0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context: Any = stream.codec_context
        context.thread_count, context.gop_size = 1, key_every
        # Said, so that every reader uses the matrix that was written with.
        context.colorspace, context.color_range = 1, 1
        context.color_primaries, context.color_trc = 1, 1
        for picture in frames:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            yuv = rgb.reformat(format="yuv420p", dst_colorspace=1, src_color_range=2, dst_color_range=1, threads=1)
            container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@contextmanager
def _open(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; FFmpeg's errors leave as `ValueError`."""
    kind = next((name for at, magic, name in _DEMUXERS if data[at : at + len(magic)] == magic), None)
    if kind is None:
        raise ValueError("not an mp4, mov, webm or mkv")
    try:
        with av.open(io.BytesIO(data), format=kind) as container:
            if not container.streams.video:
                raise ValueError("no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ValueError("the kind of its video is unknown")
            if not 0 < stream.width * stream.height <= max_pixels:
                raise ValueError(f"{stream.width}x{stream.height} pixels, more than {max_pixels}")
            stream.codec_context.thread_count = 1  # loader processes are the parallelism
            yield container, stream
    except (av.FFmpegError, EOFError) as error:
        raise ValueError(f"cannot be decoded: {str(error) or type(error).__name__}") from error


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Packets that are shown, with their times."""
    count = 0
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard:
            continue
        if packet.pts is None:
            raise ValueError("a frame has no time")
        count += 1
        if count > MAX_FRAMES:
            raise ValueError(f"more than {MAX_FRAMES} frames")
        yield packet


def _info(stream: Any, pts: np.ndarray) -> VideoInfo:
    if not len(pts):
        raise ValueError("no frames")
    if (np.diff(pts) <= 0).any():
        raise ValueError("two frames have the same time")
    times = (pts - pts[0]) * float(stream.time_base)
    fps = (len(times) - 1) / float(times[-1]) if len(times) > 1 else float(stream.average_rate or 0)
    return VideoInfo(stream.width, stream.height, times, fps)


def _same(fps: float, source: float) -> bool:
    return abs(fps - source) <= SAME_RATE * source


def _decode(container: Any, stream: Any, start: Any, wanted: np.ndarray) -> list[np.ndarray]:
    """The frames at the timestamps `wanted`, decoded from the key frame `start` on."""
    container.seek(start.dts if start.dts is not None else start.pts, stream=stream, backward=True, any_frame=False)
    found: dict[int, np.ndarray] = {}
    missing = {int(pts) for pts in wanted}
    for frame in container.decode(stream):
        if frame.pts in missing:
            if frame.is_corrupt:
                raise ValueError(f"frame at {frame.time:.3f} s is corrupt")
            found[frame.pts] = _rgb(frame)
            missing.discard(frame.pts)
        if not missing:
            break
    if missing:
        raise ValueError(f"{len(missing)} of {len(wanted)} frames cannot be decoded")
    frames = [found[int(pts)] for pts in wanted]
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError("frames change their size")
    return frames


def _rgb(frame: Any) -> np.ndarray:
    """(H, W, 3) uint8, turned as the file says it is to be shown."""
    matrix = frame.colorspace
    if matrix == _UNSAID:
        matrix = 1 if frame.height >= 720 else 5
    pixels = frame.reformat(format="rgb24", src_colorspace=_MATRICES.get(matrix, 5), threads=1).to_ndarray()
    if frame.rotation % 90:
        raise ValueError(f"turned by {frame.rotation} degrees, expected a multiple of 90")
    return np.rot90(pixels, frame.rotation // 90) if frame.rotation else pixels


def _resized(frame: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    if frame.shape[:2] == size:
        return frame
    picture = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box))

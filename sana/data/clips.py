"""Samples of video and world shards: from members of a shard to `Clip` and `World` batches.

Every choice (where a clip begins, which caption, whether its first frame is given) is a function of the seed and the
sample's position in the stream.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from sana.data.caption import Caption
from sana.data.record import BadSample
from sana.data.video import Video, count_at, probe, read_clip
from sana.data.world import Camera, read_camera
from sana.ops.random import uniform
from sana.types import Clip, World


class Members(Protocol):
    """Where the bytes of samples come from; a `sana.data.source.Source` is one."""

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """Shard and name of a sample, for messages."""
        ...

    def read(self, i: int, member: str) -> bytes:
        """Bytes of the member "clip", "meta" or "camera" of a sample; raises `BadSample` where there is none."""
        ...

    def bad_sample(self, i: int, reason: str) -> BadSample:
        """The error that says why a sample cannot be used."""
        ...


@dataclass(frozen=True)
class ClipSample:
    """One clip, before it is joined with others.

    Attributes:
        video: its frames.
        captions: all of them.
        motion: score of the source, NaN where there is none.
        camera: of each frame, in pixels of the frames, relative to the first; None unless asked for.
        key: shard and name.
        position: in the stream.
    """

    video: Video
    captions: list[Caption]
    motion: float
    camera: Camera | None
    key: str
    position: int


@dataclass(frozen=True)
class ClipReader:
    """Reads one clip at a time.

    Args:
        source: the samples' bytes.
        frames: length of every clip; 1 + k stride for autoencoders that compress time (`sana.data.video.longest`).
        fps: rate of every clip; None: each video's own.
        size: (height, width) of the frames; None: as they are.
        camera: read poses and intrinsics too.
        least_motion, most_motion: bounds of the motion score; what is outside, or has none where a bound is set, is
            refused by `wanted`.
        seed: of the choice of the beginning.

    Raises:
        BadSample: from `read`: what cannot be read, is too short, or has no camera where one is asked for.
    """

    source: Members
    frames: int
    fps: float | None = None
    size: tuple[int, int] | None = None
    camera: bool = False
    least_motion: float | None = None
    most_motion: float | None = None
    seed: int = 0

    def wanted(self, i: int) -> bool:
        """Whether a sample is long enough and moves as asked, from its JSON; a rate or length not told is looked up."""
        meta = json.loads(self.source.read(i, "meta"))
        motion = motion_score(meta)
        if self.least_motion is not None and not motion >= self.least_motion:
            return False
        if self.most_motion is not None and not motion <= self.most_motion:
            return False
        try:
            return count_at(probe(self.source.read(i, "clip")), self.fps) >= self.frames
        except (ValueError, BadSample):
            return False

    def read(self, i: int, position: int) -> ClipSample:
        """Sample i, standing at a position of the stream."""
        u = float(uniform(self.seed, torch.tensor([position]), "clip start"))
        try:
            meta = json.loads(self.source.read(i, "meta"))
            data = self.source.read(i, "clip")
            video = read_clip(data, self.frames, self.fps, size=self.size, u=u)
            camera = None
            if self.camera:
                whole = read_camera(self.source.read(i, "camera"), probe(data).frames)
                height, width = video.frames.shape[1:3]
                camera = whole.at(video.index).relative().resized(video.box, width, height)
            return ClipSample(video, captions(meta), motion_score(meta), camera, self.source.key(i), position)
        except ValueError as error:
            raise self.source.bad_sample(i, f"corrupt clip: {error}") from error


def captions(meta: dict[str, Any]) -> list[Caption]:
    """The captions of a sample's JSON, "captions" or "prompt"; raises `ValueError` where it has neither."""
    if meta.get("captions"):
        return [Caption(c["source"], c["text"], c.get("score")) for c in meta["captions"]]
    if "prompt" in meta:
        return [Caption("prompt", meta["prompt"])]
    raise ValueError("JSON has neither 'captions' nor 'prompt'")


def motion_score(meta: dict[str, Any]) -> float:
    """The motion score of a sample's JSON: a number, or the mean of a list of them; NaN where there is none."""
    motion = meta.get("motion")
    if motion is None or motion == []:
        return float("nan")
    return float(np.mean(motion))


def with_motion(text: str, motion: float) -> str:
    """A caption with the score after it that published video models read, "... motion score: 12."; as it is for NaN."""
    return text if np.isnan(motion) else f"{text} motion score: {int(motion)}."


def collate_clips(
    samples: Sequence[ClipSample],
    choice: Callable[[Sequence[Caption], float], Caption],
    *,
    seed: int = 0,
    first_frame: float = 0.0,
    tell_motion: bool = False,
) -> Clip | World:
    """Join samples of one size into a `World` if they have cameras, else a `Clip`.

    Args:
        samples: of equal frames and size.
        choice: caption rule, see `sana.data.caption`.
        seed: of the caption choice and of first-frame conditioning.
        first_frame: probability that a clip trains image-to-video.
        tell_motion: append the motion score to captions, see `with_motion`.
    """
    index = torch.tensor([sample.position for sample in samples], dtype=torch.int64)
    u = uniform(seed, index, "caption").tolist()
    chosen = [choice(sample.captions, u[k]) for k, sample in enumerate(samples)]
    texts = [caption.text for caption in chosen]
    if tell_motion:
        texts = [with_motion(text, sample.motion) for text, sample in zip(texts, samples, strict=True)]
    pixels = torch.from_numpy(np.stack([sample.video.frames for sample in samples]))
    common: dict[str, Any] = {
        "video": pixels.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0),
        "latent": None,
        "caption": texts,
        "fps": torch.tensor([sample.video.fps for sample in samples], dtype=torch.float32),
        "motion": torch.tensor([sample.motion for sample in samples], dtype=torch.float32),
        "first_frame": uniform(seed, index, "first frame") < first_frame,
        "index": index,
        "key": [sample.key for sample in samples],
        "weight": torch.ones(len(samples)),
        "source": [caption.source for caption in chosen],
    }
    cameras = [sample.camera for sample in samples if sample.camera is not None]
    if not cameras:
        return Clip(**common)
    if len(cameras) < len(samples):
        raise ValueError(f"{len(samples) - len(cameras)} of {len(samples)} clips have no camera")
    return World(
        **common,
        pose=torch.from_numpy(np.stack([camera.pose for camera in cameras])),
        intrinsics=torch.from_numpy(np.stack([camera.intrinsics for camera in cameras])),
    )

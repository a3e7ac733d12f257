"""The contracts between packages: what travels from one to another, with shapes, ranges and units.

Conventions, stated once and used everywhere:

* Time ``t`` is in [0, 1]; ``t = 0`` is data and ``t = 1`` is noise.
* The linear path is ``xt = (1 - t) x0 + t eps`` and the velocity is ``v = eps - x0``.
* Pixels are in [-1, 1], ``(b, 3, h, w)`` for images and ``(b, 3, f, h, w)`` for videos.
* Dimensions by letter: b batch, f frames, c channels, h w height and width of the latent, n tokens = f h w,
  d width of the network, l text tokens.
* Latents are scaled by the autoencoder so that they are of unit order: ``(b, c, f, h, w)`` inside networks and
  objectives; an image has f = 1 and gets that axis at the edge (`sana.model`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from numpy import ndarray
from torch import Tensor, device, from_numpy

Velocity = Callable[[Tensor, Tensor], Tensor]
"""``v = velocity(x, t)`` with x (b, ...), t (b,) in [0, 1] and v like x. What a sampler integrates."""

State = Any
"""What a streaming module carries from one chunk to the next: a pytree of tensors, or None before the first chunk."""


class Grid(NamedTuple):
    """Size of the latent in tokens: f frames of h rows and w columns; tokens are row-major, (f, h, w)."""

    f: int
    h: int
    w: int

    @property
    def tokens(self) -> int:
        """n = f h w."""
        return self.f * self.h * self.w


@dataclass(frozen=True)
class Condition:
    """What a network is conditioned on, as it leaves the encoders.

    Attributes:
        text: token features, (b, l, c_text), as the text encoder gives them (not normalised).
        mask: (b, l) bool, True where the token may be attended to. None: all of them.
        guidance: (b,) guidance scale for networks that embed it (Sprint), else None.
    """

    text: Tensor
    mask: Tensor | None = None
    guidance: Tensor | None = None


@dataclass(frozen=True)
class Times:
    """What a network derives from the times of a sampling grid, once before the first step.

    Attributes:
        t: (s,) the times, in at least fp32.
        embedding: (g, s, d), g = 1, or b where the network embeds each sample's guidance too.
        vectors: (g, s, layers, 6, d): every block's adaLN vectors, its own table added.
    """

    t: Tensor
    embedding: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class Prepared:
    """What a network derives from a `Condition` once per prompt and reuses over all steps.

    Attributes:
        text_kv: per layer, the fused keys and values of the caption, (b, l, 2 d).
        mask: (b, l) bool or None, as in `Condition`; on a GPU None where it would allow everything.
        guidance: (b,) or None, as in `Condition`.
        times: for forwards at the times it was made for and at no others; None: any time.
    """

    text_kv: tuple[Tensor, ...]
    mask: Tensor | None = None
    guidance: Tensor | None = None
    times: Times | None = None


@dataclass(frozen=True)
class Edits:
    """Interventions on single layers of one forward pass; the empty default changes nothing.

    Attributes:
        identity_attention: layers whose self-attention returns its values (perturbed-attention guidance).
        residual: layer -> (b, n, d) added to the tokens after that layer (ControlNet, camera rays).
    """

    identity_attention: frozenset[int] = frozenset()
    residual: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What every block of one forward pass shares.

    Attributes:
        grid: size of the latent in tokens.
        modulation: (b, f, 6, d): shift, scale, gate of the mixer, then of the FFN, from the timestep, before the
            block's own table is added; None where `vectors` are given.
        mask: (b, l) bool: which caption tokens may be attended to; or float: what is added to their scores; or None.
        edits: interventions by layer.
        vectors: (b, f, layers, 6, d): the same with every block's table added, where that was done before.
    """

    grid: Grid
    modulation: Tensor | None
    mask: Tensor | None = None
    edits: Edits = field(default_factory=Edits)
    vectors: Tensor | None = None


class Bad(NamedTuple):
    """A sample that could not be used: its shard, its name there, and why."""

    shard: str
    key: str
    reason: str


@dataclass
class Batch:
    """One training batch, as the data module yields it.

    A sample that cannot be read keeps its position and name; in its place stands another one of the batch, at weight 0.
    So neither shapes nor the order of the others depend on it.

    Attributes:
        image: (b, 3, H, W) float in [-1, 1], or None when latents are cached. On its way from the loader to the device
            it is uint8 in [0, 255], a quarter of the bytes.
        latent: (b, c, h, w) float, already scaled, or None.
        caption: one prompt per sample, after caption choice; "" where it was dropped.
        index: (b,) int64, the position of each sample in the global stream of the run (it grows over epochs and
            never depends on ranks or workers): the key of all randomness that concerns the sample.
        key: the sample's name in its shard, for messages.
        weight: (b,) float, the factor of each sample's loss: 1, or 0 where the sample is bad. None: all 1.
        bad: the samples of this batch that could not be used.
        source: who wrote each caption; "" where the sample is bad.
        text: (b, l, c) features of the captions where they are cached, zero beyond each caption's tokens, else None.
        text_mask: (b, l) bool, True on the caption's tokens, with `text`.
    """

    image: Tensor | None
    latent: Tensor | None
    caption: list[str]
    index: Tensor
    key: list[str]
    weight: Tensor | None = None
    bad: list[Bad] = field(default_factory=list)
    source: list[str] = field(default_factory=list)
    text: Tensor | None = None
    text_mask: Tensor | None = None

    def pin_memory(self) -> Batch:
        """Move the tensors to page-locked memory, for faster copies to a GPU; the loader calls it."""
        return self._with(lambda tensor: tensor.pin_memory())

    def to(self, device: device) -> Batch:
        """The batch with its tensors on a device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def __getstate__(self) -> dict[str, Any]:
        """Small tensors leave a worker by value: each tensor by reference costs a connection between processes."""
        small = ("index", "weight", "text_mask")
        return {n: v.numpy() if n in small and isinstance(v, Tensor) else v for n, v in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({n: from_numpy(v) if isinstance(v, ndarray) else v for n, v in state.items()})

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        names = ("image", "latent", "index", "weight", "text", "text_mask")
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{name: None if t is None else change(t) for name, t in tensors.items()})


@dataclass
class Clip:
    """One training batch of video clips: uniformly spaced frames of each source video.

    Attributes:
        video: (b, 3, f, H, W) float in [-1, 1], or None when latents are cached.
        latent: (b, c, f, h, w) float, already scaled, or None.
        caption: one prompt per clip, after caption choice.
        fps: (b,) float32, frames per second at which `video` is to be played.
        motion: (b,) float32, motion score of the source video as its shards give it (of the whole video: mean optical
            flow, for instance); NaN where there is none.
        first_frame: (b,) bool, True where the first frame is given clean and the clip trains image-to-video.
        index: (b,) int64, position of each sample in the global stream of the run, as in `Batch`.
        key: the sample's shard and name, for messages.
        weight, bad, source: as in `Batch`: a clip that cannot be read has another one in its place, at weight 0.
    """

    video: Tensor | None
    latent: Tensor | None
    caption: list[str]
    fps: Tensor
    motion: Tensor
    first_frame: Tensor
    index: Tensor
    key: list[str]
    weight: Tensor | None = field(default=None, kw_only=True)
    bad: list[Bad] = field(default_factory=list, kw_only=True)
    source: list[str] = field(default_factory=list, kw_only=True)


@dataclass
class World(Clip):
    """Clips with the camera of every frame: what world models are trained on.

    The camera looks along +z, x points right and y down in the image (OpenCV). A point X of the world is seen at
    pixel ``K (R^T (X - o))`` where ``pose = [R o; 0 1]``; the centre of the first pixel is at (0.5, 0.5).

    Attributes:
        pose: (b, f, 4, 4) float64 camera to world, relative to the first frame (whose pose is the identity), in the
            units of the source, metres where it is metric.
        intrinsics: (b, f, 3, 3) float64, K of each frame in pixels of `video` as it is here: resized and cropped.
    """

    pose: Tensor
    intrinsics: Tensor

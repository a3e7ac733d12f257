"""One sample as every source gives it, and the one error by which a source says that a sample is unfit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sana.data.caption import Caption

REASONS = (
    "bad json",
    "checksum",
    "corrupt clip",
    "corrupt image",
    "corrupt tar",
    "duplicate key",
    "empty caption",
    "link",
    "missing file",
    "no caption",
    "no image",
    "not UTF-8",
    "not an image",
    "pickle",
    "too many bytes",
    "too many members",
    "too many pixels",
    "truncated",
    "unreadable",
    "unsafe name",
    "unsafe url",
)
"""First words of every reason; ": " and a detail may follow."""


@dataclass(frozen=True)
class Limits:
    """What a sample may have at most; more is refused before it is read or decoded.

    Attributes:
        max_pixels: width x height of an image as stored.
        max_bytes: of one member or file.
        max_members: of one sample.
        caption_fields: names of JSON fields or columns that hold captions, besides "prompt", "caption", "text",
            "captions" and those that begin with "caption_".
    """

    max_pixels: int = 64_000_000
    max_bytes: int = 256 * 2**20
    max_members: int = 64
    caption_fields: tuple[str, ...] = ()


class BadSample(Exception):
    """A sample that cannot be used. Training goes on without it and reports it.

    Attributes:
        shard: name of the shard or file that holds it.
        key: name of the sample; "" when the fault is the whole shard's.
        reason: one of `REASONS`, perhaps with ": " and a detail; one line of at most 200 characters.
    """

    def __init__(self, shard: str, key: str, reason: str) -> None:
        self.shard, self.key = _one_line(shard, 500), _one_line(key, 500)
        self.reason = _one_line(reason, 200)
        super().__init__(f"{self.shard}/{self.key}: {self.reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.shard, self.key, self.reason)

    @property
    def kind(self) -> str:
        """The reason without its detail, one of `REASONS`."""
        return self.reason.split(":", 1)[0]

    def entry(self) -> dict[str, str]:
        """One line of ``bad_samples.jsonl``."""
        return {"shard": self.shard, "key": self.key, "reason": self.reason}


@dataclass(frozen=True)
class Record:
    """What is known about a sample besides its pixels.

    Attributes:
        key: name within its shard.
        shard: name of the shard, or the path of the file in a folder of images.
        captions: at least one, none of them empty.
        width, height: pixels of the image as it is seen (after EXIF rotation); 0 if there is no image.
        scores: scores of the image (aesthetics, agreement with its prompt); only those that are known.
        hq: whether the source flags it as high quality.
        meta: the sample's JSON as it is stored; {} if there is none.
    """

    key: str
    shard: str
    captions: tuple[Caption, ...]
    width: int
    height: int
    scores: dict[str, float] = field(default_factory=dict)
    hq: bool = False
    meta: dict[str, Any] = field(default_factory=dict)


def storable(name: str) -> bool:
    """Whether a name from untrusted bytes is text: no control characters, no halves of characters."""
    return not any(c < " " or c == "\x7f" or c == "\ufffd" or "\ud800" <= c <= "\udfff" for c in name)


def _one_line(text: str, longest: int) -> str:
    """Text from untrusted bytes made fit for a log: printable, one line, not endless."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= longest else text[: longest - 3] + "..."
